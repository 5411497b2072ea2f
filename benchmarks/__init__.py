"""What khosim costs, as ratios to something run in the same call: ``python -m benchmarks``.

A benchmark is a function that takes a :class:`benchmarks.harness.Context` and yields
:class:`benchmarks.harness.Record` objects; :mod:`benchmarks.registry` lists them by name.
"""
