#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""File systems on stacks that obdsetup makes and opens: every file is unchanged."""

import hashlib
import os
import shutil
import stat
import subprocess

from obdtest import image
from obdtest.files import mount, umount, work_directory
from obdtest.ktap import Skip, add, check, defer, equal, main
from obdtest.programs import OBDSETUP, close, need, need_module, obdsetup, run

KINDS = {"ext4": "32m", "btrfs": "128m", "xfs": "300m", "erofs": None, "squashfs": None}
WRAPPINGS = (["--algorithm", "lz4", "--tar"], ["--algorithm", "zstd", "--block-size", "64k"], ["--algorithm", "none"])


def make_tree(root):
    """Makes files of many sizes, links, and directories."""
    os.makedirs(f"{root}/dir/deep/deeper")
    for nth, size in enumerate((0, 1, 511, 4096, 4097, 70000, 300000)):
        with open(f"{root}/dir/file{nth}", "wb") as file:
            file.write(image.sample(size, nth))
    for nth in range(60):
        with open(f"{root}/dir/deep/small{nth}", "wb") as file:
            file.write(image.sample(50 * nth, nth))
    with open(f"{root}/sparse", "wb") as file:
        file.truncate(1 << 20)
        os.pwrite(file.fileno(), b"here", 500000)
    os.symlink("dir/file1", f"{root}/link")
    os.link(f"{root}/dir/file5", f"{root}/dir/deep/hard")
    os.chmod(f"{root}/dir/file1", 0o4711)


def change_tree(root, turn):
    """Makes the changes for a layer."""
    with open(f"{root}/dir/file3", "wb") as file:
        file.write(image.sample(5000, turn + 100))
    with open(f"{root}/dir/file6", "ab") as file:
        file.write(b"more" * turn)
    with open(f"{root}/layer{turn}", "wb") as file:
        file.write(image.sample(100000, turn + 200))
    if turn == 2:
        shutil.rmtree(f"{root}/dir/deep")
        os.unlink(f"{root}/layer1")


def manifest(root):
    """Returns the mode of each file and directory of a tree, with the content's SHA-256 or the link's target, by
    path."""
    out = {}
    for place, directories, files in os.walk(root):
        for name in directories + files:
            path = os.path.join(place, name)
            status = os.lstat(path)
            what = ""
            if stat.S_ISLNK(status.st_mode):
                what = os.readlink(path)
            elif stat.S_ISREG(status.st_mode):
                with open(path, "rb") as file:
                    what = hashlib.sha256(file.read()).hexdigest()
            out[os.path.relpath(path, root)] = (stat.filemode(status.st_mode), what)
    out.pop("lost+found", None)
    return out


def file_system(kind):
    need("obdsetup")
    if not shutil.which("mksquashfs" if kind == "squashfs" else f"mkfs.{kind}"):
        raise Skip(f"no mkfs for {kind}")
    need_module(kind)
    work = work_directory()
    tree, where, raw = f"{work}/tree", f"{work}/mnt", f"{work}/raw"
    os.mkdir(where)
    make_tree(tree)
    layers = [f"{work}/layer0.obd"]
    if KINDS[kind] is None:
        obdsetup("create", "--directory", tree, "--fs", kind, *WRAPPINGS[0], layers[0])
    else:
        layers += layers_by_mounting(kind, work, tree, where, raw, layers)
    wanted = manifest(tree)
    name = f"obdtest-{os.getpid()}-{kind}"
    obdsetup("open", name, *layers)
    defer(close, name)
    device = f"/dev/mapper/{name}"
    if kind == "ext4":
        run("e2fsck", "-fn", device)
    options = {"xfs": "ro,norecovery,nouuid", "btrfs": "ro,norecovery"}.get(kind, "ro")
    mount(device, where, options, kind)
    got = manifest(where)
    equal(sorted(got), sorted(wanted), "names")
    for path, what in wanted.items():
        equal(got[path], what, path)
    umount(where)
    # obdsetup, which reads without the kernel module, must return the same.
    obdsetup("dump", *layers, "-o", f"{work}/dump", "--sparse")
    run("cmp", device, f"{work}/dump")
    obdsetup("close", name)
    check(not os.path.exists(device), f"{device} is still there")


def layers_by_mounting(kind, work, tree, where, raw, layers):
    """Makes layers[0] and two layers with changes, by mounting the disk and writing to it. Returns the files of the
    two."""
    run("truncate", "-s", KINDS[kind], raw)
    run(f"mkfs.{kind}", "-q", raw)
    more = []
    for turn in range(3):
        if turn:
            change_tree(tree, turn)
        mount(raw, where, "loop,discard", kind)
        run("cp", "-a", f"{tree}/.", where)
        for path in sorted(set(manifest(where)) - set(manifest(tree)), reverse=True):
            path = os.path.join(where, path)
            (os.rmdir if os.path.isdir(path) and not os.path.islink(path) else os.unlink)(path)
        run("fstrim", where)
        umount(where)
        path = f"{work}/layer{turn}.obd"
        bases = [arg for layer in (layers[:1] + more)[:turn] for arg in ("--base", layer)]
        obdsetup("create", "--image", raw, *bases, *WRAPPINGS[turn], path)
        if turn:
            more.append(path)
    return more


def not_unmounted(kind, options):
    """Opens the layer of a disk that was unmounted, and that of a copy of the mounted disk, whose journal has entries.
    `open' warns about the copy and names the mount options that it needs."""
    need("obdsetup")
    if not shutil.which(f"mkfs.{kind}"):
        raise Skip(f"no mkfs for {kind}")
    need_module(kind)
    work = work_directory()
    where, raw = f"{work}/mnt", f"{work}/raw"
    os.mkdir(where)
    run("truncate", "-s", KINDS[kind], raw)
    run(f"mkfs.{kind}", "-q", raw)
    mount(raw, where, "loop", kind)
    with open(f"{where}/file", "wb") as file:
        file.write(image.sample(70000, 3))
    os.sync()
    # fsync() writes the changes of this file to the journal, which in btrfs is the log tree.
    with open(f"{where}/file", "ab") as file:
        file.write(b"more")
        file.flush()
        os.fsync(file.fileno())
    run("cp", "--sparse=always", raw, f"{work}/dirty")
    umount(where)
    name = f"obdtest-{os.getpid()}-{kind}"
    device = f"/dev/mapper/{name}"
    for disk, is_dirty in ((raw, False), (f"{work}/dirty", True)):
        obdsetup("create", "--force", "--skip-zeros", "--image", disk, f"{work}/layer")
        done = subprocess.run([OBDSETUP, "open", name, f"{work}/layer"], capture_output=True, text=True, check=True)
        defer(close, name)
        said = f"was not unmounted cleanly, and a read-only device cannot replay its journal: mount -o {options} "
        equal(said in done.stderr, is_dirty, f"open warns about {disk}: {done.stderr!r}")
        plain = subprocess.run(["mount", "-t", kind, "-o", "ro", device, where], capture_output=True, check=False)
        defer(umount, where)
        equal(plain.returncode != 0, is_dirty, f"mount -o ro of {disk} fails")
        umount(where)
        mount(device, where, options, kind)
        check(os.path.exists(f"{where}/file") or is_dirty, "the file is missing")
        umount(where)
        obdsetup("close", name)


for fs in KINDS:
    add(fs, file_system, fs)
for fs, needed in (("ext4", "ro,noload"), ("xfs", "ro,norecovery"), ("btrfs", "ro,rescue=nologreplay")):
    add(f"{fs}: open warns about a disk that was not unmounted", not_unmounted, fs, needed)

if __name__ == "__main__":
    main()
