"""Kernels in machines that are thrown away."""
