#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Reads succeed when memory is short. The memory of the cache and of removed devices is freed."""

import os
import random
import time

from obdtest import dm, image
from obdtest.disk import Disk, same_bytes
from obdtest.ktap import SLOW, Skip, check, defer, equal, main, note, test
from obdtest.memory import hog, kernel_memory, meminfo

SIZE = 16 << 20


def compressible():
    """Returns 16 MiB that compress well, with different pages."""
    return b"".join(number.to_bytes(8, "little") * 64 * 8 for number in range(SIZE // 4096))


def not_too_much():
    """Skips the test on a machine with much memory."""
    if meminfo()["MemTotal"] > 6 << 20:
        raise Skip("this machine has too much memory to take it all")


def until_short():
    """Waits until the process of hog() has used up the memory."""
    for _ in range(1000 * SLOW):
        if meminfo()["MemAvailable"] < 128 << 10:
            break
        time.sleep(0.05)


@test("reads while a process takes nearly all memory")
def short_of_memory():
    not_too_much()
    data = compressible()
    raw = image.zfile(data, image.ZSTD, 65536)
    disk = Disk(dm.zfile(dm.Loop(raw), len(raw), SIZE))
    child = hog(64 << 10)
    try:
        until_short()
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


def set_limit(size):
    """Sets the limit of the cache in bytes. 0 sets the default."""
    with open("/sys/module/dm_overlaybd/parameters/cache_limit_bytes", "w", encoding="ascii") as file:
        file.write(str(size))


def cache_bytes():
    """Returns the size of the cache of all devices in bytes."""
    with open("/sys/module/dm_overlaybd/parameters/cache_bytes", encoding="ascii") as file:
        return int(file.read())


def killed():
    """Returns how many processes the kernel's OOM killer has killed."""
    with open("/proc/vmstat", encoding="ascii") as file:
        return next(int(row.split()[1]) for row in file if row.startswith("oom_kill "))


@test("many devices: under memory pressure, they free the cache before a process is killed, and still read")
def many_devices():
    not_too_much()
    data = compressible()
    raw = image.zfile(data, image.ZSTD, 65536)
    loop = dm.Loop(raw)
    room = min(192 << 10, meminfo()["MemAvailable"] // 3)
    defer(set_limit, 0)
    set_limit(room << 10)
    count = 500 if SLOW == 1 else 50
    table = dm.line(0, SIZE // 512, "zfile", loop.path, len(raw), 1, "cache_all")
    disks = [Disk(dm.create(table)) for _ in range(count)]
    each = max((room << 10) // count // 65536, 1) * 65536
    for nth, disk in enumerate(disks):
        same_bytes(disk.read(0, each), data[:each], f"device {nth}, cold")
    full = cache_bytes() >> 10
    check(full > room * 2 // 3, f"{full} of {room} KiB in the cache")
    kills = killed()
    child = hog(64 << 10)
    longest, rng = 0, random.Random(73)
    try:
        until_short()
        for nth in range(300):
            at = rng.randrange(each // 4096) * 4096
            began = time.monotonic()
            same_bytes(disks[rng.randrange(count)].read(at, 4096), data[at:at + 4096], f"4096 at {at}")
            longest = max(longest, time.monotonic() - began)
        left = cache_bytes() >> 10
        check(meminfo()["MemAvailable"] < 192 << 10, "memory was never short")
        equal(os.waitpid(child, os.WNOHANG), (0, 0), "the process that takes all memory")
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    note(f"{full} KiB in the cache, {left} under pressure; the longest read took {longest * 1000:.0f} ms")
    equal(killed(), kills, "processes that the kernel has killed")
    check(left < full * 3 // 4, f"{left} of {full} KiB are still in the cache")
    check(longest < 10 * SLOW, f"a read took {longest:.1f} s")


@test("a device's memory is free after its removal")
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
    # Kernels with checkers free memory late, and find leaks themselves.
    check(grown < 12 << 10 or SLOW > 1, f"{grown} KiB more than before")
    equal(device.exists(), False, "the device")


def kib_each(count, table):
    """Returns the KiB of kernel memory for each of count idle devices with this table."""
    before = kernel_memory()
    devices = [dm.create(table) for _ in range(count)]
    grown = kernel_memory() - before
    for device in devices:
        device.remove()
    return grown / count


@test("an idle device needs little more memory than dm-linear")
def idle():
    raw = image.zfile(image.sample(65536))
    loop = dm.Loop(raw)
    linear = dm.line(0, 8, "linear", loop.path, 0)
    zfile = dm.line(0, 128, "zfile", loop.path, len(raw))
    # The first devices also allocate memory that all devices share.
    kib_each(20, linear), kib_each(20, zfile)
    alone, as_well = kib_each(120, zfile), kib_each(120, linear)
    more = alone - as_well
    note(f"{alone:.1f} KiB, {more:.1f} more than dm-linear")
    # Kernels with checkers free memory late, and add to each allocation.
    check(more <= 48 or SLOW > 1, f"{more:.1f} KiB more")


if __name__ == "__main__":
    main()
