#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""obdsetup open --writable and create --changes. Changes are kept, and become a layer. A store is accepted only with
the layers that it was made for. After a kill, a crash or a full store, no wrong layer is made.

OBD_KILLS is the number of kills. OBD_SEED is the seed of their random times.
"""

import contextlib
import glob
import json
import os
import random
import shutil
import signal
import subprocess
import time

from obdtest import image, left, programs, udevd
from obdtest.files import enter_work_directory, read, write
from obdtest.ktap import Skip, check, defer, equal, main, note, same_bytes, skip_all, test
from obdtest.left import devices, eventually, nothing_left
from obdtest.programs import obdsetup, quietly, run

KILLS = int(os.environ.get("OBD_KILLS", "4"))
SEED = os.environ.get("OBD_SEED") or str(random.SystemRandom().randrange(1 << 32))
NAME = f"obdtest-{os.getpid()}"
DISK = f"/dev/mapper/{NAME}"
SIZE = 8 << 20
RNG = random.Random(101)


def refused(status, said, *args):
    """Checks that a command fails with this exit status and message."""
    _, err = obdsetup(*args, status=status)
    check(said in err, f"obdsetup {' '.join(args)} said: {err.strip()}")


def write_disk(at, content, path=DISK):
    """Writes content to the disk from byte `at` on, and syncs it."""
    fd = os.open(path, os.O_WRONLY)
    try:
        equal(os.pwrite(fd, content, at), len(content), "bytes written")
        os.fsync(fd)
    finally:
        os.close(fd)


def clear():
    """Removes the mount and the devices that a failed test has left."""
    quietly("umount", "mnt")
    left.clear(NAME, f"{NAME}2")


def work():
    """Changes to a new directory with the layers base.obd and app.obd of a disk, until the end of the test. Returns the
    content of the disk."""
    enter_work_directory()
    defer(clear)
    os.mkdir("mnt")
    content = bytearray(image.sample(SIZE - (1 << 20), 101) + bytes(1 << 20))
    write("disk.raw", content)
    obdsetup("create", "--image", "disk.raw", "base.obd")
    content[4 << 20:(4 << 20) + 9000] = RNG.randbytes(9000)
    write("disk.raw", content)
    obdsetup("create", "--base", "base.obd", "--image", "disk.raw", "app.obd")
    return content


LAYERS = ("base.obd", "app.obd")
# Time limit of a test in seconds, on a machine that runs other programs, too.
LONG = 600
BASES = ("--base", "base.obd", "--base", "app.obd")


MADE = "note: store: made a new store of changes, of up to "


def open_writable(*args, layers=LAYERS, name=NAME):
    """Opens the disk, and makes the store if it doesn't exist. Returns the messages, except for that about a new
    store."""
    is_there = os.path.exists("store")
    new = [] if is_there else ["--create"]
    said = obdsetup("open", *new, "--writable", "store", *args, name, *layers)[1]
    first, _, rest = said.partition("\n")
    check(is_there or MADE in first, f"open said: {said}")
    return said if is_there else rest


def changes(name=NAME, status=0):
    """Returns the health and the report on the store from obdsetup status."""
    out, _ = obdsetup("status", "--json", name, status=status)
    report = json.loads(out)
    return report["health"], report["changes"]


@test("changes survive a close; the layer of a store equals the layer of the whole disk", timeout=LONG)
def loop_of_layers():
    work()
    for name in LAYERS:
        os.unlink(name)
    os.mkdir("tree")
    write("tree/old", RNG.randbytes(300_000))
    obdsetup("create", "--directory", "tree", "--fs", "ext4", "--size", "16m", "base.obd")
    for nth, (layer, layers) in enumerate((("app.obd", LAYERS[:1]), ("third.obd", LAYERS))):
        bases = [word for name in layers for word in ("--base", name)]
        said = open_writable(layers=layers)
        equal(said, "", "what open says")
        run("mount", DISK, "mnt")
        more = RNG.randbytes(200_000)
        write(f"mnt/new{nth}", more)
        os.unlink("mnt/old" if nth == 0 else "mnt/new0")
        refused(5, "is in use", "close", NAME)
        refused(5, f"stack {NAME} has it open: run `obdsetup close {NAME}' first",
                "create", "--changes", "store", *bases, "none")
        refused(5, f"stack {NAME} has it open", "open", "--writable", "store", f"{NAME}2", *layers)
        run("umount", "mnt")
        obdsetup("close", NAME)
        nothing_left()
        equal(os.stat("store").st_mode & 0o777, 0o600, "mode of the store")
        check(os.stat("store").st_blocks * 512 < 4 << 20, "the store takes more space than the changes")
        # As after a reboot.
        equal(open_writable(layers=layers), "", "what open says the second time")
        run("mount", DISK, "mnt")
        same_bytes(read(f"mnt/new{nth}"), more, "what was written")
        check(not os.path.exists("mnt/old"), "the removed file is there again")
        run("umount", "mnt")
        disk = read(DISK)
        health, store = changes()
        equal((health, store["file"]), ("ok", f"{os.getcwd()}/store"), "status")
        check(200_000 < store["used"] < 4 << 20 < store["size"], f"store: {store}")
        text, _ = obdsetup("status", NAME)
        check("writes go to " in text and "with the space that is available now, it is " in text, text)
        check(NAME in obdsetup("list")[0], "list doesn't show the disk")
        obdsetup("create", *bases, "--image", DISK, "slow.obd", "--force")
        obdsetup("close", NAME)
        obdsetup("create", "--changes", "store", *bases, layer)
        same_bytes(read(layer), read("slow.obd"), "the layer")
        obdsetup("open", NAME, *layers, layer)
        same_bytes(read(DISK), disk, "the disk of all layers")
        equal(run("blockdev", "--getro", DISK).strip(), "1", "read-only")
        obdsetup("close", NAME)
        os.unlink("store")
    nothing_left()


@test("a store of another disk is refused, and so are other files and devices; all stay unchanged", timeout=LONG)
def others():
    work()
    open_writable()
    write_disk(0, b"written")
    obdsetup("close", NAME)
    before = read("store")
    for layers in (("base.obd",), ("app.obd", "base.obd")):
        obdsetup("open", "--writable", "store", NAME, *layers, status=3)
    refused(3, "store: has the changes of another disk: ", "open", "--writable", "store", NAME, "base.obd")
    same_bytes(read("store"), before, "the store")
    refused(3, "disk.raw: not a store of changes: begins with ", "open", "--writable", "disk.raw", NAME, *LAYERS)
    refused(1, "a directory, not a file", "open", "--writable", "mnt", NAME, *LAYERS)
    refused(1, "a store cannot become smaller", "open", "--writable", "store", "--store-size", "1m", NAME, *LAYERS)
    disk = read("disk.raw")
    device = run("losetup", "--find", "--show", "disk.raw").strip()
    defer(quietly, "losetup", "--detach", device)
    refused(5, f"{device}: is no store of changes, and not empty", "open", "--writable", device, NAME, *LAYERS)
    same_bytes(read("disk.raw"), disk, "content of the device")
    run("losetup", "--detach", device)
    os.truncate("store", len(before) - 512)
    refused(3, "store: the store of changes is cut short", "open", "--writable", "store", NAME, *LAYERS)
    nothing_left()


@test("a store on a block device", timeout=LONG)
def device_store():
    content = work()
    with open("volume", "wb") as file:
        file.truncate(SIZE)
    device = run("losetup", "--find", "--show", "--direct-io=on", "volume").strip()
    defer(quietly, "losetup", "--detach", device)
    refused(4, f"{device}: the device is empty, and no store", "open", "--writable", device, NAME, *LAYERS)
    obdsetup("open", "--create", "--writable", device, "--lsmt-opt", "no_such_option", NAME, *LAYERS, status=4)
    check(not any(read("volume")), "the device is not empty again")
    for nth in range(2):
        new = [] if nth else ["--create"]
        obdsetup("open", *new, "--writable", device, NAME, *LAYERS)
        same_bytes(read(DISK), bytes(content), f"content, open {nth}")
        more = RNG.randbytes(70_000)
        content[(nth + 1) * 1_000_000:(nth + 1) * 1_000_000 + 70_000] = more
        write_disk((nth + 1) * 1_000_000, more)
        refused(5, f"stack {NAME} has it open", "create", "--changes", device, *BASES, "none")
        obdsetup("close", NAME)
        obdsetup("create", "--changes", device, *BASES, "fast.obd", "--force")
        write("disk.raw", content)
        obdsetup("create", "--image", "disk.raw", *BASES, "slow.obd", "--force")
        same_bytes(read("fast.obd"), read("slow.obd"), "the layer")
    # Another program has the device open exclusively, as a mount does.
    before = read("volume")[:4096]
    fd = os.open(device, os.O_RDONLY | os.O_EXCL)
    obdsetup("open", "--writable", device, NAME, *LAYERS, status=5)
    os.close(fd)
    same_bytes(read("volume")[:4096], before, "the start of the store")
    # Another loop device over the same file is the same store.
    obdsetup("open", "--writable", device, NAME, *LAYERS)
    other = run("losetup", "--find", "--show", "volume").strip()
    defer(quietly, "losetup", "--detach", other)
    refused(5, f"stack {NAME} has it open", "open", "--writable", other, f"{NAME}2", *LAYERS)
    obdsetup("close", NAME)
    equal(devices(), {}, "devices that are left")


@test("a store on a device with logical blocks of 4096 bytes", timeout=LONG)
def large_sectors():
    content = work()
    with open("volume", "wb") as file:
        file.truncate(SIZE)
    device = run("losetup", "--find", "--show", "--sector-size", "4096", "volume").strip()
    defer(quietly, "losetup", "--detach", device)
    write("odd.raw", bytes(content) + bytes(512))
    obdsetup("create", "--image", "odd.raw", "odd.obd")
    new = ("open", "--create", "--writable", device, NAME)
    refused(4, f"{device}: has logical blocks of 4096 bytes, and the size of the disk, {SIZE + 512} bytes, is no ",
            *new, "odd.obd")
    check(not any(read("volume")), "the device is no longer empty")
    _, said = obdsetup(*new, *LAYERS)
    check(f"note: {device}: has logical blocks of 4096 bytes, and so has the disk with it" in said, said)
    equal(run("blockdev", "--getss", DISK).strip(), "4096", "sectors of the disk")
    content[5 << 20:(5 << 20) + 8192] = RNG.randbytes(8192)
    write_disk(5 << 20, content[5 << 20:(5 << 20) + 8192])
    obdsetup("close", NAME)
    equal(obdsetup("open", "--writable", device, NAME, *LAYERS)[1], "", "what open says the second time")
    same_bytes(read(DISK), bytes(content), "content")
    obdsetup("close", NAME)
    write("disk.raw", content)
    obdsetup("create", "--changes", device, *BASES, "fast.obd")
    obdsetup("create", "--image", "disk.raw", *BASES, "slow.obd")
    same_bytes(read("fast.obd"), read("slow.obd"), "the layer")
    equal(devices(), {}, "devices that are left")


def fill():
    """Writes to all of the disk, until a write fails. Returns the number of bytes written."""
    done = 0
    try:
        for at in range(0, SIZE, 64 << 10):
            write_disk(at, RNG.randbytes(64 << 10))
            done += 64 << 10
    except OSError as error:
        note(f"{done} bytes written, then: {error}")
    return done


@test("a store that gets full: status reports it before and after, and --store-size makes room", timeout=LONG)
def full():
    work()
    open_writable("--store-size", "2m")
    for nth in range(30):
        write_disk(nth << 16, RNG.randbytes(64 << 10))
    health, store = changes(status=4)
    equal((health, store["overflowed"]), ("nearly-full", False), "status of a store that is nearly full")
    _, err = obdsetup("status", NAME, status=4)
    check("NEARLY FULL: 9" in err, err)
    refused(4, "NEARLY FULL", "list", "--check")
    first = read(DISK)[:30 << 16]
    check(fill() < SIZE, "no write failed")
    health, store = changes(status=4)
    equal((health, store["overflowed"], store["lost"]), ("full", True, False), "status of a full store")
    equal(len(read(DISK)), SIZE, "bytes that can still be read")
    obdsetup("close", NAME)
    words = "store: was full, and writes to the disk failed"
    refused(3, words, "create", "--changes", "store", *BASES, "none")
    refused(3, words, "open", "--writable", "store", NAME, *LAYERS)
    said = open_writable("--store-size", "16m")
    check("note: store: was full, and writes to the disk failed: check the file system" in said, said)
    check(len(first) == 30 << 16 and fill() == SIZE, "there is not enough space in the larger store")
    disk = read(DISK)
    obdsetup("close", NAME)
    obdsetup("create", "--changes", "store", *BASES, "third.obd")
    obdsetup("export", *LAYERS, "third.obd", "-o", "out.raw")
    same_bytes(read("out.raw"), disk, "the disk of all layers")
    nothing_left()


@test("a store that is full to the last chunk, and one that has a chunk left", timeout=LONG)
def last_chunk():
    work()
    # Of 511 chunks, one is the header, and two have the exceptions: 508 are left for data.
    for chunks in (507, 508):
        open_writable("--store-size", "2m")
        for nth in range(chunks):
            write_disk(nth << 12, RNG.randbytes(4096))
        _, store = changes(status=4)
        equal((store["overflowed"], store["lost"]), (False, False), "nothing has failed")
        obdsetup("close", NAME)
        if chunks == 507:
            obdsetup("create", "--changes", "store", *BASES, "third.obd")
        else:
            # A write may have failed after `close` read the status for the last time.
            refused(3, "store: was full", "create", "--changes", "store", *BASES, "none")
            open_writable("--store-size", "4m")
            obdsetup("close", NAME)
            obdsetup("create", "--changes", "store", *BASES, "third.obd", "--force")
        os.unlink("store")
    nothing_left()


@test("a store whose file system gets full: the changes are lost, and status reports it", timeout=LONG)
def lost():
    work()
    run("mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", "mnt")
    defer(quietly, "umount", "mnt")
    obdsetup("open", "--create", "--writable", "mnt/store", NAME, *LAYERS)
    fill()
    health, store = changes(status=4)
    equal((health, store["lost"]), ("lost", True), "status")
    obdsetup("close", NAME)
    words = "store: the changes are lost"
    refused(3, words, "create", "--changes", "mnt/store", *BASES, "none")
    refused(3, words, "open", "--writable", "mnt/store", NAME, *LAYERS)
    nothing_left()


@test("after a crash, a store can be opened, but no layer can be made of it before it was closed", timeout=LONG)
def crash():
    content = work()
    open_writable()
    more = RNG.randbytes(100_000)
    write_disk(50_000, more)
    content[50_000:150_000] = more
    for name in (NAME, f"{NAME}-image", f"{NAME}-store"):
        run("dmsetup", "remove", "--retry", name)
    # This close also removes the devices of the layers that the crash has left.
    obdsetup("open", NAME, *LAYERS)
    obdsetup("close", NAME)
    nothing_left()
    refused(3, "store: was not closed when it was open last", "create", "--changes", "store", *BASES, "none")
    said = open_writable()
    check("note: store: was not closed when it was open last" in said, said)
    same_bytes(read(DISK), bytes(content), "content")
    obdsetup("close", NAME)
    obdsetup("create", "--changes", "store", *BASES, "third.obd")
    # The kernel removes the disk when its last user closes it. No obdsetup runs then to mark the store as closed.
    open_writable()
    with open(DISK, "rb"):
        _, said = obdsetup("close", "--deferred", NAME)
        check("its store counts as not closed until it is opened and closed again" in said, said)
    nothing_left()
    refused(3, "store: was not closed when it was open last", "create", "--changes", "store", *BASES, "none")
    open_writable()
    obdsetup("close", NAME)
    nothing_left()


def kill(rng, lasts, *args):
    """Runs obdsetup and kills it at a random time within lasts seconds. Returns whether it was still running."""
    child = subprocess.Popen(["obdsetup", *args], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)
    time.sleep(rng.random() * lasts)
    child.kill()
    child.wait()
    eventually("processes that are left", programs.running, [])
    return child.returncode == -signal.SIGKILL


@test("open and close are killed: the next one clears what is left, and the store keeps the changes",
      timeout=LONG + 100 * KILLS)
def kills():
    content = work()
    note(f"OBD_SEED={SEED}")
    rng = random.Random(SEED)
    lasts = {}
    for command in ("open", "close", "open", "close"):
        start = time.monotonic()
        if command == "open":
            open_writable()
        else:
            obdsetup("close", NAME)
        lasts[command] = time.monotonic() - start
    half = 0
    top = f"OVERLAYBD-WRITABLE-{NAME}"
    for nth in range(KILLS):
        killed = kill(rng, lasts["open"], "open", "--writable", "store", NAME, *LAYERS)
        found = devices()
        if found.get(NAME) == top:
            obdsetup("close", NAME)
        elif found:
            half += killed
        open_writable()
        same_bytes(read(DISK), bytes(content), f"content after kill {nth} of open, which left {found}")
        at, more = nth * 100_000, RNG.randbytes(5000)
        write_disk(at, more)
        content[at:at + len(more)] = more
        kill(rng, lasts["close"], "close", NAME)
        found = devices()
        if found.get(NAME) == top:
            obdsetup("close", NAME)
        open_writable()
        same_bytes(read(DISK), bytes(content), f"content after kill {nth} of close, which left {found}")
        obdsetup("close", NAME)
        nothing_left()
    note(f"{half} of {KILLS} kills of open left half a disk")
    obdsetup("create", "--changes", "store", *BASES, "fast.obd")
    write("disk.raw", content)
    obdsetup("create", "--image", "disk.raw", *BASES, "slow.obd")
    same_bytes(read("fast.obd"), read("slow.obd"), "the layer")
    # After a kill, the new store may exist; if not, open makes it.
    os.unlink("store")
    for _ in range(KILLS):
        kill(rng, lasts["open"], "open", "--create", "--writable", "store", NAME, *LAYERS)
        if devices().get(NAME) != top:
            open_writable()
        obdsetup("close", NAME)
        os.unlink("store")
    nothing_left()


@test("an open that fails leaves neither devices nor a new store, and an old store unchanged", timeout=LONG)
def failed_open():
    work()
    run("dmsetup", "create", f"{NAME}-store", "--notable")
    defer(quietly, "dmsetup", "remove", f"{NAME}-store")
    new = ("open", "--create", "--writable", "store")
    refused(5, f"device {NAME}-store exists already", *new, NAME, *LAYERS)
    check(not os.path.exists("store"), "a store is left")
    obdsetup(*new, "--lsmt-opt", "no_such_option", NAME, *LAYERS, status=5)
    quietly("dmsetup", "remove", f"{NAME}-store")
    obdsetup(*new, "--lsmt-opt", "no_such_option", NAME, *LAYERS, status=4)
    check(not os.path.exists("store"), "a store is left")
    # This open fails at its end, after it has made the disk: it cannot write its output.
    with open("/dev/full", "wb") as full:
        done = subprocess.run(["obdsetup", *new, NAME, *LAYERS], stdout=full, stderr=subprocess.PIPE, check=False)
    check(done.returncode != 0 and not os.path.exists("store"), f"open succeeded, or a store is left: {done}")
    refused(1, "a store of ", *new, "--store-size", "1048576t", NAME, *LAYERS)
    check(not os.path.exists("store"), "a store is left")
    open_writable()
    write_disk(0, b"written")
    obdsetup("close", NAME)
    before = read("store")
    obdsetup("open", "--writable", "store", "--lsmt-opt", "no_such_option", NAME, *LAYERS, status=4)
    same_bytes(read("store"), before, "the store")
    nothing_left()


def open_and_hold(*args):
    """Runs an `open` that fails at its end. Tries to write to the disk before that, and to keep it in use until `open`
    has failed. Returns the message of `open`, and whether that worked.
    """
    with open("/dev/full", "wb") as full:
        child = subprocess.Popen(["obdsetup", "open", *args, "--writable", "store", NAME, *LAYERS], stdout=full,
                                 stderr=subprocess.PIPE, text=True)
    fd = None
    while fd is None and child.poll() is None:
        with contextlib.suppress(OSError):
            fd = os.open(DISK, os.O_RDWR)
    if fd is None:
        return child.communicate()[1], False
    os.pwrite(fd, HELD, 0)
    os.fsync(fd)
    said = child.communicate()[1]
    os.close(fd)
    check(child.returncode != 0, f"open did not fail: {said}")
    return said, True


HELD = b"written meanwhile" * 100


@test("an open that fails while the disk is in use: the store stays, and keeps the changes", timeout=LONG)
def failed_in_use():
    work()
    for args in (["--create"], [], ["--store-size", "64m"]):
        for _ in range(20):
            said, held = open_and_hold(*args)
            if held:
                break
        check(held, "the disk was never in use when open failed")
        check("note: store: is kept, and counts as not closed: " in said, said)
        refused(5, f"stack {NAME} has it open", "create", "--changes", "store", *BASES, "none")
        same_bytes(read(DISK)[:len(HELD)], HELD, "what was written")
        obdsetup("close", NAME)
        obdsetup("create", "--changes", "store", *BASES, "third.obd", "--force")
        open_writable()
        same_bytes(read(DISK)[:len(HELD)], HELD, "what was written")
        obdsetup("close", NAME)
        nothing_left()


@test("two opens with the same store at the same time: one succeeds, the other fails", timeout=LONG)
def two_at_once():
    work()
    names = (NAME, f"{NAME}2")
    for nth in range(8):
        new = [] if nth % 2 else ["--create"]
        both = [subprocess.Popen(["obdsetup", "open", *new, "--writable", "store", name, *LAYERS],
                                 stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for name in names]
        said = [child.communicate()[1] for child in both]
        codes = [child.returncode for child in both]
        equal(sorted(codes), [0, 5], f"exit codes; messages: {said}")
        obdsetup("close", names[codes.index(0)])
        nothing_left()
        if nth % 2:
            os.unlink("store")


@test("a write to the store fails: obdsetup records it, although dm-snapshot's header says valid", timeout=LONG)
def failed_writes():
    work()
    with open("volume", "wb") as file:
        file.truncate(SIZE)
    loop = run("losetup", "--find", "--show", "volume").strip()
    defer(quietly, "losetup", "--detach", loop)
    lower, sectors = f"{NAME}-lower", SIZE // 512
    linear = f"0 {sectors} linear {loop} 0"
    run("dmsetup", "create", lower, "--table", linear)
    defer(quietly, "dmsetup", "remove", "--retry", lower)
    store = f"/dev/mapper/{lower}"

    def swap(table):
        run("dmsetup", "suspend", "--noflush", "--nolockfs", lower)
        run("dmsetup", "load", lower, "--table", table)
        run("dmsetup", "resume", lower)

    obdsetup("open", "--create", "--writable", store, NAME, *LAYERS)
    write_disk(0, RNG.randbytes(8192))
    swap(f"0 {sectors} error")
    with contextlib.suppress(OSError):
        write_disk(1 << 20, RNG.randbytes(8192))
    swap(linear)
    run("blockdev", "--flushbufs", store)
    equal(read(store)[4100:4104], b"\1\0\0\0", "field valid of dm-snapshot's header")
    obdsetup("close", NAME)
    refused(3, "a write to it failed when it was open last", "create", "--changes", store, *BASES, "none")
    _, said = obdsetup("open", "--writable", store, NAME, *LAYERS)
    check("a write to it failed when it was open last" in said, said)
    obdsetup("close", NAME)
    obdsetup("create", "--changes", store, *BASES, "third.obd")


@test("a store that another machine has open is refused", timeout=LONG)
def other_machine():
    if not os.path.exists("/etc/machine-id"):
        raise Skip("no /etc/machine-id to put another one over")
    work()

    def on_machine(machine, boot, *args, status=0):
        write("machine", f"{machine * 32}\n".encode())
        write("boot", f"{boot * 32}\n".encode())
        script = ("mount --bind machine /etc/machine-id && mount --bind boot /proc/sys/kernel/random/boot_id && "
                  'exec obdsetup "$@"')
        done = subprocess.run(["unshare", "--mount", "sh", "-c", script, "sh", *args], capture_output=True, text=True,
                              check=False)
        equal(done.returncode, status, f"status of obdsetup {args} on that machine ({done.stderr.strip()})")
        return done.stderr

    reopen = ("open", "--writable", "store", NAME, *LAYERS)
    on_machine("1", "1", "open", "--create", "--writable", "store", NAME, *LAYERS)
    for name in (NAME, f"{NAME}-image", f"{NAME}-store"):
        run("dmsetup", "remove", "--retry", name)
    said = on_machine("2", "2", *reopen, status=5)
    check(f"is open on another machine, or was not closed there; its machine-id is {'1' * 32}" in said, said)
    # A container on the same machine (another machine-id), and the same machine after a reboot (another boot_id).
    for machine, boot in (("2", "1"), ("1", "2")):
        on_machine(machine, boot, *reopen)
        obdsetup("close", NAME)
        on_machine("1", "1", *reopen)
        for name in (NAME, f"{NAME}-image", f"{NAME}-store"):
            run("dmsetup", "remove", "--retry", name)
    on_machine("2", "2", "open", "--take-over", *reopen[1:])
    obdsetup("close", NAME)
    # A closed store may be opened on any machine.
    on_machine("3", "3", *reopen)
    obdsetup("close", NAME)
    nothing_left()


@test("obdsetup is killed before or after it makes a device, and before or after it removes one", timeout=LONG)
def kill_points():
    content = work()
    open_writable()
    obdsetup("close", NAME)
    os.mkdir("bin")
    for command in ("create", "remove"):
        for first in (f"[ $1 != {command} ] || {{ kill -9 $PPID; exit 1; }}", ":"):
            last = "kill -9 $PPID" if first == ":" else ":"
            write("bin/dmsetup", f"""#!/bin/sh
{first}
{shutil.which("dmsetup")} "$@"
code=$?
[ $1 != {command} ] || {last}
exit $code
""".encode())
            os.chmod("bin/dmsetup", 0o755)
            if command == "remove":
                open_writable()
            args = ("close", NAME) if command == "remove" else ("open", "--writable", "store", NAME, *LAYERS)
            env = dict(os.environ, PATH=f"{os.getcwd()}/bin:{os.environ['PATH']}")
            done = subprocess.run(["obdsetup", *args], env=env, capture_output=True, check=False)
            equal(done.returncode, -signal.SIGKILL, f"status of obdsetup {args}: {done.stderr}")
            found = devices()
            note(f"{command}, {first}: left {found}")
            if found.get(NAME) != f"OVERLAYBD-WRITABLE-{NAME}":
                refused(3, "store: was not closed when it was open last",
                        "create", "--changes", "store", *BASES, "none")
                open_writable()
            same_bytes(read(DISK), bytes(content), "content")
            at = RNG.randrange(SIZE - 5000)
            more = RNG.randbytes(5000)
            write_disk(at, more)
            content[at:at + 5000] = more
            obdsetup("close", NAME)
            nothing_left()
    obdsetup("create", "--changes", "store", *BASES, "fast.obd")
    obdsetup("export", *LAYERS, "fast.obd", "-o", "out.raw")
    same_bytes(read("out.raw"), bytes(content), "the disk of all layers")


@test("udev makes links to the disk, and none to the devices below it", timeout=LONG)
def udev():
    work()
    run("mkfs.ext4", "-q", "-F", "disk.raw")
    obdsetup("create", "--image", "disk.raw", "base.obd", "--force")
    open_writable(layers=("base.obd", ))
    uuid = run("blkid", "-p", "-s", "UUID", "-o", "value", DISK).strip()
    equal(os.path.realpath(f"/dev/disk/by-uuid/{uuid}"), os.path.realpath(DISK), "device of the file system")
    links = glob.glob(f"/dev/disk/by-id/*{NAME}-*")
    equal(links, [], "links to the devices below")
    obdsetup("close", NAME)
    nothing_left()


@test("a line of overlaybdtab can name a store", timeout=LONG)
def tab():
    work()
    write("tab", f"{NAME} {os.getcwd()}/base.obd,{os.getcwd()}/app.obd writable={os.getcwd()}/store,noauto\n".encode())
    os.environ["OVERLAYBDTAB"] = f"{os.getcwd()}/tab"
    defer(os.environ.pop, "OVERLAYBDTAB")
    # The store doesn't exist, as if its file system weren't mounted.
    refused(4, "store: there is no store of changes; `open --create' makes it", "open", NAME)
    check(not os.path.exists("store"), "a store is left")
    obdsetup("open", "--create", NAME)
    write_disk(0, b"written")
    obdsetup("close", NAME)
    obdsetup("create", "--changes", "store", *BASES, "third.obd")
    # A store that was enlarged on the command line may be larger than the table says, at each boot after that, too.
    text = read("tab").decode().replace(",noauto", ",noauto,store-size=2m")
    write("tab", text.encode())
    obdsetup("open", "--store-size", "32m", NAME)
    obdsetup("close", NAME)
    obdsetup("open", NAME)
    obdsetup("close", NAME)
    refused(1, "a store cannot become smaller", "open", "--store-size", "4m", NAME)
    write("tab", text.replace("store-size=2m", "create").encode())
    refused(1, "option `create' is for the command line only", "open", NAME)
    nothing_left()


if __name__ == "__main__":
    if not shutil.which("obdsetup"):
        skip_all("no obdsetup")
    if quietly("modprobe", "dm-snapshot"):
        skip_all("this kernel has no dm-snapshot")
    udevd.start()
    main()
