"""What the lab plays."""
