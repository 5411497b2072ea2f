"""Drivers: what the kernels of a machine with devices do to them, and how they hand them over."""
