"""A run, live or from a recording."""
