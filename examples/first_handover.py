"""Two kernels, one machine: what is preserved survives the jump, the rest does not.

Run it: ``python examples/first_handover.py``.
"""

from __future__ import annotations

from khosim import Machine

machine = Machine(ram="1G")
kernel = machine.boot(cmdline="kho=on reserve_mem=2M:4096:oops")
print("first kernel:", kernel)
for address, size in kernel.scratch_areas():
    print(f"  scratch {size >> 20:4} MiB at {address:#x}")

kept = kernel.alloc_folio(order=2, owner="guest")
kept.write(0, b"still here")
kernel.kho_preserve_folio(kept)
lost = kernel.alloc_folio(order=2, owner="guest")
lost.write(0, b"forgotten")

successor = kernel.kexec()
print("its successor:", successor)
for line in successor.messages:
    print("  ", line)
print("before restore:", successor.page(kept.pfn).kind, "and", successor.page(lost.pfn).kind)
restored = successor.kho_restore_folio(kept.phys)
assert restored is not None
print("after restore:", restored, restored.read(0, 10))
print("a second restore:", successor.kho_restore_folio(kept.phys))
print("violations:", machine.check())
