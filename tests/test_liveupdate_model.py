"""Sessions and files through any life, held against a model that is a few dictionaries.

Create, preserve, call off, kill the agent, refuse to freeze, hand over, retrieve, finish, in any
order and over several kernels, with an allocator that hands out any page and with allocations that
fail. After each step every invariant is asked, and what was handed over has to come back.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from khosim import Machine
from khosim.errors import KernelError
from khosim.kernel.file import File
from khosim.kernel.kernel import Kernel
from khosim.kernel.liveupdate.file_ops import FileHandler, LiveupdateFileOpArgs
from khosim.kernel.liveupdate.flb_ops import Flb, LiveupdateFlbOpArgs
from khosim.kernel.memfd import MFD_ALLOW_SEALING, Memfd

PAGE = 4096
PICK = st.integers(0, 7)
NAMES = ("vm-a", "vm-b", "a name of sixty-three bytes".ljust(63, "."))
TOKENS = (0, 1, (1 << 64) - 1)
F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_WRITE = 2, 4, 8


class Dial(File):
    """A device with one number, whose freeze can be made to refuse."""

    def __init__(self, kernel: Kernel, value: int) -> None:
        super().__init__(kernel, "dial")
        self.value = value
        self.stubborn = False


class Panel(Flb):
    """What all dials share: one preserved page with a number in it."""

    compatible = "panel-v1"

    def preserve(self, args: LiveupdateFlbOpArgs) -> None:
        """Preserve a page."""
        args.obj = args.kernel.kho_alloc_preserve(8)
        args.obj.write(0, (77).to_bytes(8, "little"))
        args.data = args.obj.phys

    def unpreserve(self, args: LiveupdateFlbOpArgs) -> None:
        """Take it back."""
        args.kernel.kho_unpreserve_free(args.obj)

    def retrieve(self, args: LiveupdateFlbOpArgs) -> None:
        """Take it over."""
        args.obj = args.kernel.kho_restore_folio(args.data)

    def finish(self, args: LiveupdateFlbOpArgs) -> None:
        """Free it."""
        args.obj.put()


class DialHandler(FileHandler):
    """Carries the number in a preserved page."""

    compatible = "dial-v1"

    def can_preserve(self, file: File) -> bool:
        """Dials only."""
        return isinstance(file, Dial)

    def preserve(self, args: LiveupdateFileOpArgs) -> None:
        """Write the number down."""
        assert isinstance(args.file, Dial)
        folio = args.kernel.kho_alloc_preserve(8)
        folio.write(0, args.file.value.to_bytes(8, "little"))
        args.serialized_data, args.private_data = folio.phys, folio

    def unpreserve(self, args: LiveupdateFileOpArgs) -> None:
        """Forget it."""
        args.kernel.kho_unpreserve_free(args.private_data)

    def freeze(self, args: LiveupdateFileOpArgs) -> None:
        """Refuse where the dial is stubborn."""
        assert isinstance(args.file, Dial)
        if args.file.stubborn:
            raise KernelError(errno.EBUSY, "dial_freeze")

    def retrieve(self, args: LiveupdateFileOpArgs) -> None:
        """Read the number."""
        phys = args.serialized_data
        args.file = Dial(args.kernel, args.kernel.ram.read_u64(phys))
        args.kernel.kho_restore_free(phys)

    def finish(self, args: LiveupdateFileOpArgs) -> None:
        """Free the page where nobody came for it."""
        if not args.retrieve_status:
            args.kernel.kho_restore_free(args.serialized_data)


@dataclass
class Thing:
    """A file as user space knows it: a dial with a value, or a memfd with content."""

    handle: Any
    content: bytearray
    seals: int = 0
    pos: int = 0
    pfns: tuple[int, ...] = ()
    """Where it lay when it was handed over."""
    session: str | None = None
    """The session that it is preserved in."""

    @property
    def is_memfd(self) -> bool:
        """Whether it is one."""
        return isinstance(self.handle, Memfd)


def pfns_of(thing: Thing) -> tuple[int, ...]:
    """The first page of each run of folios of a memfd."""
    return tuple(run.pfn for run in thing.handle.inode.mapping) if thing.is_memfd else ()


@dataclass
class Came:
    """A session from the predecessor."""

    things: dict[int, Thing]
    handle: Any = None
    gone: set[int] = field(default_factory=set)
    """Tokens whose retrieve failed."""
    finished: bool = False


class LiveUpdates(RuleBasedStateMachine):
    """The rules."""

    @initialize(seed=st.integers(0, 1 << 16), allocator=st.sampled_from(["linux", "adversarial"]))
    def power_on(self, seed: int, allocator: str) -> None:
        """A machine and its first kernel."""
        self.machine = Machine("64M", allocator=allocator, seed=seed)
        self.things: list[Thing] = []
        """Files that user space has open."""
        self.outgoing: dict[str, tuple[Any, dict[int, Thing]]] = {}
        self.incoming: dict[str, Came] = {}
        self.began(self.machine.boot(cmdline="kho=on liveupdate=on"))

    def began(self, kernel: Kernel) -> None:
        """A kernel is up: its drivers register, and take their shared state over."""
        self.kernel = kernel
        handler = DialHandler()
        self.panel = Panel()
        kernel.liveupdate.register_file_handler(handler)
        kernel.liveupdate.register_flb(handler, self.panel)
        # The agent opens the device once with memory to spare: a first open that fails is for ever.
        kernel.liveupdate.open().close()
        nr_dials = sum(
            not thing.is_memfd for came in self.incoming.values() for thing in came.things.values()
        )
        if nr_dials:
            folio = kernel.liveupdate.flb_get_incoming(self.panel)
            assert int.from_bytes(folio.read(0, 8), "little") == 77
            kernel.liveupdate.flb_put_incoming(self.panel)

    def thing(self, pick: int, *, kind: type[File] = File) -> Thing | None:
        """One of the open files of a kind."""
        found = [thing for thing in self.things if isinstance(thing.handle, kind)]
        return found[pick % len(found)] if found else None

    # -- files ----------------------------------------------------------------------------------

    @rule(number=st.integers(0, 1 << 32), fill=st.binary(), is_memfd=st.booleans())
    def make(self, number: int, fill: bytes, is_memfd: bool) -> None:
        """A file of one kind or the other."""
        if is_memfd:
            self.memfd(number % 7, number % PAGE, fill)
        else:
            self.dial(number)

    @precondition(lambda self: self.things)
    @rule(
        pick=PICK,
        at=st.integers(0, 6 * PAGE),
        data=st.binary(min_size=1, max_size=9),
        seals=st.sampled_from([0, 0, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_WRITE]),
        close=st.sampled_from([False, False, False, True]),
    )
    def use(self, pick: int, at: int, data: bytes, seals: int, close: bool) -> None:
        """Guests go on using their files, preserved or not."""
        self.write(pick, at, data)
        self.seek(pick, at)
        if seals:
            self.seal(pick, seals)
        if close:
            self.close(pick)

    def memfd(self, pages: int, cut: int, fill: bytes) -> None:
        """A memfd with holes, of any size, with something at its end."""
        size = max(pages * PAGE - cut, 0)
        file = self.kernel.memfd("guest", size=size, flags=MFD_ALLOW_SEALING)
        content = bytearray(size)
        fill = fill[:size]
        if fill:
            file.write(size - len(fill), fill)
            content[size - len(fill) :] = fill
        self.things.append(Thing(file, content))

    def dial(self, value: int) -> None:
        """A device."""
        dial = Dial(self.kernel, value)
        self.things.append(Thing(dial, bytearray(value.to_bytes(8, "little"))))

    def write(self, pick: int, at: int, data: bytes) -> None:
        """Guests go on writing, preserved or not."""
        thing = self.thing(pick, kind=Memfd)
        if thing is None or len(data) > len(thing.content):
            return
        at %= len(thing.content) - len(data) + 1
        if thing.seals & F_SEAL_WRITE:
            with pytest.raises(KernelError):
                thing.handle.write(at, data)
            return
        thing.handle.write(at, data)
        thing.content[at : at + len(data)] = data

    def seal(self, pick: int, seals: int) -> None:
        """Seals, as long as the file is not preserved: later ones are lost, as in the kernel."""
        thing = self.thing(pick, kind=Memfd)
        if thing is not None and thing.session is None:
            thing.handle.add_seals(seals)
            thing.seals |= seals

    def seek(self, pick: int, pos: int) -> None:
        """A position counts until the freeze."""
        thing = self.thing(pick, kind=Memfd)
        if thing is not None:
            thing.handle.vfs_setpos(pos)
            thing.pos = pos

    def close(self, pick: int) -> None:
        """User space closes its descriptor; a session may hold the file still."""
        thing = self.thing(pick)
        if thing is not None:
            self.things.remove(thing)
            thing.handle.close()

    # -- sessions of this kernel ----------------------------------------------------------------

    @rule(name=st.sampled_from(NAMES), after=st.sampled_from([None, 0, 1, 2, 3]))
    def create(self, name: str, after: int | None) -> None:
        """A session, unless there is one or memory ends."""
        if name in self.outgoing:
            self.refused(errno.EEXIST, lambda: self.kernel.liveupdate.create_session(name))
            return
        done, session = self.perhaps(
            after is not None, lambda: self.kernel.liveupdate.create_session(name), after or 0
        )
        if done:
            self.outgoing[name] = (session, {})

    @rule(
        name=st.sampled_from(NAMES),
        pick=PICK,
        token=st.sampled_from(TOKENS),
        after=st.sampled_from([None, None, None, None, *range(12)]),
    )
    def preserve(self, name: str, pick: int, token: int, after: int | None) -> None:
        """A file goes into a session; perhaps the allocation after some others fails."""
        if not any(thing.session is None for thing in self.things):
            if pick & 1:
                self.dial(pick)
            else:
                self.memfd(pages=pick, cut=pick, fill=b"made to be preserved")
        thing = self.thing(pick)
        assert thing is not None
        if name not in self.outgoing:
            self.create(name, None)
        session, tokens = self.outgoing[name]
        if token in tokens:
            self.refused(errno.EEXIST, lambda: session.preserve(thing.handle, token))
        elif thing.session is not None or self.is_incoming(thing):
            self.refused(errno.EBUSY, lambda: session.preserve(thing.handle, token))
        else:
            done, _ = self.perhaps(
                after is not None, lambda: session.preserve(thing.handle, token), after or 0
            )
            if done:
                tokens[token] = thing
                thing.session = name

    def call_off(self, name: str) -> None:
        """The agent closes the session: nothing of it is preserved any more."""
        if name in self.outgoing:
            session, tokens = self.outgoing.pop(name)
            session.close()
            for thing in tokens.values():
                thing.session = None

    def kill_the_agent(self) -> None:
        """All descriptors of sessions are closed, whatever state they are in."""
        for name in list(self.outgoing):
            self.call_off(name)
        for name in list(self.incoming):
            self.close_incoming(name)

    @precondition(lambda self: self.outgoing or self.incoming)
    @rule(
        name=st.sampled_from(NAMES),
        how=st.sampled_from(["call off", "finish", "finish", "close", "kill"]),
    )
    def end(self, name: str, how: str) -> None:
        """One way or another a session comes to its end."""
        here = self.outgoing if how == "call off" else self.incoming
        name = name if name in here or not here else next(iter(here))
        if how == "kill":
            self.kill_the_agent()
        elif how == "call off":
            self.call_off(name)
        elif how == "finish":
            self.finish(name)
        else:
            self.close_incoming(name)

    # -- the jump -------------------------------------------------------------------------------

    @precondition(lambda self: self.outgoing)
    @rule(pick=PICK)
    def refuse_to_freeze(self, pick: int) -> None:
        """One device refuses: the update fails and everything is as before."""
        preserved = [
            thing for _, tokens in self.outgoing.values() for thing in tokens.values()
        ]
        dials = [thing for thing in preserved if isinstance(thing.handle, Dial)]
        if not dials:
            return
        thing = dials[pick % len(dials)]
        thing.handle.stubborn = True
        self.refused(errno.EBUSY, lambda: self.machine.load_successor(self.kernel))
        thing.handle.stubborn = False
        assert self.kernel.alive

    @precondition(lambda self: any(tokens for _, tokens in self.outgoing.values()))
    @rule(
        then=st.sampled_from(["", "read", "read, finish", "read, close", "finish", "close"]),
        after=st.sampled_from([None, None, None, *range(6)]),
    )
    def kexec(self, then: str, after: int | None) -> None:
        """The next kernel; what was not in a session is gone. Often the agent goes on at once."""
        self.things = []
        self.incoming = {name: Came(tokens) for name, (_, tokens) in self.outgoing.items()}
        self.outgoing = {}
        for came in self.incoming.values():
            came.things = {
                token: Thing(
                    thing.handle, bytearray(thing.content), thing.seals, thing.pos, pfns_of(thing)
                )
                for token, thing in came.things.items()
            }
        self.began(self.kernel.kexec())
        for number, name in enumerate(list(self.incoming)):
            if then:
                self.retrieve_session(name)
            if "read" in then:
                for token in list(self.incoming[name].things):
                    self.retrieve(number, token, after)
            if "finish" in then:
                self.finish(name)
            if "close" in then and number % 2:
                self.close_incoming(name)

    # -- sessions of the predecessor ------------------------------------------------------------

    @rule(name=st.sampled_from(NAMES))
    def retrieve_session(self, name: str) -> None:
        """Once; there may be a session of that name for the successor, too."""
        luo = self.kernel.liveupdate
        came = self.incoming.get(name)
        if came is None:
            self.refused(errno.ENOENT, lambda: luo.retrieve_session(name))
        elif came.handle is not None:
            self.refused(errno.EINVAL, lambda: luo.retrieve_session(name))
        else:
            came.handle = luo.retrieve_session(name)
            assert came.handle.tokens == list(came.things)

    @precondition(lambda self: self.incoming)
    @rule(
        pick=PICK,
        token=st.sampled_from(TOKENS),
        after=st.sampled_from([None, None, None, *range(6)]),
    )
    def retrieve(self, pick: int, token: int, after: int | None) -> None:
        """A file comes back as it was, or its refusal is remembered."""
        name = list(self.incoming)[pick % len(self.incoming)]
        came = self.incoming[name]
        if came.handle is None:
            self.retrieve_session(name)
        thing = came.things.get(token)
        if thing is None:
            self.refused(errno.ENOENT, lambda: came.handle.retrieve(token))
            return
        if token in came.gone:
            with pytest.raises(KernelError):
                came.handle.retrieve(token)
            return
        is_first = thing.handle.kernel is not self.kernel
        fail = after is not None and is_first and thing.is_memfd
        done, file = self.perhaps(
            fail, lambda: came.handle.retrieve(token), after or 0, is_retrieve=True
        )
        if not done:
            came.gone.add(token)
            with pytest.raises(KernelError):
                came.handle.retrieve(token)
            return
        if not is_first:
            assert file is thing.handle
            file.fput()
            return
        thing.handle = file
        self.things.append(thing)
        if isinstance(file, Dial):
            assert file.value.to_bytes(8, "little") == thing.content
            return
        assert file.size == len(thing.content)
        assert file.read(0, file.size) == thing.content
        assert (file.seals, file.f_pos) == (thing.seals, thing.pos)

    def finish(self, name: str) -> None:
        """The session is done with; what nobody asked for is freed."""
        came = self.incoming.get(name)
        if came is not None and came.handle is not None:
            came.handle.finish()
            for token, thing in came.things.items():
                is_unread = thing.handle.kernel is not self.kernel and token not in came.gone
                for pfn in thing.pfns if is_unread else ():
                    assert self.kernel.page(pfn).kind != "incoming"
            came.things = {}

    def close_incoming(self, name: str) -> None:
        """The last descriptor finishes the session."""
        came = self.incoming.get(name)
        if came is not None and came.handle is not None:
            came.handle.close()
            del self.incoming[name]

    def is_incoming(self, thing: Thing) -> bool:
        """Whether the file came in a session that is not finished yet."""
        return any(
            other.handle is thing.handle
            for came in self.incoming.values()
            for other in came.things.values()
        )

    # -- what always holds ----------------------------------------------------------------------

    @invariant()
    def nothing_is_broken(self) -> None:
        """No invariant speaks."""
        machine: Machine | None = getattr(self, "machine", None)
        if machine is not None:
            assert machine.check() == []

    @invariant()
    def lists_agree(self) -> None:
        """Sessions, files and references are those of the model."""
        if not hasattr(self, "outgoing"):
            return
        luo = self.kernel.liveupdate
        assert list(luo.sessions.outgoing.sessions) == list(self.outgoing)
        nr_dials = 0
        for name, (session, tokens) in self.outgoing.items():
            assert session.tokens == list(tokens), name
            assert session.session.file_set.block_set.nblocks == bool(tokens)
            nr_dials += sum(not thing.is_memfd for thing in tokens.values())
        assert luo.flb.state(self.panel).outgoing.count.value == nr_dials
        for thing in self.things:
            is_held = thing.session is not None or self.is_incoming(thing)
            assert thing.handle.f_count == 1 + is_held
            if thing.is_memfd:
                inode = thing.handle.inode
                assert inode.frozen == (thing.session is not None)
                pins = {run.pins for run in inode.mapping}
                assert pins <= {int(thing.session is not None)}

    @precondition(lambda self: self.kernel and not self.outgoing and not self.incoming)
    @rule()
    def all_is_at_rest(self) -> None:
        """Without sessions there is nothing that LUO owns."""
        luo = self.kernel.liveupdate
        assert not luo.preserved_files
        assert luo.flb.state(self.panel).outgoing.count.value == 0

    # -- helpers --------------------------------------------------------------------------------

    def refused(self, number: int, call: Callable[[], object]) -> None:
        """The call is refused with this errno."""
        with pytest.raises(KernelError) as refusal:
            call()
        assert refusal.value.errno == number, refusal.value

    def perhaps(
        self, fail: bool, call: Callable[[], Any], after: int = 0, *, is_retrieve: bool = False
    ) -> tuple[bool, Any]:
        """Make the call, with the allocation after ``after`` others failing if ``fail``."""
        left = after

        def refuse(_order: int, owner: str) -> bool:
            nonlocal left
            if owner == "xa_insert" and is_retrieve:
                return False  # 7.3 warns, and has a file that can be preserved twice: a hazard
            left -= 1
            return left == -1

        self.kernel.pages.fail = refuse if fail else None
        try:
            return True, call()
        except KernelError:
            if not fail:
                raise
            return False, None
        finally:
            self.kernel.pages.fail = None


LiveUpdates.TestCase.settings = settings(
    settings.get_profile("same"), max_examples=20, stateful_step_count=50
)
TestLiveUpdates = LiveUpdates.TestCase


@pytest.mark.parametrize("seed", range(24))
def test_many_lives(seed: int) -> None:
    """The same rules by weights: Hypothesis spreads its steps thin, and lives want to be lived."""
    rng = Random(seed)
    lives = LiveUpdates()
    lives.power_on(seed, rng.choice(["linux", "adversarial"]))
    rarely: list[int | None] = [None] * 6
    for _ in range(70):
        step = rng.choices(
            ("preserve", "kexec", "retrieve", "end", "freeze", "create", "use", "make"),
            (30, 8, 16, 6, 6, 3, 14, 6),
        )[0]
        name, pick, token = rng.choice(NAMES), rng.randrange(8), rng.choice(TOKENS)
        if step == "preserve":
            lives.preserve(name, pick, token, rng.choice([*rarely, *range(12)]))
        elif step == "kexec" and any(tokens for _, tokens in lives.outgoing.values()):
            then = rng.choice(["", "", "read", "read, finish", "read, close", "finish", "close"])
            lives.kexec(then, rng.choice([*rarely, *range(6)]))
        elif step == "retrieve" and lives.incoming:
            lives.retrieve(pick, token, rng.choice([*rarely, *range(6)]))
        elif step == "end":
            lives.end(name, rng.choice(["call off", "finish", "finish", "close", "kill"]))
        elif step == "freeze":
            lives.refuse_to_freeze(pick)
        elif step == "create":
            lives.create(name, rng.choice([*rarely, 0, 1, 2]))
        elif step == "use":
            seals = rng.choice([0, 0, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_WRITE])
            lives.use(pick, rng.randrange(6 * PAGE), rng.randbytes(5), seals, rng.random() < 0.2)
        elif step == "make":
            lives.make(rng.randrange(1 << 32), rng.randbytes(40), rng.random() < 0.7)
        lives.nothing_is_broken()
        lives.lists_agree()
