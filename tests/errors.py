#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Lower devices that fail: readers get errors, nothing hangs, and reads succeed again afterwards."""

import errno
import fcntl
import os
import struct
import threading
import time

from obdtest import dm, image
from obdtest.disk import Disk, fails_with, read_or_none, same_bytes, verify
from obdtest.dm import line
from obdtest.ktap import check, equal, main, test

DATA = image.sample(400000, 31)
PADDED = DATA + bytes(-len(DATA) % 512)
VSIZE = 256 << 10
LAYER = image.lsmt(VSIZE, [(0, image.sample(100 * 512, 32)), (200, image.sample(200 * 512, 33))])
PLAIN = image.flatten([image.Lsmt(LAYER)])


def swap(device, *table):
    """Replaces the live table of a device."""
    device.load(*table, readonly=True)
    device.resume()


def on_linear(raw):
    """Returns a linear device with the blob, its table, and its number of sectors. A test can replace the table by one
    that fails reads, and restore it."""
    loop = dm.Loop(raw)
    total = loop.size // 512
    good = [line(0, total, "linear", loop.path, 0)]
    return dm.create(*good), good, total


@test("zfile: while lower reads fail, reads fail with EIO and are counted; afterwards they succeed")
def zfile_errors():
    raw = image.zfile(DATA)
    lower, good, total = on_linear(raw)
    device = dm.zfile(lower, len(raw), len(DATA))
    disk = Disk(device)
    same_bytes(disk.read(0, 4096), DATA[:4096], "before")
    swap(lower, line(0, total, "error"))
    for at in range(65536, 65536 + 10 * 4096, 4096):
        fails_with(errno.EIO, disk.read, at, 4096)
    fails_with(errno.EIO, disk.read, 131072, 131072)
    info = device.info()
    check(int(info[8]) >= 11, f"lower read errors: {info[8]}")
    equal((info[0], info[9]), ("V", "0"), "an error below isn't corruption")
    swap(lower, *good)
    disk.flush()
    same_bytes(disk.whole(), PADDED, "after")
    equal(device.info()[8], info[8], "lower read errors afterwards")


@test("zfile: a bad sector fails the blocks in it, and no others")
def one_bad_sector():
    raw = image.zfile(DATA)
    lower, good, total = on_linear(raw)
    device = dm.zfile(lower, len(raw), len(DATA))
    loop = good[0][3].split()[0]
    bad = total // 2
    swap(lower, line(0, bad, "linear", loop, 0), line(bad, 1, "error"),
         line(bad + 1, total - bad - 1, "linear", loop, bad + 1))
    disk = Disk(device)
    failed = []
    for number, (offset, length) in enumerate(image.Zfile(raw).places()):
        at = number * 4096
        data = read_or_none(disk, at, min(4096, len(PADDED) - at))
        if data is None:
            failed.append(number)
            check(offset // 512 <= bad <= (offset + length - 1) // 512,
                  f"block {number} fails, but the bad sector has none of its bytes")
        else:
            same_bytes(data, PADDED[at:at + 4096], f"block {number}")
    check(failed, "nothing has failed")
    swap(lower, *good)
    verify(device, PADDED)


@test("lsmt: reads of a layer that fails fail with EIO; those of holes and of other layers succeed")
def lsmt_errors():
    lower, good, total = on_linear(LAYER)
    top = image.lsmt(VSIZE, [(10, image.sample(5120, 34))])
    wanted = image.flatten([image.Lsmt(LAYER), image.Lsmt(top)])
    device = dm.lsmt(VSIZE, (lower, len(LAYER)), (dm.Loop(top), len(top)))
    disk = Disk(device)
    swap(lower, line(0, total, "error"))
    fails_with(errno.EIO, disk.read, 0, 512)
    fails_with(errno.EIO, disk.read, 9 * 512, 1024)
    same_bytes(disk.read(10 * 512, 5120), wanted[5120:10240], "the upper layer")
    same_bytes(disk.read(120 * 512, 4096), bytes(4096), "a hole")
    swap(lower, *good)
    verify(device, wanted)


@test("errors while metadata is read: the table is refused, and the lower device is closed")
def metadata_errors():
    raw = image.zfile(DATA)
    # Ranges of bytes that are read besides the first sector: a ZFile's index; a layer's index and a sector of its
    # trailer.
    blocks = -(-len(DATA) // 4096)
    index = (len(raw) - 512 - 4 * blocks, len(raw) - 512)
    trailer = (struct.unpack_from("<Q", LAYER, len(LAYER) - 4096 + 32)[0], len(LAYER) - 4096 + 512)
    for blob, needed, target, args, length in ((raw, index, "zfile", [], dm.sectors(len(DATA))),
                                               (LAYER, trailer, "lsmt", [1], VSIZE // 512)):
        lower, good, total = on_linear(blob)
        loop = good[0][3].split()[0]
        for bad in {0, 9, needed[0] // 512 - 1, needed[0] // 512, (needed[1] - 1) // 512, total - 9}:
            parts = [line(0, bad, "linear", loop, 0), line(bad, 1, "error"),
                     line(bad + 1, total - bad - 1, "linear", loop, bad + 1)]
            swap(lower, *[part for part in parts if part[1]])
            device = dm.Device()
            try:
                device.load(line(0, length, target, *args, lower.path, len(blob)))
            except OSError as error:
                equal(error.errno, errno.EIO, f"{target}, bad sector {bad}")
                failed = True
            else:
                failed = False
            equal(failed, bad == 0 or needed[0] // 512 <= bad <= (needed[1] - 1) // 512, f"{target} fails at sector {bad}")
            device.clear()
            device.remove()
        equal(lower.open_count(), 0, "users of the device below")


@test("errors that come and go under load never give wrong data")
def flaky():
    raw = image.zfile(DATA, image.ZSTD)
    lower, good, total = on_linear(raw)
    device = dm.zfile(lower, len(raw), len(DATA))
    wrong, counts, stop = [], {"good": 0, "failed": 0}, threading.Event()

    def reader(start):
        disk = Disk(device)
        at = start
        while not stop.is_set():
            at = (at + 12288 + 512) % 380000 // 512 * 512
            data = read_or_none(disk, at, 12288)
            if data is None:
                counts["failed"] += 1
            elif data != PADDED[at:at + 12288]:
                wrong.append(at)
            else:
                counts["good"] += 1

    readers = [threading.Thread(target=reader, args=(start,)) for start in (0, 100000, 200000)]
    for thread in readers:
        thread.start()
    for _ in range(8):
        swap(lower, line(0, total, "error"))
        time.sleep(0.05)
        swap(lower, *good)
        time.sleep(0.05)
    stop.set()
    for thread in readers:
        thread.join()
    equal(wrong, [], "places with wrong data")
    check(counts["good"] and counts["failed"], f"reads: {counts}")
    verify(device, PADDED)


@test("a lower device that shrinks to 4096 bytes: errors, no crash")
def shrinks():
    raw = image.zfile(DATA)
    loop = dm.Loop(raw)
    device = dm.zfile(loop, len(raw), len(DATA))
    disk = Disk(device)
    same_bytes(disk.read(0, 4096), DATA[:4096], "before")
    os.truncate(loop.fd, 4096)
    with open(loop.path, "rb", buffering=0) as file:
        fcntl.ioctl(file, 0x4C07)
    fails_with(errno.EIO, disk.read, 200704, 65536)
    state = device.info()[0]
    check(state in ("V", "C"), f"the status begins with {state!r}, not with V or C")


if __name__ == "__main__":
    main()
