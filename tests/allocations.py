#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""How reads allocate memory. Only allocations of at least four pages are traced, since nothing else makes these with
the same flags at the same time."""

import random

from obdtest import dm, image
from obdtest.disk import Disk, same_bytes
from obdtest.dm import line
from obdtest.ktap import add, check, equal, main, note
from obdtest.memory import drop_caches
from obdtest.tracing import Trace

# Incompressible, so that stored and decompressed data have the same size.
DATA = random.Random(61).randbytes(16 * 65536)
# The flags of these allocations: they neither wait, nor use the kernel's reserves, nor wake kswapd. The pages are
# reclaimable.
PIECES = {"__GFP_NORETRY", "__GFP_NOWARN", "__GFP_NOMEMALLOC", "__GFP_COMP", "__GFP_RECLAIMABLE"}


def pieces(trace):
    """Returns the flags of the traced allocations for reads and for the cache, by their order."""
    found = {}
    for name, text in trace.lines():
        if "mm_page_alloc" in name:
            fields = dict(word.split("=", 1) for word in text.split() if "=" in word)
            flags = set(fields["gfp_flags"].split("|"))
            if PIECES <= flags:
                found.setdefault(int(fields["order"]), []).append(flags)
    return found


def flags(algorithm, options, length):
    """Reads from all blocks in reads of length bytes, and checks the allocations. The same reads again allocate hardly
    anything."""
    raw = image.zfile(DATA, algorithm, 65536)
    loop = dm.Loop(raw)
    disk = Disk(dm.create(line(0, len(DATA) // 512, "zfile", loop.path, len(raw), len(options), *options)))
    # Empty the pool, which other devices have filled.
    drop_caches()
    trace = Trace(("kmem:mm_page_alloc", "order >= 2"))
    step = max(length, 65536)
    for at in range(0, len(DATA), step):
        same_bytes(disk.read(at, length), DATA[at:at + length], f"{length} bytes at {at}")
    found = pieces(trace)
    note(f"orders {({order: len(each) for order, each in found.items()})}, {'|'.join(sorted(found.get(3, [[]])[0]))}")
    check(found.get(3), "no allocation of order 3")
    equal([order for order in found if order > 3], [], "orders above 3")
    for each in found[3]:
        equal(each, PIECES, "flags")
    for at in range(0, len(DATA), step):
        disk.read(at, length)
    again = pieces(trace)
    check(sum(map(len, again.values())) <= 2, f"allocations for the same reads once more: {again}")


add("buffers of lower reads: allocations don't wait or use reserves, and buffers are reused", flags, image.LZ4,
    ("cache_blocks", 0), 131072)
add("cached blocks: allocations don't wait or use reserves, and pages of evicted blocks are reused", flags, image.ZSTD,
    ("cache_blocks", 4), 4096)


if __name__ == "__main__":
    main()
