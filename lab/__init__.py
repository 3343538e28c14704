"""The lab: networks, loads and scenarios that make handshakes fail on purpose."""
