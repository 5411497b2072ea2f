"""Holding the simulated kernel against what real kernels did."""
