# SPDX-License-Identifier: GPL-2.0
"""Load from obd_bench.ko, and the plans that define its reads."""

import os
import random
import struct
import tempfile

_RUN = "/sys/kernel/debug/obd_bench/run"
_DIRECTORY = tempfile.mkdtemp(prefix="obd-bench-")


class Plan:
    """Ranges (offset in bytes, length, extra) of a file for the load generator to read."""

    _count = 0

    def __init__(self, ranges):
        self.ranges = list(ranges)
        Plan._count += 1
        self.path = f"{_DIRECTORY}/{Plan._count}"
        with open(self.path, "wb") as file:
            file.write(b"".join(struct.pack("<QII", *one) for one in self.ranges))

    def __len__(self):
        return len(self.ranges)


def _run(*words):
    fd = os.open(_RUN, os.O_RDWR)
    try:
        os.write(fd, " ".join(map(str, words)).encode())
        text = os.pread(fd, 4096, 0).decode()
    except OSError as error:
        raise OSError(error.errno, f"{os.strerror(error.errno)}: {' '.join(map(str, words))}") from error
    finally:
        os.close(fd)
    return {name: int(value) for name, value in (row.split() for row in text.splitlines())}


def bios(path, plan, depth=1, threads=1):
    """Reads the ranges of a block device."""
    return _run("bio", path, plan.path, depth, threads)


def beside(path, plan, milliseconds, pause, scan=None):
    """Reads the ranges of a block device, one at a time, with a pause of so many microseconds before each. Meanwhile,
    another thread of the same CPU reads from the device of scan: (path, plan, depth)."""
    other, other_plan, depth = scan or (path, plan, 0)
    return _run("beside", path, plan.path, milliseconds, pause, other, other_plan.path, depth)


def codec(path, plan, algorithm, crc=False):
    """Decompresses the ranges. The extra of each is its decompressed size."""
    return _run("codec", path, plan.path, algorithm, int(crc))


def storm(milliseconds):
    """Has two CPUs interrupt each other and wake each other up, in six phases of this many milliseconds. Returns the
    figures of each phase."""
    return _run("storm", milliseconds)


def files(names, plan, at_once=128 << 10, threads=1, keep=False):
    """Reads ranges of files. The extra of each is the number of the file. With keep, opens all files first."""
    path = f"{_DIRECTORY}/names"
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(f"{name}\n" for name in names)
    return _run("file", path, plan.path, at_once, threads, int(keep))


def drop_caches():
    """Drops the caches of files and block devices."""
    os.sync()
    with open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as file:
        file.write("3")


class Layer:
    """A layer of the image, in ZFiles and merged: where its data is in the file and on the disk."""

    def __init__(self, path, algorithms):
        self.segments = _segments(path)
        self.zfiles = {name: Zfile(blob) for name, blob in algorithms.items()}

    def places(self, count, length, align, seed=1):
        """Returns random places with length bytes of data in one segment, as (offset in the file, on the disk). Each
        starts at a multiple of align in the file."""
        rng = random.Random(seed)
        pieces = [segment for segment in self.segments if segment[2] >= length + align]
        weights = [segment[2] for segment in pieces]
        out = []
        for disk, file, size in rng.choices(pieces, weights, k=count):
            first = -(-file // align)
            last = (file + size - length) // align
            at = rng.randrange(first, last + 1) * align
            out.append((at, disk + at - file))
        return out

    def run(self, total, length):
        """Returns consecutive places with total bytes together."""
        out = []
        for disk, file, size in sorted(self.segments, key=lambda segment: segment[1]):
            for at in range(0, size - length + 1, length):
                out.append((file + at, disk + at))
                if len(out) * length >= total:
                    return out
        return out


def _segments(path):
    """Returns (byte on the disk, byte in the file, bytes) for the data of an uncompressed layer."""
    with open(path, "rb") as file:
        file.seek(-4096, os.SEEK_END)
        index, count = struct.unpack_from("<QQ", file.read(4096), 32)
        file.seek(index)
        words = struct.unpack(f"<{2 * count}Q", file.read(16 * count))
    low = (1 << 50) - 1
    out = []
    for where, what in zip(words[::2], words[1::2]):
        if where & low != low and not what >> 55 & 1:
            disk, length, moffset = where & low, where >> 50, what & (1 << 55) - 1
            if out and out[-1][0] + out[-1][2] == disk * 512 and out[-1][1] + out[-1][2] == moffset * 512:
                out[-1][2] += length * 512
            else:
                out.append([disk * 512, moffset * 512, length * 512])
    return out


class Zfile:
    """The places of a ZFile's blocks."""

    def __init__(self, path):
        with open(path, "rb") as file:
            head = file.read(512)
            index, count, self.size = struct.unpack_from("<QQQ", head, 40)
            self.block, self.algorithm = struct.unpack_from("<IB", head, 72)
            self.crc = bool(head[88])
            file.seek(index)
            lengths = struct.unpack(f"<{count}I", file.read(4 * count))
        self.starts = [512]
        for length in lengths:
            self.starts.append(self.starts[-1] + length)

    def blocks(self, start, length):
        return range(start // self.block, (start + length - 1) // self.block + 1)

    def lower(self, places, length):
        """Yields the read of the blob that each place needs, in whole sectors."""
        for start, _ in places:
            blocks = self.blocks(start, length)
            first = self.starts[blocks.start] // 512 * 512
            yield first, -(-self.starts[blocks.stop] // 512) * 512 - first, 0

    def stored(self, places, length):
        """Yields the stored bytes and the size of each block that places need."""
        for start, _ in places:
            for nth in self.blocks(start, length):
                size = min(self.block, self.size - nth * self.block)
                yield self.starts[nth], self.starts[nth + 1] - self.starts[nth], size

    def needed(self, places, length):
        """Returns the number of stored bytes that places need."""
        return sum(self.starts[b.stop] - self.starts[b.start]
                   for b in (self.blocks(start, length) for start, _ in places))
