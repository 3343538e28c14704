"""Generates the manual page and the completions when a package is built."""
