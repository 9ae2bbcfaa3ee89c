#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""File systems that obdsetup makes have all metadata of their source: random trees, from directories and tars."""

import os
import shutil
import stat
import subprocess
import tarfile
import tempfile
import time

from obdtest import tree
from obdtest.ktap import Skip, add, check, defer, equal, main, note

OBDSETUP = shutil.which("obdsetup")
FILE_SYSTEMS = ("ext2", "ext3", "ext4", "erofs", "btrfs", "squashfs")
OPTIONS = {"btrfs": "ro,norecovery"}
# mksquashfs reads a tar, which can't have sockets or all device numbers.
THROUGH_TAR = ("squashfs",)
SEEDS = {"ext2": (11,), "ext3": ()}


def run(*command, **options):
    """Runs a command. Returns its output and its messages."""
    done = subprocess.run(command, capture_output=True, check=False, **options)
    if done.returncode:
        raise OSError(f"{command}: status {done.returncode}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")


def need(kind):
    if not OBDSETUP:
        raise Skip("no obdsetup")
    if subprocess.run(["modprobe", kind], capture_output=True, check=False).returncode:
        raise Skip(f"this kernel has no {kind}")


def umount(where):
    if os.path.ismount(where):
        run("umount", where)


def close(name):
    """Closes what a failed test has left open."""
    if os.path.exists(f"/dev/mapper/{name}"):
        subprocess.run([OBDSETUP, "close", name], capture_output=True, check=False)


def mounted(kind, layer, where):
    """Opens and mounts a layer."""
    name = f"obdtest-{os.getpid()}-{kind}"
    run(OBDSETUP, "open", name, layer)
    defer(close, name)
    device = f"/dev/mapper/{name}"
    if kind.startswith("ext"):
        run("e2fsck", "-fn", device)
    if kind == "btrfs":
        run("btrfs", "check", device)
    run("mount", "-t", kind, "-o", OPTIONS.get(kind, "ro"), device, where)
    defer(umount, where)


def fitted(kind, wanted, from_tar):
    """Reduces a manifest to what the file system can store."""
    for path, seen in list(wanted.items()):
        if kind == "squashfs":
            whole = seen["mtime"] // 10**9
            seen["mtime"] = min(max(whole, 0), (1 << 32) - 1) * 10**9
            seen["xattrs"] = {name: value for name, value in seen["xattrs"].items() if not name.startswith("system.")}
            if path == b".":
                seen["xattrs"] = {name: value for name, value in seen["xattrs"].items() if value}
        if from_tar and seen["mode"][0] in "bcp":
            # GNU tar writes each name of such a file as a file of its own.
            del seen["names"]
        large = seen.get("device", (0, 0))[1] >= 1 << 19
        if seen["mode"][0] == "s" and (from_tar or kind in THROUGH_TAR) or large and kind in THROUGH_TAR:
            del wanted[path]
    return wanted


def compare(got, wanted):
    equal(sorted(got), sorted(wanted), "names")
    for path, seen in wanted.items():
        for what, value in seen.items():
            equal(got[path].get(what), value, f"{path}: {what}")


def holes(where, source):
    """The file system has data where the source isn't zero, and holes elsewhere."""
    count = 0
    for path, seen in source.items():
        if "content" in seen:
            there = os.path.join(os.fsencode(where), path)
            wanted = tree.non_zero_blocks(there)
            equal(tree.data_blocks(there, seen["content"][0]), wanted, f"{path}: blocks with data")
            count += len(wanted) * tree.BLOCK < seen["content"][0]
    check(count, "some files have holes")


def round_trip(kind, seed, from_tar):
    need(kind)
    work = tempfile.mkdtemp(prefix="obdtest-")
    defer(shutil.rmtree, work)
    source, layer, where = f"{work}/source", f"{work}/layer.obd", f"{work}/mnt"
    os.mkdir(source)
    os.mkdir(where)
    note(f"seed {seed}")
    tree.Maker(source, seed).make()
    wanted = fitted(kind, tree.manifest(source), from_tar)
    loss = ["--allow-loss"] if kind in THROUGH_TAR else []
    if from_tar:
        # tar leaves sockets out, with a warning but no error.
        run("tar", "--format=pax", "--xattrs", "--xattrs-include=*", "--acls", "--sparse", "--numeric-owner",
            "-cf", f"{work}/source.tar", "-C", source, ".")
        _, said = run(OBDSETUP, "convert", f"{work}/source.tar", layer, "--fs", kind, *loss)
    else:
        _, said = run(OBDSETUP, "create", "--directory", source, "--fs", kind, *loss, layer)
    if kind == "squashfs":
        for what in ("POSIX ACLs", "fractions of a second", "times before 1970"):
            check(f"squashfs cannot hold {what}" in said, f"a warning of {what}: {said}")
    elif kind not in THROUGH_TAR:
        equal(said, "", "warnings")
    mounted(kind, layer, where)
    compare(tree.manifest(where), wanted)
    # squashfs has larger blocks; erofs doesn't report holes.
    if kind not in ("erofs", "squashfs"):
        holes(where, wanted)


def workplace():
    """Returns a directory with a mount point."""
    work = tempfile.mkdtemp(prefix="obdtest-")
    defer(shutil.rmtree, work)
    os.mkdir(f"{work}/mnt")
    return work


def unsaid(kind):
    """A tar without directories."""
    need(kind)
    work = workplace()
    with tarfile.open(f"{work}/source.tar", "w") as tar:
        member = tarfile.TarInfo("etc/deep/passwd")
        member.mtime, member.mode = 1700000000, 0o600
        tar.addfile(member)
    run(OBDSETUP, "convert", f"{work}/source.tar", f"{work}/layer.obd", "--fs", kind)
    mounted(kind, f"{work}/layer.obd", f"{work}/mnt")
    for path in ("", "etc", "etc/deep"):
        status = os.stat(f"{work}/mnt/{path}")
        seen = (stat.filemode(status.st_mode), status.st_uid, status.st_gid, status.st_mtime)
        equal(seen, ("drwxr-xr-x", 0, 0, 1700000000), f"/{path}")
    equal(os.stat(f"{work}/mnt/etc/deep/passwd").st_mode & 0o7777, 0o600, "mode of the file")


def private(kind):
    """A directory without access for others, and its ACL."""
    need(kind)
    work = workplace()
    os.mkdir(f"{work}/source")
    os.setxattr(f"{work}/source", "trusted.of", b"the root directory")
    os.chown(f"{work}/source", 1000, 100000)
    os.chmod(f"{work}/source", 0o700)
    os.utime(f"{work}/source", ns=(5000000000123456789, 5000000000123456789))
    run("tar", "--format=pax", "--xattrs", "--xattrs-include=*", "-cf", f"{work}/source.tar", "-C", f"{work}/source", ".")
    for source in ("source", "source.tar"):
        run(OBDSETUP, "convert", f"{work}/{source}", f"{work}/layer.obd", "--fs", kind, "--force")
        mounted(kind, f"{work}/layer.obd", f"{work}/mnt")
        status = os.stat(f"{work}/mnt")
        equal((stat.filemode(status.st_mode), status.st_uid, status.st_gid), ("drwx------", 1000, 100000), source)
        wanted = ((1 << 32) - 1) * 10**9 if kind == "squashfs" else 5000000000123456789
        equal(status.st_mtime_ns, wanted, f"{source}: time")
        equal(os.getxattr(f"{work}/mnt", "trusted.of"), b"the root directory", f"{source}: extended attribute")
        umount(f"{work}/mnt")
        run(OBDSETUP, "close", f"obdtest-{os.getpid()}-{kind}")


def refused():
    need("squashfs")
    work = workplace()
    os.mkdir(f"{work}/source")
    os.setxattr(f"{work}/source", "system.posix_acl_access", tree.access_acl(0o755, 1234))
    done = subprocess.run([OBDSETUP, "create", "--directory", f"{work}/source", "--fs", "squashfs", f"{work}/layer.obd"],
                          capture_output=True, text=True, check=False)
    equal(done.returncode, 1, "status")
    check("squashfs cannot hold POSIX ACLs: 1 file loses them: ./" in done.stderr and "--allow-loss" in done.stderr, done.stderr)
    equal(sorted(os.listdir(work)), ["mnt", "source"], "what is left")


def sparse(kind):
    """A file of 500 GiB with two blocks of data."""
    need(kind)
    work = workplace()
    os.mkdir(f"{work}/source")
    with open(f"{work}/source/large", "wb") as file:
        file.truncate(500 << 30)
        os.pwrite(file.fileno(), b"first", 1 << 30)
        os.pwrite(file.fileno(), b"second", (400 << 30) + 5)
    start = time.monotonic()
    run(OBDSETUP, "create", "--directory", f"{work}/source", "--fs", kind, f"{work}/layer.obd")
    took = time.monotonic() - start
    check(took < 60, f"took {took} s")
    check(os.stat(f"{work}/layer.obd").st_size < 1 << 20, "the layer is small")
    mounted(kind, f"{work}/layer.obd", f"{work}/mnt")
    with open(f"{work}/mnt/large", "rb") as file:
        equal(os.fstat(file.fileno()).st_size, 500 << 30, "size")
        for at, wanted in ((1 << 30, b"first\0"), ((400 << 30) + 4, b"\0second\0"), ((500 << 30) - 2, b"\0\0"), (0, b"\0")):
            equal(os.pread(file.fileno(), len(wanted), at), wanted, f"at {at}")


for fs in FILE_SYSTEMS:
    add(f"{fs}: a tar without directories", unsaid, fs)
    add(f"{fs}: a private root directory", private, fs)
add("squashfs: ACLs are refused", refused)
for fs in ("ext4", "erofs", "btrfs"):
    add(f"{fs}: holes take no space", sparse, fs)
for fs in FILE_SYSTEMS:
    for number in SEEDS.get(fs, (1, 2)):
        add(f"{fs}: a directory, tree {number}", round_trip, fs, number, False)
        add(f"{fs}: a tar, tree {number}", round_trip, fs, number, True)

if __name__ == "__main__":
    main()
