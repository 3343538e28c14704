"""The kernel's side of a run: compiling, loading and attaching the programs, and their tables."""
