"""How long guests stand still in a live update: an estimate from counted events and named costs."""

from __future__ import annotations
