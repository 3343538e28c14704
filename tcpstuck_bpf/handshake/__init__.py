"""What happened to one handshake. Pure."""
