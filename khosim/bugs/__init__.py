"""The museum of bugs: what was wrong once in Linux's handover, shown with the fix off and on.

One small file in :mod:`khosim.bugs.entries` for each bug that a simulator of memory and protocol
can show; :mod:`khosim.bugs.elsewhere` says why the others are not there.
"""
