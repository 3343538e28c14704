"""Metrics for Prometheus: publishes a snapshot over HTTP or as a file."""
