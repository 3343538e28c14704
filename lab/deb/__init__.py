"""Builds and tests the Debian package in fresh trees of Debian suites."""
