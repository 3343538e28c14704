"""Measures the cost of tracing: kernel instructions per packet, and the tool's own CPU time."""
