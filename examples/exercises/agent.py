"""Exercise 4, after lesson 7: an agent that does not lose a guest.

An agent gets guests (memfds) one by one, and finally replaces the kernel. It has to bring all
guests through, each under its own token. Useful:

* ``kernel.liveupdate.create_session(name)``, ``session.preserve(memfd, token)``;
* ``kernel.liveupdate.retrieve_session(name)``, ``session.tokens``, ``session.retrieve(token)``;
* ``session.finish()``: what was not retrieved by then is freed. ``session.close()``.
"""

from __future__ import annotations

from khosim.kernel.kernel import Kernel
from khosim.kernel.memfd import Memfd


def update(kernel: Kernel, guests: dict[int, Memfd]) -> tuple[Kernel, dict[int, Memfd]]:
    """Replace the kernel: the new one, and the guests in it by their tokens.

    Afterwards no session is open, so that the next update can do the same.
    """
    raise NotImplementedError
