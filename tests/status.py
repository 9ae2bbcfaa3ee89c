#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""What the targets report: all kinds of status, counters, dependencies, IMA measurements."""

import os
import subprocess

from obdtest import dm, image, stack
from obdtest.disk import Disk, read_or_none, verify
from obdtest.dm import line
from obdtest.ktap import Skip, check, equal, main, same_bytes, test

DATA = image.sample(200000, 21)
RAW = image.zfile(DATA)
PADDED = DATA + bytes(-len(DATA) % 512)
LENGTH = dm.sectors(len(DATA))
VSIZE = 128 << 10
LAYERS = [image.lsmt(VSIZE, [(0, image.sample(16384, 1)), (100, 20)]),
          image.lsmt(VSIZE, [(8, 8), (64, image.sample(4096, 2)), (200, image.sample(512, 3))])]
IMA = "/sys/kernel/security/ima"


def numbers(device):
    """Returns the counters of a zfile device: lower reads, their bytes, blocks decompressed, read errors, corrupt
    blocks."""
    return [int(field) for field in device.info()[5:10]]


@test("zfile INFO: state, algorithm, block size, blocks, memory, and counters that start at 0")
def zfile_info():
    for algorithm in image.NAMES:
        for block in (512, 4096, 65536):
            raw = image.zfile(DATA, algorithm, block)
            device = dm.zfile(dm.Loop(raw), len(raw), len(DATA))
            info = device.info()
            check(len(info) >= 10, f"fields: {info}")
            blocks = -(-len(DATA) // block)
            equal(info[:4], ["V", image.NAMES[algorithm], str(block), str(blocks)], "the first fields")
            check(blocks <= int(info[4]) <= 16 * blocks + 4096, f"bytes of the table: {info[4]} for {blocks} blocks")
            equal(info[5:10], ["0"] * 5, "counters")


@test("zfile INFO: a whole read counts each block once, and reads each stored byte once")
def zfile_counters():
    device = dm.zfile(dm.Loop(RAW), len(RAW), len(DATA))
    same_bytes(Disk(device).whole(), PADDED, "content")
    reads, read_bytes, blocks, errors, corrupt = numbers(device)
    equal(blocks, int(device.info()[3]), "blocks decompressed")
    equal((errors, corrupt), (0, 0), "errors")
    check(0 < reads <= blocks, f"lower reads: {reads}")
    stored = len(RAW) - 1024 - 4 * blocks
    check(stored <= read_bytes <= stored + reads * 1024, f"lower bytes: {read_bytes}, stored: {stored}")


@test("zfile INFO: a small read costs one block, not more")
def zfile_small_read():
    device = dm.zfile(dm.Loop(RAW), len(RAW), len(DATA))
    disk = Disk(device)
    disk.read(8192 + 512, 512)
    reads, read_bytes, blocks, *_ = numbers(device)
    equal((reads, blocks), (1, 1), "lower reads and blocks")
    length = image.Zfile(RAW).places()[2][1]
    check(length <= read_bytes <= length + 1022, f"bytes read: {read_bytes} for a block of {length}")


@test("lsmt INFO: layers, segments, size, memory")
def lsmt_info():
    device = stack.open_stack(*LAYERS)
    info = device.info()
    check(len(info) >= 4, f"fields: {info}")
    mapped = [extent for extent in image.merge([image.Lsmt(raw) for raw in LAYERS]) if extent[3] is not None]
    equal(info[0], "2", "layers")
    equal(info[2], str(VSIZE), "virtual size")
    check(len(mapped) <= int(info[1]) <= 2 * len(mapped) + 8, f"segments: {info[1]}, expected at least {len(mapped)}")
    check(int(info[3]) >= 16 * int(info[1]), f"bytes of the index: {info[3]}")


@test("TABLE reloads exactly: every form of line returns the same line, and the same disk")
def table_reloads():
    loop, layers = dm.Loop(RAW), [dm.Loop(raw) for raw in LAYERS]
    wrapped = dm.Loop(RAW + bytes(8192))
    pairs = [arg for blob, raw in zip(layers, LAYERS) for arg in (blob.number, len(raw))]
    for lines in ([line(0, LENGTH, "zfile", loop.number, len(RAW))], [line(0, 9, "zfile", wrapped.number, "-")],
                  [line(0, LENGTH, "zfile_target", loop.number, len(RAW))],
                  [line(0, VSIZE // 512, "lsmt", 2, *pairs)], [line(0, VSIZE // 512, "lsmt_target", *pairs)],
                  [line(0, 10, "zfile", loop.number, len(RAW)), line(10, 5, "lsmt", 1, *pairs[:2])]):
        device = dm.create(*lines)
        shown = device.status(dm.TABLE)
        equal(shown, lines, "table")
        content = Disk(device).whole()
        again = dm.create(*shown)
        equal(again.status(dm.TABLE), shown, "table of the second device")
        same_bytes(Disk(again).whole(), content, "content of the second device")


@test("TABLE names devices by number, as dmsetup prints them")
def table_dmsetup():
    loop = dm.Loop(RAW)
    device = dm.create(line(0, LENGTH, "zfile", loop.path, len(RAW), 0))
    out = subprocess.run(["dmsetup", "table", device.name], capture_output=True, text=True, check=True).stdout
    equal(out, f"0 {LENGTH} zfile {loop.number} {len(RAW)}\n", "dmsetup table")
    out = subprocess.run(["dmsetup", "status", device.name], capture_output=True, text=True, check=True).stdout
    check(out.startswith(f"0 {LENGTH} zfile V lz4 4096 {-(-len(DATA) // 4096)} "), f"dmsetup status: {out!r}")


@test("INFO of 255 layers, and TABLE that is longer than a page")
def long_table():
    loop = dm.Loop(LAYERS[0])
    device = dm.lsmt(VSIZE, *[(loop, len(LAYERS[0]))] * 255)
    wanted = " ".join(["255"] + [f"{loop.number} {len(LAYERS[0])}"] * 255)
    equal(device.status(dm.TABLE)[0][3], wanted, "table")
    equal(device.info()[0], "255", "layers")


@test("dependencies: dmsetup deps and holders show every lower device")
def dependencies():
    loops = [dm.Loop(raw) for raw in LAYERS]
    zloop = dm.Loop(image.zfile(LAYERS[0]))
    zdevice = dm.zfile(zloop, zloop.size, len(LAYERS[0]))
    equal(zdevice.deps(), [zloop.number], "below zfile")
    device = dm.lsmt(VSIZE, (zdevice, len(LAYERS[0])), *[(loop, len(raw)) for loop, raw in zip(loops, LAYERS)])
    equal(device.deps(), sorted([zdevice.number] + [loop.number for loop in loops]), "below lsmt")
    for below in (zdevice, *loops):
        name = os.path.basename(below.path)
        equal(os.listdir(f"/sys/block/{name}/holders"), [os.path.basename(device.path)], f"holders of {name}")
    out = subprocess.run(["dmsetup", "deps", zdevice.name], capture_output=True, text=True, check=True).stdout
    equal(out.strip(), "1 dependencies\t: ({}, {})".format(*zloop.number.split(":")), "dmsetup deps")


@test("IMA status: name, version, devices and the image's parameters")
def ima_status():
    loop = dm.Loop(RAW)
    device = dm.zfile(loop, len(RAW), len(DATA))
    text = device.status(dm.IMA)[0][3]
    check(text.startswith("target_name=zfile,target_version=") and text.endswith(";"), f"zfile: {text!r}")
    for part in (f",device={loop.number}", ",algorithm=lz4", ",block_size=4096", f",size={len(DATA)}", ",crc=y"):
        check(part in text, f"zfile: {part} isn't in {text!r}")
    top = stack.open_stack(*LAYERS)
    text = top.status(dm.IMA)[0][3]
    check(text.startswith("target_name=lsmt,target_version=") and text.endswith(";"), f"lsmt: {text!r}")
    for part in (",layers=2", f",size={VSIZE}", *(f",device_{nth}={dep}" for nth, dep in enumerate(top.deps()))):
        check(part in text, f"lsmt: {part} isn't in {text!r}")


@test("IMA measures the table")
def ima_measures():
    if not os.path.exists(IMA):
        subprocess.run(["mount", "-t", "securityfs", "securityfs", "/sys/kernel/security"], check=False)
    if not os.path.exists(IMA):
        raise Skip("this kernel has no IMA")
    try:
        with open(f"{IMA}/policy", "w", encoding="ascii") as policy:
            policy.write("measure func=CRITICAL_DATA label=device-mapper template=ima-buf\n")
    except OSError as error:
        raise Skip(f"the IMA policy cannot be set: {error.strerror}") from None
    device = dm.zfile(dm.Loop(RAW), len(RAW), len(DATA))
    with open(f"{IMA}/ascii_runtime_measurements", encoding="ascii") as file:
        events = [row.split() for row in file if "dm_table_load" in row]
    check(events, "no event dm_table_load")
    measured = bytes.fromhex(events[-1][-1]).decode()
    wanted = device.status(dm.IMA)[0][3]
    check(wanted in measured, f"{wanted!r} isn't in {measured!r}")


@test("a corrupt block: an I/O error, C in the status until reloaded, counters, one line in the log")
def corrupt_block():
    offset, length = image.Zfile(RAW).places()[5]
    broken = bytearray(RAW)
    broken[offset + length // 2] ^= 0x40
    loop = dm.Loop(bytes(broken))
    device = dm.zfile(loop, len(RAW), len(DATA))
    log = dm.KernelLog()
    disk = Disk(device)
    for at in range(0, len(PADDED), 4096):
        data = read_or_none(disk, at, min(4096, len(PADDED) - at))
        if at == 5 * 4096:
            equal(data, None, "read of the corrupt block")
        else:
            same_bytes(data or b"", PADDED[at:at + 4096], f"block {at // 4096}")
    equal(device.info()[0], "C", "state")
    equal(numbers(device)[3:], [0, 1], "lower errors and corrupt blocks")
    lines = [text for text in log.lines() if "zfile: block 5 is corrupt" in text]
    equal(len(lines), 1, "lines in the kernel log")
    check(device.number in lines[0], f"{device.number} isn't in {lines[0]!r}")
    # Reading good blocks doesn't reset the state; a new table does.
    same_bytes(disk.read(0, 4096), DATA[:4096], "block 0 again")
    equal(device.info()[0], "C", "state afterwards")
    loop.write(0, RAW)
    same_bytes(disk.read(5 * 4096, 4096), DATA[5 * 4096:6 * 4096], "block 5 when it is good again")
    equal(device.info()[0], "C", "state when it is good again")
    disk.close()
    device.load(line(0, LENGTH, "zfile", loop.path, len(RAW)))
    device.resume()
    equal(device.info()[0], "V", "state of a new table")
    verify(device, PADDED, rounds=10)


@test("a thousand reads of corrupt blocks don't flood the log")
def rate_limit():
    places = image.Zfile(RAW).places()
    broken = bytearray(RAW)
    for offset, length in places:
        broken[offset + length // 2] ^= 1
    device = dm.zfile(dm.Loop(bytes(broken)), len(RAW), len(DATA))
    log = dm.KernelLog()
    disk = Disk(device)
    for _ in range(25):
        for at in range(0, 40 * 4096, 4096):
            equal(read_or_none(disk, at, 4096), None, f"read at {at}")
    count = sum("is corrupt" in text for text in log.lines())
    check(0 < count <= 60, f"{count} lines in the kernel log")
    equal(numbers(device)[4], 1000, "corrupt blocks")


@test("no CRC: a block that does not decompress is corrupt")
def corrupt_without_crc():
    for algorithm in image.NAMES:
        raw = bytearray(image.zfile(DATA, algorithm, 16384, crc=False))
        offset, length = image.Zfile(bytes(raw)).places()[1]
        raw[offset:offset + length] = b"\xff" * length
        device = dm.zfile(dm.Loop(bytes(raw)), len(raw), len(DATA))
        disk = Disk(device)
        equal(read_or_none(disk, 16384, 512), None, "a part of the block")
        equal(read_or_none(disk, 16384, 16384), None, "the block")
        same_bytes(disk.read(0, 16384), DATA[:16384], "the block before")
        equal(device.info()[0], "C", "state")


if __name__ == "__main__":
    main()
