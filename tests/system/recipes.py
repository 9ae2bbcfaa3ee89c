#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Documentation/recipes.rst: the commands are taken from there, and run as they stand."""

import errno
import glob
import hashlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time

from obdtest import dm, image
from obdtest.disk import Disk, read_or_none
from obdtest.ktap import Skip, check, defer, equal, main, note, same_bytes, skip_all, test

DOCUMENT = f"{os.path.dirname(os.path.abspath(__file__))}/../../Documentation/recipes.rst"
SIZE = 16 << 20
PIECE = 64 << 10
# The devices that commands of the document make, topmost first.
DEVICES = ("app-verified", "app", "base", "base-verified", "base-local", "app-local")
DATA, TEXT = image.sample(3 << 20, 91), b"".join(b"%09d\n" % number for number in range(200000))
APP = image.sample(700 << 10, 92)


def recipe(title):
    """The blocks of commands of a section: those that follow on a text; pictures stand alone."""
    with open(DOCUMENT, encoding="ascii") as file:
        text = file.read()
    start = re.search(rf"^{re.escape(title)}.*\n[=-]+$", text, re.MULTILINE)
    check(start, f"there is a recipe: {title}")
    body = re.split(r"^.+\n[=-]{4,}$", text[start.end():], maxsplit=1, flags=re.MULTILINE)[0]
    return re.findall(r"\S::\n\n((?:    .*\n|\n)+)", body)


def sh(script):
    """Runs commands as a shell has them; what they print."""
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, check=False)
    check(not done.returncode, f"{script.strip()}\nends with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def quietly(*command):
    subprocess.run(command, capture_output=True, check=False)


def need(*names):
    for name in names:
        if not shutil.which(name):
            raise Skip(f"no {name}")


def need_module(*names):
    for name in names:
        if subprocess.run(["modprobe", name], capture_output=True, check=False).returncode:
            raise Skip(f"no kernel module {name}")


class Work:
    """A directory with two layers, in which the commands run; what they should give."""

    made = None

    def __init__(self):
        need("obdsetup", "mkfs.ext4")
        self.path = tempfile.mkdtemp(prefix="obdtest-")
        defer(shutil.rmtree, self.path)
        defer(os.chdir, os.getcwd())
        os.chdir(self.path)
        defer(self._down)
        if not Work.made:
            Work.made = self._make()
        for name, content in zip(("base.obd", "app.obd"), Work.made[:2]):
            with open(name, "wb") as file:
                file.write(content)
        self.disk = Work.made[2]

    @staticmethod
    def _make():
        """The layers and the disk they are made of."""
        os.mkdir("tree")
        for name, content in (("data", DATA), ("text", TEXT)):
            with open(f"tree/{name}", "wb") as file:
                file.write(content)
        sh(f"""
            mkfs.ext4 -q -d tree disk.raw {SIZE >> 10}k
            obdsetup create --image disk.raw base.obd
            mount -o loop disk.raw /mnt
            head -c 100000 tree/text >/mnt/more
            rm /mnt/text""")
        with open("/mnt/app", "wb") as file:
            file.write(APP)
        sh("umount /mnt; obdsetup create --base base.obd --image disk.raw app.obd")
        out = []
        for name in ("base.obd", "app.obd", "disk.raw"):
            with open(name, "rb") as file:
                out.append(file.read())
        return out

    def _down(self):
        """Takes down whatever a failed test has left."""
        quietly("umount", "/mnt")
        for name in DEVICES:
            if os.path.exists(f"/dev/mapper/{name}"):
                quietly("obdsetup", "close", name)
                quietly("dmsetup", "remove", name)

    def same(self, name="app"):
        """Every byte of a device is that of the source, and so are the files in it."""
        same_bytes(whole(name), self.disk, f"content of {name}")
        if os.path.ismount("/mnt") and name == "app":
            with open("/mnt/data", "rb") as data, open("/mnt/app", "rb") as app:
                equal(digest(data.read() + app.read()), digest(DATA + APP), "files in it")

    def pieces(self, name="app"):
        """How many pieces of a device can be read, and are right, and how many end with EIO; no third is allowed."""
        disk = Disk(f"/dev/mapper/{name}")
        right = failed = 0
        for at in range(0, SIZE, PIECE):
            got = read_or_none(disk, at, PIECE)
            if got is None:
                failed += 1
            else:
                same_bytes(got, self.disk[at:at + PIECE], f"piece at {at}")
                right += 1
        disk.close()
        return right, failed

    def corrupt(self):
        """Changes a byte of a block in base.obd that has something to say, and sets the block's CRC right: only
        a hash can notice."""
        with open("base.obd", "r+b") as file:
            raw = Work.made[0]
            places = image.Zfile(raw).places()
            offset, length = places[len(places) // 2]
            block = bytearray(raw[offset:offset + length])
            block[-5] ^= 1
            block[-4:] = image.crc32c(image.BLOCK_SEED, bytes(block[:-4])).to_bytes(4, "little")
            file.seek(offset)
            file.write(block)


def digest(content):
    return hashlib.sha256(content).hexdigest()


def whole(name):
    disk = Disk(f"/dev/mapper/{name}")
    content = disk.whole()
    disk.close()
    return content


def target_status(name):
    return sh(f"dmsetup status {name}").split()


def nothing_left():
    left = [name for name in DEVICES if os.path.exists(f"/dev/mapper/{name}")]
    equal(left, [], "devices that are left")


@test("dm-verity below: the bytes of the source; a changed block is EIO and nothing else")
def verity_below():
    need("veritysetup")
    need_module("dm-verity")
    work = Work()
    form, use, down = recipe("An image trusted by one hash for each layer")
    sh(form)
    sh(use)
    work.same()
    work.corrupt()
    right, failed = work.pieces()
    check(right and failed, f"{right} pieces right, {failed} with EIO")
    equal(target_status("app-zfile0")[3], "V", "state of zfile")
    equal(target_status("base-verified")[3], "C", "state of verity")
    equal(target_status("app-verified")[3], "V", "state of the other verity")
    sh(down)
    nothing_left()
    # Without verity nobody notices.
    sh("obdsetup open app base.obd app.obd")
    check(whole("app") != work.disk, "the change shows")
    sh("obdsetup close app")


@test("dm-verity above: the bytes of the source; a changed block is EIO and nothing else")
def verity_above():
    need("veritysetup")
    need_module("dm-verity")
    work = Work()
    form, use, down = recipe("An image trusted by one hash: dm-verity above")
    sh(form)
    sh(use)
    work.same("app-verified")
    work.corrupt()
    right, failed = work.pieces("app-verified")
    check(right and failed, f"{right} pieces right, {failed} with EIO")
    check(whole("app") != work.disk, "the change shows below verity")
    equal(target_status("app-verified")[3], "C", "state of verity")
    sh(down)
    nothing_left()


def processes(name):
    """The processes of that name."""
    found = []
    for path in glob.glob("/proc/[0-9]*/comm"):
        try:
            with open(path, encoding="ascii") as file:
                if file.read().strip() == name:
                    found.append(int(path.split("/")[2]))
        except OSError:
            pass
    return found


def kill(name, number=signal.SIGKILL):
    for pid in processes(name):
        os.kill(pid, number)


def wait(condition, what, seconds=20):
    for _ in range(seconds * 20):
        if condition():
            return
        time.sleep(0.05)
    check(False, f"{what}: not within {seconds} s")


def host(name):
    """Another name of this machine."""
    with open("/etc/hosts", encoding="ascii") as file:
        before = file.read()
    with open("/etc/hosts", "w", encoding="ascii") as file:
        file.write(f"{before}127.0.0.1 {name}\n")

    def restore():
        with open("/etc/hosts", "w", encoding="ascii") as file:
            file.write(before)
    defer(restore)


class Remote:
    """What the recipe with nbdkit needs: a server with the layers' files, a volume group without them."""

    def __init__(self):
        need("nbdkit", "nbd-client", "lvm")
        need_module("nbd", "dm-clone")
        self.work = Work()
        os.mkdir("images")
        for name in ("base", "app"):
            os.rename(f"{name}.obd", f"images/{name}.obd")
            sh(f"stat -c %s images/{name}.obd >{name}.size")
        if os.path.lexists("/srv/images"):
            raise Skip("there is a /srv/images")
        os.symlink(f"{self.work.path}/images", "/srv/images")
        defer(os.unlink, "/srv/images")
        host("server")
        disk = dm.Loop(b"", size=80 << 20, readonly=False)
        sh(f"vgcreate --quiet vg {disk.path}")
        defer(quietly, "vgremove", "--force", "vg")
        defer(self._down)
        self.blocks = recipe("A remote image")

    def _down(self):
        kill("nbdkit")
        self.work._down()  # pylint: disable=protected-access
        for number in range(2):
            quietly("nbd-client", "-d", f"/dev/nbd{number}")

    def server(self):
        sh(self.blocks[0])

    def node(self):
        sh(self.blocks[1])


def hydrated(name):
    """(local, all) regions of a clone."""
    return tuple(map(int, target_status(name)[6].split("/")))


@test("nbdkit and dm-clone: in use before anything is local, and when the server is gone")
def remote():
    remotes = Remote()
    work = remotes.work
    remotes.server()
    remotes.node()
    equal(hydrated("base-local")[0] + hydrated("app-local")[0], 0, "local regions")
    work.same()
    equal(hydrated("base-local")[0] + hydrated("app-local")[0], 0, "local regions after all was read")
    sh(remotes.blocks[2])
    for name in ("base-local", "app-local"):
        local, regions = hydrated(name)
        equal(local, regions, f"local regions of {name}")
    work.same()
    sh(remotes.blocks[3])
    kill("nbdkit")
    equal([line for line in sh("dmsetup deps -o devname").splitlines() if "nbd" in line], [], "users of NBD")
    sh("echo 3 >/proc/sys/vm/drop_caches")
    work.same()
    sh(remotes.blocks[4])
    work.same()
    sh("obdsetup close app")
    nothing_left()


@test("nbdkit and dm-clone: a server that hangs, and one that dies, is EIO; the copy goes on later")
def remote_dies():
    remotes = Remote()
    work = remotes.work
    remotes.server()
    remotes.node()
    for name in ("base-local", "app-local"):
        sh(f"dmsetup message {name} 0 hydration_batch_size 1; dmsetup message {name} 0 enable_hydration")
        wait(lambda name=name: hydrated(name)[0] > 200, "something is local")
        sh(f"dmsetup message {name} 0 disable_hydration")
    work.same()
    before = hydrated("base-local")
    check(before[0] < before[1], f"local: {before}")
    kill("nbdkit", signal.SIGSTOP)
    disk = Disk("/dev/mapper/app")
    start = time.monotonic()
    last = max(at for at in range(0, SIZE, PIECE) if any(work.disk[at:at + PIECE]))
    check(any(read_or_none(disk, at, PIECE) is None for at in range(last, 0, -PIECE)), "a read ends with EIO")
    note(f"the read ended after {time.monotonic() - start:.1f} s")
    disk.close()
    kill("nbdkit")
    start = time.monotonic()
    right, failed = work.pieces()
    check(right and failed, f"{right} pieces right, {failed} with EIO")
    note(f"{right} pieces right, {failed} with EIO, in {time.monotonic() - start:.1f} s")
    sh("""
        umount /mnt
        obdsetup close app
        dmsetup remove base-local app-local
        nbd-client -d /dev/nbd0
        nbd-client -d /dev/nbd1""")
    nothing_left()
    # Once more with the same volumes.
    remotes.server()
    sh("\n".join(line for line in remotes.blocks[1].splitlines() if "lvcreate" not in line))
    check(hydrated("base-local")[0] >= before[0], f"local: {hydrated('base-local')}, before {before}")
    work.same()
    sh("umount /mnt; obdsetup close app; dmsetup remove base-local app-local")


@test("nbdkit with its curl plugin: the bytes of a web server")
def web():
    need("nbdkit", "nbd-client", "busybox")
    need_module("nbd")
    work = Work()
    host("server")
    sh("stat -c %s base.obd >base.size")
    server = subprocess.Popen(["busybox", "httpd", "-f", "-p", "127.0.0.1:8080", "-h", work.path])
    defer(server.wait)
    defer(server.kill)
    defer(kill, "nbdkit")
    up, down = recipe("From a web server")
    defer(quietly, "nbd-client", "-d", "/dev/nbd0")
    defer(quietly, "obdsetup", "close", "base")
    defer(quietly, "umount", "/mnt")
    sh(up)
    equal(digest(whole("base")), digest(image.flatten([image.Lsmt(image.Zfile(Work.made[0]))])), "content")
    with open("/mnt/data", "rb") as data, open("/mnt/text", "rb") as text:
        same_bytes(data.read() + text.read(), DATA + TEXT, "files in it")
    sh(down)
    wait(lambda: not processes("nbdkit"), "nbdkit ends")
    nothing_left()


if __name__ == "__main__":
    if "OBD_VM" not in os.environ:
        skip_all("the recipes' names of devices and hosts are free in the test VM only")
    main()
