# SPDX-License-Identifier: GPL-2.0
"""Reads block devices in several ways, and compares the data with the expected content."""

import errno
import fcntl
import hashlib
import mmap
import os
import random
import threading

from .ktap import SLOW, check, defer, equal, same_bytes

_FLSBUF, _GETSIZE64 = 0x1261, 0x80081272


class Disk:
    """A block device that is open for buffered and for direct reads."""

    def __init__(self, device):
        path = getattr(device, "path", device)
        self.buffered = os.open(path, os.O_RDONLY)
        self.direct = os.open(path, os.O_RDONLY | os.O_DIRECT)
        self.size = int.from_bytes(fcntl.ioctl(self.buffered, _GETSIZE64, bytes(8)), "little")
        self.closed = False
        self.buffers = {}
        defer(self.close)

    def close(self):
        if not self.closed:
            self.closed = True
            self.buffers.clear()
            os.close(self.buffered)
            os.close(self.direct)

    def flush(self):
        """Drops the device's pages from the page cache."""
        fcntl.ioctl(self.buffered, _FLSBUF)

    def _buffer(self, length):
        key = threading.get_ident()
        if key not in self.buffers or len(self.buffers[key]) < length:
            self.buffers[key] = mmap.mmap(-1, max(length, 1 << 20))
        return self.buffers[key]

    def read(self, offset, length):
        """Reads whole sectors with direct I/O; offset and length are in bytes. Stops at the end of the device."""
        view = memoryview(self._buffer(length))[:length]
        done = 0
        while done < length:
            got = os.preadv(self.direct, [view[done:]], offset + done)
            if not got:
                break
            done += got
        return bytes(view[:done])

    def read_pieces(self, offset, lengths, gap=512):
        """Reads with one direct read into several buffers, which are gap bytes apart in memory. The lengths, in bytes,
        are multiples of 512."""
        total = sum(lengths)
        area = memoryview(self._buffer(total + gap * (len(lengths) + 1)))
        pieces, at = [], gap
        for length in lengths:
            pieces.append(area[at:at + length])
            at += length + gap
        got = os.preadv(self.direct, pieces, offset)
        return b"".join(bytes(piece) for piece in pieces)[:got]

    def read_buffered(self, offset, length):
        """Reads any bytes through the page cache. Stops at the end of the device."""
        out = b""
        while len(out) < length:
            got = os.pread(self.buffered, length - len(out), offset + len(out))
            if not got:
                break
            out += got
        return out

    def whole(self, chunk=1 << 20):
        """Reads the whole device with direct I/O."""
        return b"".join(self.read(at, min(chunk, self.size - at)) for at in range(0, self.size, chunk))


def fails_with(error, function, *args):
    """Checks that a call fails with this errno."""
    try:
        function(*args)
    except OSError as caught:
        equal(errno.errorcode[caught.errno], errno.errorcode[error], "error")
        return
    check(False, f"no error, {errno.errorcode[error]} was expected")


def read_or_none(disk, offset, length):
    """Reads with direct I/O. Returns None if that fails with EIO."""
    try:
        return disk.read(offset, length)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return None


def verify_sha256(device, sha256, size):
    """Checks all of a device: the first `size` bytes by their hash, and zeros after them, up to the end of the sector.
    Returns all bytes."""
    disk = Disk(device)
    data = disk.whole()
    disk.close()
    equal(len(data), -(-size // 512) * 512, "size of the device")
    equal(hashlib.sha256(data[:size]).hexdigest(), sha256, "sha256")
    same_bytes(data[size:], bytes(len(data) - size), "rest of the last sector")
    return data


def verify(device, wanted, seed=1, rounds=60, whole=True):
    """Checks a device: the whole of it with direct reads (if whole is set) and buffered reads, then single sectors, odd
    sizes and random places (fewer on slow kernels), also from several threads."""
    rounds = -(-rounds // SLOW)
    disk = Disk(device)
    equal(disk.size, len(wanted), "size of the device")
    if whole:
        same_bytes(disk.whole(), wanted, "direct reads of 1 MiB")
    disk.flush()
    same_bytes(disk.read_buffered(0, len(wanted)), wanted, "buffered reads")
    disk.flush()
    rng = random.Random(seed)
    verify_random(disk, wanted, rng, rounds)
    errors = []

    def reader(number):
        try:
            verify_random(disk, wanted, random.Random(seed * 1000 + number), rounds // 2)
        except Exception as error:  # pylint: disable=broad-except
            errors.append(error)

    readers = [threading.Thread(target=reader, args=(number,)) for number in range(4 // min(SLOW, 2))]
    for thread in readers:
        thread.start()
    for thread in readers:
        thread.join()
    disk.close()
    if errors:
        raise errors[0]


def verify_random(disk, wanted, rng, rounds):
    """Checks reads at random places."""
    last = len(wanted) // 512
    for _ in range(rounds if last else 0):
        start = rng.randrange(last)
        kind = rng.randrange(4)
        if kind == 0:
            offset, length = start * 512, 512
            got = disk.read(offset, length)
        elif kind == 1:
            offset = start * 512
            length = min(rng.randrange(1, 200), last - start) * 512
            got = disk.read(offset, length)
        elif kind == 2:
            offset = start * 512
            lengths = [rng.randrange(1, 9) * 512 for _ in range(rng.randrange(1, 9))]
            while sum(lengths) > len(wanted) - offset and len(lengths) > 1:
                lengths.pop()
            lengths[0] = min(lengths[0], len(wanted) - offset)
            length = min(sum(lengths), len(wanted) - offset)
            got = disk.read_pieces(offset, lengths)
        else:
            offset = start * 512 + rng.randrange(512)
            length = min(rng.randrange(1, 70001), len(wanted) - offset)
            got = disk.read_buffered(offset, length)
        same_bytes(got, wanted[offset:offset + length], f"{length} bytes at {offset}, read of kind {kind}")
