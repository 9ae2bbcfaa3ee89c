#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""obdsetup: layers that belong together, one loop device for each file, and files that are in use."""

import collections
import ctypes
import fcntl
import hashlib
import json
import os
import struct

from obdtest import image, left
from obdtest.disk import verify
from obdtest.files import read, work_directory, write
from obdtest.ktap import Skip, check, defer, equal, main, test
from obdtest.left import loops
from obdtest.programs import close, obdsetup, quietly, run

MIB = 1 << 20
SIZE = 4 << 20
NAME = f"obdtest-{os.getpid()}"
# A directory on the host, over 9p, which has no rename that fails if the new name exists.
SHARED = "/run/vm"


def devices():
    """Returns the number of obdsetup's devices of each type."""
    return collections.Counter(uuid.split("-")[1] for uuid in left.devices().values())


def make_stack(work, count):
    """Makes layers with several options. Each changes an incompressible part of the disk. Returns the files of the
    layers and the content of the disk."""
    wrappings = ([], ["--tar"], ["--algorithm", "zstd", "--block-size", "64k"], ["--algorithm", "none"],
                 ["--algorithm", "zstd", "--tar"], ["--no-crc"])
    content, layers = bytearray(image.sample(SIZE, 91)), []
    for nth in range(count):
        content[nth << 16:(nth << 16) + 5000] = os.urandom(5000)
        bases = [arg for layer in layers for arg in ("--base", layer)]
        layers.append(f"{work}/layer{nth}")
        equal(obdsetup("create", *bases, "--image", write(f"{work}/raw", content), *wrappings[nth % len(wrappings)],
                       layers[-1])[1], "", "create: standard error")
    return layers, bytes(content)


@test("open of N layers made by obdsetup: N loop devices, and one device for each layer")
def one_loop_each():
    work = work_directory()
    layers, content = make_stack(work, 12)
    before = loops()
    obdsetup("open", NAME, *layers)
    defer(close, NAME)
    equal(len(set(loops()) - set(before)), len(layers), "loop devices")
    equal(devices(), {"LSMT": 1, "LAYER": 10, "BLOB": 2}, "devices")
    verify(f"/dev/mapper/{NAME}", content, rounds=30)
    obdsetup("close", NAME)
    equal((sorted(loops()), devices()), (sorted(before), {}), "what is left")


@test("open: a wrong stack is refused and leaves no devices; --ignore-identity opens it")
def wrong_stack():
    work = work_directory()
    (first, second, third), content = make_stack(work, 3)
    before = loops()
    for layers in ((second, first, third), (first, third), (second, third), (first, second, second, third)):
        said = obdsetup("open", NAME, *layers, status=3)[1]
        check("--ignore-identity" in said, said)
        equal((loops(), devices()), (before, {}), "what is left")
    said = obdsetup("open", "--ignore-identity", NAME, first, third)[1]
    defer(close, NAME)
    check("warning: " in said and "a layer is missing" in said, said)
    obdsetup("close", NAME)
    obdsetup("open", NAME, first, second, third)
    verify(f"/dev/mapper/{NAME}", content, rounds=10)
    obdsetup("close", NAME)


@test("create and convert: a disk that is mounted read-write or open for writing is refused")
def mounted_disk():
    work = work_directory()
    raw, mnt = f"{work}/raw", f"{work}/mnt"
    os.mkdir(mnt)
    run("truncate", "--size=8M", raw)
    run("mkfs.ext4", "-q", raw)
    obdsetup("create", "--image", raw, f"{work}/before")
    loop = run("losetup", "--find", "--show", raw).strip()
    defer(quietly, "losetup", "--detach", loop)
    # The disk isn't in use.
    obdsetup("create", "--image", raw, f"{work}/idle")
    run("mount", loop, mnt)
    defer(quietly, "umount", mnt)
    write(f"{mnt}/file", b"content")
    for command in ("create", "--image", raw), ("create", "--image", loop), ("convert", "--from", "raw", raw), \
            ("convert", "--from", "raw", loop):
        said = obdsetup(*command, f"{work}/out", status=5)[1]
        check(loop in said and ("mounted read-write" in said or "can be written to" in said), said)
        check("--allow-in-use" in said and not os.path.exists(f"{work}/out"), said)
    obdsetup("create", "--allow-in-use", "--image", loop, f"{work}/out")
    # A disk that is mounted read-only doesn't change.
    run("umount", mnt)
    run("mount", "-o", "ro", loop, mnt)
    obdsetup("create", "--force", "--skip-zeros", "--image", raw, f"{work}/out")
    obdsetup("create", "--force", "--skip-zeros", "--image", loop, f"{work}/out2")
    run("umount", mnt)
    run("cmp", f"{work}/out", f"{work}/out2")
    # A process has the device open for writing.
    with open(loop, "r+b"):
        said = obdsetup("create", "--force", "--image", loop, f"{work}/out", status=5)[1]
        check(f"process {os.getpid()}" in said, said)
        obdsetup("create", "--force", "--image", raw, f"{work}/out", status=5)
    obdsetup("create", "--force", "--image", loop, f"{work}/out")


@test("dump and export: a mounted device is not overwritten")
def mounted_output():
    work = work_directory()
    mnt, layer = f"{work}/mnt", make_stack(work, 1)[0][0]
    os.mkdir(mnt)
    run("truncate", "--size=8M", f"{work}/other")
    run("mkfs.ext4", "-q", f"{work}/other")
    loop = run("losetup", "--find", "--show", f"{work}/other").strip()
    defer(quietly, "losetup", "--detach", loop)
    for options in ("rw", "ro"):
        run("mount", "-o", options, loop, mnt)
        defer(quietly, "umount", mnt)
        before = hashlib.sha256(read(loop)).digest()
        for command in ("dump", "export"):
            said = obdsetup(command, "--force", "-o", loop, layer, status=5)[1]
            check(f"{loop}: cannot be overwritten: it is mounted on {mnt}: unmount it first" in said, said)
            if options == "ro":
                equal(hashlib.sha256(read(loop)).digest(), before, "the device")
        run("umount", mnt)
    # A mapped device is on the loop device.
    run("dmsetup", "create", f"{NAME}-over", "--readonly", "--table", f"0 8 linear {loop} 0")
    defer(quietly, "dmsetup", "remove", f"{NAME}-over")
    said = obdsetup("dump", "--force", "-o", loop, layer, status=5)[1]
    check("it is in use, as a part of another device" in said, said)
    run("dmsetup", "remove", f"{NAME}-over")
    obdsetup("dump", "--force", "-o", loop, layer)
    check(hashlib.sha256(read(loop)).digest() != before, "nothing was written")


@test("open: a layer on a device that is mounted is refused")
def mounted_layer():
    # A file that is both a layer and a btrfs: a btrfs uses no bytes before 65536, and the layer's index and trailer are
    # after the end of the btrfs.
    work = work_directory()
    mnt, size = f"{work}/mnt", 128 << 20
    os.mkdir(mnt)
    with open(f"{work}/raw", "wb") as file:
        for _ in range(127):
            file.write(os.urandom(1 << 20))
        file.write(os.urandom((1 << 20) - 4096))
    layer = f"{work}/layer"
    obdsetup("create", "--algorithm", "none", "--image", f"{work}/raw", layer)
    os.truncate(f"{work}/raw", 0)
    os.truncate(f"{work}/raw", size)
    run("mkfs.btrfs", "-q", f"{work}/raw")
    run("dd", f"if={work}/raw", f"of={layer}", "bs=64k", "skip=1", "seek=1", "conv=notrunc")
    os.unlink(f"{work}/raw")
    loop = run("losetup", "--read-only", "--find", "--show", layer).strip()
    defer(quietly, "losetup", "--detach", loop)
    obdsetup("open", NAME, loop)
    obdsetup("close", NAME)
    run("mount", "-t", "btrfs", "-o", "ro", loop, mnt)
    defer(quietly, "umount", mnt)
    said = obdsetup("open", NAME, loop, status=5)[1]
    check(f"is mounted on {mnt}: unmount it" in said, said)
    equal(devices(), {}, "devices")
    run("umount", mnt)
    obdsetup("open", NAME, loop)
    obdsetup("close", NAME)


# linux/blkpg.h
BLKPG = 0x1269
ADD_PARTITION, DELETE_PARTITION = 1, 2


def change_partition(disk, what, number, start=0, length=0):
    """Adds a partition to a disk that has no partition table, or deletes it. start and length are in bytes."""
    partition = ctypes.create_string_buffer(struct.pack("=qqi64s64sxxxx", start, length, number, b"", b""))
    with open(disk, "rb") as file:
        fcntl.ioctl(file, BLKPG, struct.pack("@iiiP", what, 0, len(partition), ctypes.addressof(partition)))


@test("open: a layer on a disk with a mapped device over a partition, or on a partition of such a disk, is refused")
def layer_of_other_parts():
    work = work_directory()
    layers, content = make_stack(work, 1)
    # A layer at the start of the disk, and one in its second partition.
    disk, size = f"{work}/disk", -(-os.path.getsize(layers[0]) // MIB) * MIB
    with open(disk, "wb") as file:
        file.write(read(layers[0]))
        file.seek(size)
        file.write(read(layers[0]))
        file.truncate(2 * size)
    length = os.path.getsize(layers[0])
    loop = run("losetup", "--partscan", "--read-only", "--find", "--show", disk).strip()
    defer(quietly, "losetup", "--detach", loop)
    # There is no partition table, which would overwrite the layer.
    for number, start, end in ((1, 4096, size), (2, size, 2 * size)):
        change_partition(loop, ADD_PARTITION, number, start, end - start)
        defer(change_partition, loop, DELETE_PARTITION, number)
    whole, first, second = f"{loop}:size={length}", f"{loop}p1", f"{loop}p2:size={length}"
    over = f"{NAME}-over"

    def refused(layer):
        said = obdsetup("open", NAME, layer, status=5)[1]
        check(f"is in use by device {over}: close that first" in said, said)
        equal(devices(), {}, "devices")

    run("dmsetup", "create", over, "--readonly", "--table", f"0 8 linear {first} 0")
    defer(quietly, "dmsetup", "remove", over)
    refused(whole)
    # Another partition may be used at the same time.
    obdsetup("open", NAME, second)
    verify(f"/dev/mapper/{NAME}", content, rounds=5)
    obdsetup("close", NAME)
    run("dmsetup", "remove", over)
    run("dmsetup", "create", over, "--readonly", "--table", f"0 8 linear {loop} 0")
    refused(second)
    run("dmsetup", "remove", over)
    obdsetup("open", NAME, whole)
    obdsetup("close", NAME)


@test("open: a layer that is open for writing is refused")
def written_layer():
    work = work_directory()
    layers, content = make_stack(work, 2)
    with open(layers[1], "r+b"):
        said = obdsetup("open", NAME, *layers, status=5)[1]
        check(f"process {os.getpid()}" in said and layers[1] in said, said)
        equal(devices(), {}, "devices")
        obdsetup("open", "--allow-in-use", NAME, *layers)
        defer(close, NAME)
    verify(f"/dev/mapper/{NAME}", content, rounds=5)
    # Opening layers that are open already only reads them.
    obdsetup("open", f"{NAME}-x", *layers)
    obdsetup("close", f"{NAME}-x")
    obdsetup("close", NAME)


def layout(work, layer):
    """Makes an OCI image layout of one layer."""
    def blob(content):
        digest = hashlib.sha256(content).hexdigest()
        write(f"{work}/layout/blobs/sha256/{digest}", content)
        return {"digest": f"sha256:{digest}", "size": len(content)}
    os.makedirs(f"{work}/layout/blobs/sha256")
    manifest = json.dumps({"schemaVersion": 2, "layers": [blob(layer)]}).encode()
    write(f"{work}/layout/index.json", json.dumps({"manifests": [blob(manifest)]}).encode())
    write(f"{work}/layout/oci-layout", b'{"imageLayoutVersion": "1.0.0"}')
    return f"{work}/layout"


@test("9p: files and directories are created, and replace nothing without --force")
def network_file_system():
    if not os.path.ismount(SHARED):
        raise Skip(f"{SHARED} is not a 9p file system")
    work, place = work_directory(), work_directory(SHARED)
    raw = write(f"{work}/raw", image.sample(SIZE, 92))
    obdsetup("create", "--image", raw, f"{place}/layer")
    obdsetup("create", "--image", raw, f"{place}/layer", status=5)
    os.chmod(f"{place}/layer", 0o600)
    obdsetup("create", "--force", "--image", raw, f"{place}/layer")
    equal(os.stat(f"{place}/layer").st_mode & 0o777, 0o600, "mode")
    obdsetup("export", "--output", f"{place}/back", f"{place}/layer")
    run("cmp", raw, f"{place}/back")
    with open(f"{place}/layer", "rb") as file:
        source = layout(work, file.read())
    obdsetup("convert", source, f"{place}/app")
    equal(sorted(os.listdir(f"{place}/app")), ["config.v1.json", "layer0.obd"], "files")
    obdsetup("verify", f"{place}/app/config.v1.json")
    obdsetup("convert", source, f"{place}/app", status=5)
    os.mkdir(f"{place}/empty")
    obdsetup("convert", source, f"{place}/empty", status=5)
    equal(sorted(os.listdir(place)), ["app", "back", "empty", "layer"], "what is left")


if __name__ == "__main__":
    main()
