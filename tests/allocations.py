#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""How memory is asked for on the path of an I/O. Only large pieces are looked at, which nobody else asks for in
this way meanwhile."""

import random

from obdtest import dm, image
from obdtest.disk import Disk, same_bytes
from obdtest.dm import line
from obdtest.ktap import add, check, equal, main, note
from obdtest.tracing import Trace

# Incompressible, so that what is read is as large as what comes out.
DATA = random.Random(61).randbytes(16 * 65536)
# What does neither wait nor take from the kernel's reserves.
OPTIONAL = {"GFP_NOWAIT", "__GFP_NORETRY", "__GFP_NOMEMALLOC"}


def flags(options, length, order, wanted):
    """Reads parts of all blocks; looks at the allocations of this order."""
    raw = image.zfile(DATA, image.LZ4, 65536)
    loop = dm.Loop(raw)
    disk = Disk(dm.create(line(0, len(DATA) // 512, "zfile", loop.path, len(raw), len(options), *options)))
    trace = Trace(("kmem:mm_page_alloc", f"order == {order}"))
    count = len(DATA) // max(length, 65536)
    for at in range(0, len(DATA), max(length, 65536)):
        same_bytes(disk.read(at, length), DATA[at:at + length], f"{length} bytes at {at}")
    found = [set(text.rsplit("gfp_flags=", 1)[1].split("|")) for name, text in trace.lines() if "mm_page_alloc" in name]
    found = [each for each in found if "GFP_NOWAIT" in each]
    note(f"{len(found)} allocations, such as {'|'.join(sorted(found[0])) if found else None}")
    check(len(found) >= count, f"{len(found)} allocations of order {order} for {count} reads")
    equal([each for each in found if not wanted <= each], [], f"allocations without {'|'.join(sorted(wanted))}")


add("buffers of lower reads neither wait nor take from reserves", flags, ("cache_blocks", 0), 131072, 6, OPTIONAL)
add("blocks in the cache neither wait nor take from reserves, and count as memory that can be given back", flags, (),
    4096, 4, OPTIONAL | {"__GFP_RECLAIMABLE"})


if __name__ == "__main__":
    main()
