#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""erofs images made by obdsetup have fingerprints of their files, so that equal files of different images share the
page cache."""

import errno
import hashlib
import mmap
import os
import random
import shutil

from obdtest.disk import fails_with
from obdtest.files import mount, umount, work_directory, write
from obdtest.ktap import Skip, check, defer, equal, main, note, same_bytes, test
from obdtest.memory import drop_caches, page_cache
from obdtest.programs import close, need, need_module, obdsetup, run

NAME = f"obdtest-{os.getpid()}"
COMMON = random.Random(7).randbytes(6 << 20)
# "hole" has a hole, "small" is stored in its inode, "more" has a little more than a block.
FILES = {"common": COMMON, "hole": COMMON[:9000] + bytes(70000) + COMMON[:5000], "small": b"small\n" * 9,
         "more": COMMON[:4096 + 100], "empty": b""}


class Image:
    """An open image with the common files, and a file that only this image has."""

    def __init__(self, work, name):
        self.name, self.work = f"{NAME}-{name}", work
        self.tree, self.mnt, self.layer = f"{work}/{name}", f"{work}/{name}.mnt", f"{work}/{name}.obd"
        os.mkdir(self.tree)
        os.mkdir(self.mnt)
        # This file makes the common files start at different places on the disks.
        own = {"aaa-own": name.encode() * (10000 + 5000 * len(name))}
        for path, content in {**own, **FILES}.items():
            write(f"{self.tree}/{path}", content)
        obdsetup("create", "--directory", self.tree, "--fs", "erofs", self.layer)
        obdsetup("open", self.name, self.layer)
        defer(close, self.name)

    def mount(self, *options):
        mount(f"/dev/mapper/{self.name}", self.mnt, ",".join(["ro", *options]), "erofs")
        with open("/proc/mounts", encoding="utf-8") as file:
            row = next(row for row in file if f" {self.mnt} " in row)
        if "inode_share" in options and "inode_share" not in row:
            raise Skip("this kernel's erofs doesn't share inodes")

    def umount(self):
        umount(self.mnt)

    def sectors(self):
        """Returns the number of sectors read from the disk."""
        rdev = os.stat(f"/dev/mapper/{self.name}").st_rdev
        with open(f"/sys/dev/block/{os.major(rdev)}:{os.minor(rdev)}/stat", encoding="ascii") as file:
            return int(file.read().split()[2])

    def read(self, path="common"):
        """Returns a file's content, and how many sectors were read from the disk for it."""
        with open(f"{self.mnt}/{path}", "rb") as file:
            before = self.sectors()
            return file.read(), self.sectors() - before


def images():
    need("obdsetup")
    need_module("erofs")
    with open("/proc/version", encoding="ascii") as file:
        release = file.read().split()[2]
    if tuple(map(int, release.split("-")[0].split(".")[:2])) < (7, 0):
        raise Skip("the kernel is older than shared inodes of erofs")
    work = work_directory()
    return Image(work, "one"), Image(work, "another")


def both(first, second, *options):
    """Reads the file `common` in the first image, then in the second. Returns the sectors and the KiB of page cache
    that the second read took."""
    drop_caches()
    for image, more in zip((first, second), options):
        image.mount(*more)
    content, sectors = first.read()
    same_bytes(content, COMMON, "content in the first")
    check(sectors * 512 >= len(COMMON), f"the first read took {sectors} sectors")
    before = page_cache()
    content, sectors = second.read()
    grown = page_cache() - before
    same_bytes(content, COMMON, "content in the second")
    note(f"{options}: the second read took {sectors} sectors and {grown} KiB of page cache")
    return sectors, grown


@test("in one domain, the second image reads no data for a common file, which is cached once")
def shared():
    first, second = images()
    option = ("inode_share", "domain_id=obdtest")
    sectors, grown = both(first, second, option, option)
    equal(sectors, 0, "sectors for the second read")
    check(grown < len(COMMON) >> 12, f"the page cache has grown by {grown} KiB")
    for path, wanted in FILES.items():
        for image in (second, first):
            same_bytes(image.read(path)[0], wanted, f"{path} in {image.name}")
    for image in (first, second):
        same_bytes(image.read("aaa-own")[0], open(f"{image.tree}/aaa-own", "rb").read(), f"what only {image.name} has")
    # When the first image is unmounted, the second one keeps the pages that the first one has read.
    with open(f"{second.mnt}/common", "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as area:
        first.umount()
        same_bytes(bytes(area), COMMON, "a mapping when the first is unmounted")
    drop_caches()
    same_bytes(second.read()[0], COMMON, "content when the first is unmounted")
    fails_with(errno.EINVAL, os.open, f"{second.mnt}/common", os.O_RDONLY | os.O_DIRECT)


@test("without the option, or with another domain, each image reads and caches a common file separately")
def not_shared():
    first, second = images()
    for options in (((), ()), (("inode_share", "domain_id=a"), ("inode_share", "domain_id=b"))):
        sectors, grown = both(first, second, *options)
        check(sectors * 512 >= len(COMMON), f"{options}: {sectors} sectors for the second read")
        check(grown * 1024 > len(COMMON) * 3 // 4, f"{options}: the page cache has grown by {grown} KiB")
        first.umount()
        second.umount()


@test("fingerprints are those of the content, and users don't see them")
def fingerprints():
    first, _ = images()
    obdsetup("export", "-o", f"{first.work}/disk", first.layer)
    with open(f"{first.work}/disk", "rb") as file:
        disk = file.read()
    for path, content in FILES.items():
        wanted = int(bool(content))
        equal(disk.count(b"sha256:" + hashlib.sha256(content).digest()), wanted, f"fingerprints of {path}")
    first.mount()
    for path in FILES:
        equal(os.listxattr(f"{first.mnt}/{path}"), [], f"extended attributes of {path}")
    if shutil.which("fsck.erofs"):
        run("fsck.erofs", f"/dev/mapper/{first.name}")


if __name__ == "__main__":
    main()
