"""tcpstuck-trace finds TCP connections that the client thinks are open and the server forgot."""

__version__ = "0.1.0"
