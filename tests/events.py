#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Notifications of a corrupt block or a failed read: an event of device-mapper, a uevent, and lines in the kernel's log."""

import errno
import os
import select
import socket
import subprocess
import time

from obdtest import dm, image
from obdtest.disk import Disk, read_or_none, same_bytes
from obdtest.dm import line
from obdtest.ktap import SLOW, add, check, defer, equal, main, test

DATA = image.sample(40 * 65536, 61)
NETLINK_KOBJECT_UEVENT = 15


def corrupted(numbers, algorithm, block):
    """Returns a ZFile with corrupt blocks."""
    raw = bytearray(image.zfile(DATA, algorithm, block))
    places = image.Zfile(bytes(raw)).places()
    for number in numbers:
        raw[places[number][0] + 3] ^= 1
    return bytes(raw)


def device(raw, *options):
    loop = dm.Loop(raw)
    return dm.create(line(0, dm.sectors(len(DATA)), "zfile", loop.path, len(raw), len(options), *options))


def events(zfile):
    """Returns the device's number of events."""
    out = subprocess.run(["dmsetup", "info", "-c", "--noheadings", "-o", "events", zfile.name], capture_output=True,
                         text=True, check=True)
    return int(out.stdout)


class Uevents:
    """The uevents of a device that have a variable, from now on."""

    def __init__(self, zfile, variable="DM_ZFILE_CORRUPT_BLOCK"):
        self.variable = variable
        self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_KOBJECT_UEVENT)
        defer(self.socket.close)
        self.socket.bind((0, 1))
        self.minor = zfile.number.split(":")[1]

    def values(self, seconds):
        """Waits up to `seconds` for the next of these uevents. Returns [the variable's value], [] without a uevent."""
        end, found = time.monotonic() + seconds, []
        while not found and select.select([self.socket], [], [], max(end - time.monotonic(), 0))[0]:
            fields = dict(field.split("=", 1) for field in self.socket.recv(65536).decode(errors="replace").split("\0")
                          if "=" in field)
            if fields.get("MINOR") == self.minor and self.variable in fields:
                equal((fields["ACTION"], fields["SUBSYSTEM"]), ("change", "block"), "kind of uevent")
                found.append(int(fields[self.variable]))
        return found


def first(algorithm, block, length, *options):
    """The first corrupt block causes one event, which wakes a waiter, and one uevent. Further corrupt blocks cause
    none."""
    zfile = device(corrupted((5, 7), algorithm, block), *options)
    uevents, log = Uevents(zfile), dm.KernelLog()
    before = events(zfile)
    disk = Disk(zfile)
    same_bytes(disk.read(0, length), DATA[:length], "a sound block")
    with subprocess.Popen(["dmsetup", "wait", "--noflush", zfile.name, str(before)], stdout=subprocess.DEVNULL) as waiter:
        defer(waiter.kill)
        time.sleep(0.3 * SLOW)
        equal((waiter.poll(), events(zfile), uevents.values(0)), (None, before, []), "wait, events before")
        equal(read_or_none(disk, 5 * block, length), None, "a corrupt block")
        equal(waiter.wait(20 * SLOW), 0, "status of dmsetup wait")
    equal(uevents.values(5 * SLOW), [5], "blocks that uevents name")
    equal(events(zfile), before + 1, "events")
    said = f"{zfile.number}: the first fault of device {zfile.name}"
    equal(sum(said in row for row in log.lines()), 1, "lines with the device's name")
    for number in (7, 5, 7):
        equal(read_or_none(disk, number * block, length), None, f"corrupt block {number}")
    equal((uevents.values(0.5), events(zfile)), ([], before + 1), "uevents, events later")
    disk.close()


@test("after a reload, the first corrupt block is reported again")
def again():
    raw = corrupted((5,), image.LZ4, 4096)
    zfile = device(raw)
    loop = dm.Loop(raw)
    for _ in range(2):
        before, uevents = events(zfile), Uevents(zfile)
        disk = Disk(zfile)
        equal(read_or_none(disk, 5 * 4096, 4096), None, "a corrupt block")
        disk.close()
        equal(uevents.values(5 * SLOW), [5], "blocks that uevents name")
        check(events(zfile) > before, "no event")
        zfile.load(line(0, dm.sectors(len(DATA)), "zfile", loop.path, len(raw)))
        zfile.suspend()
        zfile.resume()


def fail(lower, content):
    """Replaces the table of a device with a table that fails all reads."""
    lower.load(line(0, dm.sectors(len(content)), "error"))
    lower.resume()


def reads(device):
    """Returns the number of reads of a device that have ended."""
    with open(f"/sys/dev/block/{device.number}/stat", encoding="ascii") as file:
        return int(file.read().split()[0])


def failed_reads(device):
    """Returns the number of failed reads in an lsmt device's status."""
    return int(device.info()[4])


@test("lsmt: the first failed read gives one event and one uevent; all are counted")
def lsmt():
    layer = image.lsmt(len(DATA), [(0, DATA)])
    lower = dm.linear(dm.Loop(layer), dm.sectors(len(layer)), readonly=True)
    stack = dm.lsmt(len(DATA), (lower, len(layer)))
    before, uevents = events(stack), Uevents(stack, "DM_LSMT_READ_ERROR")
    disk = Disk(stack)
    same_bytes(disk.read(0, 65536), DATA[:65536], "a good read")
    equal((failed_reads(stack), events(stack), uevents.values(0)), (0, before, []), "before")
    fail(lower, layer)
    for nth in range(3):
        equal(read_or_none(disk, nth * 4096, 4096), None, f"failed read {nth}")
    equal(uevents.values(5 * SLOW), [errno.EIO], "errors that uevents name")
    equal(uevents.values(0.5), [], "later uevents")
    equal((failed_reads(stack), events(stack)), (3, before + 1), "failed reads, events")
    disk.close()


@test("lsmt: a corrupt block of a layer gives an event of the disk, too")
def lsmt_on_zfile():
    layer = image.lsmt(len(DATA), [(0, DATA)])
    raw = bytearray(image.zfile(layer, image.LZ4, 4096))
    raw[image.Zfile(bytes(raw)).places()[6][0] + 3] ^= 1  # block 0 has the layer's header
    zfile = dm.zfile(dm.Loop(bytes(raw)), len(raw), len(layer))
    stack = dm.lsmt(len(DATA), (zfile, len(layer)))
    lower, upper = Uevents(zfile), Uevents(stack, "DM_LSMT_READ_ERROR")
    disk = Disk(stack)
    equal(read_or_none(disk, 5 * 4096, 4096), None, "a corrupt block")
    disk.close()
    equal((lower.values(5 * SLOW), upper.values(5 * SLOW)), ([6], [errno.EIO]), "uevents of the layer, of the disk")
    equal(failed_reads(stack), 1, "failed reads")


@test("lsmt: a failed read-ahead doesn't count as a failed read")
def lsmt_optional():
    layer = image.lsmt(len(DATA), [(0, DATA)])
    lower = dm.linear(dm.Loop(layer), dm.sectors(len(layer)), readonly=True)
    stack = dm.lsmt(len(DATA), (lower, len(layer)))
    fail(lower, layer)
    before = reads(stack)
    with open(stack.path, "rb") as file:
        os.posix_fadvise(file.fileno(), 65536, 65536, os.POSIX_FADV_WILLNEED)
        time.sleep(SLOW)
    check(reads(stack) > before, "no read-ahead was sent")
    equal(failed_reads(stack), 0, "failed reads after read-ahead")
    disk = Disk(stack)
    equal(read_or_none(disk, 0, 4096), None, "a failed read")
    disk.close()
    equal(failed_reads(stack), 1, "failed reads")


@test("a device that is removed immediately after its first corrupt block")
def removed():
    raw = corrupted((5,), image.LZ4, 4096)
    loop = dm.Loop(raw)
    for _ in range(20):
        zfile = dm.create(line(0, dm.sectors(len(DATA)), "zfile", loop.path, len(raw)))
        disk = Disk(zfile)
        equal(read_or_none(disk, 5 * 4096, 4096), None, "a corrupt block")
        disk.close()
        zfile.remove()
        check(not zfile.exists(), "the device is still there")


@test("a device with many corrupt blocks doesn't silence the log about others")
def limits():
    many, one = device(corrupted(range(40), image.LZ4, 4096)), device(corrupted((5,), image.LZ4, 4096))
    log = dm.KernelLog()
    disk = Disk(many)
    for number in range(40):
        equal(read_or_none(disk, number * 4096, 4096), None, f"corrupt block {number}")
    said = [row for row in log.lines() if f"{many.number}: zfile: block" in row]
    check(3 < len(said) < 40, f"{len(said)} lines about 40 blocks")
    other = Disk(one)
    equal(read_or_none(other, 5 * 4096, 4096), None, "the corrupt block of the other device")
    said = [row for row in log.lines() if f"{one.number}: zfile: block 5 is corrupt" in row]
    equal(len(said), 1, "lines about the other device")
    disk.close()
    other.close()


for each_title, each_args in {"LZ4, in the completion": (image.LZ4, 4096, 4096, "cache_blocks", 0),
                              "LZ4, a part of a block": (image.LZ4, 65536, 4096),
                              "zstd, in a worker": (image.ZSTD, 65536, 65536, "cache_blocks", 0),
                              "zstd, cache_all": (image.ZSTD, 16384, 16384, "cache_all")}.items():
    add(f"{each_title}: the first corrupt block gives one event and one uevent", first, *each_args)


if __name__ == "__main__":
    main()
