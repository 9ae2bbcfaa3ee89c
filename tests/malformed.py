#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Malformed golden images, with their recorded verdicts, and an image that changes: none may give wrong data.

The malformed images that the tests make are in mutants.py.
"""

import errno
import struct

from obdtest import dm, golden, image
from obdtest.disk import Disk, read_or_none
from obdtest.ktap import add, check, equal, main, same_bytes, test

VERDICTS = golden.rows("malformed/VERDICTS.tsv")
# A layer with segments beyond its virtual size: these are cut off; the rest is correct.
OTHER_SIZE = {"l-past-vsize.lsmt": 65536}


class Refused(Exception):
    """A table was refused. The argument is the phrase."""


def try_device(make, *args):
    """Makes a device. Raises Refused with the kernel's phrase."""
    log = dm.KernelLog()
    try:
        return make(*args)
    except OSError as error:
        phrases = [line.split(": ", 3)[-1] for line in log.lines() if line.startswith("device-mapper: table: ")]
        check(phrases, f"refused ({errno.errorcode[error.errno]}) with no phrase in the kernel log")
        raise Refused(phrases[0]) from None


def claimed_size(raw, limit=1 << 40):
    """Returns the size of the original file that the header of a ZFile or, if that is 0 or too large, the trailer
    claims; 512 if both are 0 or too large."""
    for at in (0, len(raw) - 512):
        size = struct.unpack_from("<Q", raw, at + 56)[0] if len(raw) >= 512 else 0
        if 0 < size < limit:
            return size
    return 512


def read_all(device, wanted):
    """Reads 4 KiB at a time. Returns how many reads failed; the data of the others must be correct."""
    disk = Disk(device)
    equal(disk.size, len(wanted), "size of the device")
    failed = 0
    for at in range(0, len(wanted), 4096):
        data = read_or_none(disk, at, min(4096, len(wanted) - at))
        if data is None:
            failed += 1
        else:
            same_bytes(data, wanted[at:at + 4096], f"4096 bytes at {at}")
    disk.close()
    return failed


def open_like_a_tool(raw, size):
    """Returns an lsmt device of size bytes on a blob, with a zfile device below if the blob is a ZFile. Raises
    Refused."""
    loop = dm.Loop(raw)
    layer = loop, len(raw)
    try:
        claimed = claimed_size(image.unwrap(raw))
        layer = try_device(dm.zfile, loop, len(raw), claimed), claimed
    except Refused as refused:
        if "Not a ZFile" not in str(refused):
            raise
    return try_device(dm.lsmt, size, layer)


def malformed(name):
    raw = golden.load(f"malformed/{name}")
    verdict = VERDICTS[name]["wanted"].rstrip("*")
    good = image.flatten([image.Lsmt(golden.load("malformed/base.lsmt"))])
    wanted = good[:OTHER_SIZE.get(name, len(good))]
    try:
        device = open_like_a_tool(raw, len(wanted))
        failed = read_all(device, wanted)
    except Refused as refused:
        check(verdict != "accept", f"refused: {refused}")
        return
    if verdict == "accept":
        equal(failed, 0, "failed reads")
    elif verdict == "reject":
        check(failed, "every read succeeded")


for image_name in (VERDICTS or [n[10:] for n in golden.NAMES if n.startswith("malformed/")]):
    add(f"malformed/{image_name}", malformed, image_name, alike=True)


@test("an image that changes after the table was loaded gives errors, not other data")
def changed_later():
    data = image.sample(200000, 3)
    raw = image.zfile(data)
    loop = dm.Loop(raw)
    device = dm.zfile(loop, len(raw), len(data))
    loop.write(512, image.zfile(image.sample(200000, 4))[512:len(raw) - 512])
    wanted = data + bytes(-len(data) % 512)
    disk = Disk(device)
    failed = 0
    for at in range(0, len(wanted), 4096):
        found = read_or_none(disk, at, min(4096, len(wanted) - at))
        failed += found is None
        if found is not None:
            same_bytes(found, wanted[at:at + 4096], f"at {at}")
    check(failed, "nothing has failed")


if __name__ == "__main__":
    main()
