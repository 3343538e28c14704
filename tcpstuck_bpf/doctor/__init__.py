"""What this machine, or a kernel in a file, can do."""
