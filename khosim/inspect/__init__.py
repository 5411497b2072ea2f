"""Real handovers, told: what is in a capture, an image, a dump or a blob, and what is torn."""
