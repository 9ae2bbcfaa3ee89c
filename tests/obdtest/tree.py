# SPDX-License-Identifier: GPL-2.0
"""Makes random trees of files of all types, with modes, owners, times, ACLs and other extended attributes. Reads the
properties of a tree's files."""

import errno
import hashlib
import os
import random
import stat
import struct

BLOCK = 4096
LAST_32 = (1 << 31) - 1
# Unusual names; %d makes them unique.
NAMES = (b"plain%d", b"with blank %d", b"-dash%d", b"new\nline%d", b"quote\"'%d", b"\xff\xfe%d", b"back\\slash%d",
         b"tab\t%d", "umlaut ä%d".encode(), b"<%d>", b"%d=equals", b"$(x)%d", b"trailing %d ", b"#%d", b".hidden%d")


def acl(*entries):
    """Returns a POSIX ACL in the kernel's format: tag, permissions, id."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def access_acl(mode, uid):
    """Returns an access ACL that agrees with the mode of a file: an additional user, and a mask."""
    none = 0xffffffff
    return acl((1, mode >> 6 & 7, none), (2, 5, uid), (4, 4, none), (16, mode >> 3 & 7, none), (32, mode & 7, none))


def capability():
    """Returns security.capability, version 2: cap_net_raw, effective and permitted."""
    return struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)


class Maker:
    """Makes a tree below root."""

    def __init__(self, root, seed, acls=True, sockets=True):
        self.rng = random.Random(seed)
        self.root = os.fsencode(root)
        self.acls, self.sockets = acls, sockets
        self.count = 0
        self.directories = [b""]
        self.linkable = []
        self.all = []

    def name(self):
        self.count += 1
        if self.rng.random() < 0.05:
            return b"%d" % self.count + b"L" * (255 - len(b"%d" % self.count))
        return self.rng.choice(NAMES) % self.count

    def time(self):
        whole = self.rng.choice((0, 1, LAST_32, LAST_32 + 1, 1700000000, 1 << 32, 5000000000, 13000000000, -1, -86400))
        return whole * 10**9 + self.rng.choice((0, 1, 999999999, 500000000, self.rng.randrange(10**9)))

    def path(self, relative):
        return os.path.join(self.root, relative) if relative else self.root

    def make(self, entries=60):
        makers = [self.file] * 6 + [self.directory] * 4 + [self.symlink] * 2 + [self.device, self.fifo, self.hard_link,
                                                                               self.sparse]
        if self.sockets:
            makers.append(self.socket)
        for nth in range(entries):
            # Make one of each kind first.
            maker = makers[nth] if nth < len(makers) else self.rng.choice(makers)
            relative = os.path.join(self.rng.choice(self.directories), self.name())
            maker(relative)
        for relative in self.all + [b""]:
            self.meta(relative)
        # Set the times of directories last: changes in a directory change its times.
        for relative in sorted(self.all + [b""], key=lambda path: -path.count(b"/") - bool(path)):
            when = self.time()
            os.utime(self.path(relative), ns=(when, when), follow_symlinks=False)
        return self

    def file(self, relative):
        size = self.rng.choice((0, 1, 100, 2047, 2048, 2049, 4095, 4096, 4097, 70000, 200000))
        with open(self.path(relative), "wb") as file:
            file.write(self.rng.randbytes(size // 2) + b"text " * (size // 10) + b"x" * (size - size // 2 - size // 10 * 5))
        self.all.append(relative)
        self.linkable.append(relative)

    def sparse(self, relative):
        with open(self.path(relative), "wb") as file:
            file.truncate(self.rng.choice((1 << 20, (3 << 20) + 17)))
            for _ in range(self.rng.randrange(4)):
                os.pwrite(file.fileno(), b"data" * 3000, self.rng.randrange(250) * BLOCK)
        self.all.append(relative)
        self.linkable.append(relative)

    def directory(self, relative):
        os.mkdir(self.path(relative))
        self.directories.append(relative)
        self.all.append(relative)

    def symlink(self, relative):
        target = self.rng.choice((b"x", b"../nowhere", b"/etc/passwd", b"y" * 59, b"y" * 60, b"z" * 1000, b"a\nb \xff"))
        os.symlink(target, self.path(relative))
        self.all.append(relative)
        self.linkable.append(relative)

    def device(self, relative):
        kind = self.rng.choice((stat.S_IFCHR, stat.S_IFBLK))
        number = self.rng.choice(((1, 3), (259, 1), (8, 300), (4095, 1048575), (0, 0)))
        os.mknod(self.path(relative), kind | 0o600, os.makedev(*number))
        self.all.append(relative)
        self.linkable.append(relative)

    def fifo(self, relative):
        os.mkfifo(self.path(relative))
        self.all.append(relative)
        self.linkable.append(relative)

    def socket(self, relative):
        os.mknod(self.path(relative), stat.S_IFSOCK | 0o600)
        self.all.append(relative)

    def hard_link(self, relative):
        if self.linkable:
            os.link(self.path(self.rng.choice(self.linkable)), self.path(relative), follow_symlinks=False)

    def meta(self, relative):
        path = self.path(relative)
        kind = stat.S_IFMT(os.lstat(path).st_mode)
        owners = (0, 1, 1000, 65534, 65536, 100000, 4294967294)
        os.chown(path, self.rng.choice(owners), self.rng.choice(owners), follow_symlinks=False)
        if kind == stat.S_IFLNK:
            if self.rng.random() < 0.3:
                os.setxattr(path, "trusted.link", b"of a link", follow_symlinks=False)
            return
        mode = self.rng.choice((0, 0o4755, 0o2755, 0o1777, 0o6711, 0o7777, 0o600, 0o644, 0o755, 0o400))
        os.chmod(path, mode)
        if self.rng.random() < 0.4:
            os.setxattr(path, "trusted.name", self.rng.randbytes(20))
            os.setxattr(path, "trusted.empty", b"")
        if kind == stat.S_IFREG and self.rng.random() < 0.3:
            os.setxattr(path, "security.capability", capability())
        if kind in (stat.S_IFREG, stat.S_IFDIR) and self.rng.random() < 0.4:
            os.setxattr(path, "user.b", b"newline\nand \0 zero")
            os.setxattr(path, "user.a b", self.rng.randbytes(self.rng.choice((1, 100, 1600, 3000))))
        if self.acls and self.rng.random() < 0.3 and kind != stat.S_IFSOCK:
            os.setxattr(path, "system.posix_acl_access", access_acl(os.lstat(path).st_mode, 1234))
            if kind == stat.S_IFDIR:
                os.setxattr(path, "system.posix_acl_default", access_acl(0o750, 4000000000))


def data_blocks(path, size):
    """Returns the numbers of the 4 KiB blocks in which a file has data, not holes."""
    blocks = []
    with open(path, "rb") as file:
        at = 0
        while at < size:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                break
            end = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            first = at // BLOCK
            for block in range(first, -(-end // BLOCK)):
                blocks.append(block)
            at = end
    return blocks


def non_zero_blocks(path):
    """Returns the numbers of the 4 KiB blocks that are not all zeros."""
    with open(path, "rb") as file:
        blocks = iter(lambda: file.read(BLOCK), b"")
        return [nth for nth, block in enumerate(blocks) if any(block)]


def look(path):
    """Returns the properties of a file, except for its other names, atime and ctime."""
    status = os.lstat(path)
    names = os.listxattr(path, follow_symlinks=False)
    seen = {
        "mode": stat.filemode(status.st_mode), "uid": status.st_uid, "gid": status.st_gid,
        "mtime": status.st_mtime_ns,
        "xattrs": {name: os.getxattr(path, name, follow_symlinks=False) for name in names},
    }
    if stat.S_ISLNK(status.st_mode):
        seen["target"] = os.readlink(path)
    elif stat.S_ISREG(status.st_mode):
        with open(path, "rb") as file:
            seen["content"] = (status.st_size, hashlib.file_digest(file, "sha256").hexdigest())
    elif stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
        seen["device"] = (os.major(status.st_rdev), os.minor(status.st_rdev))
    return seen


def manifest(root):
    """Returns the properties of all files and directories of a tree, by path, without lost+found."""
    root = os.fsencode(root)
    seen, inodes = {}, {}
    for place, directories, files in os.walk(root):
        if place == root and b"lost+found" in directories:
            directories.remove(b"lost+found")
        for name in directories + files:
            path = os.path.join(place, name)
            relative = os.path.relpath(path, root)
            seen[relative] = look(path)
            inodes.setdefault(os.lstat(path).st_ino, []).append(relative)
    seen[b"."] = look(root)
    for names in inodes.values():
        for name in names:
            seen[name]["names"] = sorted(names)
    return seen
