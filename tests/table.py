#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Table lines: which ones load, and which are refused with which phrase."""

import errno
import os

from obdtest import dm, image
from obdtest.disk import Disk, fails_with, verify
from obdtest.dm import line
from obdtest.ktap import add, check, equal, main, same_bytes, test

DATA = image.sample(100000, 5)
ZFILE = image.zfile(DATA)
ZLEN = dm.sectors(len(DATA))
VSIZE = 64 << 10
EXTENTS = [(0, image.sample(8192, 6)), (40, 20), (64, image.sample(16384, 7))]
LAYER = image.lsmt(VSIZE, EXTENTS)
LLEN = VSIZE // 512
PLAIN = image.flatten([image.Lsmt(LAYER)])
PADDED = DATA + bytes(-len(DATA) % 512)


def refused(target, phrase, error, length, *args, readonly=True):
    """Loads a line in which ZDEV and LDEV stand for devices. Checks that it is refused with this error and phrase, and
    that the devices are closed."""
    devices = {"ZDEV": dm.Loop(ZFILE).path, "LDEV": dm.Loop(LAYER).path}
    for device in devices.values():
        with open(device, "rb"):
            pass
    args = [devices.get(arg, arg) for arg in args]
    device = dm.Device()
    log = dm.KernelLog()
    fails_with(error, lambda: device.load(line(0, length, target, *args), readonly=readonly))
    lines = [text for text in log.lines() if text.startswith("device-mapper: table: ")]
    equal(len(lines), 1, f"lines of device-mapper in the kernel log, {lines}")
    # Kernels without names of errors log their numbers.
    endings = [f" {target}: {phrase} (-{text})" for text in (errno.errorcode[error], error)]
    check(lines[0].endswith(tuple(endings)), f"the kernel log says {lines[0]!r}, wanted {phrase!r}")
    # The failed constructor has closed its devices.
    for path in devices.values():
        os.close(os.open(path, os.O_RDONLY | os.O_EXCL))


ZSIZE, LSIZE = len(ZFILE), len(LAYER)
EINVAL, ENOENT = errno.EINVAL, errno.ENOENT
LARGER = "Device is larger than its image"
ARGS, OPTIONS = "Unrecognized optional argument", "Invalid number of optional arguments"
LAYERS = "Invalid number of layers"

for title, target, phrase, error, length, args in (
        ("no argument", "zfile", "Missing device", EINVAL, ZLEN, []),
        ("no size", "zfile", "Missing blob size", EINVAL, ZLEN, ["ZDEV"]),
        ("a size that is no number", "zfile", "Invalid blob size", EINVAL, ZLEN, ["ZDEV", "12x"]),
        ("a negative size", "zfile", "Invalid blob size", EINVAL, ZLEN, ["ZDEV", "-1"]),
        ("a size of 2^64", "zfile", "Invalid blob size", EINVAL, ZLEN, ["ZDEV", 1 << 64]),
        ("a size above the device's", "zfile", "Blob is larger than its device", EINVAL, ZLEN, ["ZDEV", 1 << 40]),
        ("a size of 2^64 - 1", "zfile", "Blob is larger than its device", EINVAL, ZLEN, ["ZDEV", (1 << 64) - 1]),
        ("a size of 0", "zfile", "Not a ZFile", EINVAL, ZLEN, ["ZDEV", 0]),
        ("one sector too long", "zfile", LARGER, EINVAL, ZLEN + 1, ["ZDEV", ZSIZE]),
        ("far too long", "zfile", LARGER, EINVAL, 1 << 50, ["ZDEV", ZSIZE]),
        ("no such device", "zfile", "Device lookup failed", ENOENT, ZLEN, ["/dev/nothing", ZSIZE]),
        ("no such number", "zfile", "Device lookup failed", errno.ENXIO, ZLEN, ["250:250", ZSIZE]),
        ("an unknown option", "zfile", ARGS, EINVAL, ZLEN, ["ZDEV", ZSIZE, 1, "surprise"]),
        ("options that aren't counted", "zfile", OPTIONS, EINVAL, ZLEN, ["ZDEV", ZSIZE, "surprise"]),
        ("fewer options than counted", "zfile", OPTIONS, EINVAL, ZLEN, ["ZDEV", ZSIZE, 1]),
        ("an argument after 0 options", "zfile", OPTIONS, EINVAL, ZLEN, ["ZDEV", ZSIZE, 0, "x"]),
        ("a layer that is no ZFile", "zfile", "Not a ZFile", EINVAL, LLEN, ["LDEV", LSIZE]),
        ("no argument", "lsmt", "Missing number of layers", EINVAL, LLEN, []),
        ("0 layers", "lsmt", LAYERS, EINVAL, LLEN, [0]),
        ("256 layers", "lsmt", LAYERS, EINVAL, LLEN, [256] + ["LDEV", LSIZE] * 256),
        ("2^64 layers", "lsmt", LAYERS, EINVAL, LLEN, [1 << 64, "LDEV", LSIZE]),
        ("layers that are no number", "lsmt", LAYERS, EINVAL, LLEN, ["x", "LDEV", LSIZE]),
        ("fewer layers than counted", "lsmt", "Missing device", EINVAL, LLEN, [2, "LDEV", LSIZE]),
        ("no size", "lsmt", "Missing blob size", EINVAL, LLEN, [1, "LDEV"]),
        ("a size that is no number", "lsmt", "Invalid blob size", EINVAL, LLEN, [1, "LDEV", "many"]),
        ("a size above the device's", "lsmt", "Blob is larger than its device", EINVAL, LLEN, [1, "LDEV", 1 << 40]),
        ("one sector too long", "lsmt", LARGER, EINVAL, LLEN + 1, [1, "LDEV", LSIZE]),
        ("an upper layer that is missing", "lsmt", "Device lookup failed", ENOENT, LLEN,
         [2, "LDEV", LSIZE, "/dev/nothing", "-"]),
        ("an unknown option", "lsmt", ARGS, EINVAL, LLEN, [1, "LDEV", LSIZE, 1, "surprise"]),
        ("more layers than counted", "lsmt", OPTIONS, EINVAL, LLEN, [1, "LDEV", LSIZE, "LDEV", LSIZE]),
        ("a ZFile as a layer", "lsmt", "Layer is a ZFile, put a zfile device below", EINVAL, LLEN,
         [1, "ZDEV", ZSIZE]),
        ("no argument", "zfile_target", "Missing device", EINVAL, ZLEN, []),
        ("no argument", "lsmt_target", LAYERS, EINVAL, LLEN, []),
        ("256 pairs", "lsmt_target", LAYERS, EINVAL, LLEN, ["LDEV", LSIZE] * 256),
        ("half a pair", "lsmt_target", "Missing blob size", EINVAL, LLEN, ["LDEV", LSIZE, "LDEV"])):
    add(f"{target}: {title} is refused", refused, target, phrase, error, length, *args)


@test("a table that isn't read-only is refused")
def writable():
    for target, args, length in (("zfile", ["ZDEV", ZSIZE], ZLEN), ("lsmt", [1, "LDEV", LSIZE], LLEN),
                                 ("zfile_target", ["ZDEV", ZSIZE], ZLEN), ("lsmt_target", ["LDEV", LSIZE], LLEN)):
        refused(target, "Device must be readonly", errno.EROFS, length, *args, readonly=False)


@test("a failed constructor keeps no device open")
def nothing_kept():
    # The constructor fails at the last layer, with the others open; it must not leave the module in use.
    loops = [dm.Loop(LAYER) for _ in range(20)] + [dm.Loop(b"nothing" * 100)]
    for _ in range(5):
        fails_with(errno.EINVAL, dm.lsmt, VSIZE, *[(loop, LSIZE) for loop in loops[:-1]], (loops[-1], "-"))
    for loop in loops:
        os.close(os.open(loop.path, os.O_RDONLY | os.O_EXCL))
        check(not os.listdir(f"/sys/block/{os.path.basename(loop.path)}/holders"), f"{loop.path} has a holder")


@test("zfile: '-' for the whole device, with all values in the header")
def whole_device():
    # Garbage after the blob, as on a logical volume.
    loop = dm.Loop(ZFILE + b"garbage" * 2000)
    verify(dm.zfile(loop, "-", len(DATA)), PADDED)


@test("zfile: '-' for the whole device, with the trailer at its end")
def whole_device_trailer():
    raw = image.zfile(DATA, overwrite=False)
    padded = image.tar(raw, pax=True)
    verify(dm.zfile(dm.Loop(padded), "-", len(DATA)), PADDED)
    fails_with(errno.EINVAL, dm.zfile, dm.Loop(raw + bytes(4096)), "-", len(DATA))


@test("lsmt: '-' for the whole device, with the trailer at its end")
def lsmt_whole_device():
    gap = -len(LAYER) % 4096
    raw = LAYER[:-4096] + bytes(gap)
    trailer = LAYER[-4096:]
    verify(dm.lsmt(VSIZE, (dm.Loop(raw + trailer), "-")), PLAIN)


@test("devices are named by path or number; a shorter device shows the first part")
def names_and_lengths():
    loop, layer = dm.Loop(ZFILE), dm.Loop(LAYER)
    for name in (loop.path, loop.number):
        verify(dm.create(line(0, 17, "zfile", name, ZSIZE)), DATA[:17 * 512], rounds=20)
    verify(dm.create(line(0, 33, "lsmt", 1, layer.number, LSIZE, 0)), PLAIN[:33 * 512], rounds=20)


@test("options: none, counted as 0")
def no_options():
    verify(dm.create(line(0, ZLEN, "zfile", dm.Loop(ZFILE).path, ZSIZE, 0)), PADDED, rounds=10)
    verify(dm.create(line(0, LLEN, "lsmt", 1, dm.Loop(LAYER).path, LSIZE, 0)), PLAIN, rounds=10)


@test("the RFC's table lines load: zfile_target and lsmt_target")
def rfc_lines():
    data = image.lsmt(VSIZE, EXTENTS)
    raw = image.zfile(data)
    top = image.lsmt(VSIZE, [(0, image.sample(512, 9)), (100, 10)])
    zfile = dm.create(line(0, dm.sectors(len(data)), "zfile_target", dm.Loop(raw).path, len(raw)))
    device = dm.create(line(0, LLEN, "lsmt_target", zfile.path, len(data), dm.Loop(top).path, len(top)))
    verify(device, image.flatten([image.Lsmt(data), image.Lsmt(top)]))


@test("tables of several targets: each sees sectors from its own start")
def several_targets():
    zloop, layer = dm.Loop(ZFILE), dm.Loop(LAYER)
    table = [line(0, 50, "zfile", zloop.path, ZSIZE), line(50, 7, "zero"),
             line(57, LLEN, "lsmt", 1, layer.path, LSIZE), line(57 + LLEN, ZLEN, "zfile", zloop.path, ZSIZE),
             line(57 + LLEN + ZLEN, 1, "zfile", zloop.path, ZSIZE)]
    wanted = DATA[:50 * 512] + bytes(7 * 512) + PLAIN + PADDED + DATA[:512]
    verify(dm.create(*table), wanted, rounds=200)


@test("a device of 128 targets on one image")
def many_targets():
    zloop = dm.Loop(ZFILE)
    table = [line(nth, 1, "zfile", zloop.path, ZSIZE) for nth in range(128)]
    verify(dm.create(*table), DATA[:512] * 128, rounds=30)


@test("1, 2, 17 and 255 layers; the topmost one has precedence")
def layer_counts():
    # Seventeen images, used repeatedly: making a loop device is slow.
    raws = [image.lsmt(VSIZE, [(nth * 5, bytes([nth + 1]) * 512 * 12), (105 + nth, 3)], pad=False)
            for nth in range(17)]
    loops = [(dm.Loop(raw), len(raw)) for raw in raws]
    for count in (1, 2, 17, 255):
        order = [nth * 7 % 17 for nth in range(count)]
        device = dm.lsmt(VSIZE, *[loops[nth] for nth in order])
        equal(device.info()[0], str(count), "layers in the status")
        verify(device, image.flatten([image.Lsmt(raws[nth]) for nth in order]), rounds=20)


@test("layers of different sizes: the topmost one with a size decides")
def virtual_sizes():
    def layer(size, seed):
        return image.lsmt(size, [(8, image.sample(4096, seed)), (40, 8)])
    for sizes in ((32768, 65536), (65536, 32768), (65536, 32768, 0), (0, 49152, 0, 0)):
        raws = [layer(size, seed) for seed, size in enumerate(sizes)]
        wanted = image.flatten([image.Lsmt(raw) for raw in raws])
        loops = [(dm.Loop(raw), len(raw)) for raw in raws]
        verify(dm.lsmt(len(wanted), *loops), wanted, rounds=10)
        fails_with(errno.EINVAL, dm.lsmt, len(wanted) + 512, *loops)
    fails_with(errno.EINVAL, dm.lsmt, 512, (dm.Loop(layer(0, 1)), 12800))


@test("a size that is no multiple of 512: the tail of the last sector is zeros")
def unaligned_size():
    # There is data beyond the end, which must not be visible.
    for inside in (1, 100, 511):
        size = 8192 + inside
        for extents in ([(0, image.sample(16384, 3))], [(0, image.sample(4096, 3))], [(16, 1)]):
            raw = image.lsmt(size, extents)
            wanted = image.flatten([image.Lsmt(raw)])
            equal(len(wanted), 8704, "length")
            verify(dm.lsmt(size, (dm.Loop(raw), len(raw))), wanted, rounds=20)
    lower, upper = image.lsmt(8200, [(0, image.sample(16384, 4))]), image.lsmt(8200, [(3, image.sample(512, 5))])
    wanted = image.flatten([image.Lsmt(lower), image.Lsmt(upper)])
    verify(dm.lsmt(8200, (dm.Loop(lower), len(lower)), (dm.Loop(upper), len(upper))), wanted, rounds=20)


@test("sectors far above 2 TiB")
def far_sectors():
    far = [(1 << 32) - 4, (1 << 32) + 100, (1 << 40) + 3, (1 << 53) - 8]
    top = (1 << 49) - 16
    far = [sector for sector in far if sector < top] + [top]
    parts = {sector: image.sample(4096, sector) for sector in far}
    raw = image.lsmt((top + 8) * 512, parts.items())
    disk = Disk(dm.lsmt((top + 8) * 512, (dm.Loop(raw), len(raw))))
    equal(disk.size, (top + 8) * 512, "size")
    for sector, data in parts.items():
        same_bytes(disk.read(sector * 512, 4096), data, f"sector {sector}")
        same_bytes(disk.read((sector - 4) * 512, 4096), bytes(2048) + data[:2048], f"sector {sector} - 4")


if __name__ == "__main__":
    main()
