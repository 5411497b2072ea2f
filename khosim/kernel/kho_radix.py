"""The radix tree of preserved memory, in pages of RAM.

Models ``kernel/liveupdate/kexec_handover.c:kho_radix_*`` @ 7.3. The
tree is bytes in RAM and nothing else: every call walks the tables again, and tables come from the
page allocator, or from memblock before it is up. Errors are negative errnos, as in the kernel.

The ``*_many`` and ``*_run`` calls do what the same number of single calls would, a whole array at a
time. Left out: locks. A walk that comes back to pages it has seen, again and again (no sound tree
has two ways to a page), is reported as a hang: the real walk would not end in useful time.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

import numpy as np
import numpy.typing as npt

from khosim.errors import KernelPanic
from khosim.kernel.kho_radix_bits import (
    bytes_of_bits,
    fill_bits,
    first_uses,
    runs_of_bits,
    runs_of_leaves,
    set_bits,
    used_words,
)
from khosim.kernel.kho_radix_memory import NodeMemory
from khosim.kernel.kho_radix_sound import read_sound_tree

__all__ = ("KhoRadixTree", "Pfns")

Keys = npt.NDArray[np.uint64]
Pfns = npt.NDArray[np.int64]
_FEW_KEYS = 64
_MANY_LEAVES = 8  # leaves of one table from which numpy reads them together
_BATCH_LEAVES = 64
_REPEATS_MAX = 1 << 15
_WARN = "WARNING: {}: tree has no root"


class KhoRadixTree:
    """One tree; ``root`` is the physical address of its root table in bytes, 0 without one."""

    __slots__ = (
        "_leaf_bits",
        "_leaf_mask",
        "_mapped",
        "_memory",
        "_page_size",
        "_root_from",
        "_shifts",
        "_table_mask",
        "_width",
        "root",
    )

    def __init__(
        self,
        memory: NodeMemory,
        root: int = 0,
        *,
        depth: int = 0,
        check_width: bool = True,
        root_from: Callable[[], int] | None = None,
    ) -> None:
        """``depth`` in levels is that of 7.3 by default. ``root_from`` gives another root table.

        Without ``check_width`` too wide keys lose their upper bits, as before 955409ba5715 in 7.3.
        """
        arch = memory.arch
        depth = depth or arch.tree_depth
        table_bits = arch.page_shift - 3
        self._memory = memory
        self._page_size = arch.page_size
        self._root_from = memory.kho_radix_alloc_node if root_from is None else root_from
        self._table_mask = (1 << table_bits) - 1
        self._leaf_bits = arch.page_shift + 3
        self._leaf_mask = (1 << self._leaf_bits) - 1
        self._width = 64 - arch.page_shift + 1 if check_width else 63
        # Of the levels that are tables, from the root's down to 1.
        self._shifts = [
            (level - 1) * table_bits + self._leaf_bits
            for level in range(depth - 1, 0, -1)
        ]
        # Pages of RAM that virt() has vouched for: it never takes that back.
        self._mapped: set[int] = set()
        self.root = root

    def init_tree(self, root: int = 0) -> int:
        """``kho_radix_init_tree``: adopt the table at ``root``, or allocate an empty one."""
        if not root:
            root = self._root_from()
            if not root:
                return -errno.ENOMEM
        self.root = root
        return 0

    def _map(self, node: int) -> None:
        # phys_to_virt of a whole page.
        memory, page_size = self._memory, self._page_size
        memory.virt(node, page_size)
        if node + page_size <= memory.ram.size_bytes:
            self._mapped.add(node)

    def _read(self, node: int, access: int) -> int:
        # phys_to_virt(node), and the number at ``access`` in its page.
        if node & (self._page_size - 1):
            self._memory.virt(access, 8)
        else:
            self._map(node)
        return self._memory.ram.read_u64(access)

    def _find_leaf(self, key: int) -> int:
        """The leaf page of ``key``, or 0 where a table lacks the entry."""
        u64, mapped, mask = self._memory.ram.u64, self._mapped, self._table_mask
        node = self.root
        for shift in self._shifts:
            entry = node + ((key >> shift & mask) << 3)
            node = u64[entry >> 3] if node in mapped else self._read(node, entry)
            if not node:
                return 0
        return node

    def _make_leaf(self, key: int, by: tuple[int, str]) -> tuple[int, bool]:
        """The leaf page of ``key`` (0: no memory), and whether it had to be made and is empty."""
        u64, mapped, mask = self._memory.ram.u64, self._mapped, self._table_mask
        shifts = self._shifts
        node = self.root
        for shift in shifts:
            entry = node + ((key >> shift & mask) << 3)
            node = u64[entry >> 3] if node in mapped else self._read(node, entry)
            if not node:
                return self._make_branch(entry, key, [s for s in shifts if s < shift], by), True
        return node, False

    def _make_branch(self, anchor: int, key: int, shifts: list[int], by: tuple[int, str]) -> int:
        """The tables of ``shifts`` and a leaf below the empty entry at ``anchor``: that leaf."""
        memory, mask = self._memory, self._table_mask
        write_u64 = memory.ram.write_u64
        new_nodes = memory.kho_radix_alloc_nodes(len(shifts) + 1)
        entry = anchor
        for node, shift in zip(new_nodes, [*shifts, 0], strict=False):
            write_u64(entry, node, by)
            memory.virt(node, self._page_size)
            entry = node + ((key >> shift & mask) << 3)
        if len(new_nodes) > len(shifts):
            self._mapped.update(new_nodes)
            return new_nodes[-1]
        # The kernel frees the tables from the top down, then cuts the new branch off.
        for node in new_nodes:
            memory.kho_radix_free_node(node)
        if new_nodes:
            write_u64(anchor, 0, by)
        return 0

    def _bit_of(self, leaf: int, key: int) -> tuple[int, int]:
        """The address of the bitmap word that holds the bit of ``key``, and the word."""
        at = leaf + ((key & self._leaf_mask) >> 6 << 3)
        if leaf in self._mapped:
            return at, self._memory.ram.u64[at >> 3]
        return at, self._read(leaf, at)

    # -- single keys -------------------------------------------------------------------------

    def add_key(self, key: int) -> int:
        """``kho_radix_add_key``: 0, -EINVAL without a root, -ERANGE, or -ENOMEM (undone)."""
        memory = self._memory
        if not self.root:
            memory.warn_once(_WARN.format("kho_radix_add_key"), "kho_radix_add_key")
            return -errno.EINVAL
        if key.bit_length() > self._width:
            return -errno.ERANGE
        by = memory.by("kho_radix_add_key")
        leaf, is_new = self._make_leaf(key, by)
        if not leaf:
            return -errno.ENOMEM
        at = leaf + ((key & self._leaf_mask) >> 6 << 3)
        if is_new:
            word = 0  # without a look, for which the host would have to map the page first
        elif leaf in self._mapped:
            word = memory.ram.u64[at >> 3]
        else:
            word = self._read(leaf, at)
        memory.ram.write_u64(at, word | 1 << (key & 63), by)
        return 0

    def has_key(self, key: int) -> bool:
        """Whether ``key`` is in the tree. The kernel has no such call; nothing is created."""
        if not self.root or key.bit_length() > self._width:
            return False
        leaf = self._find_leaf(key)
        if not leaf:
            return False
        return bool(self._bit_of(leaf, key)[1] >> (key & 63) & 1)

    def del_key(self, key: int) -> None:
        """``kho_radix_del_key``: clear the key's bit; warns when its tables do not exist."""
        leaf = self._leaf_to_clear(key)
        if leaf:
            at, word = self._bit_of(leaf, key)
            by = self._memory.by("kho_radix_del_key")
            self._memory.ram.write_u64(at, word & ~(1 << (key & 63)), by)

    def _leaf_to_clear(self, key: int) -> int:
        memory = self._memory
        if not self.root:
            memory.warn_once(_WARN.format("kho_radix_del_key"), "kho_radix_del_key")
            return 0
        if key.bit_length() > self._width:
            return 0
        leaf = self._find_leaf(key)
        if not leaf:
            memory.warn(f"WARNING: kho_radix_del_key: key {key:#x} was never preserved")
        return leaf

    def destroy(self) -> None:
        """``kho_radix_destroy_tree``: free every table, children first."""
        if self.root:
            self._destroy(self.root, 0, set(), [_REPEATS_MAX])
            self.root = 0

    def _destroy(self, node: int, depth: int, seen: set[int], repeats: list[int]) -> None:
        if node in seen:
            repeats[0] -= 1
            if repeats[0] < 0:
                raise self._hang("kho_radix_destroy_tree")
        seen.add(node)
        if depth < len(self._shifts):
            for child in self._children(node)[1]:
                self._destroy(child, depth + 1, seen, repeats)
        self._memory.kho_radix_free_node(node)

    # -- walking -----------------------------------------------------------------------------

    def _words(self, node: int) -> npt.NDArray[np.uint64]:
        """All of a table's or leaf's page."""
        memory, page_size = self._memory, self._page_size
        if node in self._mapped:
            return memory.ram.words[node >> 3 : (node + page_size) >> 3]
        page = memory.ram.view(memory.virt(node, page_size), page_size)
        if not node & (page_size - 1):
            self._mapped.add(node)
        return page.view("<u8")

    def _children(self, node: int) -> tuple[list[int], list[int]]:
        return used_words(self._words(node))

    def _hang(self, symbol: str) -> KernelPanic:
        generation = self._memory.by(symbol)[0]
        message = f"watchdog: BUG: soft lockup in {symbol}: the radix tree runs in circles"
        return KernelPanic(message, generation)

    def walk(self) -> Iterator[tuple[int, int]]:
        """``kho_radix_walk_tree``: what its callbacks see, in its order.

        Yields ``(0, phys)`` for every table and leaf page before its content, and
        ``(nr_keys, first_key)`` for each run of consecutive keys of a leaf. Nothing without a
        root. Raises :class:`KernelPanic` at an address without memory and for a walk without end.
        """
        return chain.from_iterable(
            part if isinstance(part, list) else zip(*map(np.ndarray.tolist, part), strict=True)
            for part in self._walk()
        )

    def read_at_once(self) -> tuple[list[int], list[tuple[int, int]]] | None:
        """All that :meth:`walk` yields, faster: ``(pages, runs)``, or None where only it can tell.

        For callers that write to none of these pages until they are done.
        """
        if not self.root:
            return None
        words = self._memory.ram.words
        found = read_sound_tree(words, self.root, self._shifts, self._page_size)
        if found is not None and not self._mapped.issuperset(found[0]):
            try:
                for node in found[0]:
                    self._map(node)
            except KernelPanic:
                return None  # in its turn
        return found

    def runs(self) -> Iterable[tuple[int, int]]:
        """The ``(nr_keys, first_key)`` of :meth:`walk`, for such callers."""
        found = self.read_at_once()
        return (run for run in self.walk() if run[0]) if found is None else found[1]

    def walk_arrays(self) -> Iterator[tuple[Pfns, Keys]]:
        """:meth:`walk` in arrays: of each pair a number in the one and in the other."""
        for part in self._walk():
            if isinstance(part, list):
                counts, values = zip(*part, strict=True)
                yield np.array(counts, dtype=np.int64), np.array(values, dtype=np.uint64)
            else:
                yield part

    def _walk(self) -> Iterator[list[tuple[int, int]] | tuple[Pfns, Keys]]:
        # What walk() yields, in pieces. Neighbouring leaves are read many at a time.
        if not self.root:
            return
        shifts = self._shifts
        seen = {self.root}
        in_page = self._memory.arch.page_size - 1  # pages may also repeat each other in part
        repeats = 0
        yield [(0, self.root)]
        # What is left of each table on the way down, the next entry last: (key, page).
        ways = [self._entries(self.root, 0, shifts[0])]
        while ways:
            if not ways[-1]:
                ways.pop()
                continue
            if len(ways) == len(shifts) and len(ways[-1]) >= _MANY_LEAVES:
                leaves = self._plain_leaves(ways[-1], seen)
                if leaves:
                    yield self._read_leaves(leaves)
                    continue
            key, node = ways[-1].pop()
            yield [(0, node)]  # before a look at what it holds, which may change until then
            if len(ways) < len(shifts):
                found = self._entries(node, key, shifts[len(ways)])
                ways.append(found)
            else:
                found = runs_of_bits(self._words(node), key)
                if found:
                    yield found
            if node in seen or node & in_page:
                repeats += 1 + len(found)
                if repeats > _REPEATS_MAX:
                    raise self._hang("kho_radix_walk_tree")
            seen.add(node)

    def _plain_leaves(
        self, entries: list[tuple[int, int]], seen: set[int]
    ) -> list[tuple[int, int]]:
        """Take leaves off the end of ``entries`` up to the first that is not a page of its own."""
        page_size, mapped = self._memory.arch.page_size, self._mapped
        taken: list[tuple[int, int]] = []
        while entries and len(taken) < _BATCH_LEAVES:
            node = entries[-1][1]
            if node in seen or node & (page_size - 1):
                break
            if node not in mapped:
                try:
                    self._map(node)
                except KernelPanic:
                    break  # when its turn comes
                if node not in mapped:
                    break  # no RAM there
            seen.add(node)
            taken.append(entries.pop())
        return taken

    def _read_leaves(self, leaves: list[tuple[int, int]]) -> tuple[Pfns, Keys]:
        page_size, shift = self._memory.arch.page_size, self._memory.arch.page_shift
        keys, nodes = np.array(leaves, dtype=np.int64).T
        pages = self._memory.ram.data.reshape(-1, page_size)[nodes >> shift]
        counts, firsts, rows = runs_of_leaves(pages.view("<u8"), keys)
        # Each leaf's page stands before its runs.
        at = np.searchsorted(rows, np.arange(len(leaves)))
        return np.insert(counts, at, 0), np.insert(firsts, at, nodes).astype(np.uint64)

    def _entries(self, node: int, start: int, shift: int) -> list[tuple[int, int]]:
        indexes, children = used_words(self._words(node))
        if len(indexes) == 1:
            return [(start | indexes[0] << shift, children[0])]
        indexes.reverse()
        children.reverse()
        return [(start | i << shift, child) for i, child in zip(indexes, children, strict=True)]

    # -- whole arrays ------------------------------------------------------------------------

    def add_many(self, keys: Pfns) -> tuple[int, int]:
        """:meth:`add_key` for each of ``keys`` (int64), in order: ``(error, keys added)``.

        Stops at the first error like a caller's loop; what was added before it stays.
        """
        if len(keys) < _FEW_KEYS or not self.root:
            return self._add_one_by_one(keys)
        too_wide = (keys >> self._width).nonzero()[0]
        if len(too_wide):
            error, done = self.add_many(keys[: too_wide[0]])
            return error or -errno.ERANGE, done
        slots, first_use = first_uses(keys >> self._leaf_bits)
        # The leaves in the order in which the loop would first touch them.
        ram = self._memory.ram
        by = self._memory.by("kho_radix_add_key")
        leaf_phys = np.zeros(len(first_use), dtype=np.int64)
        done = len(keys)
        order = np.argsort(first_use, kind="stable")
        firsts = first_use[order]
        for slot, probe in zip(order.tolist(), keys[firsts].tolist(), strict=True):
            leaf, _ = self._make_leaf(probe, by)
            if not leaf or leaf & (self._memory.arch.page_size - 1):
                done = int(first_use[slot])
                break
            self._bit_of(leaf, probe)
            leaf_phys[slot] = leaf
        ram.note_writes(leaf_phys[leaf_phys > 0] >> self._memory.arch.page_shift, by)
        bits = keys[:done] & self._leaf_mask
        set_bits(ram.data, leaf_phys[slots[:done]] + (bits >> 3), bits & 7)
        if done == len(keys):
            return 0, done
        if not leaf:
            return -errno.ENOMEM, done
        error, more = self._add_one_by_one(keys[done:])  # somebody has corrupted the tree
        return error, done + more

    def _add_one_by_one(self, keys: Pfns) -> tuple[int, int]:
        for done, key in enumerate(keys.tolist()):
            error = self.add_key(key)
            if error:
                return error, done
        return 0, len(keys)

    def add_run(self, first_key: int, nr_keys: int) -> tuple[int, int]:
        """:meth:`add_key` for ``nr_keys`` consecutive keys: ``(error, keys added)``."""
        for key, stop in self._leaf_spans(first_key, first_key + nr_keys):
            error = self.add_key(key)
            if error:
                return error, key - first_key
            if stop - key > 1:
                self._fill(self._find_leaf(key), key, stop, "kho_radix_add_key")
        return 0, nr_keys

    def del_run(self, first_key: int, nr_keys: int) -> None:
        """:meth:`del_key` for ``nr_keys`` consecutive keys; one warning for each missing leaf."""
        for key, stop in self._leaf_spans(first_key, first_key + nr_keys):
            leaf = self._leaf_to_clear(key)
            if leaf:
                self._fill(leaf, key, stop, "kho_radix_del_key")

    def _leaf_spans(self, key: int, end: int) -> Iterator[tuple[int, int]]:
        while key < end:
            stop = min(end, (key | self._leaf_mask) + 1)
            yield key, stop
            key = stop

    def _fill(self, leaf: int, key: int, stop: int, symbol: str) -> None:
        memory = self._memory
        low, high = key & self._leaf_mask, ((stop - 1) & self._leaf_mask) + 1
        at = memory.virt(leaf + (low >> 3), bytes_of_bits(low, high))
        bytes_ = memory.ram.writable(at, bytes_of_bits(low, high), memory.by(symbol))
        fill_bits(bytes_, low, high, is_set=symbol == "kho_radix_add_key")
