#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""The control group that lower reads are charged to: that of the reader, except for reads into the spare buffer."""

import time

from obdtest import dm, image, inject
from obdtest.cgroup import Group
from obdtest.disk import Disk, same_bytes
from obdtest.dm import line
from obdtest.ktap import add, check, equal, main, note, test

DATA = image.sample(700001, 61)
PADDED = DATA + bytes(-len(DATA) % 512)
SECTORS = dm.sectors(len(DATA))
BLOCK = 65536
RAW = image.zfile(DATA, image.ZSTD, BLOCK)
READS, READ_BYTES = 5, 6


def zfile(lower, *options):
    words = " ".join(map(str, options)).split()
    return dm.create(line(0, SECTORS, "zfile", lower.path, len(RAW), len(words), *words))


def read_all(device, step, length):
    disk = Disk(device)
    for at in range(0, len(PADDED), step):
        want = PADDED[at:at + length]
        same_bytes(disk.read(at, len(want)), want, f"{len(want)} bytes at {at}")
    disk.close()


def charged(options, delayed, step, length):
    """A group is charged for exactly the lower reads that its own reads cause."""
    group = Group()
    loop = dm.Loop(RAW)
    device = zfile(loop, options)
    before = [int(word) for word in device.info()[READS:READ_BYTES + 1]]
    group.run(read_all, dm.delayed(device, SECTORS, 10) if delayed else device, step, length)
    reads, read_bytes = [int(word) - was for word, was in zip(device.info()[READS:READ_BYTES + 1], before)]
    check(reads > 0, "nothing was read")
    equal(group.stat(loop), (read_bytes, reads), "bytes and reads that the group is charged for")


@test("a stack below a delayed device: the group of the reader is charged for each layer")
def stacked():
    group = Group()
    vsize = 256 << 10
    layers = [image.lsmt(vsize, [(0, image.sample(vsize, 62))]), image.lsmt(vsize, [(100, image.sample(60 * 512, 63))])]
    loops, zfiles = [], []
    for layer in layers:
        raw = image.zfile(layer)
        loops.append(dm.Loop(raw))
        zfiles.append((dm.zfile(loops[-1], len(raw), len(layer)), len(layer)))
    device = dm.delayed(dm.lsmt(vsize, *zfiles), vsize // 512, 10)
    before = [int(each.info()[READ_BYTES]) for each, _ in zfiles]

    def reader():
        disk = Disk(device)
        disk.whole()
        disk.close()

    group.run(reader)
    for nth, loop in enumerate(loops):
        read_bytes = int(zfiles[nth][0].info()[READ_BYTES]) - before[nth]
        check(read_bytes > 0, f"nothing was read of layer {nth}")
        equal(group.stat(loop)[0], read_bytes, f"bytes of layer {nth}")


def limited(options, length):
    """A group's limit on the lower device slows the group's reads down."""
    group = Group()
    loop = dm.Loop(RAW)
    device = zfile(loop, options)
    # The lower reads fetch at least all stored bytes.
    seconds = 2
    group.limit(loop, len(RAW) // seconds)
    start = time.monotonic()
    group.run(read_all, device, BLOCK, length)
    took = time.monotonic() - start
    note(f"{took:.2f} s")
    # The first time slice isn't limited.
    check(took > seconds * 0.6, f"took {took:.2f} s with a limit, {seconds} were expected")


@test("a read into the spare buffer is not charged to the group of the reader")
def spare():
    group = Group()
    loop = dm.Loop(RAW)
    device = zfile(loop, "cache_blocks 0")
    end = inject.allocations(100)
    group.run(read_all, device, BLOCK, 4096)
    failed = end()
    check(failed > 0, "no allocation failed")
    check(int(device.info()[READS]) > 0, "nothing was read")
    equal(group.stat(loop), (0, 0), "bytes and reads that the group is charged for")


@test("the statistics of the device count each read once, and none is in flight at the end")
def statistics():
    loop = dm.Loop(RAW)
    for options in ("cache_blocks 0", "", "cache_all"):
        device = zfile(loop, options)

        def stat(device=device):
            with open(f"{device.sysfs}/stat", encoding="ascii") as file:
                fields = [int(field) for field in file.read().split()]
            return fields[0], fields[2], fields[8]

        disk = Disk(device)
        ios, sectors, _ = stat()
        for _ in range(3):
            for at in range(0, 8 * BLOCK, BLOCK):
                disk.read(at, 4096)
        now = stat()
        equal((now[0] - ios, now[1] - sectors, now[2]), (24, 24 * 8, 0), f"reads, sectors, in flight ({options})")
        disk.close()


for each_options in ("cache_blocks 0", "cache_blocks 64", "cache_all"):
    for each_delayed in (False, True):
        for each_length in (4096, 65536):
            add(f"{each_options}, reads of {each_length}{', delayed' if each_delayed else ''}: the reader's group is charged",
                charged, each_options, each_delayed, BLOCK, each_length)
    add(f"{each_options}: the group's limit is effective for reads of 4096", limited, each_options, 4096)


if __name__ == "__main__":
    main()
