"""Namespaces joined by a wire, and what goes over it."""
