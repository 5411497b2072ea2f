"""Seeded defects: what of them the invariants, the search and the tests notice.

``python -m benchmarks.mutants switches`` flips behaviours of a release, ``python -m
benchmarks.mutants code AREA`` changes khosim's own code. See docs/mutation.md.
"""
