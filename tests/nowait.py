#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Reads that must not wait (RWF_NOWAIT): they succeed, or fail with EAGAIN immediately; then the same read succeeds."""

import errno
import mmap
import os
import time

from obdtest import dm, image, inject
from obdtest.disk import Disk, fails_with, same_bytes, verify
from obdtest.dm import line
from obdtest.ktap import SLOW, add, check, equal, main
from obdtest.uring import Ring

VSIZE = 1 << 20
LAYER = image.lsmt(VSIZE, [(0, image.sample(1500 * 512, 61)), (1600, image.sample(400 * 512, 62))])
PLAIN = image.flatten([image.Lsmt(LAYER)])
OPTIONS = ("cache_blocks 0", "", "cache_all")
READ_ERRORS, CACHED = 8, 10
# An offset far from the blocks that lsmt reads for its index and that are therefore cached.
FAR = 262144


class Stack:
    """A zfile device with lsmt on it, over a device that can be suspended."""

    def __init__(self, algorithm, block, options):
        raw = image.zfile(LAYER, algorithm, block)
        self.loop = dm.Loop(raw)
        self.sectors = self.loop.size // 512
        self.below = dm.linear(self.loop, self.sectors, readonly=True)
        self.open(self.below, raw, options)

    def open(self, below, raw, options):
        words = options.split()
        self.zfile = dm.create(line(0, dm.sectors(len(LAYER)), "zfile", below.path, len(raw), len(words), *words))
        self.lsmt = dm.lsmt(VSIZE, (self.zfile, len(LAYER)))
        self.disks = [(Disk(self.zfile), LAYER), (Disk(self.lsmt), PLAIN)]


def nowait(disk, offset, length):
    area = memoryview(mmap.mmap(-1, length))
    got = os.preadv(disk.direct, [area], offset, os.RWF_NOWAIT)
    return bytes(area[:got])


def succeeds(algorithm, block, options):
    """If nothing has to wait, each read returns the correct bytes."""
    for disk, wanted in Stack(algorithm, block, options).disks:
        for length in (512, 4096, 65536, 262144):
            for at in range(0, len(wanted) - length, 3 * 65536):
                same_bytes(nowait(disk, at, length), wanted[at:at + length], f"{length} bytes at {at}")


def again(algorithm, block, options):
    """While the lower device is suspended, a read that must not wait fails and has no lasting effect."""
    stack = Stack(algorithm, block, options)
    cached = stack.zfile.info()[CACHED]
    stack.below.suspend()
    try:
        for disk, _ in stack.disks:
            for length in (512, 65536, 131072):
                start = time.monotonic()
                fails_with(errno.EAGAIN, nowait, disk, FAR, length)
                check(time.monotonic() - start < 2 * SLOW, "the read has waited")
    finally:
        stack.below.resume()
    info = stack.zfile.info()
    equal((info[0], info[READ_ERRORS], info[CACHED]), ("V", "0", cached), "state, read errors, cached")
    for disk, wanted in stack.disks:
        same_bytes(nowait(disk, FAR, 65536), wanted[FAR:FAR + 65536], "afterwards")
    verify(stack.lsmt, PLAIN, rounds=10)


def uring(options):
    """io_uring: a read with RWF_NOWAIT gets EAGAIN if it would have to wait. Submitting a read without it doesn't
    block, either."""
    for nth in range(2):
        # A stack for each disk: one disk's reads may be cached for the other.
        stack = Stack(image.LZ4, 4096, options)
        disk, wanted = stack.disks[nth]
        ring, later = Ring(65536), Ring(65536)
        stack.below.suspend()
        try:
            start = time.monotonic()
            ring.submit(disk.direct, FAR, 65536, os.RWF_NOWAIT)
            equal(ring.wait(), -errno.EAGAIN, "with RWF_NOWAIT")
            later.submit(disk.direct, FAR + 65536, 65536)
            check(time.monotonic() - start < 2 * SLOW, "the read has waited")
        finally:
            stack.below.resume()
        same_bytes(later.wait(), wanted[FAR + 65536:FAR + 2 * 65536], "without RWF_NOWAIT")
        ring.submit(disk.direct, FAR, 65536, os.RWF_NOWAIT)
        same_bytes(ring.wait(), wanted[FAR:FAR + 65536], "with RWF_NOWAIT, afterwards")


def no_memory(options):
    """Without memory, a read that must not wait fails, and a read that may wait succeeds."""
    stack = Stack(image.LZ4, 4096, options)
    end = inject.allocations(100)
    for disk, wanted in stack.disks:
        # The spare buffer is for reads that may wait.
        fails_with(errno.EAGAIN, nowait, disk, FAR, 4096)
        same_bytes(disk.read(FAR, 4096), wanted[FAR:FAR + 4096], "a read that may wait")
    check(end() > 0, "no allocation failed")
    for disk, wanted in stack.disks:
        same_bytes(nowait(disk, FAR, 65536), wanted[FAR:FAR + 65536], "with memory")


def not_below():
    """On a lower device that doesn't support RWF_NOWAIT, reads with it fail with the error of that device."""
    stack = Stack(image.LZ4, 4096, "")
    late = dm.delayed(stack.loop, stack.sectors, 0)
    fails_with(errno.EOPNOTSUPP, nowait, Disk(late), 0, 4096)
    stack.open(late, image.zfile(LAYER), "")
    for disk, wanted in stack.disks:
        fails_with(errno.EOPNOTSUPP, nowait, disk, 0, 4096)
        same_bytes(disk.read(0, 4096), wanted[:4096], "a read that may wait")


for each_options in OPTIONS:
    for each_algorithm, each_block in ((image.LZ4, 4096), (image.ZSTD, 65536)):
        each_title = f"{image.NAMES[each_algorithm]} in {each_block}, {each_options or 'default cache'}"
        add(f"{each_title}: reads that don't have to wait succeed", succeeds, each_algorithm, each_block, each_options)
        add(f"{each_title}: reads that would have to wait fail with EAGAIN", again, each_algorithm, each_block, each_options)
    add(f"io_uring, {each_options or 'default cache'}: EAGAIN, and submission doesn't wait", uring, each_options)
    add(f"no memory, {each_options or 'default cache'}: reads fail with EAGAIN", no_memory, each_options)
add("a lower device without support for RWF_NOWAIT", not_below)


if __name__ == "__main__":
    main()
