"""Scenarios: what several kernels in a row do on one machine, as data, and what comes of it.

:mod:`~khosim.scenario.parse` reads a TOML file into a :class:`~khosim.scenario.model.Scenario`;
:mod:`~khosim.scenario.play` carries it out with :class:`khosim.Machine` and keeps the facts;
:mod:`~khosim.scenario.library` finds those that come with khosim. ``docs/scenarios.md`` is the
format. A new kind of step is a class in one of the ``steps_*`` modules and a line in
:data:`~khosim.scenario.steps.STEPS`.
"""
