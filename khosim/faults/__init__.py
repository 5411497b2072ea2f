"""Faults that a search or a test can order: in a call, between two kernels, by a device."""
