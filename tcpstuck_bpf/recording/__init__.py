"""A run in a file, and back."""
