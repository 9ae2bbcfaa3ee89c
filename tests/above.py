#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Other targets above and below a stack."""

import errno
import mmap
import os
import subprocess

from obdtest import dm, image, stack
from obdtest.disk import Disk, fails_with, same_bytes, verify
from obdtest.dm import line
from obdtest.ktap import equal, main, test
from obdtest.programs import need, need_module

VSIZE = 1 << 20
LAYER = image.lsmt(VSIZE, [(0, image.sample(700 * 512, 61)), (1000, image.sample(400 * 512, 62))])
TOP = image.lsmt(VSIZE, [(50, 100), (300, image.sample(50 * 512, 63))])
PLAIN = image.flatten([image.Lsmt(LAYER), image.Lsmt(TOP)])


def make():
    """Returns a stack of a ZFile and a layer that isn't compressed."""
    return stack.open_stack(image.zfile(LAYER, image.ZSTD, 16384), TOP)


def write(path, offset, content):
    """Writes whole pages with direct I/O."""
    area = mmap.mmap(-1, len(content))
    area.write(content)
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    try:
        os.pwritev(fd, [area], offset)
    finally:
        os.close(fd)


def written(device, offsets):
    """Writes 4 KiB at each offset of a device that has the content of the image. Returns the new content."""
    wanted = bytearray(PLAIN)
    for offset in offsets:
        content = image.sample(4096, offset)
        write(device.path, offset, content)
        wanted[offset:offset + 4096] = content
    return bytes(wanted)


@test("dm-snapshot above takes writes; the image is unchanged")
def snapshot():
    need_module("dm-snapshot")
    origin = make()
    cow = dm.Loop(b"", size=4 << 20, readonly=False)
    device = dm.create(line(0, VSIZE // 512, "snapshot", origin.path, cow.path, "N", 8), readonly=False)
    verify(device, written(device, (0, 40960, 150 * 4096, VSIZE - 4096)), rounds=40)
    verify(origin, PLAIN, rounds=20)
    device.remove()


@test("a thin volume whose external origin is an image")
def thin():
    need_module("dm-thin-pool")
    origin = make()
    meta, data = (dm.Loop(b"", size=4 << 20, readonly=False) for _ in range(2))
    pool = dm.create(line(0, 8192, "thin-pool", meta.path, data.path, 128, 0), readonly=False)
    subprocess.run(["dmsetup", "message", pool.name, "0", "create_thin 0"], check=True)
    device = dm.create(line(0, VSIZE // 512, "thin", pool.path, 0, origin.path), readonly=False)
    verify(device, written(device, (4096, 300 * 1024)), rounds=40)
    verify(origin, PLAIN, rounds=20)
    device.remove()
    pool.remove()


@test("linear pieces above, in another order")
def pieces():
    origin = make()
    device = dm.create(line(0, 101, "linear", origin.path, 900), line(101, 3, "linear", origin.path, 7),
                       line(104, 512, "linear", origin.path, 40))
    wanted = PLAIN[900 * 512:1001 * 512] + PLAIN[7 * 512:10 * 512] + PLAIN[40 * 512:552 * 512]
    verify(device, wanted, rounds=60)


@test("images in images: a ZFile in a layer of another stack")
def nested():
    inner = image.zfile(PLAIN, image.LZ4, 8192)
    outer_size = -(-len(inner) // 512) * 512
    outer = image.lsmt(outer_size, [(0, inner + bytes(outer_size - len(inner)))])
    lower = stack.open_stack(image.zfile(outer, image.ZSTD))
    verify(dm.zfile(lower, len(inner), VSIZE), PLAIN, rounds=40)


@test("striped and delayed devices below: lower reads are split and late")
def striped():
    raw = image.zfile(LAYER)
    chunk, half = 8, -(-len(raw) // 8192)
    sides = [bytearray(), bytearray()]
    padded = raw + bytes(half * 8192 - len(raw))
    for nth in range(half * 2):
        sides[nth % 2] += padded[nth * 4096:(nth + 1) * 4096]
    loops = [dm.Loop(bytes(side)) for side in sides]
    stripes = dm.create(line(0, half * 16, "striped", 2, chunk, loops[0].path, 0, loops[1].path, 0))
    late = dm.delayed(stripes, half * 16, 5)
    wanted = image.flatten([image.Lsmt(LAYER)])
    device = dm.lsmt(VSIZE, (dm.zfile(late, len(raw), len(LAYER)), len(LAYER)))
    disk = Disk(device)
    same_bytes(disk.whole(), wanted, "content")
    disk.close()
    verify(device, wanted, rounds=12)


@test("dm-verity below: reads succeed, and corruption that verity finds is an I/O error")
def verity():
    need("veritysetup")
    need_module("dm-verity")
    raw = image.zfile(LAYER)
    data, tree = dm.Loop(raw), dm.Loop(b"", size=1 << 20, readonly=False)
    out = subprocess.run(["veritysetup", "format", data.path, tree.path], capture_output=True, text=True, check=True)
    fields = {row.split(":")[0]: row.split(":")[1].strip() for row in out.stdout.splitlines() if ":" in row}
    blocks = data.size // 4096
    lower = dm.create(line(0, blocks * 8, "verity", 1, data.path, tree.path, 4096, 4096, blocks, 1, "sha256",
                           fields["Root hash"], fields["Salt"]))
    device = dm.zfile(lower, len(raw), len(LAYER))
    verify(device, LAYER, rounds=20)
    # Correct the block's CRC; verity's hash stays wrong.
    number = 40
    offset, length = image.Zfile(raw).places()[number]
    broken = bytearray(raw[offset:offset + length])
    broken[-5] ^= 1
    broken[-4:] = image.crc32c(image.BLOCK_SEED, bytes(broken[:-4])).to_bytes(4, "little")
    disk = Disk(device)
    data.write(offset, bytes(broken))
    fails_with(errno.EIO, disk.read, number * 4096, 4096)
    same_bytes(disk.read(0, 4096), LAYER[:4096], "another block")
    equal(device.info()[0], "V", "state: an error of the lower device is no corrupt block")


if __name__ == "__main__":
    main()
