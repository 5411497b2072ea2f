"""Predicting scratch: what a kernel will set aside for its successor, and why so much.

:func:`khosim.plan.planner.make_plan` is the way in. It reads a memory map
(:mod:`~khosim.plan.source`), then either makes the memblock calls of a real boot again
(:mod:`~khosim.plan.replayed`) or boots a simulated kernel of a distribution's dimensions
(:mod:`~khosim.plan.model`, :mod:`~khosim.plan.simulated`), and says who took what
(:mod:`~khosim.plan.ledger`).
"""
