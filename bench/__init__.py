"""What tracing costs: instructions per packet in the kernel, and the tool's own share."""
