#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""obdsetup is killed or gets a signal at any moment, while udevd runs, is stopped, is absent, or is in another IPC
namespace. Other programs can still work, and the next open or close of the same name clears what is left.

OBD_KILLS is the number of kills of each kind. OBD_SEED is the seed of their random times; each run prints its seed.
"""

import contextlib
import fcntl
import glob
import os
import random
import re
import signal
import subprocess
import tempfile
import time

from obdtest import dm, image, programs, udevd
from obdtest.files import work_directory, write
from obdtest.ktap import SLOW, add, check, defer, equal, main, note, same_bytes, test
from obdtest.left import clear, devices, eventually, locks, own_loops

KILLS = int(os.environ.get("OBD_KILLS", "1"))
SEED = os.environ.get("OBD_SEED") or str(random.SystemRandom().randrange(1 << 32))
# Of at least this many kills, some must come while a stack is half built.
MANY = 50
NAME = f"obdtest-{os.getpid()}"
SIZE = 300 << 10
DATA = image.sample(SIZE, 91)
# obdsetup stops waiting for udev if udev has handled no event of the stack for so many seconds.
UDEV_BOUND = 60


def make_layers(count=2):
    """Makes the files of a stack, with lengths that are not multiples of 512. Returns the files and the content of the
    disk."""
    work = work_directory()
    layers = []
    for nth in range(count):
        layer = image.lsmt(SIZE, [(0, DATA)] if nth == 0 else [(nth, 1)])
        raw = next(raw for block in (4096, 8192, 16384) if len(raw := image.zfile(layer, image.LZ4, block)) % 512)
        layers.append(write(f"{work}/layer{nth}.obd", raw))
    content = bytearray(DATA)
    for nth in range(1, count):
        content[nth * 512:nth * 512 + 512] = bytes(512)
    return layers, bytes(content)


class Way:
    """A way to run obdsetup: while udevd is running, stopped or absent, or in another IPC namespace than udevd's."""

    def __init__(self, name):
        self.name = name
        self.prefix = ["unshare", "--ipc"] if name == "namespace" else []
        self.env = dict(os.environ)
        self.env.pop("DM_DISABLE_UDEV", None)

    def begin(self):
        """If this way is without udevd, stops it until the end of the test."""
        if self.name == "absent":
            udevd.stop()
            defer(udevd.start)

    def start(self, *args):
        return subprocess.Popen([*self.prefix, "obdsetup", *args], env=self.env, text=True, stdin=subprocess.DEVNULL,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def run(self, *args, status=0):
        """Runs obdsetup, and checks its exit status. Returns its standard error."""
        done = subprocess.run([*self.prefix, "obdsetup", *args], env=self.env, text=True, stdin=subprocess.DEVNULL,
                              capture_output=True, check=False)
        equal(done.returncode, status, f"{self.name}: status of obdsetup {' '.join(args)} ({done.stderr.strip()})")
        return done.stderr

    def stop(self):
        """If this way is with a stopped udevd, suspends it. go_on() resumes it."""
        if self.name == "stopped":
            udevd.pause()

    def go_on(self):
        if self.name == "stopped":
            udevd.go_on()
            udevd.settle()


def links():
    return glob.glob(f"/dev/mapper/{NAME}*") + glob.glob("/dev/mapper/layer*")


def semaphores():
    """Returns the keys of libdm's cookies, which are semaphores."""
    with open("/proc/sysvipc/sem", encoding="ascii") as file:
        rows = [row.split() for row in file.readlines()[1:]]
    return [row[0] for row in rows if int(row[0]) >> 16 == 0x0D4D]


def nothing_left(layers):
    eventually("devices left", devices, {})
    eventually("loop devices left", lambda: own_loops(*layers), {})
    eventually("links left", links, [])
    eventually("locks left", lambda: locks(NAME), [])
    eventually("cookies left", semaphores, [])


def others_can_work(layers):
    """Checks that the next free loop device can be attached."""
    done = subprocess.run(["losetup", "--find", "--show", "--read-only", layers[0]], capture_output=True, text=True,
                          check=False)
    equal(done.returncode, 0, f"losetup ({done.stderr.strip()})")
    subprocess.run(["losetup", "--detach", done.stdout.strip()], check=True)


def close_whatever():
    """Resumes udevd and removes the devices that a failed test has left."""
    udevd.go_on()
    clear()


def read_back(content):
    with open(f"/dev/mapper/{NAME}", "rb") as file:
        same_bytes(file.read(), content, "content")


def kills(way, command):
    """Kills open or close at random times. Checks that the next open clears what is left, or reports a complete
    stack."""
    way.begin()
    layers, content = make_layers()
    defer(close_whatever)
    note(f"OBD_SEED={SEED}")
    rng = random.Random(f"{SEED} {way.name} {command}")
    # Measure the second time: the first one reads more from the disk.
    for _ in range(2):
        start = time.monotonic()
        way.run("open", NAME, *layers)
        opened = time.monotonic()
        way.run("close", NAME)
        closed = time.monotonic()
    lasts = {"open": opened - start, "close": closed - opened}[command]
    half = whole = late = nth = 0
    while nth < KILLS:
        if command == "close":
            way.run("open", NAME, *layers)
        way.stop()
        child = way.start(command, NAME, *(layers if command == "open" else []))
        time.sleep(rng.random() * lasts)
        child.kill()
        _, said = child.communicate()
        eventually(f"kill {nth}: processes left", programs.running, [])
        way.go_on()
        if child.returncode != -signal.SIGKILL:
            # The command ended before the kill. Such kills don't count.
            equal(child.returncode, 0, f"status of {command} ({said.strip()})")
            late += 1
            check(late < 10 + KILLS, f"{late} kills came too late, the last ones after up to {lasts:.3f} s")
            lasts /= 2
            if command == "open":
                way.run("close", NAME)
            nothing_left(layers)
            continue
        nth += 1
        others_can_work(layers)
        left = devices()
        top = any(uuid.startswith(f"OVERLAYBD-LSMT-{NAME}") for uuid in left.values())
        done = subprocess.run([*way.prefix, "obdsetup", "open", NAME, *layers], env=way.env, text=True,
                              capture_output=True, check=False)
        if left and done.returncode == 0:
            half += 1
            # If only devices of layers are left, open uses them without a message.
            check(not top or "half built" in done.stderr, f"kill {nth}: open does not mention {left}: {done.stderr}")
        elif left:
            whole += 1
            equal(done.returncode, 5, f"kill {nth}: status of open ({done.stderr.strip()}) with {left}")
            check(top, f"kill {nth}: open was refused, and there is no disk: {left}")
        else:
            equal(done.returncode, 0, f"kill {nth}: status of open ({done.stderr.strip()})")
        read_back(content)
        way.run("close", NAME)
        nothing_left(layers)
    note(f"{KILLS} kills within {lasts:.2f} s: {half} left half a stack, {whole} a whole one; {late} more came too late")
    check(half or command != "open" or KILLS < MANY, "no kill of open left half a stack")


def killed_then_closed():
    """close, too, clears what a killed open has left."""
    way = Way("running")
    layers, _ = make_layers()
    defer(close_whatever)
    closed = 0
    for nth in range(20):
        child = way.start("open", NAME, *layers)
        while child.poll() is None and not devices():
            pass
        child.kill()
        child.communicate()
        eventually("processes left", programs.running, [])
        if not devices():
            continue
        way.run("close", NAME)
        nothing_left(layers)
        closed += 1
        if closed == KILLS:
            break
    check(closed, "no kill left anything")


for way_name in ("running", "stopped", "absent", "namespace"):
    for what in ("open", "close"):
        add(f"{what} is killed; udevd: {way_name}", kills, Way(way_name), what, timeout=180 + 25 * KILLS)
add("open is killed, and close clears what is left", killed_then_closed, timeout=150 + 20 * KILLS)


@test("open is killed between the calls that attach a loop device, and the next open or close detaches it", timeout=300)
def half_attached():
    way = Way("running")
    layers, content = make_layers()
    defer(close_whatever)
    with tempfile.NamedTemporaryFile() as log:
        def traced(*options):
            args = ["strace", "-o", log.name, "-e", "trace=ioctl", "-e", "signal=none", *options,
                    "obdsetup", "open", NAME, *layers]
            done = subprocess.run(args, env=way.env, stdin=subprocess.DEVNULL, capture_output=True, check=False)
            return done.returncode

        equal(traced(), 0, "status of open")
        calls = log.read().decode().splitlines()
    way.run("close", NAME)
    nothing_left(layers)
    numbers = [number for number, call in enumerate(calls, 1) if "LOOP_SET_STATUS64" in call]
    check(len(numbers) > 1, f"loop devices attached: {len(numbers)}")
    for number in (numbers[0], numbers[-1]):
        for command in ("open", "close"):
            equal(traced("-e", f"inject=ioctl:signal=KILL:when={number}"), -signal.SIGKILL, "status after the kill")
            check(own_loops(*layers), "no loop device is left: the kill came at another moment")
            others_can_work(layers)
            if command == "open":
                way.run("open", NAME, *layers)
                read_back(content)
                way.run("close", NAME)
            else:
                way.run("close", NAME, status=4)
            nothing_left(layers)


def signalled(way, number, *command):
    """Sends a signal to an obdsetup that waits for a stopped udevd. Checks that it ends immediately, and leaves no
    process and no cookie."""
    way.stop()
    before = semaphores()
    child = way.start(*command)
    eventually("a wait begins", lambda: any("udevreleasecookie" in line for line in programs.running()), True)
    child.send_signal(number)
    start = time.monotonic()
    _, said = child.communicate()
    took = time.monotonic() - start
    equal(child.returncode, 130, f"status after {number.name} ({said.strip()})")
    check(took < 10 * SLOW, f"{number.name}: ended after {took:.1f} s")
    equal(programs.running(), [], f"{number.name}: processes left")
    equal(semaphores(), before, f"{number.name}: cookies")


def bounded(way, *command):
    """Checks that an obdsetup that waits for a stopped udevd ends after UDEV_BOUND, and says what it has waited for."""
    way.stop()
    before = semaphores()
    start = time.monotonic()
    said = way.run(*command, status=4)
    took = time.monotonic() - start
    check("udev" in said and NAME in said and "stopped" in said, f"unexpected message: {said}")
    check(UDEV_BOUND <= took < UDEV_BOUND + 40 * SLOW, f"ended after {took:.1f} s")
    equal(semaphores(), before, "cookies")


@test("signals end a wait for udev, and nothing is left")
def signals():
    way = Way("stopped")
    layers, _ = make_layers()
    defer(close_whatever)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signalled(way, number, "open", NAME, *layers)
        equal(devices(), {}, f"{number.name}: devices left")
        way.go_on()
        nothing_left(layers)


def waits(child):
    """Waits until a process has run no program for two seconds, on slow kernels longer. Checks that it has not
    ended."""
    quiet = 0
    while quiet < 100 * SLOW:
        equal(child.poll(), None, "status of a process that should wait")
        running = ""
        with contextlib.suppress(OSError):
            with open(f"/proc/{child.pid}/task/{child.pid}/children", encoding="ascii") as file:
                running = file.read().strip()
        quiet = 0 if running else quiet + 1
        time.sleep(0.02)


@test("a signal ends an obdsetup that waits for another one immediately; it says what it has waited for", timeout=300)
def signals_at_locks():
    way = Way("running")
    layers, content = make_layers()
    defer(close_whatever)
    work = os.path.dirname(layers[0])
    store = f"{work}/store"
    way.run("open", "--create", "--writable", store, NAME, *layers)
    shared = next(uuid for uuid in devices().values() if re.search(r"-[0-9a-f]{40}$", uuid))
    way.run("close", NAME)
    nothing_left(layers)
    plain, writable = ["open", NAME, *layers], ["open", "--writable", store, NAME, *layers]
    at_work = "another obdsetup, which is at work on device"
    # The file that another process has locked, a command to run before, the command that waits, and its message.
    for path, before, command, said in (
            (f"/run/obdsetup/{NAME}", None, plain, f"waited for {at_work} {NAME}"),
            (f"/run/obdsetup/{NAME}", plain, ["close", NAME], f"waited for {at_work} {NAME}"),
            (f"/run/obdsetup/.{shared}", None, plain, f"waited for {at_work} {shared}"),
            (store, None, writable, f"{store}: is locked by another program, such as another obdsetup")):
        if before:
            way.run(*before)
            udevd.settle()
        with open(os.open(path, os.O_RDONLY | os.O_CREAT, 0o600), encoding="ascii") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                child = way.start(*command)
                waits(child)
                start = time.monotonic()
                child.send_signal(number)
                _, text = child.communicate()
                took = time.monotonic() - start
                equal(child.returncode, 130, f"{command[0]}: status after {number.name} ({text.strip()})")
                equal(text, f"obdsetup: {said}: interrupted\n", f"{command[0]}: message after {number.name}")
                check(took < 5 * SLOW, f"{command[0]}, {number.name}: ended after {took:.1f} s")
                check(os.path.exists(path), f"{path} was removed, although another process has locked it")
        if path != store:
            os.unlink(path)
        if before:
            read_back(content)
            way.run("close", NAME)
        nothing_left(layers)


@test("open waits for udev for a limited time, and then says what it has waited for", timeout=300)
def bound():
    way = Way("stopped")
    layers, _ = make_layers()
    defer(close_whatever)
    bounded(way, "open", NAME, *layers)
    equal(devices(), {}, "devices left")
    way.go_on()
    nothing_left(layers)


@test("signals end a close that waits for udev, and the next close removes the rest", timeout=300)
def signals_of_close():
    way = Way("stopped")
    layers, _ = make_layers()
    defer(close_whatever)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        way.go_on()
        way.run("open", NAME, *layers)
        udevd.settle()
        signalled(way, number, "close", NAME)
        way.go_on()
        if devices():
            way.run("close", NAME)
        nothing_left(layers)


@test("close waits for udev for a limited time", timeout=300)
def bound_of_close():
    way = Way("stopped")
    layers, _ = make_layers()
    defer(close_whatever)
    way.go_on()
    way.run("open", NAME, *layers)
    udevd.settle()
    bounded(way, "close", NAME)
    way.go_on()
    if devices():
        way.run("close", NAME)
    nothing_left(layers)


@test("in another IPC namespace, obdsetup does not wait for udevd, which still makes its links")
def namespace():
    way = Way("namespace")
    layers, content = make_layers()
    defer(close_whatever)
    start = time.monotonic()
    equal(way.run("open", NAME, *layers), "", "what open says")
    check(time.monotonic() - start < UDEV_BOUND / 2, "open has waited")
    read_back(content)
    udevd.settle()
    check(f"disk/by-id/dm-name-{NAME}" in udevd.links(f"/dev/mapper/{NAME}"), "udevd has made no links")
    equal(way.run("close", NAME), "", "what close says")
    udevd.settle()
    nothing_left(layers)


@test("several programs open stacks on the same block devices at the same time")
def parallel_devices():
    way = Way("running")
    layers, content = make_layers()
    defer(close_whatever)
    blobs = []
    for layer in layers:
        size = os.path.getsize(layer)
        with open(layer, "ab") as file:
            file.truncate((size | 4095) + 1)
        blobs.append(subprocess.check_output(["losetup", "--find", "--show", layer], text=True).strip())
        defer(subprocess.call, ["losetup", "--detach", blobs[-1]])
        blobs[-1] += f":size={size}"
    names = [f"{NAME}-{nth}" for nth in range(6)]
    children = [way.start("open", name, *blobs) for name in names]
    said = [child.communicate()[1] for child in children]
    equal([child.returncode for child in children], [0] * 6, f"status of open ({said})")
    for name in names:
        with open(f"/dev/mapper/{name}", "rb") as file:
            same_bytes(file.read(), content, "content")
        way.run("close", name)
    eventually("devices left", devices, {})


@test("two programs with different /run open the same name at the same time: one succeeds, and its stack stays")
def two_runs():
    way = Way("absent")
    way.begin()
    layers, content = make_layers()
    defer(close_whatever)
    other = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs tmpfs /run && exec "$@"', "sh"]
    for nth in range(4):
        children = [subprocess.Popen([*prefix, "obdsetup", "open", NAME, *layers], env=way.env, text=True,
                                     stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                    for prefix in ([other, []] if nth % 2 else [[], other])]
        said = [child.communicate()[1] for child in children]
        equal(sorted(child.returncode for child in children), [0, 5], f"{nth}: status of open ({said})")
        read_back(content)
        way.run("close", NAME)
        nothing_left(layers)


@test("several programs open and close stacks at the same time")
def parallel():
    for way in (Way("running"), Way("absent")):
        way.begin()
        layers, content = make_layers()
        defer(close_whatever)
        names = [f"{NAME}-{nth}" for nth in range(6)]
        for command, rest in (("open", layers), ("close", [])):
            children = [way.start(command, name, *rest) for name in names]
            for name, child in zip(names, children):
                _, said = child.communicate()
                equal((child.returncode, said), (0, ""), f"{way.name}: {command} {name}")
            if command == "open":
                for name in names:
                    with open(f"/dev/mapper/{name}", "rb") as file:
                        same_bytes(file.read(), content, f"{way.name}: {name}")
        nothing_left(layers)
        # Of two that open the same name, one succeeds.
        children = [way.start("open", NAME, *layers) for _ in range(2)]
        for child in children:
            child.communicate()
        equal(sorted(child.returncode for child in children), [0, 5], f"{way.name}: both open {NAME}")
        read_back(content)
        way.run("close", NAME)
        nothing_left(layers)


@test("a half-built stack: status reports it, open and close clear it")
def half_built():
    way = Way("running")
    layers, content = make_layers()
    defer(close_whatever)

    def create(name, uuid, *table):
        subprocess.run(["dmsetup", "create", name, "--uuid", uuid, *table], check=True, env=way.env)

    def top_only():
        create(NAME, f"OVERLAYBD-LSMT-{NAME}", "--notable")

    def inner_only():
        create(f"{NAME}-zfile0", f"OVERLAYBD-LAYER-{NAME}-0", "--table", "0 8 zero")

    for make in (top_only, inner_only):
        make()
        done = subprocess.run(["obdsetup", "status", NAME], capture_output=True, text=True, check=False, env=way.env)
        check(done.returncode != 0, f"{make.__name__}: status is {done.returncode}: {done.stdout}")
        check("half" in (done.stdout + done.stderr).lower(), f"{make.__name__}: {done.stdout}{done.stderr}")
        said = way.run("open", NAME, *layers)
        check("half built" in said and NAME in said, f"{make.__name__}: open says {said!r}")
        read_back(content)
        way.run("close", NAME)
        make()
        said = way.run("close", NAME)
        check("half built" in said, f"{make.__name__}: close says {said!r}")
        nothing_left(layers)


@test("a renamed stack is found by both names")
def renamed():
    way = Way("running")
    layers, content = make_layers()
    defer(close_whatever)
    other = f"{NAME}-other"
    for name in (NAME, other):
        way.run("open", NAME, *layers)
        subprocess.run(["dmsetup", "rename", NAME, other], check=True, env=way.env)
        with open(f"/dev/mapper/{other}", "rb") as file:
            same_bytes(file.read(), content, "content")
        way.run("status", NAME)
        way.run("status", other)
        said = way.run("open", NAME, *layers, status=5)
        check(other in said, f"open says {said!r}")
        way.run("open", other, *layers, status=5)
        way.run("close", name)
        nothing_left(layers)


@test("open skips a loop device that the kernel offers as free but that another program has claimed")
def poisoned():
    way = Way("running")
    layers, content = make_layers()
    defer(close_whatever)
    with open("/dev/loop-control", "rb", buffering=0) as control:
        number = dm.fcntl.ioctl(control, 0x4C82)
    claim = os.open(f"/dev/loop{number}", os.O_RDWR | os.O_EXCL)
    defer(os.close, claim)
    failed = subprocess.run(["losetup", "--find", "--show", layers[0]], capture_output=True, text=True, check=False)
    note(f"losetup: {failed.returncode} {failed.stdout.strip()}{failed.stderr.strip()}")
    if failed.returncode == 0:
        subprocess.run(["losetup", "--detach", failed.stdout.strip()], check=True)
    way.run("open", NAME, *layers)
    read_back(content)
    check(f"loop{number}" not in own_loops(*layers), "the claimed loop device is used")
    way.run("close", NAME)
    nothing_left(layers)


@test("open makes nodes that are missing in /dev")
def nodes():
    way = Way("absent")
    way.begin()
    layers, content = make_layers()
    defer(close_whatever)
    with open("/dev/loop-control", "rb", buffering=0) as control:
        number = dm.fcntl.ioctl(control, 0x4C82)
    for path in ("/dev/loop-control", f"/dev/loop{number}"):
        os.rename(path, f"{path}.away")
        defer(lambda path=path: os.replace(f"{path}.away", path) if os.path.exists(f"{path}.away") else None)
    way.run("open", NAME, *layers)
    read_back(content)
    check(os.path.exists("/dev/loop-control") and os.path.exists(f"/dev/loop{number}"), "no nodes were made")
    way.run("close", NAME)
    nothing_left(layers)


if __name__ == "__main__":
    udevd.start()
    main()
