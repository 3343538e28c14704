"""The lab: networks, loads and scenarios in which handshakes go wrong on purpose."""
