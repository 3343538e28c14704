"""Reads a kernel's type information, of the running kernel or of an image."""
