"""Verdicts, causes of drops, backlog advice, and the comparison with kernel counters. Pure."""
