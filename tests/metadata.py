#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""File systems that obdsetup makes have all metadata of their source: random trees, from directories and tars.

Some trees are the same in each run. One more is different each day; OBD_METADATA_SEED replaces it with the trees of
other seeds, separated by blanks. Each test prints the seed of its tree.
"""

import fcntl
import os
import stat
import struct
import tarfile
import time

from obdtest import tree
from obdtest.files import mount, umount, work_directory
from obdtest.ktap import Skip, add, check, defer, equal, main, note
from obdtest.programs import close, need, need_module, obdsetup, run

FILE_SYSTEMS = ("ext2", "ext3", "ext4", "erofs", "btrfs", "squashfs")
OPTIONS = {"btrfs": "ro,norecovery"}
# mksquashfs reads a tar, which can't have sockets or all device numbers.
THROUGH_TAR = ("squashfs",)
SEEDS = {"ext2": (11,), "ext3": (), "ext4": (1,), "erofs": (1,), "btrfs": (1,), "squashfs": (1,)}
OF_THE_DAY = os.environ.get("OBD_METADATA_SEED", str(int(time.time() // 86400))).split()
# The features of this kernel's ext4.
FEATURES = "/sys/fs/ext4/features"
# FS_IOC_*
GETFLAGS, SETFLAGS = 0x80086601, 0x40086602
ENABLE_VERITY, ADD_KEY, SET_POLICY = 0x40806685, 0xC0506617, 0x800C6613


def need_kind(kind):
    need("obdsetup")
    need_module(kind)


def mounted(kind, layer, where):
    """Opens and mounts a layer."""
    name = f"obdtest-{os.getpid()}-{kind}"
    obdsetup("open", name, layer)
    defer(close, name)
    device = f"/dev/mapper/{name}"
    if kind.startswith("ext"):
        run("e2fsck", "-fn", device)
    if kind == "btrfs":
        run("btrfs", "check", device)
    mount(device, where, OPTIONS.get(kind, "ro"), kind)


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
            # GNU tar stores each hard link to such a file as another file.
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
    """Checks that files have data in the blocks that are not all zeros, and holes elsewhere."""
    count = 0
    for path, seen in source.items():
        if "content" in seen:
            there = os.path.join(os.fsencode(where), path)
            wanted = tree.non_zero_blocks(there)
            equal(tree.data_blocks(there, seen["content"][0]), wanted, f"{path}: blocks with data")
            count += len(wanted) * tree.BLOCK < seen["content"][0]
    check(count, "no file has holes")


def round_trip(kind, seed, from_tar):
    need_kind(kind)
    work = work_directory()
    source, layer, where = f"{work}/source", f"{work}/layer.obd", f"{work}/mnt"
    os.mkdir(source)
    os.mkdir(where)
    note(f"OBD_METADATA_SEED={seed}")
    tree.Maker(source, seed).make()
    wanted = fitted(kind, tree.manifest(source), from_tar)
    loss = ["--allow-loss"] if kind in THROUGH_TAR else []
    if from_tar:
        # tar leaves sockets out, with a warning but no error.
        run("tar", "--format=pax", "--xattrs", "--xattrs-include=*", "--acls", "--sparse", "--numeric-owner",
            "-cf", f"{work}/source.tar", "-C", source, ".")
        _, said = obdsetup("convert", f"{work}/source.tar", layer, "--fs", kind, *loss)
    else:
        _, said = obdsetup("create", "--directory", source, "--fs", kind, *loss, layer)
    if kind == "squashfs":
        for what in ("POSIX ACLs", "fractions of a second", "times before 1970"):
            check(f"squashfs cannot hold {what}" in said, f"no warning of {what}: {said}")
    elif kind not in THROUGH_TAR:
        equal(said, "", "warnings")
    mounted(kind, layer, where)
    compare(tree.manifest(where), wanted)
    # squashfs has larger blocks; erofs doesn't report holes.
    if kind not in ("erofs", "squashfs"):
        holes(where, wanted)


def workplace():
    """Returns a new directory with the mount point `mnt`."""
    work = work_directory()
    os.mkdir(f"{work}/mnt")
    return work


def unsaid(kind):
    """A tar without entries for directories: these get default properties, and the time of the file in them."""
    need_kind(kind)
    work = workplace()
    with tarfile.open(f"{work}/source.tar", "w") as tar:
        member = tarfile.TarInfo("etc/deep/passwd")
        member.mtime, member.mode = 1700000000, 0o600
        tar.addfile(member)
    obdsetup("convert", f"{work}/source.tar", f"{work}/layer.obd", "--fs", kind)
    mounted(kind, f"{work}/layer.obd", f"{work}/mnt")
    for path in ("", "etc", "etc/deep"):
        status = os.stat(f"{work}/mnt/{path}")
        seen = (stat.filemode(status.st_mode), status.st_uid, status.st_gid, status.st_mtime)
        equal(seen, ("drwxr-xr-x", 0, 0, 1700000000), f"/{path}")
    equal(os.stat(f"{work}/mnt/etc/deep/passwd").st_mode & 0o7777, 0o600, "mode of the file")


def private(kind):
    """The root directory keeps its mode, owner, time and extended attribute."""
    need_kind(kind)
    work = workplace()
    os.mkdir(f"{work}/source")
    os.setxattr(f"{work}/source", "trusted.of", b"the root directory")
    os.chown(f"{work}/source", 1000, 100000)
    os.chmod(f"{work}/source", 0o700)
    os.utime(f"{work}/source", ns=(5000000000123456789, 5000000000123456789))
    run("tar", "--format=pax", "--xattrs", "--xattrs-include=*", "-cf", f"{work}/source.tar", "-C", f"{work}/source", ".")
    for source in ("source", "source.tar"):
        obdsetup("convert", f"{work}/{source}", f"{work}/layer.obd", "--fs", kind, "--force")
        mounted(kind, f"{work}/layer.obd", f"{work}/mnt")
        status = os.stat(f"{work}/mnt")
        equal((stat.filemode(status.st_mode), status.st_uid, status.st_gid), ("drwx------", 1000, 100000), source)
        wanted = ((1 << 32) - 1) * 10**9 if kind == "squashfs" else 5000000000123456789
        equal(status.st_mtime_ns, wanted, f"{source}: time")
        equal(os.getxattr(f"{work}/mnt", "trusted.of"), b"the root directory", f"{source}: extended attribute")
        umount(f"{work}/mnt")
        obdsetup("close", f"obdtest-{os.getpid()}-{kind}")


def refused():
    need_kind("squashfs")
    work = workplace()
    os.mkdir(f"{work}/source")
    os.setxattr(f"{work}/source", "system.posix_acl_access", tree.access_acl(0o755, 1234))
    _, said = obdsetup("create", "--directory", f"{work}/source", "--fs", "squashfs", f"{work}/layer.obd", status=1)
    check("squashfs cannot hold POSIX ACLs: 1 file stored without them: ./" in said and "--allow-loss" in said, said)
    equal(sorted(os.listdir(work)), ["mnt", "source"], "what is left")


def sparse(kind):
    """A file of 500 GiB with two blocks of data."""
    need_kind(kind)
    work = workplace()
    os.mkdir(f"{work}/source")
    with open(f"{work}/source/large", "wb") as file:
        file.truncate(500 << 30)
        os.pwrite(file.fileno(), b"first", 1 << 30)
        os.pwrite(file.fileno(), b"second", (400 << 30) + 5)
    start = time.monotonic()
    obdsetup("create", "--directory", f"{work}/source", "--fs", kind, f"{work}/layer.obd")
    took = time.monotonic() - start
    check(took < 60, f"took {took} s")
    check(os.stat(f"{work}/layer.obd").st_size < 1 << 20, "the layer is not small")
    mounted(kind, f"{work}/layer.obd", f"{work}/mnt")
    with open(f"{work}/mnt/large", "rb") as file:
        equal(os.fstat(file.fileno()).st_size, 500 << 30, "size")
        for at, wanted in ((1 << 30, b"first\0"), ((400 << 30) + 4, b"\0second\0"), ((500 << 30) - 2, b"\0\0"), (0, b"\0")):
            equal(os.pread(file.fileno(), len(wanted), at), wanted, f"at {at}")


def of_ext4(work):
    """Mounts a new ext4 that can have encrypted, verity and case-insensitive files. Returns its root."""
    need_kind("ext4")
    with open(f"{work}/ext4", "wb") as file:
        file.truncate(64 << 20)
    missing = [name for name in ("encryption", "verity", "casefold") if not os.path.exists(f"{FEATURES}/{name}")]
    if missing:
        raise Skip(f"the ext4 of this kernel has no {', '.join(missing)}")
    # The blocks of verity must not be larger than those of the file system, which are small by default.
    run("mkfs.ext4", "-q", "-b", "4096", "-O", "encrypt,verity,casefold", "-E", "encoding=utf8", f"{work}/ext4")
    mount(f"{work}/ext4", f"{work}/source", "loop")
    return f"{work}/source"


def ioctl(path, number, argument):
    """Calls ioctl() on a file. Returns the argument as the kernel leaves it."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return fcntl.ioctl(fd, number, argument)
    finally:
        os.close(fd)


def chattr(path, flags):
    before, = struct.unpack("L", ioctl(path, GETFLAGS, bytes(8)))
    ioctl(path, SETFLAGS, struct.pack("L", before | flags))


def encrypt(root, path):
    """Encrypts an empty directory with AES-256-XTS and a key of 64 bytes, which it adds to the file system."""
    # struct fscrypt_add_key_arg, in which the kernel returns the key's identifier, and struct fscrypt_policy_v2.
    added = ioctl(root, ADD_KEY, struct.pack("=II32xII32x", 2, 0, 64, 0) + bytes(range(64)))
    ioctl(path, SET_POLICY, struct.pack("=BBBBI", 2, 1, 4, 0, 0) + added[8:24])


def flags(kind):
    """`create' warns once about flags and once about encryption, which are not kept. The files are readable as
    usual."""
    need_kind(kind)
    work = workplace()
    source = of_ext4(work)
    for name in ("append", "immutable", "nodump", "plain"):
        with open(f"{source}/{name}", "w", encoding="ascii") as file:
            file.write(name)
    os.mkdir(f"{source}/folded")
    with open(f"{source}/verity", "w", encoding="ascii") as file:
        file.write("content")
    # struct fsverity_enable_arg: version 1, SHA-256, blocks of 4096 bytes.
    ioctl(f"{source}/verity", ENABLE_VERITY, struct.pack("=III", 1, 1, 4096).ljust(128, b"\0"))
    os.mkdir(f"{source}/secret")
    encrypt(source, f"{source}/secret")
    with open(f"{source}/secret/file", "w", encoding="ascii") as file:
        file.write("secret")
    chattr(f"{source}/folded", 0x40000000)
    for name, bit in (("append", 0x20), ("immutable", 0x10), ("nodump", 0x40)):
        chattr(f"{source}/{name}", bit)
    _, said = obdsetup("create", "--directory", source, "--fs", kind, f"{work}/layer.obd")
    lines = [line for line in said.splitlines() if "fraction" not in line]
    equal(lines, [
        "obdsetup: warning: flags are not kept, see chattr(1) (immutable, append only, no dump, case-insensitive names, "
        "verity): 5 files stored without them: ./append ./folded ./immutable ...",
        "obdsetup: warning: encryption is not kept: 2 files readable by all who have the layer: ./secret ./secret/file",
    ], "warnings")
    mounted(kind, f"{work}/layer.obd", f"{work}/mnt")
    for name, wanted in (("append", "append"), ("verity", "content"), ("secret/file", "secret")):
        with open(f"{work}/mnt/{name}", encoding="ascii") as file:
            equal(file.read(), wanted, name)


for fs in ("ext4", "erofs", "btrfs", "squashfs"):
    add(f"{fs}: create warns about flags of files that are not kept", flags, fs)
for fs in FILE_SYSTEMS:
    add(f"{fs}: a tar without entries for directories", unsaid, fs)
    add(f"{fs}: a private root directory", private, fs)
add("squashfs: ACLs are refused without --allow-loss", refused)
for fs in ("ext4", "erofs", "btrfs"):
    add(f"{fs}: holes take no space", sparse, fs)
for fs in FILE_SYSTEMS:
    for number in SEEDS[fs]:
        add(f"{fs}: a directory, tree {number}", round_trip, fs, number, False)
        add(f"{fs}: a tar, tree {number}", round_trip, fs, number, True)
    for number in OF_THE_DAY:
        add(f"{fs}: a directory, tree of the day", round_trip, fs, int(number), False)
        add(f"{fs}: a tar, tree of the day", round_trip, fs, int(number), True)

if __name__ == "__main__":
    main()
