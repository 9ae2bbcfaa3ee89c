# SPDX-License-Identifier: GPL-2.0
"""Mapped devices and loop devices, made with ioctls.

Making a device runs no program, so hundreds of devices can be made quickly even in an emulated machine. The devices are
removed at the end of the test that made them.
"""

import ctypes
import errno
import fcntl
import itertools
import os
import struct
import time

from .ktap import Failure, defer
from .programs import need_module

READONLY, SUSPEND, TABLE = 1 << 0, 1 << 1, 1 << 4
NOFLUSH, INACTIVE, UUID, DEFERRED, IMA = 1 << 11, 1 << 12, 1 << 14, 1 << 17, 1 << 19

_REMOVE_ALL, _CREATE, _REMOVE, _SUSPEND, _DEV_STATUS = 1, 3, 4, 6, 7
_LOAD, _CLEAR, _DEPS, _TABLE_STATUS, _TARGET_MSG = 9, 10, 11, 12, 14
_HEADER = "=3I2Ii4IQ128s129s7x"
_SPEC = "=QQiI16s"
_MAJOR = 4

_count = itertools.count(1)
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]


def _ioctl(command, name, flags=0, data=b"", targets=0, event=0, room=16384):
    """Issues an ioctl of device-mapper. Returns (flags, open count, targets, device number, data)."""
    header = struct.calcsize(_HEADER)
    size = header + max(len(data), room)
    buf = bytearray(size)
    struct.pack_into(_HEADER, buf, 0, _MAJOR, 0, 0, size, header, targets, 0, flags, event, 0, 0,
                     name.encode(), b"")
    buf[header:header + len(data)] = data
    with open("/dev/mapper/control", "rb+", buffering=0) as control:
        # Not fcntl.ioctl(), which would block the other threads for the whole call. The buffer is passed as the address
        # of one char: with an array type for each size, several threads would create and drop types at the same time.
        area = ctypes.c_char.from_buffer(buf)
        if _libc.ioctl(control.fileno(), (3 << 30) | (header << 16) | (0xFD << 8) | command, ctypes.addressof(area)):
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
    got = struct.unpack_from(_HEADER, buf)
    start, end = got[4], got[3]
    return got[7], got[6], got[5], got[10], bytes(buf[start:end])


def line(start, length, target, *args):
    """Returns a line of a table."""
    return (start, length, target, " ".join(str(arg) for arg in args))


def _pack(table):
    out = b""
    for start, length, target, args in table:
        params = args.encode() + b"\0"
        params += bytes(-len(params) % 8)
        out += struct.pack(_SPEC, start, length, 0, struct.calcsize(_SPEC) + len(params), target.encode())
        out += params
    return out


def _unpack(data, count):
    table, at = [], 0
    size = struct.calcsize(_SPEC)
    for _ in range(count):
        # Device-mapper counts the targets before it looks up the table, which may be gone by then.
        if not data:
            break
        start, length, _, following, target = struct.unpack_from(_SPEC, data, at)
        params = data[at + size:data.index(b"\0", at + size)]
        table.append((start, length, target.rstrip(b"\0").decode(), params.decode()))
        at = following
    return table


class Device:
    """A mapped device."""

    def __init__(self, name=None):
        self.name = name or f"obdtest-{os.getpid()}-{next(_count)}"
        dev = _ioctl(_CREATE, self.name)[3]
        self.number = f"{os.major(dev)}:{os.minor(dev)}"
        self.path = f"/dev/dm-{os.minor(dev)}"
        self.sysfs = f"/sys/block/dm-{os.minor(dev)}"
        self.removed = False
        defer(self.remove)

    def load(self, *table, readonly=True):
        """Loads a table. resume() makes it live."""
        _ioctl(_LOAD, self.name, READONLY if readonly else 0, _pack(table), len(table))

    def clear(self):
        """Clears a loaded table."""
        _ioctl(_CLEAR, self.name)

    def resume(self):
        _ioctl(_SUSPEND, self.name)

    def suspend(self, noflush=False):
        _ioctl(_SUSPEND, self.name, SUSPEND | (NOFLUSH if noflush else 0))

    def status(self, kind=0, inactive=False):
        """Returns the lines of the status. kind is 0 (for INFO), TABLE or IMA."""
        which = kind | (INACTIVE if inactive else 0)
        flags, _, targets, _, data = _ioctl(_TABLE_STATUS, self.name, which)
        if flags & (1 << 8):
            _, _, targets, _, data = _ioctl(_TABLE_STATUS, self.name, which, room=1 << 20)
        return _unpack(data, targets)

    def info(self):
        """Returns the INFO fields of the first target."""
        return self.status()[0][3].split()

    def message(self, text, sector=0):
        """Sends a message to the target at a sector."""
        _ioctl(_TARGET_MSG, self.name, 0, struct.pack("=Q", sector) + text.encode() + b"\0")

    def deps(self):
        """Returns the numbers (major:minor) of the devices that the table uses, sorted."""
        data = _ioctl(_DEPS, self.name)[4]
        count = struct.unpack_from("=I", data)[0]
        return sorted(f"{os.major(d)}:{os.minor(d)}" for d in struct.unpack_from(f"={count}Q", data, 8))

    def open_count(self):
        return _ioctl(_DEV_STATUS, self.name)[1]

    def readonly(self):
        return bool(_ioctl(_DEV_STATUS, self.name)[0] & READONLY)

    def exists(self):
        try:
            _ioctl(_DEV_STATUS, self.name)
            return True
        except OSError as error:
            if error.errno == errno.ENXIO:
                return False
            raise

    def try_remove(self, deferred=False):
        """Tries once to remove the device. Raises OSError if that fails."""
        _ioctl(_REMOVE, self.name, DEFERRED if deferred else 0)
        self.removed = True

    def remove(self):
        """Removes the device. Retries for 5 s, as programs that look at new devices open it for a moment."""
        for _ in range(100):
            if self.removed:
                return
            try:
                self.try_remove()
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                if error.errno != errno.EBUSY:
                    raise
                time.sleep(0.05)
        raise Failure(f"{self.name} cannot be removed, it is busy")


def create(*table, readonly=True):
    """Returns a mapped device with a live table."""
    device = Device()
    try:
        device.load(*table, readonly=readonly)
        device.resume()
    except OSError:
        device.remove()
        raise
    return device


def linear(device, sectors, readonly=False):
    """Returns a linear device over the first `sectors` sectors of another device. Tests can replace the table of the
    linear device."""
    return create(line(0, sectors, "linear", device.path, 0), readonly=readonly)


def delayed(device, count, milliseconds):
    """Returns a dm-delay device over the first `count` sectors of another device. It passes each read on from a kernel
    thread, after this number of milliseconds."""
    need_module("dm-delay")
    return create(line(0, count, "delay", device.path, 0, milliseconds))


class Loop:
    """A loop device over a file in memory that begins with content. size, in bytes, is that of the file: by default,
    whole pages of 4 KiB. block is the size of the logical blocks; direct is for direct I/O to the file."""

    def __init__(self, content, block=512, size=None, direct=False, readonly=True):
        self.fd = os.memfd_create("obdtest")
        os.truncate(self.fd, size or max(-(-len(content) // 4096) * 4096, 4096))
        write(self.fd, content)
        self._attach(block, direct, readonly)
        defer(self.detach)

    def _attach(self, block, direct, readonly):
        flags = (1 if readonly else 0) | (16 if direct else 0)
        info = struct.pack("=5Q4I64s64s32s2Q", 0, 0, 0, 0, 0, 0, 0, 0, flags, b"", b"", b"", 0, 0)
        config = struct.pack("=II", self.fd, block) + info + bytes(64)
        while True:
            with open("/dev/loop-control", "rb", buffering=0) as control:
                number = fcntl.ioctl(control, 0x4C82)
            self.path = f"/dev/loop{number}"
            try:
                with open(self.path, "rb" if readonly else "rb+", buffering=0) as loop:
                    fcntl.ioctl(loop, 0x4C0A, config)
                break
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
        dev = os.stat(self.path).st_rdev
        self.number = f"{os.major(dev)}:{os.minor(dev)}"
        self.size = os.fstat(self.fd).st_size

    def write(self, offset, content):
        """Changes bytes of the backing file, and drops the loop device's pages. The devices above do not notice."""
        write(self.fd, content, offset)
        with open(self.path, "rb", buffering=0) as loop:
            fcntl.ioctl(loop, 0x1261)

    def clear(self):
        """Detaches the device from its file, immediately or when the last user closes it."""
        with open(self.path, "rb", buffering=0) as loop:
            fcntl.ioctl(loop, 0x4C01)

    def detach(self):
        try:
            self.clear()
        except OSError as error:
            # The device is already detached.
            if error.errno != errno.ENXIO:
                raise
        os.close(self.fd)


def write(fd, content, offset=0):
    """Writes all of content."""
    view = memoryview(content)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


class KernelLog:
    """The messages of the kernel from now on."""

    LOOKS, LOOKED = " looks", " looked"

    def __init__(self):
        self.fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        self.skip()
        defer(os.close, self.fd)

    def skip(self):
        """Skips the messages up to now."""
        os.lseek(self.fd, 0, os.SEEK_END)

    @staticmethod
    def mark(what=""):
        """Writes run.sh's mark again, in case many messages push the first mark out of the log. After LOOKS, run.sh
        ignores messages, because the test checks them itself; LOOKED ends that."""
        if "OBD_LOG_MARK" in os.environ:
            with open("/dev/kmsg", "w", encoding="ascii") as log:
                log.write(os.environ["OBD_LOG_MARK"] + what)

    def lines(self):
        """Returns the messages since the last call."""
        out = []
        while True:
            try:
                record = os.read(self.fd, 8192).decode(errors="replace")
                out.append(record.split(";", 1)[1].split("\n", 1)[0])
            except BlockingIOError:
                return out
            except BrokenPipeError:
                continue


def sectors(size):
    """Returns the number of sectors for size bytes."""
    return -(-size // 512)


def zfile(device, blob_bytes, size, target="zfile"):
    """Returns a zfile device of size bytes, rounded up to sectors, on the first blob_bytes bytes of a device, or on all
    of the device if blob_bytes is "-"."""
    return create(line(0, max(sectors(size), 1), target, device.path, blob_bytes))


def lsmt(size, *layers):
    """Returns an lsmt device of size bytes on layers, lowest first: tuples of a device and the length of the layer in
    bytes, or "-" for the whole device."""
    args = [arg for device, blob_bytes in layers for arg in (device.path, blob_bytes)]
    return create(line(0, sectors(size), "lsmt", len(layers), *args))
