#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""obdsetup on systems where something is missing: the module, device-mapper, loop devices, or a node in /dev. Its
message names what is missing and says what to do, and it leaves nothing behind."""

import contextlib
import glob
import os
import stat
import subprocess
import tempfile

from obdtest import files, image
from obdtest.files import work_directory
from obdtest.ktap import Skip, check, defer, equal, main, test
from obdtest.left import locks, nothing_left
from obdtest.module import MODULE, module_file
from obdtest.programs import OBDSETUP, need, quietly

NAME = f"obdtest-{os.getpid()}"
SIZE = 256 << 10
DATA = image.sample(SIZE, 93)
MODPROBE = "/proc/sys/kernel/modprobe"
LOOP_CONTROL, DM_CONTROL = "/dev/loop-control", "/dev/mapper/control"
NO_MODULE = ("the kernel module dm_overlaybd is not loaded: run `modprobe dm_overlaybd', or install the package "
             "dm-overlaybd-dkms")


def make_layer():
    work = work_directory()
    # Runs after the other deferred functions, which restore what a test removes.
    defer(nothing_left, work)
    return work, files.write(f"{work}/layer.obd", image.zfile(image.lsmt(SIZE, [(0, DATA)])))


def fails(*args, status=4, prefix=()):
    """Runs obdsetup. Returns its message."""
    need("obdsetup")
    done = subprocess.run([*prefix, OBDSETUP, *args], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    equal(done.returncode, status, f"status of obdsetup {' '.join(args)} ({done.stderr.strip()})")
    equal(done.stdout, "", "standard output")
    return done.stderr.strip()


def says(wanted, *args, **options):
    """Checks that obdsetup fails with a message of one line that has this text. There may also be notes."""
    said = fails(*args, **options)
    check(wanted in said, f"obdsetup {' '.join(args)} says {said!r}, wanted {wanted!r}")
    errors = [line for line in said.splitlines() if not line.startswith("obdsetup: note: ")]
    equal(len(errors), 1, f"lines of {said!r}")
    equal(locks(NAME), [], "locks left")


def write(path, text):
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def no_autoload():
    """Keeps the kernel from loading modules by itself until the test ends."""
    if "OBD_VM" not in os.environ:
        raise Skip("in the test VM only")
    with open(MODPROBE, encoding="ascii") as file:
        defer(write, MODPROBE, file.read())
    write(MODPROBE, "/bin/false")


def unload(module):
    """Unloads a module, and those that need it. Loads them again at the end of the test."""
    path = f"/sys/module/{module}"
    if not os.path.exists(f"{path}/initstate"):
        if os.path.exists(path):
            raise Skip(f"{module} is built into this kernel")
        return
    for other in os.listdir(f"{path}/holders"):
        unload(other)
    equal(quietly("rmmod", module), 0, f"rmmod {module}")
    defer(subprocess.run, ["modprobe", module])


def unload_ours():
    path = module_file()
    defer(lambda: os.path.exists(MODULE) or subprocess.run(["insmod", path], check=True))
    equal(quietly("rmmod", "dm_overlaybd"), 0, "rmmod dm_overlaybd")


@contextlib.contextmanager
def node(path, kind, number):
    """Makes a device node at path, in place of the one that is there. Restores that at the end of the block."""
    with away(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.mknod(path, kind | 0o600, os.makedev(*number))
        try:
            yield
        finally:
            os.unlink(path)


@contextlib.contextmanager
def away(path):
    """Moves the file at path away. Restores it at the end of the block."""
    there = os.path.lexists(path)
    if there:
        os.rename(path, f"{path}.away")
    try:
        yield
    finally:
        if there:
            os.replace(f"{path}.away", path)


def with_dev(work, *names):
    """Returns a prefix for a command, with which it runs with a read-only /dev that has only these nodes."""
    dev = f"{work}/dev"
    os.makedirs(f"{dev}/mapper")
    for name in names:
        status = os.stat(f"/dev/{name}")
        os.mknod(f"{dev}/{name}", stat.S_IFMT(status.st_mode) | 0o600, status.st_rdev)
    script = f"mount --bind {dev} /dev && mount -o remount,ro,bind /dev && exec \"$@\""
    return ["unshare", "--mount", "sh", "-c", script, "sh"]


@test("without the module: open says so, for each kind of stack")
def no_module():
    work, layer = make_layer()
    with open(f"{work}/data.zf", "wb") as file:
        file.write(image.zfile(DATA))
    with open(f"{work}/bare.obd", "wb") as file:
        file.write(image.lsmt(SIZE, [(0, DATA)]))
    no_autoload()
    unload_ours()
    for args in ([NAME, layer], ["--private", NAME, f"{work}/bare.obd", layer], ["--zfile", NAME, f"{work}/data.zf"]):
        says(NO_MODULE, "open", *args)
    says(f"no stack {NAME} is set up", "close", NAME)
    says(f"no stack {NAME} is set up", "status", NAME)


@test("the module is installed, but not loaded: open says so")
def not_loadable():
    _, layer = make_layer()
    no_autoload()
    unload_ours()
    work = work_directory()
    release = os.uname().release
    os.makedirs(f"{work}/{release}")
    wanted = "the kernel module dm_overlaybd is installed, but not loaded: `modprobe dm_overlaybd' says why"
    script = f"mount --bind {work} /lib/modules && exec \"$@\""
    prefix = ["unshare", "--mount", "sh", "-c", script, "sh"]
    for path, text in (("updates/dkms/dm_overlaybd.ko.xz", wanted), ("extra/dm_overlaybd.ko", wanted),
                       ("extra/not_dm_overlaybd.ko", NO_MODULE)):
        write(f"{work}/{release}/modules.dep", f"kernel/drivers/a.ko:\n{path}: kernel/drivers/md/dm-mod.ko\n")
        says(text, "open", NAME, layer, prefix=prefix)


@test("without dm-snapshot: open --writable says so")
def no_snapshot():
    work, layer = make_layer()
    no_autoload()
    unload("dm_snapshot")
    says("the kernel has no target snapshot: run `modprobe dm_snapshot'", "open", "--create", "--writable",
         f"{work}/store", NAME, layer)
    equal(sorted(os.listdir(work)), ["layer.obd"], "what is left")


@test("without loop devices: open says so, whether there is a node or not")
def no_loop():
    _, layer = make_layer()
    no_autoload()
    unload("loop")
    with away(LOOP_CONTROL):
        says("this kernel has no loop devices: run `modprobe loop'", "open", NAME, layer)
    with node(LOOP_CONTROL, stat.S_IFCHR, (10, 237)):
        says(f"{LOOP_CONTROL}: this kernel has no loop devices: run `modprobe loop'", "open", NAME, layer)


@test("without device-mapper: open, close and status say so, whether there is a node or not")
def no_device_mapper():
    _, layer = make_layer()
    no_autoload()
    if not os.path.exists("/sys/module/dm_mod/initstate"):
        raise Skip("dm_mod is built into this kernel")
    unload_ours()
    unload("dm_mod")
    for command in (["open", NAME, layer], ["close", NAME], ["status", NAME]):
        with away(DM_CONTROL):
            says("this kernel has no device-mapper: run `modprobe dm_mod'", *command)
            check(not os.path.lexists(DM_CONTROL), "a node that leads to nothing is left")
        with node(DM_CONTROL, stat.S_IFCHR, (10, 236)):
            says(f"{DM_CONTROL}: this kernel has no device-mapper: run `modprobe dm_mod'", *command)


@test("the module of device-mapper is not loaded, and its node is missing: obdsetup makes the node and so loads it")
def loaded_by_node():
    make_layer()
    if "OBD_VM" not in os.environ:
        raise Skip("in the test VM only")
    if not os.path.exists("/sys/module/dm_mod/initstate"):
        raise Skip("dm_mod is built into this kernel")
    if quietly("modprobe", "--dry-run", "char-major-10-236"):
        raise Skip("modprobe does not find dm_mod by the number of its node")
    unload_ours()
    unload("dm_mod")
    with away(DM_CONTROL):
        says(f"no stack {NAME} is set up", "status", NAME)
        check(os.path.exists("/sys/module/dm_mod"), "dm_mod is not loaded")
        equal(stat.S_IMODE(os.stat(DM_CONTROL).st_mode), 0o600, "mode of the node")


@test("nodes that are missing and cannot be made: open says which, and how to make them")
def no_nodes():
    work, layer = make_layer()
    usual = ["null", "zero", "urandom"]
    minor = os.minor(os.stat(DM_CONTROL).st_rdev)
    for names, wanted in (
            ([], f"{DM_CONTROL} is missing, and cannot be made (mknod {DM_CONTROL} c 10 {minor}): Read-only file system"),
            (["mapper/control"], f"{LOOP_CONTROL} is missing, and cannot be made (mknod {LOOP_CONTROL} c 10 237): Read-only"),
            (["mapper/control", "loop-control"], "is missing, and cannot be made (mknod /dev/loop")):
        place = tempfile.mkdtemp(dir=work)
        says(wanted, "open", NAME, layer, prefix=with_dev(place, *usual, *names))
    place = tempfile.mkdtemp(dir=work)
    says("/dev/null: No such file or directory", "open", NAME, layer, prefix=with_dev(place, "mapper/control"))


@test("devices that may not be opened, as in a container: open says so")
def denied():
    work, layer = make_layer()
    loops = glob.glob("/dev/loop[0-9]*")
    for paths, wanted in (
            ([DM_CONTROL], f"{DM_CONTROL}: permission denied: must be root, and in a container must be given this device"),
            ([LOOP_CONTROL],
             f"{LOOP_CONTROL}: permission denied: must be root, and in a container must be given this device"),
            (loops, "permission denied: must be root, and in a container must be given this device")):
        # Mount each node on itself with the option nodev.
        mounts = " && ".join(["true", *(f"mount --bind {path} {path} && mount -o remount,bind,nodev {path}"
                                        for path in paths)])
        if not paths:
            continue
        says(wanted, "open", NAME, layer, status=2, prefix=["unshare", "--mount", "sh", "-c", f"{mounts} && exec \"$@\"", "sh"])
    equal(sorted(os.listdir(work)), ["layer.obd"], "what is left")


if __name__ == "__main__":
    main()
