#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""The kernel panics on a corrupt block if the table line asks for it. This ends the guest, so scripts/check.sh boots a
guest for this test and checks how it ended."""

from obdtest import dm, image
from obdtest.disk import Disk, same_bytes
from obdtest.dm import line
from obdtest.ktap import Failure, check, main, note, test

BLOCK = 4096
DATA = image.sample(16 * BLOCK, 21)


@test("a corrupt block panics the kernel only if the table line asks for it")
def corrupt():
    raw = bytearray(image.zfile(DATA, image.LZ4, BLOCK))
    offset, _ = image.Zfile(bytes(raw)).places()[3]
    raw[offset] ^= 0xff
    loop = dm.Loop(bytes(raw))
    table = (0, len(DATA) // 512, "zfile", loop.path, len(raw))
    disk = Disk(dm.create(line(*table)))
    try:
        disk.read(3 * BLOCK, BLOCK)
    except OSError as error:
        check(True, f"an error without the option: {error}")
    else:
        raise Failure("the corrupt block was read")
    disk.close()
    disk = Disk(dm.create(line(*table, 1, "panic_on_corruption")))
    same_bytes(disk.read(0, BLOCK), DATA[:BLOCK], "another block")
    note("now the kernel has to panic")
    disk.read(3 * BLOCK, BLOCK)
    raise Failure("the kernel has not panicked")


if __name__ == "__main__":
    main()
