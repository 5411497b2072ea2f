"""What a predecessor's LUO state comes down to (``kernel/liveupdate/luo_core.c``)."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ("LuoRoot",)


class LuoRoot(NamedTuple):
    """What a predecessor's root says: physical addresses, 0 where there is nothing."""

    liveupdate_num: int
    sessions_pa: int
    flbs_pa: int
