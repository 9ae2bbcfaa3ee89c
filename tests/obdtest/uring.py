# SPDX-License-Identifier: GPL-2.0
"""Reads through io_uring, one at a time, with the system calls instead of liburing."""

import ctypes
import mmap
import os
import struct

from .ktap import Skip, defer

_SETUP, _ENTER = 425, 426
_SQES = 0x10000000
_GETEVENTS, _OP_READ = 1, 22

_libc = ctypes.CDLL(None, use_errno=True)


def _call(number, *args):
    done = _libc.syscall(ctypes.c_long(number), *args)
    if done < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return done


class Ring:
    """A ring of one entry, with a buffer of `room` bytes for the data."""

    def __init__(self, room):
        params = bytearray(120)
        try:
            self.fd = _call(_SETUP, ctypes.c_uint(1), ctypes.byref(ctypes.c_char.from_buffer(params)))
        except OSError as error:
            raise Skip(f"io_uring cannot be used: {error}") from error
        defer(os.close, self.fd)
        fields = struct.unpack("=30I", params)
        self.tail, self.mask, self.array = fields[11], fields[12], fields[16]
        self.cq_head, self.cq_mask, self.cqes = fields[20], fields[22], fields[25]
        size = max(self.array + 4 * fields[0], self.cqes + 16 * fields[1])
        self.rings = mmap.mmap(self.fd, size)
        self.sqes = mmap.mmap(self.fd, 64 * fields[0], offset=_SQES)
        self.area = mmap.mmap(-1, room)

    def _get(self, offset):
        return struct.unpack_from("=I", self.rings, offset)[0]

    def submit(self, fd, offset, length, flags=0):
        """Starts a read of length bytes at offset; flags are those of preadv2(). Does not wait for its end."""
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.area))
        tail = self._get(self.tail)
        slot = tail & self._get(self.mask)
        struct.pack_into("=BBHiQQIIQ24x", self.sqes, 64 * slot, _OP_READ, 0, 0, fd, offset, address, length, flags, 1)
        struct.pack_into("=I", self.rings, self.array + 4 * slot, slot)
        struct.pack_into("=I", self.rings, self.tail, tail + 1)
        _call(_ENTER, ctypes.c_uint(self.fd), ctypes.c_uint(1), ctypes.c_uint(0), ctypes.c_uint(0), None, ctypes.c_size_t(0))

    def wait(self):
        """Waits for the read. Returns the data, or the negative errno."""
        _call(_ENTER, ctypes.c_uint(self.fd), ctypes.c_uint(0), ctypes.c_uint(1), ctypes.c_uint(_GETEVENTS), None,
              ctypes.c_size_t(0))
        head = self._get(self.cq_head)
        result = struct.unpack_from("=i", self.rings, self.cqes + 16 * (head & self._get(self.cq_mask)) + 8)[0]
        struct.pack_into("=I", self.rings, self.cq_head, head + 1)
        return result if result < 0 else self.area[:result]
