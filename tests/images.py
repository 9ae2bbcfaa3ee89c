#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Images of every kind that the formats allow, made by the tests' own writer."""

import random

from obdtest import dm, image, stack
from obdtest.disk import Disk, read_or_none, verify
from obdtest.ktap import add, alone, equal, main, test

BLOCKS = [512 << n for n in range(8)]


def zfile_kinds(algorithm, block):
    """Tests an algorithm and block size: with and without CRC and digest, with the header or the trailer in use, in
    a tar or not, and with odd sizes."""
    for nth, (size, crc, overwrite, digest, wrap) in enumerate((
            (70001, True, True, True, None), (131072, True, False, True, "pax"), (66048, False, True, True, "ustar"),
            (65535, False, False, False, None), (1, True, False, False, "pax"))):
        data = image.sample(size, nth)
        raw = image.zfile(data, algorithm, block, crc, overwrite, digest)
        if wrap:
            raw = image.tar(raw, pax=wrap == "pax")
        alone(zfile_kind, raw, data)


def zfile_kind(raw, data):
    verify(dm.zfile(dm.Loop(raw), len(raw), len(data)), data + bytes(-len(data) % 512), rounds=16)


for algorithm in image.NAMES:
    for block in BLOCKS:
        add(f"ZFile, {image.NAMES[algorithm]}, {block}", zfile_kinds, algorithm, block)


@test("data that does not compress: the stored blocks are longer than the blocks")
def incompressible():
    data = random.Random(1).randbytes(200000)
    for algorithm in image.NAMES:
        for block in (4096, 65536):
            for crc in (True, False):
                raw = image.zfile(data, algorithm, block, crc)
                alone(zfile_kind, raw, data)


@test("zstd frames with checksums of their own, and without the size of their content")
def frames():
    data = image.sample(200000, 12)
    for block in (512, 4096, 65536):
        for checksum, content_size in ((True, True), (True, False), (False, False)):
            def frame(piece, checksum=checksum, content_size=content_size):
                return image.zstd_frame(piece, checksum, content_size)
            raw = image.zfile(data, image.ZSTD, block, crc=False, compressor=frame)
            alone(zfile_kind, raw, data)


@test("a zstd frame whose own checksum is wrong is corrupt")
def wrong_checksum():
    data = image.sample(16384, 13)
    stored = [image.zstd_frame(data[at:at + 4096], checksum=True) for at in range(0, len(data), 4096)]
    stored[2] = stored[2][:-1] + bytes([stored[2][-1] ^ 1])
    raw = image.zfile_of(stored, len(data), image.ZSTD, crc=False)
    disk = Disk(dm.zfile(dm.Loop(raw), len(raw), len(data)))
    for nth, at in enumerate(range(0, len(data), 4096)):
        for length in (512, 4096):
            wanted = None if nth == 2 else data[at:at + length]
            equal(read_or_none(disk, at, length), wanted, f"{length} bytes at {at}")


@test("data that compresses to almost nothing")
def zeros():
    for algorithm in image.NAMES:
        raw = image.zfile(bytes(1 << 20), algorithm, 65536)
        alone(zfile_kind, raw, bytes(1 << 20))


@test("tar headers: a long pax payload, GNU magic, and a wrapped layer")
def tars():
    data = image.sample(50000, 8)
    raw = image.zfile(data, overwrite=False)
    records = image.pax_record("comment", "x" * 3000)
    alone(zfile_kind, image.tar(raw, records=records), data)
    alone(zfile_kind, image.tar(raw, pax=False, magic=b"ustar  \0"), data)
    layer = image.lsmt(32768, [(1, image.sample(10240, 9))])
    wrapped = image.tar(layer)
    verify(dm.lsmt(32768, (dm.Loop(wrapped), len(wrapped))), image.flatten([image.Lsmt(layer)]), rounds=20)


def random_stack(seed):
    rng = random.Random(seed)
    size = 512 << 10
    raws = []
    for nth in range(rng.randrange(2, 7)):
        raw = image.lsmt(size, image.random_layer(rng, size), pad=rng.randrange(2))
        kind = (seed + nth) % 4
        if kind:
            raw = image.zfile(raw, 1 + kind % 2, 512 << rng.randrange(8), rng.randrange(2), rng.randrange(2))
        if rng.randrange(2):
            raw = image.tar(raw, pax=rng.randrange(2))
        raws.append(raw)
    wanted = image.flatten([stack.layer(raw) for raw in raws])
    verify(stack.open_stack(*raws), wanted, rounds=120)


for number in range(8):
    add(f"random layers {number}, against a simple model", random_stack, number)


@test("layers without data: no segments, or only zeroed ones")
def no_data():
    empty = image.lsmt(65536, [])
    gone = image.lsmt(65536, [(0, 128)])
    full = image.lsmt(65536, [(0, image.sample(65536, 1))])
    for raws in ((empty,), (gone,), (full, empty), (full, gone), (full, gone, empty), (gone, full)):
        wanted = image.flatten([image.Lsmt(raw) for raw in raws])
        verify(stack.open_stack(*raws), wanted, rounds=10)


@test("longest segments: 16383 sectors, and several of them in a row")
def long_segments():
    size = 24 << 20
    lower = image.lsmt(size, [(5, b"\xa5" * 512 * 20000), (30000, b"\x5a" * 512 * 16383)])
    upper = image.lsmt(size, [(16380, 10), (20000, 12000)])
    wanted = image.flatten([image.Lsmt(lower), image.Lsmt(upper)])
    verify(stack.open_stack(lower, upper), wanted, rounds=60)


if __name__ == "__main__":
    main()
