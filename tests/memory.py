#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Reads go on when memory is short, and what is cached is given back."""

import os
import random
import time

from obdtest import dm, image
from obdtest.disk import Disk, same_bytes
from obdtest.ktap import SLOW, Skip, check, equal, main, note, test
from obdtest.memory import hog, kernel_memory, meminfo

SIZE = 16 << 20


def compressible():
    """16 MiB that compress well, each page its own."""
    return b"".join(number.to_bytes(8, "little") * 64 * 8 for number in range(SIZE // 4096))


@test("reads while a process takes nearly all memory")
def short_of_memory():
    if meminfo()["MemTotal"] > 6 << 20:
        raise Skip("this machine has too much memory to take it all")
    data = compressible()
    raw = image.zfile(data, image.ZSTD, 65536)
    disk = Disk(dm.zfile(dm.Loop(raw), len(raw), SIZE))
    child = hog(64 << 10)
    try:
        for _ in range(1000 * SLOW):
            if meminfo()["MemAvailable"] < 128 << 10:
                break
            time.sleep(0.05)
        rng = random.Random(71)
        lowest = meminfo()["MemAvailable"]
        for nth in range(400):
            offset = rng.randrange(SIZE // 512 - 256) * 512
            length = rng.choice((512, 4096, 65536, 131072))
            same_bytes(disk.read(offset, length), data[offset:offset + length], f"direct, {length} at {offset}")
            if nth % 4 == 0:
                same_bytes(disk.read_buffered(offset, length), data[offset:offset + length],
                           f"buffered, {length} at {offset}")
                lowest = min(lowest, meminfo()["MemAvailable"])
        check(lowest < 128 << 10, f"memory was never short: {lowest} KiB were left")
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)


@test("memory that a device has taken is free when it is gone")
def given_back():
    data = compressible()
    raw = image.zfile(data, image.LZ4, 65536)
    loop = dm.Loop(raw)

    before = kernel_memory()
    for _ in range(8):
        device = dm.zfile(loop, len(raw), SIZE)
        disk = Disk(device)
        rng = random.Random(72)
        for _ in range(150):
            offset = rng.randrange(SIZE // 4096) * 4096
            same_bytes(disk.read(offset, 4096), data[offset:offset + 4096], f"4096 at {offset}")
        disk.close()
        device.remove()
    grown = kernel_memory() - before
    # Checkers keep what was freed for a while, and find what is lost by themselves.
    check(grown < 12 << 10 or SLOW > 1, f"{grown} KiB more than before")
    equal(device.exists(), False, "the device")


def kib_each(count, table):
    """KiB of kernel memory that an idle device takes."""
    before = kernel_memory()
    devices = [dm.create(table) for _ in range(count)]
    grown = kernel_memory() - before
    for device in devices:
        device.remove()
    return grown / count


@test("an idle device takes little more memory than dm-linear")
def idle():
    raw = image.zfile(image.sample(65536))
    loop = dm.Loop(raw)
    linear = dm.line(0, 8, "linear", loop.path, 0)
    zfile = dm.line(0, 128, "zfile", loop.path, len(raw))
    # What the first ones of all take isn't theirs.
    kib_each(20, linear), kib_each(20, zfile)
    more = kib_each(120, zfile) - kib_each(120, linear)
    note(f"{more:.1f} KiB more")
    # Checkers keep what was freed for a while, and add to each allocation.
    check(more <= 48 or SLOW > 1, f"{more:.1f} KiB more")


if __name__ == "__main__":
    main()
