"""Throw-away virtual machines that boot real kernels."""
