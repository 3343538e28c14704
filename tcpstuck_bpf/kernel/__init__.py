"""The kernel's side of a run: compiles, loads and attaches the programs, and reads their tables."""
