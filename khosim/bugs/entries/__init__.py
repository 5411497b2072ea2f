"""The exhibits, one file each, named after the bug's number and short name.

A file offers ``BUG``, a :class:`~khosim.bugs.bug.Bug`; nothing else has to know of it.
"""
