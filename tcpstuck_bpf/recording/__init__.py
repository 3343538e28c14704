"""Writes a run to a file, and reads it back."""
