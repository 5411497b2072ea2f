"""Real kernels in QEMU: boots one, hands over, and keeps what it did as a capture."""
