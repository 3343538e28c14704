"""What a kernel says of its types, running or in a file."""
