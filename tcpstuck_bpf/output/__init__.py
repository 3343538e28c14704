"""Prints findings and the summary, as text or JSON."""
