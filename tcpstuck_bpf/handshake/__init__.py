"""The story of one handshake, and of silent ones together. Pure."""
