"""Every allocation of a live update fails once: nothing is lost, and nothing is owned twice."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from khosim import KernelError, Machine
from khosim.kernel.file import File
from khosim.kernel.kernel import Kernel
from khosim.kernel.liveupdate.flb_ops import Flb, LiveupdateFlbOpArgs

ON = "kho=on liveupdate=on"


class Shared(Flb):
    """An object that takes a page."""

    compatible = "shared-v1"

    def preserve(self, args: LiveupdateFlbOpArgs) -> None:
        args.obj = args.kernel.kho_alloc_preserve(8)
        args.data = args.obj.phys

    def unpreserve(self, args: LiveupdateFlbOpArgs) -> None:
        args.kernel.kho_unpreserve_free(args.obj)

    def retrieve(self, args: LiveupdateFlbOpArgs) -> None:
        args.obj = args.kernel.kho_restore_folio(args.data)

    def finish(self, args: LiveupdateFlbOpArgs) -> None:
        args.obj.put()


def boot(ram: str = "64M", **options: str) -> tuple[Machine, Kernel, Shared]:
    machine = Machine(ram, **options)  # type: ignore[arg-type]
    kernel = machine.boot(cmdline=ON)
    return machine, kernel, register(kernel)


def register(kernel: Kernel) -> Shared:
    flb = Shared()
    kernel.liveupdate.register_flb(kernel.liveupdate.handlers["memfd-v2"], flb)
    return flb


def fail_nth(kernel: Kernel, nth: int) -> list[str]:
    """Refuse the nth request; the list tells whose it was."""
    hit: list[str] = []
    calls = iter(range(1 << 30))

    def fail(order: int, owner: str) -> bool:
        if next(calls) != nth:
            return False
        hit.append(owner)
        return True

    kernel.pages.fail = fail
    return hit


def balance(kernel: Kernel) -> tuple[int, int, dict[int, File], int]:
    """Free pages (and the tree's), preserved keys, owned files, sessions."""
    walked = [nr_keys for nr_keys, _ in kernel.kho_out.tree.walk()]
    luo = kernel.liveupdate
    return (
        kernel.pages.nr_free_pages() + walked.count(0),
        sum(walked),
        dict(luo.preserved_files),
        luo.sessions.outgoing.count,
    )


def until_it_succeeds(attempt: Callable[[int], list[str]]) -> set[str]:
    """Let request 0, 1, 2 ... fail until none is left; who was refused."""
    refused: set[str] = set()
    for nth in range(400):
        hit = attempt(nth)
        if not hit:
            return refused
        refused.update(hit)
    raise AssertionError("it never succeeds")


@pytest.mark.parametrize("allocator", ["linux", "adversarial"])
def test_preserving(allocator: str) -> None:
    """Whatever fails while a session is made and filled: closing it restores the balance."""
    machine, kernel, flb = boot(allocator=allocator)
    guests = [kernel.memfd(f"{n}", size=size) for n, size in enumerate((0, 4096, 300_000))]
    for guest in guests[1:]:
        guest.fallocate(0, guest.size)
    device = kernel.liveupdate.open()
    before = balance(kernel)

    def attempt(nth: int) -> list[str]:
        hit = fail_nth(kernel, nth)
        sessions, errors = [], []
        try:
            sessions.append(device.create_session("s"))
            for token, guest in enumerate(guests):
                sessions[0].preserve(guest, token)
        except KernelError as refused:
            errors.append(refused.errno)
        kernel.pages.fail = None
        assert errors == [errno.ENOMEM] * len(hit)
        assert not machine.check()
        for session in sessions:
            session.close()
        assert balance(kernel) == before
        assert kernel.liveupdate.flb.state(flb).outgoing.count.value == 0
        assert {guest.f_count for guest in guests} == {1}
        return hit

    refused = until_it_succeeds(attempt)
    assert {"luo_session_alloc", "anon_inode_getfile", "xa_insert", "luo_preserve_file"} <= refused
    assert {"kho_alloc_preserve", "memfd_luo_preserve_folios"} <= refused


def test_retrieving() -> None:
    """Whatever fails in the successor: what was retrieved is whole, and no page is owned twice."""

    def attempt(nth: int) -> list[str]:
        machine, kernel, _ = boot()
        session = kernel.liveupdate.create_session("s")
        for token in range(2):
            guest = kernel.memfd("guest", size=9000)
            guest.write(token * 4096, b"content %d" % token)
            session.preserve(guest, token)
        kernel = machine.kexec(kernel)
        flb = register(kernel)
        kernel.liveupdate.flb_get_incoming(flb)
        hit = fail_nth(kernel, nth)
        found, errors = {}, []
        try:
            session = kernel.liveupdate.retrieve_session("s")
            for token in range(2):
                found[token] = session.retrieve(token)
        except KernelError as refused:
            errors.append(refused.errno)
        kernel.pages.fail = None
        # -EINVAL where the records cannot be restored, -EIO where the sessions cannot.
        assert set(errors) <= {errno.ENOMEM, errno.ENOSPC, errno.EINVAL, errno.EIO}
        assert len(errors) <= len(hit)
        for token, file in found.items():
            assert file.read(token * 4096, 9) == b"content %d" % token
        if session.kernel is kernel:
            session.close()
        assert kernel.liveupdate.preserved_files == {}
        assert not machine.check()
        return hit

    refused = until_it_succeeds(attempt)
    assert {"luo_session_alloc", "luo_file_deserialize_one", "anon_inode_getfile"} <= refused
    assert {"shmem_alloc_inode", "alloc_file_pseudo"} <= refused
