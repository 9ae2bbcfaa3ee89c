# SPDX-License-Identifier: GPL-2.0
"""The recipes of Documentation/recipes.rst: their commands, and what the commands need."""

import hashlib
import os
import random
import re
import subprocess
import tempfile

from . import image
from .disk import Disk, read_or_none
from .files import enter_work_directory, read, write
from .ktap import SLOW, check, defer, equal, same_bytes, skip_all
from .programs import need, quietly

DOCUMENT = f"{os.path.dirname(os.path.abspath(__file__))}/../../Documentation/recipes.rst"
SIZE = 8 << 20
PIECE = 64 << 10
# The devices that the recipes make.
DEVICES = ("app-verified", "app", "base", "base-verified", "base-local", "app-local", "one", "two",
           "work", "work-image", "work-store")
DATA, TEXT = random.Random(91).randbytes(2 << 20), b"".join(b"%09d\n" % number for number in range(100000))
APP = random.Random(92).randbytes(500 << 10)


def recipe(title):
    """Returns the command blocks of a section: the literal blocks after text that ends with a double colon. Diagrams
    follow a double colon alone, so they are not included."""
    with open(DOCUMENT, encoding="ascii") as file:
        text = file.read()
    start = re.search(rf"^{re.escape(title)}.*\n[=-]+$", text, re.MULTILINE)
    check(start, f"there is no recipe {title}")
    body = re.split(r"^.+\n[=-]{4,}$", text[start.end():], maxsplit=1, flags=re.MULTILINE)[0]
    return re.findall(r"\S::\n\n((?:    .*\n|\n)+)", body)


def sh(script, timeout=60):
    """Runs commands in a shell. Returns their output."""
    # Files, not pipes: a server left in the background would keep pipes open.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        shell = ["timeout", str(timeout * SLOW), "bash", "-euxo", "pipefail", "-c", script]
        status = subprocess.run(shell, stdin=subprocess.DEVNULL, stdout=out, stderr=err, check=False).returncode
        out.seek(0)
        err.seek(0)
        check(not status, f"status {status}, 124 is time out, of\n{err.read()}")
        return out.read()


class Work:
    """A directory with two layers, base.obd and app.obd, for the commands, and the expected content."""

    made = None

    def __init__(self):
        need("obdsetup", "mkfs.ext4")
        self.path = enter_work_directory()
        defer(self.down)
        if not Work.made:
            Work.made = self._make()
        self.base, app, self.disk = Work.made
        for name, content in (("base.obd", self.base), ("app.obd", app)):
            write(name, content)

    @staticmethod
    def _make():
        """Returns the layers and the disk that they are made from."""
        os.mkdir("tree")
        for name, content in (("data", DATA), ("text", TEXT)):
            write(f"tree/{name}", content)
        sh(f"""
            mkfs.ext4 -q -b 4096 -d tree disk.raw {SIZE >> 10}k
            obdsetup create --image disk.raw base.obd
            mount -o loop disk.raw /mnt
            head -c 100000 tree/text >/mnt/more
            rm /mnt/text""")
        write("/mnt/app", APP)
        sh("umount /mnt; obdsetup create --base base.obd --image disk.raw app.obd")
        return [read(name) for name in ("base.obd", "app.obd", "disk.raw")]

    def down(self):
        """Removes the devices and the mount that a failed test has left."""
        quietly("umount", "/mnt")
        # The names don't show which device is above which, so go over them twice.
        for name in DEVICES * 2:
            if os.path.exists(f"/dev/mapper/{name}"):
                quietly("obdsetup", "close", name)
                quietly("dmsetup", "remove", name)

    def same(self, name="app"):
        """Checks that the device has the expected content. If it is mounted on /mnt, checks the files, too."""
        same_bytes(whole(name), self.disk, f"content of {name}")
        if os.path.ismount("/mnt"):
            equal(digest(read("/mnt/data") + read("/mnt/app")), digest(DATA + APP), "files in it")

    def same_base(self):
        """Checks the content of `base`, a device with the lower layer alone, and its files in /mnt."""
        same_bytes(whole("base"), image.flatten([image.Lsmt(image.Zfile(self.base))]), "content of base")
        equal(digest(read("/mnt/data") + read("/mnt/text")), digest(DATA + TEXT), "files in it")

    def pieces(self, name="app"):
        """Reads a device in pieces of 64 KiB. Returns how many read correctly and how many fail with EIO. Fails on
        wrong data."""
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
        """Changes a byte of a block with data in base.obd and corrects the block's CRC: only a hash detects it."""
        with open("base.obd", "r+b") as file:
            raw = self.base
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


def main_in_vm(main):
    """Runs the tests, but only in the test VM: elsewhere, the names of devices and hosts in the recipes may be in
    use."""
    if "OBD_VM" not in os.environ:
        skip_all("the recipes' names of devices and hosts are free in the test VM only")
    # cargo install puts programs here.
    os.environ["PATH"] += ":/cargo/bin"
    main()
