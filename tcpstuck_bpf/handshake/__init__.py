"""Follows each handshake, and detects floods among the silent ones. Pure."""
