"""Invariants seen from outside, with their own decoder."""
