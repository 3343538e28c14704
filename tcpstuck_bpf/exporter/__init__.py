"""Metrics for Prometheus: how a snapshot leaves, over HTTP or as a file."""
