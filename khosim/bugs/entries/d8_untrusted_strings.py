"""D8: a message printed text of the predecessor without asking where it ends."""

from __future__ import annotations

from khosim.abi.luo import LIVEUPDATE_HNDL_COMPAT_LENGTH
from khosim.bugs.bug import Bug
from khosim.bugs.live import LIVE, Device, DeviceHandler
from khosim.bugs.stage import Stage
from khosim.kernel.liveupdate.file_ops import LiveupdateFileOpArgs

__all__ = ("BUG",)

FIELD = b"?" * LIVEUPDATE_HNDL_COMPAT_LENGTH


class SecretHandler(DeviceHandler):
    """Hands a number of its own over, such as a key, and no memory."""

    compatible = "secret-v1"

    def preserve(self, args: LiveupdateFileOpArgs) -> None:
        """The number is all."""
        args.serialized_data = int.from_bytes(b"S3cr3t!!", "little")

    def unpreserve(self, args: LiveupdateFileOpArgs) -> None:
        """There is nothing to give back."""


def scenario(stage: Stage) -> None:
    """A predecessor out of order: the name of a file's handler fills its field to the last byte."""
    # What is wrong here is the predecessor, and no invariant's business.
    machine = stage.machine("64M", checks=False)
    kernel = machine.boot(stage.release, cmdline=LIVE)
    kernel.liveupdate.register_file_handler(SecretHandler())
    session = kernel.liveupdate.create_session("vm")
    session.preserve(Device(kernel), 1)
    machine.load_successor(kernel)
    entry = session.session.file_set.block_set.head_pa + 16
    machine.hardware.ram.write(entry, FIELD, (kernel.generation, "wild store"))
    stage.tell(f"the {len(FIELD)} bytes at {entry:#x} that name a handler have no NUL")
    successor = machine.resume()
    stage.refuses("EIO", "opening /dev/liveupdate", successor.liveupdate.open)
    (line,) = [line for line in successor.messages if "No registered handler" in line]
    stage.tell(f"it logs {line.encode('ascii', 'backslashreplace').decode()}")
    wanted = f"luo: No registered handler for compatible '{FIELD.decode()}'"
    stage.expect(
        line == wanted,
        "text-ends-with-its-field",
        f"the message shows {len(line) - len(wanted)} bytes that lie behind the handler's name",
        generation=successor.generation,
    )


BUG = Bug(
    id="D8",
    name="untrusted-strings",
    subject="liveupdate: safely print untrusted strings",
    commit="277f4e5e398b",
    broken="6.19, 7.0",
    fixed="7.1",
    release="7.3",
    without_fix={"luo_bounds_strings": False},
    caught_by=("text-ends-with-its-field",),
    partly="the read ends at a NUL nearby; elsewhere it may run into a page that is not mapped",
    story="""
The record of a file begins with the name of its handler, 48 bytes. Where the successor has no such
handler it says so in its log, with the name.

It printed the name with %s, which goes on to the next NUL. A predecessor writes one, but its
records are memory that another kernel had in its hands: where the field is full, whatever lies
behind it is printed as well, such as the addresses and tokens of the files, and where no NUL comes
before the end of mapped memory the kernel dies of a log message.

Messages now name the size of the field, which is the most that they print.
""",
    scenario=scenario,
)
