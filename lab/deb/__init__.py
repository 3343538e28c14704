"""Builds the Debian package, and tries it, in fresh trees of Debian's suites."""
