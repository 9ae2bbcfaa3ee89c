#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Layers on several kinds of block devices: loop, RAM disk, logical volume, partition, blocks of 4096 bytes, other
targets."""

import errno
import os
import subprocess

from obdtest import dm, golden, image
from obdtest.disk import Disk, fails_with, same_bytes, verify
from obdtest.ktap import Failure, Skip, add, check, defer, equal, main, test
from obdtest.programs import need, need_module, run

DATA = image.sample(500000, 51)
PADDED = DATA + bytes(-len(DATA) % 512)
VSIZE = 512 << 10
LAYER = image.lsmt(VSIZE, [(0, image.sample(300 * 512, 52)), (400, 50), (600, image.sample(100 * 512, 53))])
TOP = image.lsmt(VSIZE, [(5, image.sample(2560, 54)), (700, 100)])
PLAIN = image.flatten([image.Lsmt(LAYER), image.Lsmt(TOP)])
# A layer like LAYER, but its segments are aligned to 8 sectors.
LAYER_4K = image.lsmt(VSIZE, [(0, image.sample(304 * 512, 52)), (400, 48), (600, image.sample(104 * 512, 53))])


class Path:
    """A block device that already exists."""

    def __init__(self, path):
        self.path = path

    def fill(self, raw):
        with open(self.path, "rb+", buffering=0) as file:
            dm.write(file.fileno(), raw)
            os.fsync(file.fileno())


def every_kind(make):
    """Tests ZFiles, and a stack of a compressed layer and one that isn't. make(blob) returns a device of the kind under
    test, with the blob at its start."""
    for overwrite in (True, False):
        raw = image.zfile(DATA, image.ZSTD, overwrite=overwrite)
        verify(dm.zfile(make(raw), len(raw), len(DATA)), PADDED, rounds=20)
    raw = image.tar(image.zfile(LAYER))
    lower = dm.zfile(make(raw), len(raw), len(LAYER))
    verify(dm.lsmt(VSIZE, (lower, len(LAYER)), (make(TOP), len(TOP))), PLAIN, rounds=30)


add("loop devices", every_kind, dm.Loop)
add("loop devices with direct I/O", every_kind, lambda raw: dm.Loop(raw, direct=True))


@test("RAM disks (brd)")
def ram_disks():
    subprocess.run(["rmmod", "brd"], capture_output=True, check=False)
    need_module("brd", options=("rd_nr=4", "rd_size=8192"))
    defer(subprocess.run, ["rmmod", "brd"])
    free = [Path(f"/dev/ram{nth}") for nth in range(4)]

    def make(raw):
        disk = free.pop()
        disk.fill(raw)
        return disk

    every_kind(make)


@test("logical volumes: blobs are shorter than their volume, and have their size or `-' in the table")
def volumes():
    need("pvcreate", "vgcreate", "lvcreate")
    backing = dm.Loop(b"", size=64 << 20, readonly=False)
    group = f"obdtest{os.getpid()}"
    run("pvcreate", "-qq", "-y", backing.path)
    run("vgcreate", "-qq", "-s", "1m", group, backing.path)
    defer(subprocess.run, ["vgremove", "-qq", "-f", group], -1, None, None, subprocess.DEVNULL)
    count = 0

    def make(raw):
        nonlocal count
        count += 1
        run("lvcreate", "-qq", "-y", "-Wn", "-Zn", "-L", "2m", "-n", f"blob{count}", group)
        volume = Path(f"/dev/{group}/blob{count}")
        if not os.path.exists(volume.path):
            run("vgmknodes", group)
        # The blob is followed by older data.
        volume.fill(b"\xee" * (2 << 20))
        volume.fill(raw)
        return volume

    every_kind(make)
    raw = image.zfile(DATA)
    volume = make(raw)
    verify(dm.zfile(volume, "-", len(DATA)), PADDED, rounds=10)
    # A reader of this image needs the trailer, which with `-' must be at the end of the volume.
    volume.fill(image.zfile(DATA, overwrite=False))
    fails_with(errno.EINVAL, dm.zfile, volume, "-", len(DATA))


@test("partitions")
def partitions():
    raw = image.zfile(DATA)
    backing = dm.Loop(b"", size=4 << 20, readonly=False)
    run("sfdisk", "-q", "--no-reread", "--no-tell-kernel", backing.path, input="label: dos\nstart=8, size=4000\n")
    try:
        run("partx", "--add", backing.path)
    except Failure as error:
        raise Skip(str(error)) from None
    part = Path(f"{backing.path}p1")
    defer(subprocess.run, ["partx", "--delete", backing.path])
    part.fill(raw)
    verify(dm.zfile(part, len(raw), len(DATA)), PADDED, rounds=20)


@test("lower device with blocks of 4096 bytes: the zfile device has blocks of 512 bytes")
def large_blocks_zfile():
    for algorithm, block, wrap in ((image.LZ4, 512, False), (image.LZ4, 4096, True), (image.ZSTD, 65536, True)):
        raw = image.zfile(DATA, algorithm, block, overwrite=wrap)
        if wrap:
            raw = image.tar(raw)
        device = dm.zfile(dm.Loop(raw, block=4096), len(raw), len(DATA))
        with open(f"{device.sysfs}/queue/logical_block_size", encoding="ascii") as file:
            equal(file.read(), "512\n", "logical block size")
        verify(device, PADDED, rounds=60)
    lower = dm.zfile(dm.Loop(image.zfile(LAYER), block=4096), "-", len(LAYER))
    verify(dm.lsmt(VSIZE, (lower, len(LAYER)), (dm.Loop(TOP), len(TOP))), PLAIN, rounds=60)


@test("striped lower device: the zfile device doesn't inherit the limits that come from the stripes")
def stripes():
    raw = image.zfile(DATA, image.LZ4, 65536, overwrite=True)
    raw += bytes(-len(raw) % 16384)
    halves = [b"".join(raw[at:at + 4096] for at in range(start, len(raw), 8192)) for start in (0, 4096)]
    log = dm.KernelLog()
    disks = [dm.Loop(half) for half in halves]
    lower = dm.create(dm.line(0, len(raw) // 512, "striped", 2, 8, disks[0].path, 0, disks[1].path, 0))
    size = len(image.zfile(DATA, image.LZ4, 65536, overwrite=True))
    device = dm.zfile(lower, size, len(DATA))
    verify(device, PADDED, rounds=20)
    for name in ("alignment_offset", "queue/chunk_sectors"):
        with open(f"{device.sysfs}/{name}", encoding="ascii") as file:
            equal(file.read(), "0\n", name)
    lines = [text for text in log.lines() if "alignment inconsistency" in text]
    check(not lines, f"kernel log: {lines}")


@test("lower device with blocks of 4096 bytes: aligned layers read, others are refused")
def large_blocks_lsmt():
    device = dm.lsmt(VSIZE, (dm.Loop(LAYER_4K, block=4096), len(LAYER_4K)))
    with open(f"{device.sysfs}/queue/logical_block_size", encoding="ascii") as file:
        equal(file.read(), "4096\n", "logical block size")
    disk = Disk(device)
    wanted = image.flatten([image.Lsmt(LAYER_4K)])
    same_bytes(disk.whole(), wanted, "content")
    for sector in (0, 8, 304, 400, 600, 696):
        same_bytes(disk.read(sector * 512, 8192), wanted[sector * 512:sector * 512 + 8192], f"sector {sector}")
    # The disk `odd` ends within a sector, which is not the first one of a block. Reads of the device end where that
    # sector starts, so they would end within a block: refused, wherever the layer has data.
    end = VSIZE + 7 * 512 + 100
    odd = image.lsmt(end, [(0, image.sample(304 * 512, 52))])
    for size, *blobs in ((VSIZE, (LAYER, 4096)), (VSIZE, (LAYER_4K, 4096), (TOP, 512)), (VSIZE + 4096, (odd, 4096))):
        log = dm.KernelLog()
        fails_with(errno.EINVAL, dm.lsmt, size, *[(dm.Loop(raw, block=block), len(raw)) for raw, block in blobs])
        lines = log.lines()
        check(any("Layers are not aligned to the blocks of their devices" in text for text in lines),
              f"no phrase in the kernel log: {lines}")


@test("layers on devices of different block sizes, aligned to the larger")
def different_blocks():
    # The upper layer hides the unaligned part of the lower one.
    for lower in (LAYER_4K, TOP):
        upper = image.lsmt(VSIZE, [(0, image.sample(304 * 512, 55)), (696, 104)])
        wanted = image.flatten([image.Lsmt(lower), image.Lsmt(upper)])
        device = dm.lsmt(VSIZE, (dm.Loop(lower), len(lower)), (dm.Loop(upper, block=4096), len(upper)))
        same_bytes(Disk(device).whole(), wanted, "content")


@test("loop devices with direct I/O on the golden images' file system: in the test VM 9p, which takes references "
      "to the pages of a bio")
def network_file():
    raw = golden.load("zfile-lsmt/ext4-lz4-4k-tar.obd")
    path = run("losetup", "--read-only", "--direct-io=on", "--find", "--show",
               f"{golden.ROOT}/zfile-lsmt/ext4-lz4-4k-tar.obd").strip()
    defer(subprocess.run, ["losetup", "--detach", path])
    content = image.Zfile(image.unwrap(raw)).read()
    verify(dm.zfile(Path(path), len(raw), len(content)), content, rounds=20)


@test("a stack of 24 devices: lsmt over zfile over lsmt and so on")
def deep_stack():
    wanted = blob = image.sample(64 << 10, 56)
    inside = []
    for nth in range(24):
        inside.append(len(blob))
        if nth % 2:
            blob = image.zfile(blob, (image.LZ4, image.ZSTD)[nth % 4 // 2])
        else:
            blob += bytes(-len(blob) % 512)
            blob = image.lsmt(len(blob), [(0, blob)])
    device, length = dm.Loop(blob), len(blob)
    for nth, size in reversed(list(enumerate(inside))):
        device = dm.zfile(device, length, size) if nth % 2 else dm.lsmt(size, (device, length))
        length = size
    verify(device, wanted, rounds=20)


@test("a zfile device below several lsmt devices: each reads correctly")
def shared():
    raw = image.zfile(LAYER)
    lower = dm.zfile(dm.Loop(raw), len(raw), len(LAYER))
    tops = [image.lsmt(VSIZE, [(nth * 10, image.sample(2048, nth))]) for nth in range(6)]
    devices = [dm.lsmt(VSIZE, (lower, len(LAYER)), (dm.Loop(top), len(top))) for top in tops]
    for device, top in zip(devices, tops):
        verify(device, image.flatten([image.Lsmt(LAYER), image.Lsmt(top)]), rounds=10)
    equal(len(os.listdir(f"{lower.sysfs}/holders")), len(devices), "holders of the shared device")


if __name__ == "__main__":
    main()
