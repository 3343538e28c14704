"""Two recordings, one of each side, as one: what both ends know of a connection."""
