"""Bytes only: the wire formats, one module per kernel header."""
