#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""DAX: file systems on lsmt-dax map the memory of pmem devices, and no page of this memory is in two places.

Needs two pmem devices of 128 MiB: of memmap=, see PMEM in scripts/check.sh, or of virtio-pmem:
QEMU_MEM=2304M,slots=4,maxmem=6G, and in QEMU_ARGS for each device
-object memory-backend-file,id=p0,size=128M,mem-path=/tmp/p0,share=on -device virtio-pmem-pci,memdev=p0.
"""

import ctypes
import errno
import fcntl
import glob
import hashlib
import json
import mmap
import os
import random
import shutil
import signal
import stat
import struct
import subprocess
import time

from obdtest import dm, image, module
from obdtest.disk import Disk, fails_with
from obdtest.files import mount, read, umount, work_directory, write
from obdtest.ktap import SLOW, check, defer, equal, main, same_bytes, skip_all, test
from obdtest.memory import page_cache
from obdtest.programs import close, need, need_module, obdsetup, run
from obdtest.tracing import Trace

PMEM = ("/dev/pmem0", "/dev/pmem1")
PAGE = os.sysconf("SC_PAGE_SIZE")
HUGE = 2 << 20
MIB = 1 << 20
# Longest segment of a layer, in sectors; a multiple of the page size.
LONGEST = 16320

subprocess.run(["modprobe", "-qa", "nd_e820", "virtio_pmem", "nd_pmem"], check=False)
with open("/proc/iomem", encoding="ascii") as iomem:
    regions = iomem.read().count("Persistent Memory (legacy)")
regions += len(glob.glob("/sys/bus/virtio/drivers/virtio_pmem/virtio*"))
# The driver creates the devices asynchronously.
deadline = time.monotonic() + 30 * SLOW
while regions >= len(PMEM) and not all(map(os.path.exists, PMEM)) and time.monotonic() < deadline:
    time.sleep(0.1)
if not all(stat.S_ISBLK(os.stat(path).st_mode) for path in PMEM if os.path.exists(path)) or \
        not all(map(os.path.exists, PMEM)):
    skip_all("no pmem: boot with QEMU_MEM=2304 KERNEL_ARGS='memmap=128M!1G memmap=128M!1280M'")

_libc = ctypes.CDLL(None, use_errno=True)


class Pmem:
    """A pmem device, or a partition of one, with bytes at its start."""

    def __init__(self, content, path=PMEM[0]):
        self.path, self.length = path, len(content)
        dev = os.stat(path).st_rdev
        self.number = f"{os.major(dev)}:{os.minor(dev)}"
        with open(path, "r+b", buffering=0) as device:
            dm.write(device.fileno(), content)
            os.fsync(device.fileno())


def table(size, *layers, target="lsmt-dax", start=0):
    """Returns a table line on layers, lowest first. size is in bytes, start in sectors."""
    return dm.line(start, size // 512, target, len(layers),
                   *[word for layer in layers for word in (layer.path, layer.length)])


def lsmt_dax(size, *layers):
    return dm.create(table(size, *layers))


def layer(size, extents, huge=False):
    """Returns a layer of parts of the disk: (sector, bytes), or (sector, number of sectors) if zeroed. With huge, long
    parts have the same offset modulo 2 MiB in the file as on the disk, so that the largest pages can be mapped."""
    entries, data = [], bytearray()
    for sector, what in extents:
        zeroed = isinstance(what, int)
        if huge and not zeroed and len(what) >= HUGE:
            data += bytes((sector * 512 - 4096 - len(data)) % HUGE)
        left = what if zeroed else len(what) // 512
        while left:
            length = min(left, LONGEST)
            entries.append(image.lsmt_entry(sector, length, 8 + len(data) // 512, zeroed))
            if not zeroed:
                data += what[len(what) - left * 512:][:length * 512]
            sector, left = sector + length, left - length
    return image.lsmt_of(entries, bytes(data), size)


def changes(raw, base=b""):
    """Returns the pages in which a disk differs from the one below it, or from zeros, as layer() takes them."""
    extents, zeros = [], bytes(PAGE)
    for at in range(0, len(raw), PAGE):
        page = raw[at:at + PAGE]
        if page == (base[at:at + PAGE] or zeros):
            continue
        if page == zeros:
            extents.append((at // 512, PAGE // 512))
        elif extents and not isinstance(extents[-1][1], int) and extents[-1][0] * 512 + len(extents[-1][1]) == at:
            extents[-1][1].extend(page)
        else:
            extents.append((at // 512, bytearray(page)))
    return extents


def refused(phrase, error, *lines):
    """Checks that a table is refused with this error, and that the kernel's log has the phrase."""
    log = dm.KernelLog()
    fails_with(error, dm.create, *lines)
    said = [text for text in log.lines() if "device-mapper: table" in text]
    check(any(phrase in text for text in said), f"no log line has {phrase!r}: {said}")


def noise(size, seed):
    """Returns random bytes, in which no page is all zeros."""
    return random.Random(seed).randbytes(size)


# ---- tables ----

SIZE = 4 * MIB


def simple(seed=1, size=SIZE):
    """Returns the content of a disk, and a layer with all of it."""
    raw = noise(size, seed)
    return raw, layer(size, [(0, raw)])


@test("reads by bios return the same as with lsmt")
def bios():
    rng = random.Random(7)
    layers = []
    for path, seed in zip(PMEM, (3, 4)):
        extents = sorted(image.random_layer(rng, SIZE, unit=PAGE // 512), key=lambda extent: extent[0])
        layers.append(Pmem(layer(SIZE, extents), path))
        with open(path, "rb") as file:
            layers[-1].lsmt = image.Lsmt(file.read(layers[-1].length))
    device = lsmt_dax(SIZE, *layers)
    same_bytes(Disk(device).whole(), image.flatten([one.lsmt for one in layers]), "the disk")
    equal(device.status()[0][2], "lsmt-dax", "target")
    with open(f"{device.sysfs}/queue/dax", encoding="ascii") as file:
        equal(file.read().strip(), "1", "queue/dax")
    plain = dm.create(table(SIZE, *layers, target="lsmt"))
    with open(f"{plain.sysfs}/queue/dax", encoding="ascii") as file:
        equal(file.read().strip(), "0", "queue/dax of lsmt")


@test("layers and disks that are not aligned to pages are refused")
def misaligned():
    data = noise(4 * PAGE, 5)
    unit = PAGE // 512
    layers = {
        "offset": image.lsmt_of([image.lsmt_entry(1, unit, 8)], data, SIZE),
        "length": image.lsmt_of([image.lsmt_entry(0, unit + 1, 8)], data, SIZE),
        "place": image.lsmt_of([image.lsmt_entry(0, unit, 9)], data, SIZE),
        "tar": image.tar(simple()[1]),
    }
    for what, content in layers.items():
        pmem = Pmem(content)
        refused("Layers are not aligned to pages", errno.EINVAL, table(SIZE, pmem))
        # The target lsmt, without DAX, accepts the layer.
        check(dm.create(table(SIZE, pmem, target="lsmt")), what)
    pmem = Pmem(simple()[1])
    refused("Disk is not aligned to pages", errno.EINVAL, table(SIZE - 512, pmem))
    odd = Pmem(layer(SIZE + 512, [(0, noise(SIZE, 1))]))
    refused("Disk is not aligned to pages", errno.EINVAL, table(SIZE, odd))


@test("extents with the same data are refused")
def overlaps():
    data = noise(16 * PAGE, 6)
    unit = PAGE // 512

    def of(*entries):
        return Pmem(image.lsmt_of([image.lsmt_entry(*entry) for entry in entries], data, SIZE))

    phrase = "Segments of a layer have the same data"
    first = 8
    for entries in (
            [(0, unit, first), (4 * unit, unit, first)],
            [(0, 2 * unit, first), (4 * unit, unit, first + unit)],
            [(0, unit, first + 3 * unit), (unit, unit, first), (2 * unit, 4 * unit, first)],
            [(0, 4 * unit, first), (8 * unit, unit, first + unit), (16 * unit, unit, first + 8 * unit)],
    ):
        refused(phrase, errno.EINVAL, table(SIZE, of(*entries)))
    # Adjacent data does not overlap, in any order; zeroed segments have no data.
    device = lsmt_dax(SIZE, of((0, unit, first + unit), (unit, unit, first), (4 * unit, unit, first, True)))
    same_bytes(Disk(device).read(0, 2 * PAGE), data[PAGE:2 * PAGE] + data[:PAGE], "pages that change places")


@test("the target is alone in its table")
def alone():
    raw, content = simple()
    first, second = Pmem(content), Pmem(content, PMEM[1])
    end = SIZE // 512
    refused("must appear alone in table", errno.EINVAL, table(SIZE, first), table(SIZE, second, start=end))
    refused("must appear alone in table", errno.EINVAL, table(SIZE, first), dm.line(end, 8, "error"))
    refused("must appear alone in table", errno.EINVAL, dm.line(0, 8, "error"), table(SIZE, first, start=8))
    same_bytes(Disk(lsmt_dax(SIZE, first)).read(0, MIB), raw[:MIB], "the disk of the target alone")


def not_a_layer(phrase, error, layer_, size=SIZE):
    """Checks that a layer is refused with this error and phrase, and that the log has the number of its device."""
    log = dm.KernelLog()
    refused(phrase, error, table(size, layer_))
    wanted = f"cannot have {layer_.number} as a layer"
    said = log.lines()
    check(any(wanted in text for text in said), f"no log line has {wanted!r}: {said}")


@test("a device without DAX, and a mapped one, are refused")
def no_dax():
    _, content = simple()
    loop = dm.Loop(content)
    loop.length = len(content)
    not_a_layer("Device has no DAX", errno.EINVAL, loop)
    pmem = Pmem(content)
    linear = dm.linear(pmem, 64 * MIB // 512, readonly=True)
    linear.length = len(content)
    not_a_layer("DAX layers must not be on mapped devices", errno.EINVAL, linear)
    upper = lsmt_dax(SIZE, pmem)
    upper.length = len(content)
    not_a_layer("DAX layers must not be on mapped devices", errno.EINVAL, upper)


@test("a device can be in only one DAX table")
def one_table():
    raw, content = simple()
    first, second = Pmem(content), Pmem(content, PMEM[1])
    phrase = "Device is in a DAX table already"
    refused(phrase, errno.EBUSY, table(SIZE, first, first))
    device = lsmt_dax(SIZE, first)
    refused(phrase, errno.EBUSY, table(SIZE, first))
    # The failure releases the devices that were claimed before it.
    refused(phrase, errno.EBUSY, table(SIZE, second, first))
    other = lsmt_dax(SIZE, second)
    # Any number of tables without DAX may use the device.
    plain = dm.create(table(SIZE, first, target="lsmt"))
    disk = Disk(plain)
    same_bytes(disk.read(0, MIB), raw[:MIB], "the disk without DAX")
    disk.close()
    plain.remove()
    # A loaded table that isn't live claims its devices, too.
    waiting = dm.Device()
    device.remove()
    waiting.load(table(SIZE, first))
    refused(phrase, errno.EBUSY, table(SIZE, first))
    # The same device may load another table instead, while neither table is live.
    waiting.load(table(SIZE, first))
    refused(phrase, errno.EBUSY, table(SIZE, first))
    waiting.clear()
    # The device is free again.
    lsmt_dax(SIZE, first)
    other.remove()


class Partition(Pmem):
    """A partition of a pmem device."""

    def __init__(self, content, number, start, length):
        self.disk, self.partition = os.open(PMEM[0], os.O_RDWR), number
        defer(os.close, self.disk)
        self._change(1, start, length)
        defer(self._change, 2, 0, 0)
        super().__init__(content, f"{PMEM[0]}p{number}")

    def _change(self, what, start, length):
        part = ctypes.create_string_buffer(struct.pack("=qqi128x4x", start, length, self.partition))
        arg = struct.pack("@iiiP", what, 0, len(part) - 1, ctypes.addressof(part))
        fcntl.ioctl(self.disk, 0x1269, arg)


@test("partitions are devices of their own")
def partitions():
    raws = [noise(SIZE, seed) for seed in (11, 12)]
    parts = [Partition(layer(SIZE, [(0, raw)]), nth + 1, (1 + 16 * nth) * MIB, 16 * MIB)
             for nth, raw in enumerate(raws)]
    devices = [lsmt_dax(SIZE, part) for part in parts]
    refused("Device is in a DAX table already", errno.EBUSY, table(SIZE, parts[1]))
    for device, raw in zip(devices, raws):
        same_bytes(Disk(device).read(0, SIZE), raw, "a partition")


def load_refused(device, *lines):
    """Checks that a device with a live table refuses another table."""
    log = dm.KernelLog()
    fails_with(errno.EBUSY, device.load, *lines)
    said = log.lines()
    check(any("which lsmt-dax cannot replace" in text for text in said), f"the log says {said}")


@test("a live table is not replaced")
def reload():
    (raw, content), (_, content2) = simple(1), simple(2)
    first, second = Pmem(content), Pmem(content2, PMEM[1])
    device = lsmt_dax(SIZE, first)
    # The device is closed, then open, then suspended.
    load_refused(device, table(SIZE, second))
    disk = Disk(device)
    load_refused(device, table(SIZE, second))
    load_refused(device, table(SIZE, first))
    device.suspend()
    load_refused(device, table(SIZE, second))
    # The same table may be resumed.
    device.resume()
    same_bytes(disk.read(0, MIB), raw[:MIB], "the disk as before")
    disk.close()
    # lsmt-dax cannot replace a live table of another target, either.
    other = dm.create(dm.line(0, SIZE // 512, "error"))
    load_refused(other, table(SIZE, second))
    # The refused tables have claimed nothing.
    # The layer is free again.
    lsmt_dax(SIZE, second)


@test("the device may be open at the first resume")
def open_at_first():
    raw, content = simple()
    device = dm.Device()
    device.load(table(SIZE, Pmem(content)))
    with open(device.path, "rb", buffering=0):
        device.resume()
        same_bytes(Disk(device).read(0, MIB), raw[:MIB], "the disk")


def until_closed(device):
    """Waits until nothing has a device open, 5 s at most."""
    for _ in range(100):
        if not device.open_count():
            return
        time.sleep(0.05)
    check(False, f"{device.name} is still open")


@test("layers stay claimed while a device that lost its table is open")
def parked():
    raw, content = simple()
    pmem, phrase = Pmem(content), "Device is in a DAX table already"
    before = module.use_count()
    device = lsmt_dax(SIZE, pmem)
    log = dm.KernelLog()
    with open(device.path, "rb", buffering=0):
        # `dmsetup remove --force' does the same.
        device.load(dm.line(0, SIZE // 512, "error"))
        device.resume()
        said = log.lines()
        check(any("its layers stay claimed until it is closed" in text for text in said), f"the log says {said}")
        refused(phrase, errno.EBUSY, table(SIZE, pmem))
        equal(module.use_count(), before + 1, "references to the module: that of the claim")
    # Once the device is closed, its layers are free. Here it is removed, too; below, it is not.
    device.remove()
    again = lsmt_dax(SIZE, pmem)
    disk = Disk(again)
    same_bytes(disk.read(0, MIB), raw[:MIB], "the disk of another device")
    disk.close()
    equal(module.use_count(), before + 1, "references to the module: that of the table")
    # A closed device that lost its table has no claim. Programs that look at new devices may open it for a moment.
    again.load(dm.line(0, SIZE // 512, "error"))
    again.resume()
    until_closed(again)
    # The layer is free again.
    lsmt_dax(SIZE, pmem)
    equal(module.use_count(), before + 1, "references to the module: that of the last table")


# ---- file systems ----

def make_tree(root, seed=0):
    os.makedirs(f"{root}/dir", exist_ok=True)
    for nth, size in enumerate((1, 4095, 4096, 70000, 3 * MIB, 16 * MIB)):
        with open(f"{root}/dir/file{nth}", "wb") as file:
            file.write(noise(size, seed + nth))
    shutil.copy(shutil.which("busybox"), f"{root}/busybox")


def digests(root, mapped=False):
    """Returns the SHA-256 of each file, by path. The files are read, or mapped if mapped is set."""
    out = {}
    for place, _, files in os.walk(root):
        for name in files:
            path = os.path.join(place, name)
            with open(path, "rb", buffering=0) as file:
                if mapped and os.path.getsize(path):
                    with mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ) as area:
                        got = hashlib.sha256(area).hexdigest()
                else:
                    digest = hashlib.sha256()
                    while chunk := file.read(MIB):
                        digest.update(chunk)
                    got = digest.hexdigest()
            out[os.path.relpath(path, root)] = got
    return out


def is_dax(path):
    """Returns whether statx() says that a file uses DAX, not the page cache."""
    buffer = ctypes.create_string_buffer(256)
    if _libc.statx(-100, path.encode(), 0, 0x7FF, buffer):
        raise OSError(ctypes.get_errno(), "statx")
    attributes, = struct.unpack_from("=Q", buffer.raw, 8)
    return bool(attributes & 1 << 21)


KINDS = {
    # Large files begin at multiples of 2 MiB.
    "ext4": (96 * MIB, ["mkfs.ext4", "-q", "-b", str(PAGE), "-E", f"stride={HUGE // PAGE},stripe_width={HUGE // PAGE}"],
             "ro,noload,dax=always"),
    "xfs": (96 * MIB, ["mkfs.xfs", "-q", "-m", "reflink=0"], "ro,norecovery,dax=always"),
}


def disks(kind, work):
    """Returns the contents of a disk with a file system and of the same disk after changes, the directory with the
    files of the second one, and the mount options."""
    need(f"mkfs.{kind}")
    need_module(kind)
    tree, raw = f"{work}/tree", f"{work}/raw"
    make_tree(tree)
    images = []
    if kind == "erofs":
        for seed in (0, 100):
            with open(f"{tree}/dir/file3", "wb") as file:
                file.write(noise(70000, seed))
            run("mkfs.erofs", "-b", str(PAGE), "-T0", "-U", "00000000-0000-0000-0000-000000000001", raw, tree)
            content = read(raw)
            os.unlink(raw)
            images.append(content + bytes(-len(content) % PAGE))
        size = max(map(len, images))
        return [one + bytes(size - len(one)) for one in images], tree, "ro,dax=always"
    size, mkfs, options = KINDS[kind]
    with open(raw, "wb") as file:
        file.truncate(size)
    # mkfs.xfs makes file systems this small only for xfstests, which sets these variables.
    run(*mkfs, raw, env={**os.environ, "TEST_DIR": "x", "TEST_DEV": "x", "QA_CHECK_FS": "x"})
    for turn in range(2):
        if turn:
            os.unlink(f"{tree}/dir/file2")
            with open(f"{tree}/dir/file3", "wb") as file:
                file.write(noise(70000, 100))
        mount(raw, f"{work}/rw", "loop,discard")
        if turn:
            # Change only these files, so that the others keep their blocks.
            os.unlink(f"{work}/rw/dir/file2")
            shutil.copy(f"{tree}/dir/file3", f"{work}/rw/dir/file3")
        else:
            run("cp", "-a", f"{tree}/.", f"{work}/rw")
        umount(f"{work}/rw")
        images.append(read(raw))
    return images, tree, options


def opened(kind):
    """Mounts a file system on two layers. Returns the device, the mount point, and the directory with the same
    files."""
    work = work_directory()
    (base, changed), tree, options = disks(kind, work)
    layers = [Pmem(layer(len(base), changes(base), huge=True), PMEM[0]),
              Pmem(layer(len(base), changes(changed, base)), PMEM[1])]
    device = lsmt_dax(len(base), *layers)
    mount(device.path, f"{work}/mnt", options)
    return device, f"{work}/mnt", tree


def file_system(kind):
    device, where, tree = opened(kind)
    wanted = digests(tree)
    before = page_cache()
    check(is_dax(f"{where}/dir/file5"), "statx() does not say DAX")
    got = digests(where, mapped=True)
    got.pop("lost+found", None)
    equal(got, wanted, "files that are mapped")
    equal(digests(where), wanted, "files that are read")
    equal(run(f"{where}/busybox", "echo", "it runs").strip(), "it runs", "a program")
    # 19 MiB were read twice. Other programs in the VM and the structures of the file system use the page cache, too.
    check(page_cache() - before < 4096, f"{page_cache() - before} KiB more of page cache")
    # The device is mounted, so it can be neither removed nor reloaded.
    for change, *args in ((device.try_remove, ), (device.load, dm.line(0, 8, "lsmt-dax", 1, PMEM[0], "-"))):
        fails_with(errno.EBUSY, change, *args)
    equal(digests(where, mapped=True), wanted, "files that are mapped, after the refused changes")


@test("ext4", timeout=400)
def ext4():
    file_system("ext4")


@test("xfs", timeout=400)
def xfs():
    file_system("xfs")


@test("erofs", timeout=400)
def erofs():
    file_system("erofs")


@test("the largest pages are mapped where a layer allows it", timeout=400)
def huge_pages():
    _, where, _ = opened("ext4")
    path = f"{where}/dir/file5"
    trace = Trace(("fs_dax:dax_pmd_fault_done", "ino > 0"))
    touched = []
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ) as area:
        for at in range(0, len(area), HUGE):
            touched.append(area[at])
    with open(path, "rb") as file:
        equal(bytes(touched), file.read()[::HUGE], "the first byte of each 2 MiB")
    said = [row[-1] for row in trace.lines()]
    check(any("NOPAGE" in row for row in said), f"no fault mapped 2 MiB of {run('filefrag', '-v', path)}")


def killed_by(function):
    """Calls the function in a new process. Returns the signal that ended the process, 0 if none did."""
    child = os.fork()
    if not child:
        try:
            function()
        finally:
            os._exit(0)
    status = os.waitpid(child, 0)[1]
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


@test("holes cannot be read or mapped with DAX")
def holes():
    work = work_directory()
    raw = f"{work}/raw"
    with open(raw, "wb") as file:
        file.truncate(16 * MIB)
    run("mkfs.ext4", "-q", "-b", str(PAGE), raw)
    mount(raw, f"{work}/rw", "loop")
    with open(f"{work}/rw/zeros", "wb") as file:
        file.write(bytes(8 * PAGE))
        file.write(noise(PAGE, 1))
    with open(f"{work}/rw/sparse", "wb") as file:
        file.truncate(4 * PAGE)
    umount(f"{work}/rw")
    content = read(raw)
    # The layer has no segments for the zeros, for which the file has blocks.
    device = lsmt_dax(len(content), Pmem(layer(len(content), changes(content))))
    mount(device.path, f"{work}/mnt", "ro,noload,dax=always")
    log = dm.KernelLog()
    with open(f"{work}/mnt/zeros", "rb", buffering=0) as file:
        same_bytes(os.pread(file.fileno(), PAGE, 8 * PAGE), noise(PAGE, 1), "a page with data, read")
        fails_with(errno.EIO, os.pread, file.fileno(), PAGE, 0)
        shared = mmap.mmap(file.fileno(), 9 * PAGE, mmap.MAP_SHARED, mmap.PROT_READ)
        private = mmap.mmap(file.fileno(), 9 * PAGE, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
        defer(shared.close)
        defer(private.close)
    same_bytes(shared[8 * PAGE:], noise(PAGE, 1), "a page with data, mapped")
    equal(killed_by(lambda: shared[0]), signal.SIGBUS, "signal of a process that maps a hole")
    equal(killed_by(lambda: private.write(b"x")), signal.SIGBUS, "signal of a process that changes its copy of a hole")
    equal(len([text for text in log.lines() if "is in no layer" in text]), 1, "lines in the log")
    # Bios read holes as zeros.
    same_bytes(Disk(device).whole(), content, "the disk, read by bios")
    # The file system maps holes of a file itself.
    with open(f"{work}/mnt/sparse", "rb") as file, \
            mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ) as area:
        same_bytes(area[:], bytes(4 * PAGE), "a hole of a file, mapped")


@test("a mounted device that lost its table keeps its layers", timeout=400)
def parked_mount():
    device, where, tree = opened("ext4")
    wanted = read(f"{tree}/dir/file5")
    phrase = "Device is in a DAX table already"
    _, length, _, params = device.status(dm.TABLE)[0]
    again = dm.line(0, PAGE // 512, "lsmt-dax", 1, *params.split()[1:3])
    with open(f"{where}/dir/file5", "rb") as file, \
            mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ) as area:
        same_bytes(area[:], wanted, "a file, mapped")
        device.load(dm.line(0, length, "error"))
        device.resume()
        # The pages are still those of the layer.
        same_bytes(area[:], wanted, "a file, mapped, without a table")
        refused(phrase, errno.EBUSY, again)
    umount(where)
    until_closed(device)
    _, content = simple()
    # The layer is free again.
    lsmt_dax(SIZE, Pmem(content))


@test("a layer whose DAX memory has a holder is refused", timeout=400)
def holder():
    need("mkfs.xfs")
    need_module("xfs")
    work = work_directory()
    _, content = simple()
    layer_ = Partition(content, 1, MIB, 16 * MIB)
    other = Partition(b"", 2, 24 * MIB, 100 * MIB)
    run("mkfs.xfs", "-q", "-f", "-m", "reflink=0", other.path,
        env={**os.environ, "TEST_DIR": "x", "TEST_DEV": "x", "QA_CHECK_FS": "x"})
    mount(other.path, f"{work}/mnt", "dax=always")
    not_a_layer("DAX memory of the device has a holder", errno.EBUSY, layer_)
    umount(f"{work}/mnt")
    # It is taken when the other partition is not mounted.
    lsmt_dax(SIZE, layer_)


@test("reads fail once the pmem device of a layer is gone")
def gone():
    raw, content = simple()
    device = lsmt_dax(SIZE, Pmem(content))
    disk = Disk(device)
    same_bytes(disk.read(0, MIB), raw[:MIB], "the disk")
    driver, name = (os.path.basename(os.path.realpath(f"/sys/block/{os.path.basename(PMEM[0])}/device{link}"))
                    for link in ("/driver", ""))
    equal(driver, "nd_pmem", "the driver of the pmem device")

    # Must not be done while a file system is mounted: see Documentation/dax.rst, "Reload, suspend, remove".
    write(f"/sys/bus/nd/drivers/{driver}/unbind", name.encode())
    try:
        for at in (0, SIZE // 2, SIZE - PAGE):
            fails_with(errno.EIO, disk.read, at, PAGE)
        disk.close()
        device.remove()
    finally:
        write(f"/sys/bus/nd/drivers/{driver}/bind", name.encode())
    end = time.monotonic() + 30 * SLOW
    while not os.path.exists(PMEM[0]) and time.monotonic() < end:
        time.sleep(0.1)
    same_bytes(Disk(lsmt_dax(SIZE, Pmem(content))).read(0, SIZE), raw, "the disk of a new device")


@test("obdsetup makes layers for DAX, and opens them", timeout=400)
def by_obdsetup():
    work = work_directory()
    make_tree(f"{work}/tree")
    os.mkdir(f"{work}/few")
    for size in (1, PAGE, PAGE + 1):
        with open(f"{work}/few/{size}", "wb") as file:
            file.write(noise(size, size))
    # mke2fs would give a small ext4 blocks of 1 KiB. An erofs has the end of most files beside the inode.
    for nth, (tree, options, mount_options) in enumerate((
            ("tree", ["--fs", "ext4"], "ro,noload,dax=always"),
            ("few", ["--fs", "ext4", "--size", "4m"], "ro,noload,dax=always"),
            ("tree", ["--fs", "erofs"], "ro,dax=always"),
            ("few", ["--fs", "erofs", "--mkfs-arg=--quiet"], "ro,dax=always"))):
        obdsetup("create", "--directory", f"{work}/{tree}", *options, "--dax", "--force", f"{work}/layer")
        obdsetup("verify", "--dax", f"{work}/layer")
        pmem = Pmem(read(f"{work}/layer"))
        # The layer is shorter than the device.
        _, said = obdsetup("verify", "--dax", pmem.path, status=3)
        check(f"{pmem.path}:size=" in said, said)
        obdsetup("verify", "--dax", f"{pmem.path}:size={pmem.length}")
        name = f"obdtest-{os.getpid()}-dax{nth}"
        obdsetup("open", "--dax", name, f"{pmem.path}:size={pmem.length}")
        defer(close, name)
        mount(f"/dev/mapper/{name}", f"{work}/mnt", mount_options)
        for top, _, files in os.walk(f"{work}/mnt"):
            for path in (f"{top}/{file}" for file in files):
                if stat.S_ISREG(os.lstat(path).st_mode) and os.path.getsize(path):
                    check(is_dax(path), f"{options}: {path}: statx() does not say DAX")
        got = digests(f"{work}/mnt", mapped=True)
        equal(got, digests(f"{work}/{tree}"), f"{options}: files that are mapped")
        equal(run("dmsetup", "table", name).split()[2], "lsmt-dax", "target")
        # list and status show DAX.
        row, = (row for row in json.loads(obdsetup("list", "--json")[0]) if row["name"] == name)
        equal((row["dax"], json.loads(obdsetup("status", "--json", name)[0])["dax"]), (True, True), "dax in JSON")
        check(", 1 layers, DAX, in use" in obdsetup("status", name)[0], "status does not show DAX")
        umount(f"{work}/mnt")
        # A layer is in one disk with DAX only. The refused one leaves nothing behind.
        other = f"{name}-other"
        _, said = obdsetup("open", "--dax", other, f"{pmem.path}:size={pmem.length}", status=5)
        check(f"block device {pmem.number} is in use by device {name}: close that first" in said, said)
        check(not os.path.exists(f"/dev/mapper/{other}"), "the refused disk exists")
        # Without DAX, it can be in another disk, too, and that is no reason to refuse DAX.
        defer(close, other)
        obdsetup("open", other, f"{pmem.path}:size={pmem.length}")
        row, = (row for row in json.loads(obdsetup("list", "--json")[0]) if row["name"] == other)
        equal(row["dax"], False, "dax of a disk without DAX")
        obdsetup("close", name)
        obdsetup("open", "--dax", name, f"{pmem.path}:size={pmem.length}")
        obdsetup("close", other)
        obdsetup("close", name)


@test("all blocks of a file with a long hole have data in a layer for DAX")
def long_hole():
    need_module("erofs")
    work = work_directory()
    os.mkdir(f"{work}/tree")
    # A file of more than 256 MiB has chunks of two blocks. Here one has a block of data and a block of zeros.
    wanted = bytes(2 * PAGE) + noise(PAGE, 1) + bytes(5 * PAGE)
    with open(f"{work}/tree/file", "wb") as file:
        file.write(wanted)
        file.truncate(300 * MIB)
    obdsetup("create", "--directory", f"{work}/tree", "--fs", "erofs", "--dax", f"{work}/layer")
    pmem = Pmem(read(f"{work}/layer"))
    name = f"obdtest-{os.getpid()}-hole"
    obdsetup("open", "--dax", name, f"{pmem.path}:size={pmem.length}")
    defer(close, name)
    mount(f"/dev/mapper/{name}", f"{work}/mnt", "ro,dax=always")
    check(is_dax(f"{work}/mnt/file"), "statx() does not say DAX")
    with open(f"{work}/mnt/file", "rb", buffering=0) as file:
        for at in range(0, len(wanted), PAGE):
            same_bytes(os.pread(file.fileno(), PAGE, at), wanted[at:at + PAGE], f"the page at byte {at}, read")
        with mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ) as area:
            same_bytes(area[:len(wanted)], wanted, "the first pages, mapped")
            same_bytes(area[-PAGE:], bytes(PAGE), "the last page, mapped")


if __name__ == "__main__":
    main()
