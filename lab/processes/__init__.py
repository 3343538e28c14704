"""Clients and servers, each in its own process."""
