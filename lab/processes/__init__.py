"""Clients and servers, each a process of its own."""
