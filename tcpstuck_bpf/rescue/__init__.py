"""Selects the stuck clients whose SYN-ACK is repeated, and sends it."""
