"""Every release beside every other: one handover after the other, and what came of it."""
