#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Whole disks. `obdsetup open --partitions' makes a device for each partition; close removes them with the disk, also
after a kill. A chain of qcow2 images becomes a stack with the same bytes, and a stack becomes such a chain.

OBD_KILLS is the number of kills. OBD_SEED determines their times.
"""

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
from obdtest.ktap import check, defer, equal, main, note, same_bytes, skip_all, test
from obdtest.left import devices, eventually
from obdtest.programs import need, need_module, obdsetup, quietly, run

KILLS = int(os.environ.get("OBD_KILLS", "6"))
SEED = os.environ.get("OBD_SEED") or str(random.SystemRandom().randrange(1 << 32))
NAME = f"obdtest-{os.getpid()}"
DISK = f"/dev/mapper/{NAME}"
MIB = 1 << 20
SIZE = 16 * MIB
GPT = """label: gpt
start=2048, size=12288, name="first one", uuid=6f626474-0000-4000-8000-000000000001
start=16384, size=2048, uuid=6f626474-0000-4000-8000-000000000002
"""
DOS = """label: dos
disk.raw1 : start=2048, size=12288
disk.raw2 : start=14336, size=16384, type=5
disk.raw5 : start=16384, size=1024
disk.raw6 : start=20480, size=2048
"""
# Time limit of a test in seconds, on a machine that runs other programs, too.
LONG = 600


def refused(status, said, *args):
    """Checks that a command fails with this exit status and message, and leaves nothing behind."""
    _, err = obdsetup(*args, status=status)
    check(said in err, f"obdsetup {' '.join(args)} said: {err.strip()}")
    nothing_left()


def nodes():
    return glob.glob(f"{DISK}*")


def nothing_left():
    left.nothing_left()
    eventually("nodes that are left", nodes, [])


def clear():
    """Removes the mount and the devices that a failed test has left."""
    quietly("umount", "mnt")
    left.clear(NAME)


def work():
    """Changes to a new directory with the mount point `mnt` until the end of the test."""
    enter_work_directory()
    defer(clear)
    os.mkdir("mnt")
    note(f"OBD_SEED={SEED}")


def disk_of(table, size=SIZE, *options):
    """Makes disk.raw with a partition table, and sample data in its partitions. Returns the content."""
    write("disk.raw", image.sample(size, 7))
    write("disk.raw", bytes(MIB), at=0)
    write("disk.raw", bytes(64 << 10), at=size - (64 << 10))
    run("sfdisk", "-q", *options, "disk.raw", input=table)
    return read("disk.raw")


def layer():
    """Makes the layer base.obd of disk.raw."""
    obdsetup("create", "--raw", "--image", "disk.raw", "--skip-zeros", "--force", "base.obd")


def file_system(start, size):
    """Makes an ext4 with a file in the partition of disk.raw with this first sector and number of sectors."""
    os.makedirs("tree", exist_ok=True)
    write("tree/file", b"what is in the file")
    run("mkfs.ext4", "-q", "-F", "-d", "tree", "-L", "obdtest-fs", "-U", "6f626474-0000-4000-8000-0000000000aa", "-E",
        f"offset={start * 512}", "disk.raw", f"{size // 2}k")


def status(code=0):
    return json.loads(obdsetup("status", "--json", NAME, status=code)[0])


def links(*names):
    """Checks that each link in /dev/disk leads to its partition."""
    udevd.settle()
    for place, name in names:
        equal(os.path.realpath(f"/dev/disk/{place}"), os.path.realpath(f"{DISK}-{name}"), place)


@test("a GUID partition table: devices, links, mount, status, close")
def gpt():
    work()
    disk_of(GPT)
    file_system(2048, 12288)
    content = read("disk.raw")
    layer()
    out, err = obdsetup("open", "--partitions", NAME, "base.obd")
    equal((out, err), (f"{DISK}\n{DISK}-part1\n{DISK}-part2\n", ""), "what open says")
    same_bytes(read(DISK), content, "disk")
    same_bytes(read(f"{DISK}-part1"), content[2048 * 512:14336 * 512], "partition 1")
    same_bytes(read(f"{DISK}-part2"), content[16384 * 512:18432 * 512], "partition 2")
    links(("by-partuuid/6f626474-0000-4000-8000-000000000001", "part1"), ("by-partlabel/first\\x20one", "part1"),
          ("by-uuid/6f626474-0000-4000-8000-0000000000aa", "part1"), ("by-label/obdtest-fs", "part1"),
          ("by-partuuid/6f626474-0000-4000-8000-000000000002", "part2"),
          (f"by-id/dm-uuid-part2-OVERLAYBD-LSMT-{NAME}", "part2"))
    report = status()
    wanted = [{"number": 1, "name": f"{NAME}-part1", "start": MIB, "size": 12288 * 512, "open_count": 0},
              {"number": 2, "name": f"{NAME}-part2", "start": 8 * MIB, "size": MIB, "open_count": 0}]
    equal(report["partitions"], wanted, "partitions")
    equal((report["health"], report["open_count"], len(report["layers"])), ("ok", 0, 1), "health")
    equal(report["devices"][0]["name"], NAME, "the first device")
    text = obdsetup("status", NAME)[0]
    check("not in use\n" in text and f"partition 1: {DISK}-part1, " in text, text)
    [row] = [row for row in json.loads(obdsetup("list", "--json")[0]) if row["name"] == NAME]
    equal(row["partitions"], wanted, "partitions of list")
    check("  1,2         -\n" in obdsetup("list")[0], "list does not show the partitions")

    run("mount", "-o", "ro", f"{DISK}-part1", "mnt")
    equal(read("mnt/file"), b"what is in the file", "file")
    report = status()
    equal((report["open_count"], report["partitions"][0]["open_count"]), (1, 1), "open counts")
    _, err = obdsetup("close", NAME, status=5)
    check(f"device {NAME}-part1 is in use" in err, err)
    _, err = obdsetup("close", f"{NAME}-part1", status=4)
    check(f"device {NAME}-part1 is a part of stack {NAME}: give that name" in err, err)
    equal(len(devices()), 4, "devices after a refusal")
    run("umount", "mnt")
    _, err = obdsetup("open", "--partitions", NAME, "base.obd", status=5)
    check(f"device {NAME} exists already" in err, err)
    equal(len(status()["partitions"]), 2, "partitions after a second open")
    obdsetup("close", NAME)
    nothing_left()


@test("open notes file systems in partitions that were not unmounted cleanly, but not if the disk takes writes")
def journals():
    work()
    disk_of(GPT)
    file_system(2048, 12288)
    run("debugfs", "-w", "-R", "feature needs_recovery", f"disk.raw?offset={MIB}")
    layer()
    _, err = obdsetup("open", "--partitions", NAME, "base.obd")
    equal(err, f"obdsetup: note: the ext4 file system on {DISK}-part1 was not unmounted cleanly, and a read-only device "
          "cannot replay its journal: mount -o ro,noload shows it without what is in the journal\n", "what open says")
    check(quietly("mount", "-o", "ro", f"{DISK}-part1", "mnt"), "a mount without noload succeeded")
    run("mount", "-o", "ro,noload", f"{DISK}-part1", "mnt")
    equal(read("mnt/file"), b"what is in the file", "file")
    run("umount", "mnt")
    obdsetup("close", NAME)
    equal(obdsetup("open", NAME, "base.obd")[1], "", "what open says without --partitions")
    obdsetup("close", NAME)
    if not quietly("modprobe", "dm-snapshot"):
        _, err = obdsetup("open", "--partitions", "--create", "--writable", "store", NAME, "base.obd")
        check("made a new store" in err and "unmounted" not in err, f"open with a store says {err!r}")
        obdsetup("close", NAME)
    nothing_left()


@test("close --deferred: the disk and a partition in use stay until the partition is closed")
def deferred():
    work()
    disk_of(GPT)
    layer()
    obdsetup("open", "--partitions", NAME, "base.obd")
    with open(f"{DISK}-part2", "rb"):
        obdsetup("close", "--deferred", NAME)
        check(os.path.exists(f"{DISK}-part2") and not os.path.exists(f"{DISK}-part1"),
              "not exactly partition 2, which is in use, is left")
    nothing_left()


@test("a DOS partition table with logical partitions; sectors of 4096 bytes; the backup of a GUID partition table")
def tables():
    work()
    content = disk_of(DOS)
    layer()
    equal(obdsetup("open", "--partitions", NAME, "base.obd")[0], "".join(
        f"{DISK}{part}\n" for part in ("", "-part1", "-part5", "-part6")), "nodes")
    same_bytes(read(f"{DISK}-part6"), content[20480 * 512:22528 * 512], "partition 6")
    obdsetup("close", NAME)

    content = disk_of("label: gpt\nstart=256, size=512\n", SIZE, "--sector-size", "4096")
    layer()
    obdsetup("open", "--partitions", NAME, "base.obd")
    same_bytes(read(f"{DISK}-part1"), content[256 * 4096:768 * 4096], "a partition of large sectors")
    obdsetup("close", NAME)

    disk_of(GPT)
    write("disk.raw", b"xx", at=512)
    layer()
    obdsetup("open", "--partitions", NAME, "base.obd")
    equal(len(nodes()), 3, "devices from the backup of the table")
    obdsetup("close", NAME)
    nothing_left()


@test("no partition table, a damaged one, partitions after the end of the disk: a clear message, nothing is left")
def damaged():
    work()
    write("disk.raw", bytes(SIZE))
    write("disk.raw", image.sample(5000, 3), at=MIB)
    layer()
    none = f"device {NAME}: no partition table was found on the disk: open it without --partitions"
    refused(1, none, "open", "--partitions", NAME, "base.obd")
    obdsetup("create", "--raw", "--image", "disk.raw", "--algorithm", "none", "plain.lsmt")
    refused(1, none, "open", "--partitions", "--private", NAME, "plain.lsmt")
    disk_of("label: dos\n")
    layer()
    refused(1, "its partition table has no partitions", "open", "--partitions", NAME, "base.obd")
    disk_of(GPT)
    write("disk.raw", bytes(512), at=512)
    write("disk.raw", bytes(512), at=SIZE - 512)
    layer()
    refused(3, "the GUID partition table and its copy at the end of the disk are damaged or missing", "open",
            "--partitions", NAME, "base.obd")
    # Without --partitions, the disk can be opened.
    obdsetup("open", NAME, "base.obd")
    obdsetup("close", NAME)
    disk_of(DOS)
    os.truncate("disk.raw", 9 * MIB)
    layer()
    refused(3, "partition 2 begins at sector 14336 and has 16384 sectors, but the disk has 18432 sectors only", "open",
            "--partitions", NAME, "base.obd")
    # Another device has the name of a partition's device.
    disk_of(GPT)
    layer()
    run("dmsetup", "create", f"{NAME}-part2", "--table", "0 8 zero")
    defer(quietly, "dmsetup", "remove", f"{NAME}-part2")
    _, err = obdsetup("open", "--partitions", NAME, "base.obd", status=5)
    check(f"device {NAME}-part2 exists already" in err, err)
    equal(devices(), {}, "devices that are left")
    run("dmsetup", "remove", f"{NAME}-part2")
    nothing_left()


@test("the partitions of a disk that takes writes take them, too, and the changes become a layer", timeout=LONG)
def writable():
    need_module("dm-snapshot")
    work()
    disk_of(GPT)
    file_system(2048, 12288)
    layer()
    obdsetup("open", "--partitions", "--create", "--writable", "store", NAME, "base.obd")
    run("mount", f"{DISK}-part1", "mnt")
    write("mnt/new", b"written")
    refused_close = obdsetup("close", NAME, status=5)[1]
    check(f"{NAME}-part1 is in use" in refused_close, refused_close)
    run("umount", "mnt")
    content = read(DISK)
    obdsetup("close", NAME)
    nothing_left()
    obdsetup("create", "--changes", "store", "--base", "base.obd", "new.obd")
    obdsetup("open", "--partitions", NAME, "base.obd", "new.obd")
    same_bytes(read(DISK), content, "disk")
    run("mount", "-o", "ro,noload", f"{DISK}-part1", "mnt")
    equal(read("mnt/new"), b"written", "new file")
    run("umount", "mnt")
    obdsetup("close", NAME)
    # If the disk has no partition table, open also removes the new store.
    write("empty.raw", bytes(SIZE))
    obdsetup("create", "--raw", "--image", "empty.raw", "empty.obd")
    _, err = obdsetup("open", "--partitions", "--create", "--writable", "other", NAME, "empty.obd", status=1)
    check("no partition table was found" in err, err)
    nothing_left()
    check(not os.path.exists("other"), "a store is left")


@test("overlaybdtab has the option partitions")
def tab():
    work()
    disk_of(GPT)
    layer()
    write("tab", f"{NAME} {os.getcwd()}/base.obd partitions,noauto\n".encode())
    os.environ["OVERLAYBDTAB"] = f"{os.getcwd()}/tab"
    defer(os.environ.pop, "OVERLAYBDTAB")
    obdsetup("open", NAME)
    equal(len(nodes()), 3, "nodes")
    obdsetup("close", NAME)
    write("tab", f"{NAME} {os.getcwd()}/base.obd\n".encode())
    obdsetup("open", "--partitions", NAME)
    equal(len(nodes()), 3, "nodes with --partitions on the command line")
    obdsetup("close", NAME)
    nothing_left()


@test("partitions without udevd: with private devices, with --zfile, and of a disk with the longest name")
def ways():
    work()
    content = disk_of(GPT)
    layer()
    write("data.zf", image.zfile(content))
    udevd.stop()
    defer(udevd.start)
    obdsetup("open", "--partitions", "--private", NAME, "base.obd")
    same_bytes(read(f"{DISK}-part2"), content[16384 * 512:18432 * 512], "partition 2")
    obdsetup("close", NAME)
    nothing_left()
    obdsetup("open", "--partitions", "--zfile", NAME, "data.zf")
    same_bytes(read(f"{DISK}-part2"), content[16384 * 512:18432 * 512], "partition 2 of a ZFile")
    obdsetup("close", NAME)
    nothing_left()
    longest = NAME + "-" * (100 - len(NAME))
    obdsetup("open", "--partitions", longest, "base.obd")
    check(os.path.exists(f"/dev/mapper/{longest}-part2"), "no partition of the disk with the longest name")
    obdsetup("close", longest)
    nothing_left()


@test("a stack that was killed before all partitions were made: status reports it, open and close clear it")
def half_built():
    work()
    disk_of(GPT)
    layer()
    for clears in ("open", "close"):
        obdsetup("open", "--partitions", NAME, "base.obd")
        run("dmsetup", "remove", f"{NAME}-part2")
        run("dmsetup", "create", f"{NAME}-partitions", "--uuid", f"OVERLAYBD-MARK-{NAME}", "--table", "0 1 error")
        out, _ = obdsetup("status", NAME, status=4)
        check("HALF BUILT: " in out, out)
        equal(status(4)["health"], "half-built", "health")
        args = ["--partitions", NAME, "base.obd"] if clears == "open" else [NAME]
        _, err = obdsetup(clears, *args)
        check(f"device {NAME} was left half built by an obdsetup that was killed: removing " in err, err)
        if clears == "open":
            equal(len(nodes()), 3, "nodes after an open that cleared")
            obdsetup("close", NAME)
        nothing_left()


@test("close also removes partitions' devices that other programs, such as kpartx, have made")
def by_others():
    work()
    disk_of(GPT)
    layer()
    obdsetup("open", NAME, "base.obd")
    run("dmsetup", "create", f"{NAME}p1", "--readonly", "--uuid", f"part1-OVERLAYBD-LSMT-{NAME}", "--table",
        f"0 12288 linear {DISK} 2048")
    equal([part["name"] for part in status()["partitions"]], [f"{NAME}p1"], "partitions")
    obdsetup("close", NAME)
    nothing_left()


@test("open and close are killed at random moments: the next one clears what is left", timeout=LONG + 30 * KILLS)
def kills():
    work()
    content = disk_of(GPT)
    layer()
    rng = random.Random(SEED)
    seen = set()
    for nth in range(KILLS):
        which = nth % 3
        if which == 2:
            obdsetup("open", "--partitions", NAME, "base.obd")
        args = ["close", NAME] if which == 2 else ["open", "--partitions", NAME, "base.obd"]
        child = subprocess.Popen(["obdsetup", *args], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                 stderr=subprocess.DEVNULL)
        # The kill comes when open has made so many of its five devices (with the mark), or when close has left so many
        # of four.
        wanted = rng.randint(0, 3) if which == 2 else rng.randint(1, 5)
        while child.poll() is None:
            there = len(glob.glob("/sys/block/dm-*"))
            if there <= wanted if which == 2 else there >= wanted:
                break
        time.sleep(rng.choice((0, 0, 0.02, 0.1)))
        child.send_signal(signal.SIGKILL if which != 1 else signal.SIGTERM)
        code = child.wait()
        eventually(f"{nth}: processes that are left", programs.running, [])
        found = sorted(name.removeprefix(NAME) for name in devices())
        seen.add((args[0], code, len(found)))
        if code == 130:
            nothing_left()
        is_whole = found and not any(name.endswith("-partitions") for name in found)
        if nth % 2 == 0 or is_whole:
            done = subprocess.run(["obdsetup", "close", NAME], capture_output=True, text=True, check=False)
            check(done.returncode in (0, 4), f"{nth}: {found}: close: {done.stderr}")
        else:
            obdsetup("open", "--partitions", NAME, "base.obd")
            same_bytes(read(f"{DISK}-part2"), content[16384 * 512:18432 * 512], "partition 2")
            obdsetup("close", NAME)
        nothing_left()
    note(f"ends: {sorted(seen)}")


def disks_of_chain():
    """Makes the disks 0.raw, 1.raw and 2.raw with a partition table. Each is the one before with changes. Returns the
    content of the last one."""
    content = bytearray(disk_of(GPT))
    content[12 * MIB:15 * MIB] = bytes(3 * MIB)
    for nth in range(3):
        if nth:
            content[(nth + 2) * MIB:(nth + 2) * MIB + 9000] = image.sample(9000, 50 + nth)
            content[(nth + 8) * MIB:(nth + 8) * MIB + 70000] = bytes(70000)
        write(f"{nth}.raw", content)
    return bytes(content)


@test("a chain of qcow2 images becomes a stack, and the stack a chain", timeout=LONG)
def chains():
    need("qemu-img")
    work()
    content = disks_of_chain()
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "0.raw", "a.qcow2")
    for nth, (below, name) in enumerate((("a", "b"), ("b", "c")), 1):
        run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", f"{os.getcwd()}/{nth}.raw", f"{name}.qcow2")
        run("qemu-img", "rebase", "-f", "qcow2", "-F", "qcow2", "-b", f"{below}.qcow2", f"{name}.qcow2")
    obdsetup("convert", "c.qcow2", "vm")
    equal(sorted(os.listdir("vm")), ["config.v1.json", "layer0.obd", "layer1.obd", "layer2.obd"], "files")
    obdsetup("open", "--partitions", NAME, "vm/config.v1.json")
    same_bytes(read(DISK), content, "disk")
    same_bytes(read(f"{DISK}-part1"), content[2048 * 512:14336 * 512], "partition 1")
    equal(len(status()["layers"]), 3, "layers")
    # QEMU reads the same content.
    run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", "c.qcow2", DISK)
    obdsetup("close", NAME)

    obdsetup("export", "--to", "qcow2", "--chain", "-o", "back", "vm/config.v1.json")
    for nth in range(3):
        run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", f"back/layer{nth}.qcow2", f"{nth}.raw")
    obdsetup("convert", "back/layer2.qcow2", "again")
    for nth in range(3):
        same_bytes(read(f"again/layer{nth}.obd"), read(f"vm/layer{nth}.obd"), f"layer {nth}")
    obdsetup("export", "--to", "qcow2", "-o", "whole.qcow2", "vm/config.v1.json")
    obdsetup("export", "-o", "whole.raw", "vm/config.v1.json")
    run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", "whole.qcow2", "2.raw")
    same_bytes(read("whole.raw"), content, "raw image")
    for name in ("whole.qcow2", "whole.raw"):
        check(os.stat(name).st_blocks * 512 < 14 * MIB, f"{name} has no holes")
    nothing_left()


@test("no space for an export or a conversion: a clear message, and nothing is left", timeout=LONG)
def no_room():
    work()
    disks_of_chain()
    obdsetup("create", "--raw", "--image", "0.raw", "0.obd")
    obdsetup("create", "--raw", "--image", "1.raw", "--base", "0.obd", "1.obd")
    os.mkdir("small")
    run("mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", "small")
    defer(quietly, "umount", "small")
    kinds = [[]]
    if shutil.which("qemu-img"):
        kinds += [["--to", "qcow2"], ["--to", "qcow2", "--chain"]]
    for kind in kinds:
        _, err = obdsetup("export", *kind, "-o", "small/out", "0.obd", "1.obd", status=4)
        check("No space left on device" in err, err)
        equal(os.listdir("small"), [], "what is left")
    # There is space for the raw image, but not for the qcow2 image that is made of it.
    if shutil.which("qemu-img"):
        run("mount", "-o", "remount,size=16m", "small")
        for kind in kinds[1:]:
            _, err = obdsetup("export", *kind, "-o", "small/out", "0.obd", "1.obd", status=4)
            check("small: no room" in err and "qemu-img failed" in err, err)
            equal(os.listdir("small"), [], "what is left")
        run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "0.raw", "a.qcow2")
        run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "a.qcow2", "b.qcow2")
        run("mount", "-o", "remount,size=6m", "small")
        obdsetup("convert", "b.qcow2", "small/out", status=4)
        equal(os.listdir("small"), [], "what is left")
    run("umount", "small")


if __name__ == "__main__":
    if not shutil.which("obdsetup"):
        skip_all("no obdsetup")
    if not shutil.which("sfdisk"):
        skip_all("no sfdisk")
    udevd.start()
    main()
