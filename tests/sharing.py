#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Stacks with layers in common: there is one device for each file, no device is removed while it is used, and no read
returns wrong data.

OBD_SHARING is the duration in seconds of the test with concurrent opens, closes and kills, OBD_SHARING_AT_ONCE the
number of its users. OBD_SEED determines what the users do: each run prints its seed.
"""

import contextlib
import fcntl
import glob
import json
import os
import random
import signal
import subprocess
import threading
import time

from obdtest import dm, image, left
from obdtest.disk import Disk, verify, verify_random
from obdtest.files import read, work_directory, write
from obdtest.ktap import SLOW, Failure, Skip, check, defer, equal, main, note, same_bytes, test
from obdtest.left import eventually, locks
from obdtest.module import MODULE, module_file
from obdtest.programs import OBDSETUP, need, need_module, obdsetup, quietly, run

SECONDS = int(os.environ.get("OBD_SHARING", "15"))
SEED = os.environ.get("OBD_SEED") or str(random.SystemRandom().randrange(1 << 32))
NAME = f"obdtest-{os.getpid()}"
SIZE = 256 << 10
LOOP_CHANGE_FD = 0x4C06
# Each test starts dozens of programs.
LONG = 300
STORM = int(os.environ.get("OBD_SHARING_AT_ONCE", "50"))


def devices(kind=""):
    """Returns the names of obdsetup's devices, of one type or all, by their UUIDs."""
    return {uuid: name for name, uuid in left.devices().items() if uuid.startswith(f"OVERLAYBD-{kind}")}


def loops():
    """Returns the files of the loop devices."""
    return sorted(left.loops().values())


def nothing_left(before=()):
    eventually("devices left", devices, {})
    eventually("loop devices left", lambda: [file for file in loops() if file not in before], [])
    eventually("locks left", lambda: locks(NAME), [])


def clear():
    """Removes the devices and locks that a failed test has left."""
    left.clear()
    for path in locks(NAME):
        with contextlib.suppress(OSError):
            os.unlink(path)


class Layers:
    """Files of layers, and their contents."""

    def __init__(self, seed=1):
        need("obdsetup")
        self.rng = random.Random(seed)
        self.work = work_directory()
        defer(clear)
        self.raws = {}

    def make(self, name, wrap=image.zfile, odd=False):
        """Makes a layer of random content. Returns its path. If odd is set, its size is not a multiple of 512."""
        while True:
            layer = image.lsmt(SIZE, image.random_layer(self.rng, SIZE, count=20))
            raw = wrap(layer)
            if not odd and len(raw) % 512:
                # The tar pads the file; the layer in it is unchanged.
                raw = image.tar(raw)
            if odd == bool(len(raw) % 512):
                break
        path = f"{self.work}/{name}"
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.rename(write(f"{path}.new", raw), path)
        self.raws[path] = layer
        return path

    def content(self, *paths):
        return content(*[self.raws[path] for path in paths])


def content(*layers):
    """Returns the content of the disk of LSMT files, filled up to SIZE with zeros."""
    whole = image.flatten([image.Lsmt(layer) for layer in layers])
    return whole + bytes(SIZE - len(whole))


def look(name, wanted, rounds=10):
    verify(f"/dev/mapper/{name}", wanted, rounds=rounds)


def below(name):
    """Returns the numbers of the devices directly below a device."""
    rdev = os.stat(f"/dev/mapper/{name}").st_rdev
    numbers = []
    for path in glob.glob(f"/sys/dev/block/{os.major(rdev)}:{os.minor(rdev)}/slaves/*/dev"):
        with open(path, encoding="ascii") as file:
            numbers.append(file.read().strip())
    return sorted(numbers)


def is_there(name):
    """Returns whether a device of that name exists. Without udev, a node in /dev/mapper may be left of a removed
    device."""
    for path in glob.glob("/sys/block/dm-*/dm/name"):
        with contextlib.suppress(OSError):
            with open(path, encoding="ascii") as file:
                if file.read().strip() == name:
                    return True
    return False


@test("A + B and A + B + C: one loop device and one zfile device for each file, until the last one closes", timeout=LONG)
def one_each():
    layers = Layers()
    base, mid, top = [layers.make(f"{name}.obd") for name in "abc"]
    one, two = f"{NAME}-1", f"{NAME}-2"
    obdsetup("open", one, base, mid)
    obdsetup("open", two, base, mid, top)
    equal(loops(), sorted([base, mid, top]), "loop devices")
    equal(len(devices("LAYER-")), 3, f"zfile devices: {devices()}")
    equal(devices("LSMT-"), {f"OVERLAYBD-LSMT-{name}": name for name in (one, two)}, "disks")
    check(set(below(one)) < set(below(two)), f"below: {below(one)}, {below(two)}")
    for uuid, name in devices("LAYER-").items():
        check(len(uuid) == len("OVERLAYBD-LAYER-") + 40, f"UUID {uuid}")
        check(name[:5] in ("a.obd", "b.obd", "c.obd") and name.endswith("-zfile") and NAME not in uuid + name,
              f"name {name}")
    look(one, layers.content(base, mid))
    look(two, layers.content(base, mid, top))
    obdsetup("close", one)
    equal(loops(), sorted([base, mid, top]), "loop devices when one is closed")
    look(two, layers.content(base, mid, top))
    obdsetup("open", one, base)
    look(one, layers.content(base))
    obdsetup("close", two)
    equal(loops(), [base], "loop devices when the other stack is closed")
    look(one, layers.content(base))
    obdsetup("close", one)
    nothing_left()


@test("status and list report what stacks share", timeout=LONG)
def told():
    layers = Layers()
    base, mid = layers.make("a.obd"), layers.make("b.obd")
    one, two, three = [f"{NAME}-{nth}" for nth in range(3)]
    obdsetup("open", one, base, mid)
    obdsetup("open", two, base)
    obdsetup("open", "--private", three, mid)
    rows = {row["name"]: row["shared_with"] for row in json.loads(obdsetup("list", "--json")[0])}
    equal(rows, {one: [two, three], two: [one], three: [one]}, "list: stacks with a file in common")
    report = json.loads(obdsetup("status", "--json", one)[0])
    equal([layer["shared_with"] for layer in report["layers"]], [[two], []], "status: stacks with a device in common")
    equal(report["shared_with"], [two, three], "status: stacks with a file in common")
    names = [device["name"] for device in report["devices"]]
    equal(names, [one, *[layer["zfile"] for layer in report["layers"]]], "status: devices")
    text = obdsetup("status", one)[0]
    check(f"{base}  (one device with {two})\n" in text and f"{mid}\n" in text, text)
    verbose = obdsetup("status", "--verbose", two)[0]
    check("-zfile:" in verbose and "cache hits" in verbose, verbose)
    obdsetup("list", "--check")
    tree = run("dmsetup", "ls", "--tree", "-o", "ascii,notrunc")
    check(tree.count("a.obd-") == 2, f"dmsetup ls --tree: {tree}")
    for name in (one, two, three):
        obdsetup("close", name)
    nothing_left()


@test("open --private, or with other options, makes separate devices; open notes the other options", timeout=LONG)
def private():
    layers = Layers()
    base = layers.make("a.obd")
    names = [f"{NAME}-{nth}" for nth in range(4)]
    equal(obdsetup("open", names[0], base)[1], "", "what the first open says")
    equal(obdsetup("open", "--private", names[1], base)[1], "", "what open --private says")
    shared = devices("LAYER-")
    check(f"OVERLAYBD-LAYER-{names[1]}-0" in shared and len(shared) == 2, f"devices: {shared}")
    for name, option in ((names[2], "--zfile-opt=cache_blocks 8"), (names[3], "--buffered")):
        said = obdsetup("open", option, name, base)[1]
        check(said.startswith("obdsetup: note: ") and "with other options" in said, f"what open {option} says: {said!r}")
    equal(len(devices("LAYER-")), 4, f"devices: {devices()}")
    equal(loops(), [base] * 4, "loop devices")
    other = f"{NAME}-other"
    equal(obdsetup("open", "--zfile-opt", "cache_blocks", "--zfile-opt", "8", other, base)[1], "",
          "what an open with the same options says")
    equal(len(devices("LAYER-")), 4, "devices with the same options once more")
    for name in (*names, other):
        look(name, layers.content(base))
        obdsetup("close", name)
    nothing_left()


@test("uncompressed files, with and without a partial sector at the end, and in a tar", timeout=LONG)
def wrappings():
    layers = Layers()
    kinds = {"plain": (bytes, False), "zodd": (image.zfile, True), "tar": (lambda raw: image.tar(image.zfile(raw)), False)}
    paths = [layers.make(f"{name}.obd", wrap, odd) for name, (wrap, odd) in kinds.items()]
    one, two = f"{NAME}-1", f"{NAME}-2"
    obdsetup("open", one, *paths)
    before = (loops(), devices("LAYER-"), devices("BLOB-"))
    equal(sorted(name.split("-")[0] for name in before[2].values()), ["plain.obd", "zodd.obd"], "blob devices")
    equal(len(before[1]), 2, "zfile devices")
    obdsetup("open", two, *reversed(paths))
    equal((loops(), devices("LAYER-"), devices("BLOB-")), before, "devices with a second stack")
    look(one, layers.content(*paths))
    look(two, layers.content(*reversed(paths)))
    obdsetup("close", one)
    look(two, layers.content(*reversed(paths)))
    obdsetup("close", two)
    nothing_left()


@test("the same layer twice in one stack", timeout=LONG)
def twice():
    layers = Layers()
    base, mid = layers.make("a.obd"), layers.make("b.obd")
    obdsetup("open", "--ignore-identity", NAME, base, mid, base)
    equal(loops(), sorted([base, mid]), "loop devices")
    look(NAME, layers.content(base, mid, base))
    obdsetup("status", NAME)
    obdsetup("close", NAME)
    nothing_left()


@test("the file counts, not its name: links, another file of that name, one that was deleted or changed", timeout=LONG)
def names_mean_nothing():
    layers = Layers()
    base = layers.make("here/a.obd")
    os.makedirs(f"{layers.work}/there")
    os.symlink(base, f"{layers.work}/there/link.obd")
    os.link(base, f"{layers.work}/there/hard.obd")
    names = [f"{NAME}-{nth}" for nth in range(3)]
    for name, path in zip(names, (base, f"{layers.work}/there/link.obd", f"{layers.work}/there/hard.obd")):
        obdsetup("open", name, path)
    equal(len(loops()), 1, f"loop devices: {loops()}")
    first = layers.content(base)
    # The same name in another directory.
    same = layers.make("there/a.obd")
    obdsetup("open", f"{NAME}-same", same)
    equal(len(loops()), 2, f"loop devices: {loops()}")
    # Another file replaces it.
    layers.make("here/a.obd")
    obdsetup("open", f"{NAME}-new", base)
    equal(len(loops()), 3, f"loop devices: {loops()}")
    for name in names:
        look(name, first)
    look(f"{NAME}-same", layers.content(same))
    look(f"{NAME}-new", layers.content(base))
    os.unlink(base)
    look(f"{NAME}-new", layers.content(base))
    newest = layers.make("here/a.obd")
    obdsetup("open", f"{NAME}-newest", newest)
    look(f"{NAME}-newest", layers.content(newest))
    # Changed in place: data read earlier may differ from the file, so the device isn't reused.
    before = len(loops())
    with open(newest, "r+b") as file:
        byte = file.read(1)
        file.seek(0)
        file.write(byte)
        os.fsync(file.fileno())
    obdsetup("open", f"{NAME}-changed", newest)
    equal(len(loops()), before + 1, "loop devices with a file that was written to")
    for name in (*names, f"{NAME}-same", f"{NAME}-new", f"{NAME}-newest", f"{NAME}-changed"):
        obdsetup("close", name)
    nothing_left()


@test("block devices: one zfile device for each, and another one for another length", timeout=LONG)
def block_devices():
    layers = Layers()
    path = layers.make("a.obd", odd=True)
    size = os.path.getsize(path)
    raw = read(path)
    loop = dm.Loop(raw + bytes(-len(raw) % 4096 + 4096))
    one, two = f"{NAME}-1", f"{NAME}-2"
    node = loop.path
    before = loops()
    for name in (one, two):
        obdsetup("open", name, f"{node}:size={size}")
        look(name, layers.content(path))
    equal(len(devices("LAYER-")), 1, f"zfile devices: {devices()}")
    equal(loops(), before, "loop devices")
    equal([layer["file"] for layer in json.loads(obdsetup("status", "--json", two)[0])["layers"]][0][:1], "/", "file")
    for name in (one, two):
        obdsetup("close", name)
    nothing_left(before)


@test("close --deferred: layers stay until their last user has closed them", timeout=LONG)
def deferred():
    layers = Layers()
    base, mid = layers.make("a.obd"), layers.make("b.obd")
    one, two = f"{NAME}-1", f"{NAME}-2"
    for first in (one, two):
        obdsetup("open", one, base, mid)
        disk = Disk(f"/dev/mapper/{one}")
        obdsetup("close", one, status=5)
        obdsetup("close", "--deferred", one)
        obdsetup("open", two, base)
        equal(loops(), sorted([base, mid]), "loop devices")
        if first == one:
            disk.close()
            eventually("loop devices when the first stack is removed", loops, [base])
            look(two, layers.content(base))
            obdsetup("close", two)
        else:
            look(two, layers.content(base))
            obdsetup("close", two)
            same_bytes(disk.whole(), layers.content(base, mid), "content")
            disk.close()
        nothing_left()


@test("devices left by a kill: list reports them, open uses them, and any close removes them", timeout=LONG)
def left_by_kill():
    layers = Layers()
    base, mid, other = [layers.make(f"{name}.obd") for name in "abc"]
    obdsetup("open", f"{NAME}-1", base, mid)
    run("dmsetup", "remove", f"{NAME}-1")
    equal(len(devices("LAYER-")), 2, "devices left")
    said = obdsetup("list")[1]
    check("no stack uses a.obd-" in said and "next close" in said, f"list: {said!r}")
    before = devices("LAYER-")
    obdsetup("open", f"{NAME}-2", base)
    equal(devices("LAYER-"), before, "devices with an open that uses one")
    look(f"{NAME}-2", layers.content(base))
    obdsetup("open", f"{NAME}-3", other)
    obdsetup("close", f"{NAME}-3")
    eventually("loop devices", loops, [base])
    obdsetup("close", f"{NAME}-2")
    nothing_left()


@test("a half-built shared device: open removes it, and makes a complete one", timeout=LONG)
def half_built():
    layers = Layers()
    base = layers.make("a.obd")
    obdsetup("open", NAME, base)
    (uuid, name), = devices("LAYER-").items()
    obdsetup("close", NAME)
    run("dmsetup", "create", name, "--notable", "--uuid", uuid)
    obdsetup("open", NAME, base)
    look(NAME, layers.content(base))
    obdsetup("close", NAME)
    nothing_left()


@test("a shared device that is suspended, of another size, or over another file is not used", timeout=LONG)
def not_used():
    layers = Layers()
    base, other = layers.make("a.obd"), f"{layers.work}/other"
    with open(other, "wb") as file:
        file.truncate(1 << 20)
    one, two = f"{NAME}-1", f"{NAME}-2"
    obdsetup("open", one, base)
    (uuid, name), = devices("LAYER-").items()
    run("dmsetup", "suspend", name)
    try:
        said = obdsetup("open", two, base, status=5)[1]
    finally:
        run("dmsetup", "resume", name)
    check(f"dmsetup resume {name}" in said, f"suspended: {said}")
    table = run("dmsetup", "table", name).split()
    obdsetup("close", one)
    loop = run("losetup", "--find", "--show", "--read-only", other).strip()
    defer(quietly, "losetup", "--detach", loop)
    for sectors, what in ((table[1], "another file"), ("8", "sectors")):
        run("dmsetup", "create", name, "--readonly", "--uuid", uuid, "--table", f"0 {sectors} linear {loop} 0")
        said = obdsetup("open", two, base, status=5)[1]
        run("dmsetup", "remove", name)
        check(what in said and "--private" in said, f"a device made by hand: {said}")
    obdsetup("open", two, base)
    look(two, layers.content(base))
    # Give the loop device another file, which is possible if a loop device is read-only.
    path, = glob.glob("/sys/dev/block/" + below(name)[0] + "/loop/..")
    with open(f"/dev/{os.path.basename(os.path.realpath(path))}", "rb") as disk, open(other, "rb+") as file:
        file.truncate(os.path.getsize(base))
        with open(other, "rb") as readable:
            fcntl.ioctl(disk, LOOP_CHANGE_FD, readable.fileno())
    said = obdsetup("open", one, base, status=5)[1]
    check("another file" in said, f"changed: {said}")
    obdsetup("close", two)
    quietly("losetup", "--detach", loop)
    nothing_left()


# Runs a program with a /run of its own, as in a container.
OTHER_RUN = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs $OPTIONS tmpfs /run && exec "$@"', "sh"]


@test("a layer that takes long to open is opened at the same time by programs with different /run", timeout=LONG)
def two_runs():
    layers = Layers()
    base = layers.make("a.obd")
    loop = run("losetup", "--find", "--show", "--read-only", base).strip()
    defer(quietly, "losetup", "--detach", loop)
    need_module("dm-delay")
    slow = dm.create(dm.line(0, os.path.getsize(base) // 512, "delay", loop, 0, 300))
    names = [f"{NAME}-run{nth}" for nth in range(4)]
    children = []
    for nth, name in enumerate(names):
        prefix = OTHER_RUN if nth % 2 else []
        children.append(subprocess.Popen([*prefix, OBDSETUP, "open", name, slow.path], text=True,
                                         stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
        time.sleep(0.2)
    said = [child.communicate()[1] for child in children]
    equal([child.returncode for child in children], [0] * 4, f"status of open ({said})")
    for name in names:
        look(name, layers.content(base), rounds=2)
    equal(len(devices("LAYER-")), 1, f"devices of the layer: {devices()}")
    for nth, name in enumerate(names):
        subprocess.run([*(OTHER_RUN if nth < 2 else []), OBDSETUP, "close", name], check=True)
    nothing_left([base])
    slow.remove()


@test("without a directory for locks, close removes a half-built stack", timeout=LONG)
def no_locks():
    layers = Layers()
    base, other = layers.make("a.obd"), layers.make("b.obd")
    obdsetup("open", NAME, base)
    (uuid, name), = devices("LAYER-").items()
    obdsetup("close", NAME)
    run("dmsetup", "create", name, "--notable", "--uuid", uuid)
    env = dict(os.environ, OPTIONS="-o ro")
    for command in (["open", NAME, other], ["close", NAME]):
        done = subprocess.run([*OTHER_RUN, OBDSETUP, *command], env=env, capture_output=True, text=True, check=False)
        equal(done.returncode, 0, f"status of {command} ({done.stderr})")
    nothing_left()


@test("stacks that close while their shared devices are inspected leave nothing", timeout=LONG)
def looked_at():
    layers = Layers()
    base = layers.make("a.obd")
    names = [f"{NAME}-{nth}" for nth in range(2)]
    for name in names:
        obdsetup("open", name, base)
    (shared, ) = devices("LAYER-").values()
    with open(f"/dev/mapper/{shared}", "rb"):
        children = [subprocess.Popen([OBDSETUP, "close", name], stderr=subprocess.PIPE, text=True) for name in names]
        said = [child.communicate()[1] for child in children]
        equal([child.returncode for child in children], [0, 0], f"status of close ({said})")
    nothing_left()


def zfile(name):
    """Returns the zfile device of a stack's only layer, its counters, and its cache mode."""
    device = json.loads(obdsetup("status", "--json", name)[0])["layers"][0]["zfile"]
    fields = run("dmsetup", "status", "--noflush", device).split()[3:]
    if len(fields) < 13:
        raise Skip("the module has no message that switches caches")
    return device, {"reads": int(fields[5]), "decompressed": int(fields[7])}, fields[12]


@test("the cache: with two stacks or more, data that one has read is cached for the others", timeout=LONG)
def cache():
    layers = Layers()
    base = layers.make("a.obd")
    one, two, three = [f"{NAME}-{nth}" for nth in range(3)]
    wanted = layers.content(base)
    obdsetup("open", one, base)
    device, _, mode = zfile(one)
    equal(mode, "parts", "mode of one stack")
    obdsetup("open", two, base)
    equal(zfile(one)[2], "all", "mode of two")
    equal([layer["cache"] for layer in json.loads(obdsetup("status", "--json", two)[0])["layers"]], ["all"], "status")

    def read(name):
        disk = Disk(f"/dev/mapper/{name}")
        same_bytes(disk.whole(), wanted, f"content of {name}")
        disk.close()

    read(one)
    before = zfile(one)[1]
    read(two)
    equal(zfile(one)[1], before, "lower reads and decompressed blocks after the second read")
    obdsetup("open", three, base)
    obdsetup("close", one)
    equal(zfile(two)[2], "all", "mode when two of three stacks are left")
    obdsetup("close", three)
    equal(zfile(two)[2], "parts", "mode when one stack is left")
    # A mode set by hand stays.
    for mode in ("none", "all"):
        run("dmsetup", "message", device, "0", "cache", mode)
        obdsetup("open", one, base)
        equal(zfile(one)[2], mode, f"mode {mode} by hand, with a second stack")
        obdsetup("close", one)
        equal(zfile(two)[2], mode, f"mode {mode} by hand, when the stack is alone again")
    run("dmsetup", "message", device, "0", "cache", "auto")
    obdsetup("open", one, base)
    run("dmsetup", "message", device, "0", "cache", "parts")
    obdsetup("open", three, base)
    equal(zfile(one)[2], "parts", "mode by hand, with a third stack")
    for name in (one, two, three):
        obdsetup("close", name)
    # An open that fails at its end leaves the mode unchanged.
    obdsetup("open", one, base)
    with open("/dev/full", "wb") as full:
        check(subprocess.call([OBDSETUP, "open", two, base], stdout=full, stderr=subprocess.DEVNULL),
              "an open whose output is a full device succeeded")
    equal(zfile(one)[2], "parts", "mode after an open that failed")
    obdsetup("close", one)
    for name in (one, two):
        obdsetup("open", "--zfile-opt", "cache_all", name, base)
    obdsetup("close", one)
    equal(zfile(two)[2], "all", "mode of the option")
    obdsetup("close", two)
    nothing_left()


@test("the module is unloaded between opens, and while they run", timeout=LONG)
def unloaded():
    layers = Layers()
    base, mid = layers.make("a.obd"), layers.make("b.obd")
    path = module_file()
    defer(lambda: os.path.exists(MODULE) or subprocess.run(["insmod", path], check=True))
    wanted = layers.content(base, mid)
    opened = 0
    for nth in range(4):
        children = [subprocess.Popen([OBDSETUP, "open", f"{NAME}-{nth}", base, mid], stdout=subprocess.DEVNULL,
                                     stderr=subprocess.PIPE, text=True) for nth in range(4)]
        if nth % 2:
            children[0].wait()
        time.sleep(nth * 0.05)
        while any(child.poll() is None for child in children):
            quietly("rmmod", "dm_overlaybd")
            time.sleep(0.1)
        for nth, child in enumerate(children):
            said = child.communicate()[1]
            check(child.returncode in (0, 4), f"status {child.returncode}: {said}")
            if child.returncode == 0:
                opened += 1
                look(f"{NAME}-{nth}", wanted, rounds=3)
                obdsetup("close", f"{NAME}-{nth}")
            else:
                check("modprobe dm_overlaybd" in said or "dmesg" in said, f"open without the module: {said}")
        nothing_left()
        if not os.path.exists(MODULE):
            subprocess.run(["insmod", path], check=True)
    note(f"{opened} of 16 opens succeeded")
    check(opened, "no open succeeded")
    obdsetup("open", NAME, base, mid)
    check(quietly("rmmod", "dm_overlaybd") != 0, "the module is unloaded while a stack is open")
    look(NAME, wanted)
    obdsetup("close", NAME)
    nothing_left()


class User(threading.Thread):
    """A thread that repeatedly opens a stack of common layers and a layer of its own, reads it, and closes it. Kills
    some of the programs that it runs."""

    def __init__(self, nth, common, layers, end):
        super().__init__()
        self.name_, self.end = f"{NAME}-user{nth}", end
        self.rng = random.Random(f"{SEED} {nth}")
        self.common, self.layers = common, layers
        self.path = f"{layers.work}/own{nth}/top.obd"
        os.makedirs(os.path.dirname(self.path))
        self.done, self.kills, self.errors = 0, 0, []

    def _write(self):
        """Replaces the user's own layer. Returns its content."""
        layer = image.lsmt(SIZE, image.random_layer(self.rng, SIZE, count=5))
        raw = image.zfile(layer)
        with open(f"{self.path}.new", "wb") as file:
            file.write(raw)
        os.rename(f"{self.path}.new", self.path)
        return layer

    def _run(self, *args, kill=False):
        child = subprocess.Popen([OBDSETUP, *args], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                 stderr=subprocess.PIPE, text=True)
        if kill:
            time.sleep(self.rng.random() * 0.3 * SLOW)
            child.kill()
        said = child.communicate()[1]
        if child.returncode == -signal.SIGKILL:
            self.kills += 1
        return child.returncode, said

    def _open(self, *paths):
        """Opens the stack, even if killed programs have left parts of it."""
        while True:
            # Without --allow-in-use, looking for programs that have the files open would take most of the time.
            status, said = self._run("open", "--allow-in-use", self.name_, *paths, kill=self.rng.random() < 0.2)
            if status == 0:
                return
            if status == 5 and f"device {self.name_} exists already" in said:
                # The killed program had already made the stack.
                self._close()
            elif status != -signal.SIGKILL:
                raise Failure(f"open {self.name_}: status {status}: {said}")

    def _close(self):
        status, said = self._run("close", self.name_, kill=self.rng.random() < 0.2)
        while status == -signal.SIGKILL:
            status, said = self._run("close", self.name_)
        check(status == 0 or status == 4 and "no stack" in said, f"close {self.name_}: status {status}: {said}")

    def run(self):
        try:
            while not self.done or time.monotonic() < self.end:
                common = self.rng.sample(sorted(self.common), self.rng.randint(1, len(self.common)))
                layers = [self.common[path] for path in common] + [self._write()]
                self._open(*common, self.path)
                if self.rng.random() < 0.3:
                    os.unlink(self.path)
                wanted = content(*layers)
                disk = Disk(f"/dev/mapper/{self.name_}")
                try:
                    verify_random(disk, wanted, self.rng, 8)
                    if self.rng.random() < 0.2:
                        status, said = self._run("close", "--deferred", self.name_)
                        equal(status, 0, f"close --deferred: {said}")
                        verify_random(disk, wanted, self.rng, 4)
                finally:
                    disk.close()
                for _ in range(100 * SLOW):
                    if not is_there(self.name_):
                        break
                    self._close()
                self.done += 1
        except Exception as error:  # pylint: disable=broad-except
            self.errors.append(error)


@test("concurrent users open, read and close stacks, replace files, and kill their programs",
      timeout=600 + 20 * SECONDS)
def storm():
    note(f"OBD_SEED={SEED}")
    layers = Layers(SEED)
    common = {}
    for name, wrap in (("a", image.zfile), ("b", image.zfile), ("c", bytes), ("d", image.zfile)):
        path = layers.make(f"{name}.obd", wrap, odd=name in "b")
        common[path] = layers.raws[path]
    # A stack of all common layers stays open, and so does a device made by hand over one of the files.
    keeper = f"{NAME}-keeper"
    obdsetup("open", keeper, *common)
    loop = run("losetup", "--find", "--show", "--read-only", sorted(common)[0]).strip()
    defer(quietly, "losetup", "--detach", loop)
    hand = dm.create(dm.line(0, 8, "linear", loop, 0))
    kept = {uuid: name for uuid, name in devices().items()}
    end = time.monotonic() + SECONDS * SLOW
    users = [User(nth, common, layers, end) for nth in range(STORM)]
    for user in users:
        user.start()
    wanted = content(*common.values())
    rounds = 0
    while any(user.is_alive() for user in users):
        look(keeper, wanted, rounds=3)
        rounds += 1
        time.sleep(0.2)
    for user in users:
        user.join()
    errors = [error for user in users for error in user.errors]
    done, kills = sum(user.done for user in users), sum(user.kills for user in users)
    note(f"{done} times opened and closed, {kills} kills, {rounds} checks of the stack that stays open")
    check(not errors, f"{len(errors)} errors, the first: {errors[:1]}")
    check(done >= STORM and kills, f"{done} stacks, {kills} kills")
    now = devices()
    check(all(now.get(uuid) == name for uuid, name in kept.items()), f"devices: {now}, before {kept}")
    check(hand.exists(), "the device that was made by hand is gone")
    look(keeper, wanted)
    hand.remove()
    quietly("losetup", "--detach", loop)
    obdsetup("close", keeper)
    # Killed programs have left the lock files of their stacks.
    for user in users:
        quietly(OBDSETUP, "close", user.name_)
    nothing_left()


if __name__ == "__main__":
    main()
