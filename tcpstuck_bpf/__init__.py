"""tcpstuck-trace: find TCP connections that the client believes in and the server forgot."""

__version__ = "0.1.0"
