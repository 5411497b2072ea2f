"""Test a subsystem of your own: copy this file, put your device in the place of the counter.

A device, its live update handler, the operations that can happen to it, and a model of what has to
come back. khosim adds folios, sessions, memfds, kexecs and faults around them. Run it with pytest,
or as a script.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from khosim.kernel.file import File
from khosim.kernel.kernel import Kernel
from khosim.kernel.liveupdate.file_ops import FileHandler, LiveupdateFileOpArgs
from khosim.testing import Hooks, deep_lives, fault_plans, handover_machine, operation


class Counter(File):
    """A device that counts."""

    def __init__(self, kernel: Kernel, value: int = 0) -> None:
        super().__init__(kernel, "counter")
        self.value = value


class CounterHandler(FileHandler):
    """Carries the count in a preserved page."""

    compatible = "counter-v1"

    def can_preserve(self, file: File) -> bool:
        """Counters only."""
        return isinstance(file, Counter)

    def preserve(self, args: LiveupdateFileOpArgs) -> None:
        """Set a page aside."""
        page = args.kernel.kho_alloc_preserve(8)
        args.serialized_data, args.private_data = page.phys, page

    def freeze(self, args: LiveupdateFileOpArgs) -> None:
        """Write the count down."""
        assert isinstance(args.file, Counter)
        args.private_data.write(0, args.file.value.to_bytes(8, "little"))

    def unpreserve(self, args: LiveupdateFileOpArgs) -> None:
        """Give the page back."""
        args.kernel.kho_unpreserve_free(args.private_data)

    def retrieve(self, args: LiveupdateFileOpArgs) -> None:
        """Read the count, and free the page."""
        args.file = Counter(args.kernel, args.kernel.ram.read_u64(args.serialized_data))
        args.kernel.kho_restore_free(args.serialized_data)

    def finish(self, args: LiveupdateFileOpArgs) -> None:
        """Free the page of a counter that nobody asked for."""
        if not args.retrieve_status:
            args.kernel.kho_restore_free(args.serialized_data)


class Model:
    """What has to be true: the counters in the session "counters" by token."""

    def __init__(self) -> None:
        self.session: Any = None
        self.counters: dict[int, Counter] = {}
        self.handed_over: dict[int, int] = {}


def on_boot(kernel: Kernel, state: Model) -> None:
    """The driver loads."""
    kernel.liveupdate.register_file_handler(CounterHandler())


def before_kexec(kernel: Kernel, state: Model) -> None:
    """The model remembers what has to come back."""
    state.handed_over = {token: counter.value for token, counter in state.counters.items()}


def after_restore(kernel: Kernel, state: Model) -> None:
    """The agent takes its session back."""
    state.counters = {}
    if state.session is None:
        return
    session = kernel.liveupdate.retrieve_session("counters")
    for token, value in state.handed_over.items():
        assert session.retrieve(token).value == value
    session.finish()
    session.close()
    state.session = None


@operation(token=st.integers(0, 3), weight=8, may_refuse=("EEXIST",))
def preserve_counter(kernel: Kernel, state: Model, token: int) -> None:
    """A new counter goes into the session."""
    if state.session is None:
        state.session = kernel.liveupdate.create_session("counters")
    counter = Counter(kernel)
    state.session.preserve(counter, token)
    state.counters[token] = counter


@operation(by=st.integers(1, 1000), when=lambda kernel, state: state.counters)
def count(kernel: Kernel, state: Model, by: int) -> None:
    """All counters go on, preserved or not."""
    for counter in state.counters.values():
        counter.value += by


@operation(when=lambda kernel, state: state.session is not None, weight=2)
def call_off(kernel: Kernel, state: Model) -> None:
    """The agent closes the session: the update is called off."""
    state.session.close()
    state.session, state.counters = None, {}


def tokens_agree(kernel: Kernel, state: Model) -> None:
    """The kernel's list is the model's."""
    if state.session is not None:
        assert sorted(state.session.tokens) == sorted(state.counters)


TestCounters = handover_machine(
    ops=[preserve_counter, count, call_off],
    invariants=[tokens_agree],
    faults=fault_plans(),
    hooks=Hooks(on_boot, before_kexec, after_restore, Model),
)


def test_deep_lives(khosim_seed: int) -> None:
    """Long lives, by the weights of the operations."""
    deep_lives(TestCounters, seed=khosim_seed, lives=5, steps=60)


if __name__ == "__main__":
    print(deep_lives(TestCounters, seed=0, lives=3, steps=60), "steps, and nothing broke")
