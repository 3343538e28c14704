"""What follows from it, and how surely. Pure."""
