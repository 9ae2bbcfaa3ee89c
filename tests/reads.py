#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Reads of any place, size and memory layout; writes and discards; queue limits."""

import errno
import fcntl
import mmap
import os
import random
import struct
import subprocess
import threading

from obdtest import dm, image, stack
from obdtest.disk import Disk, fails_with, same_bytes, verify_random
from obdtest.ktap import Failure, add, check, equal, main, test

SIZE = 300 << 10
RNG = random.Random(11)
LAYER = image.lsmt(SIZE, image.random_layer(RNG, SIZE, 40, 40))
PLAIN = image.flatten([image.Lsmt(LAYER)])


def zfile_disk(block=4096, algorithm=image.LZ4, **loop_options):
    """Returns a zfile device, and its content."""
    raw = image.zfile(PLAIN, algorithm, block)
    return dm.zfile(dm.Loop(raw, **loop_options), len(raw), len(PLAIN)), PLAIN


def lsmt_disk():
    """Returns an lsmt device on a loop device that can be written to, and its content."""
    return stack.open_stack(LAYER, readonly=False), PLAIN


def stacked_disk():
    """Returns an lsmt device on a zfile device, and its content."""
    return stack.open_stack(image.zfile(LAYER, image.ZSTD, 16384)), PLAIN


DISKS = {"zfile lz4 512": lambda: zfile_disk(512), "zfile lz4 4096": zfile_disk,
         "zfile zstd 65536": lambda: zfile_disk(65536, image.ZSTD), "lsmt": lsmt_disk, "lsmt on zfile": stacked_disk}


def every_size(make):
    """Reads 1, 2, 3... sectors around block boundaries."""
    device, wanted = make()
    disk = Disk(device)
    for start in (0, 1, 7, 8, 15, 127, 128):
        for count in (1, 2, 3, 5, 8, 9, 31, 33, 129, 257, 300):
            offset, length = start * 512, count * 512
            same_bytes(disk.read(offset, length), wanted[offset:offset + length], f"{count} sectors at {start}")
    last = len(wanted) // 512
    for count in (1, 2, 9, 130):
        same_bytes(disk.read((last - count) * 512, count * 512), wanted[-count * 512:], f"the last {count} sectors")
    equal(disk.read(len(wanted), 512), b"", "read after the end")


def scattered(make):
    """Single reads into many pieces of memory, each with its own size and alignment."""
    device, wanted = make()
    disk = Disk(device)
    rng = random.Random(5)
    for _ in range(60):
        lengths = [rng.choice((512, 1024, 1536, 3584, 4096, 4608, 8192)) for _ in range(rng.randrange(1, 40))]
        total = sum(lengths)
        offset = rng.randrange((len(wanted) - total) // 512) * 512
        got = disk.read_pieces(offset, lengths, gap=rng.choice((512, 1024, 2560)))
        same_bytes(got, wanted[offset:offset + total], f"{len(lengths)} pieces of {total} bytes at {offset}")


def unaligned_memory(make):
    """Direct reads into memory that is aligned just as the queue's dma_alignment requires."""
    device, wanted = make()
    disk = Disk(device)
    with open(f"{device.sysfs}/queue/dma_alignment", encoding="ascii") as file:
        step = int(file.read()) + 1
    check(step <= 512, f"dma_alignment {step - 1} requires more than the size of a sector")
    area = memoryview(mmap.mmap(-1, 1 << 20))
    rng = random.Random(6)
    for _ in range(60):
        at = rng.randrange(1, 4096 // step) * step
        offset, length = rng.randrange(400) * 512, rng.randrange(1, 60) * 512
        area[at - step:at] = b"#" * step
        area[at + length:at + length + 8] = b"########"
        got = os.preadv(disk.direct, [area[at:at + length]], offset)
        same_bytes(bytes(area[at:at + got]), wanted[offset:offset + length], f"{length} bytes at {offset} to +{at}")
        equal(bytes(area[at - step:at]) + bytes(area[at + length:at + length + 8]), b"#" * (step + 8),
              "memory around the buffer")


def many_readers(make):
    """Eight concurrent readers, two for each sequence of places."""
    device, wanted = make()
    disk = Disk(device)
    errors = []

    def reader(seed):
        try:
            verify_random(disk, wanted, random.Random(seed), 60)
        except (Failure, OSError) as error:
            errors.append(error)

    threads = [threading.Thread(target=reader, args=(seed // 2,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check(not errors, f"{errors[:1]}")


def no_writes(make):
    """Writes, discards and requests to write zeros are refused, and nothing changes."""
    device, wanted = make()
    equal(device.readonly(), True, "read-only flag")
    with open(f"{device.sysfs}/ro", encoding="ascii") as file:
        equal(file.read(), "1\n", "sysfs ro")
    try:
        fd = os.open(device.path, os.O_RDWR)
    except OSError as error:
        equal(error.errno, errno.EACCES, "opening for writing")
        fd = os.open(device.path, os.O_RDONLY)
        fails_with(errno.EBADF, os.pwrite, fd, b"x" * 512, 0)
    else:
        fails_with(errno.EPERM, os.pwrite, fd, b"x" * 512, 0)
    # BLKDISCARD, BLKZEROOUT, BLKSECDISCARD
    for request in (0x1277, 0x127F, 0x127D):
        try:
            fcntl.ioctl(fd, request, struct.pack("=QQ", 0, 4096))
            check(False, f"ioctl {request:#x} has succeeded")
        except OSError as error:
            check(error.errno in (errno.EBADF, errno.EPERM, errno.EACCES, errno.EOPNOTSUPP), f"ioctl: {error}")
    os.close(fd)
    same_bytes(Disk(device).whole(), wanted, "content")


for disk_name, make_disk in DISKS.items():
    add(f"{disk_name}: reads of every size", every_size, make_disk)
    add(f"{disk_name}: reads into scattered memory", scattered, make_disk)
    add(f"{disk_name}: reads to unaligned memory", unaligned_memory, make_disk)
    add(f"{disk_name}: many readers", many_readers, make_disk)
    add(f"{disk_name}: no writes", no_writes, make_disk)


@test("a write from a target above fails, and changes nothing")
def write_from_above():
    # The read-only flag stops user space, but not a target above.
    for device, wanted in (zfile_disk(readonly=False), lsmt_disk()):
        above = dm.linear(device, len(wanted) // 512)
        fd = os.open(above.path, os.O_RDWR | os.O_DIRECT)
        area = mmap.mmap(-1, 4096)
        area.write(b"x" * 4096)
        try:
            fails_with(errno.EIO, os.pwritev, fd, [area], 0)
        finally:
            os.close(fd)
        same_bytes(Disk(above).whole(), wanted, "content")


def asynchronous(engine):
    """Many requests in flight, issued by fio."""
    device, wanted = zfile_disk(16384, image.ZSTD)
    run = subprocess.run(
        ["fio", "--name=obd", f"--filename={device.path}", "--readonly", "--rw=randread", "--direct=1",
         f"--ioengine={engine}", "--iodepth=32", "--bsrange=512-131072", "--blockalign=512", "--numjobs=1",
         "--io_size=6m", "--thread", "--output-format=terse", "--terse-version=3"],
        capture_output=True, text=True, check=False)
    equal(run.returncode, 0, f"status of fio ({run.stderr.strip()[:300]})")
    check(int(run.stdout.split(";")[5]) > 1000, "fio has read too little")
    same_bytes(Disk(device).whole(), wanted, "content afterwards")


for each_engine in ("libaio", "io_uring"):
    add(f"reads with many requests in flight (fio, direct, {each_engine})", asynchronous, each_engine)


def must_not_wait(make):
    """Reads that must not wait return the correct bytes or fail with EAGAIN or EOPNOTSUPP."""
    device, wanted = make()
    disk = Disk(device)
    area = mmap.mmap(-1, 65536)
    for at in range(0, len(wanted) - 65536, 4096):
        try:
            got = os.preadv(disk.direct, [area], at, os.RWF_NOWAIT)
        except OSError as error:
            check(error.errno in (errno.EAGAIN, errno.EOPNOTSUPP), f"error: {error}")
        else:
            same_bytes(area[:got], wanted[at:at + got], f"{got} bytes at {at}")
    same_bytes(disk.whole(), wanted, "content afterwards")


for disk_name, make_disk in DISKS.items():
    add(f"{disk_name}: reads that must not wait", must_not_wait, make_disk)


@test("queue limits: zfile")
def zfile_limits():
    for block in (512, 4096, 65536):
        device, _ = zfile_disk(block)
        limits = queue(device)
        equal(limits["logical_block_size"], 512, "logical block size")
        equal(limits["physical_block_size"], block, "physical block size")
        equal(limits["minimum_io_size"], block, "minimum I/O size")
        check(limits["optimal_io_size"] >= block and limits["optimal_io_size"] % block == 0,
              f"optimal I/O size {limits['optimal_io_size']}")
        equal(limits["dma_alignment"], 511, "DMA alignment")
        equal(limits["discard_max_bytes"], 0, "discard")
        equal(limits["write_zeroes_max_bytes"], 0, "write zeroes")


@test("queue limits: lsmt has the limits of its lower devices")
def lsmt_limits():
    device, _ = stacked_disk()
    limits = queue(device)
    equal(limits["logical_block_size"], 512, "logical block size")
    equal(limits["physical_block_size"], 16384, "physical block size")
    equal(limits["discard_max_bytes"], 0, "discard")


def queue(device):
    """Returns the limits in a device's queue directory."""
    out = {}
    for name in ("logical_block_size", "physical_block_size", "minimum_io_size", "optimal_io_size",
                 "dma_alignment", "discard_max_bytes", "write_zeroes_max_bytes"):
        with open(f"{device.sysfs}/queue/{name}", encoding="ascii") as file:
            out[name] = int(file.read())
    return out


if __name__ == "__main__":
    main()
