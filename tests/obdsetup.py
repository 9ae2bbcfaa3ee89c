#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""The module reads the layers that obdsetup writes. open sets up stacks; close removes all their devices."""

import json
import os
import random
import subprocess
import time

from obdtest import dm, golden, image, stack
from obdtest.disk import Disk, same_bytes, verify
from obdtest.files import read, work_directory, write
from obdtest.ktap import add, check, defer, equal, main, test
from obdtest.programs import OBDSETUP, close, obdsetup, run

SIZE = 300 << 10
DATA = image.sample(SIZE - 8192, 81) + bytes(8192)


def open_device(name, *layers):
    """Opens a stack. Returns the path of its disk, /dev/dm-N."""
    obdsetup("open", name, *layers)
    defer(close, name)
    return os.path.realpath(f"/dev/mapper/{name}")


def wrapping(algorithm, block, crc, tar):
    """Makes a layer with these options, and reads it with the tests' own reader and through the module."""
    work = work_directory()
    raw, layer = write(f"{work}/raw", DATA), f"{work}/layer"
    args = ["--algorithm", algorithm] + (["--block-size", block] if block else [])
    args += ([] if crc else ["--no-crc"]) + (["--tar"] if tar else [])
    obdsetup("create", "--image", raw, *args, layer)
    blob = read(layer)
    same_bytes(image.flatten([stack.layer(blob)]), DATA, "the tests' own reader")
    verify(stack.open_stack(blob), DATA, rounds=16)


for algorithm in ("lz4", "zstd"):
    for size in ("4k", "8k", "16k", "32k", "64k"):
        for crc in (True, False):
            add(f"create: {algorithm}, {size}, {'CRC' if crc else 'no CRC'}, {'tar' if crc else 'no tar'}",
                wrapping, algorithm, size, crc, crc)
add("create: no compression", wrapping, "none", None, True, False)
add("create: no compression, tar", wrapping, "none", None, True, True)


@test("create --base: the difference to other layers")
def difference():
    work = work_directory()
    layers, content = [], bytearray(DATA)
    rng = random.Random(82)
    for nth, kind in enumerate((["--algorithm", "lz4"], ["--algorithm", "zstd", "--tar"], ["--algorithm", "none"])):
        if nth:
            for _ in range(6):
                at = rng.randrange(60) * 4096
                content[at:at + 4096] = rng.choice((bytes(4096), rng.randbytes(4096)))
        raw = write(f"{work}/raw", content)
        bases = [arg for layer in layers for arg in ("--base", layer)]
        layer = f"{work}/layer{nth}"
        obdsetup("create", "--image", raw, *bases, *kind, layer)
        layers.append(layer)
    blobs = [read(layer) for layer in layers]
    check(len(blobs[1]) < len(blobs[0]) and len(blobs[2]) < 60000, f"sizes: {[len(blob) for blob in blobs]}")
    verify(stack.open_stack(*blobs), bytes(content), rounds=40)
    obdsetup("dump", *layers, "-o", f"{work}/dump")
    same_bytes(read(f"{work}/dump"), bytes(content), "dump")


@test("commit: compresses and wraps a layer, and undoes that")
def commit():
    work = work_directory()
    layer = image.lsmt(SIZE, [(0, DATA[:100 * 512]), (300, 40), (350, DATA[20480:40960])])
    bare = write(f"{work}/bare", layer)
    obdsetup("commit", "--algorithm", "zstd", "--block-size", "16k", "--tar", bare, f"{work}/wrapped")
    obdsetup("commit", "--algorithm", "none", f"{work}/wrapped", f"{work}/again")
    wanted = image.flatten([image.Lsmt(layer)])
    for path in ("bare", "wrapped", "again"):
        blob = read(f"{work}/{path}")
        same_bytes(image.flatten([stack.layer(blob)]), wanted, path)
        device = stack.open_stack(blob)
        verify(device, wanted, rounds=10)


@test("merge: replaces two of three layers")
def merge():
    work = work_directory()
    raws = [image.lsmt(SIZE, [(0, DATA[:100 * 512])]), image.lsmt(SIZE, [(10, 30), (200, DATA[20480:40960])]),
            image.lsmt(SIZE, [(20, DATA[:2560])])]
    layers = [write(f"{work}/layer{nth}", raw) for nth, raw in enumerate(raws)]
    wanted = image.flatten([image.Lsmt(raw) for raw in raws])
    obdsetup("merge", "-o", f"{work}/upper", *layers[1:])
    upper = read(f"{work}/upper")
    same_bytes(image.flatten([stack.layer(raws[0]), stack.layer(upper)]), wanted, "merged")
    verify(stack.open_stack(raws[0], upper), wanted, rounds=10)


@test("open, status, table, close: a stack of three files")
def open_close():
    work = work_directory()
    raws = [image.zfile(image.lsmt(SIZE, [(0, DATA[:200 * 512])])),
            image.tar(image.zfile(image.lsmt(SIZE, [(10, 30), (500, DATA[:51200])]), image.ZSTD, 65536)),
            image.lsmt(SIZE, [(100, DATA[4096:8192])])]
    layers = [write(f"{work}/layer{nth}", raw) for nth, raw in enumerate(raws)]
    wanted = image.flatten([stack.layer(raw) for raw in raws])
    name = f"obdtest-{os.getpid()}"
    path = open_device(name, *layers)
    verify(path, wanted, rounds=60)
    table = run("dmsetup", "table", name).split()
    equal(table[:4], ["0", str(SIZE // 512), "lsmt", "3"], "table")
    state = json.loads(obdsetup("status", "--json", name)[0])
    check(state, "`status --json' reports nothing")
    files = {file["file"] for device in state["devices"] for target in device["targets"] for file in target["files"]}
    check(files >= {os.path.realpath(layer) for layer in layers}, f"files behind loop devices: {files}")
    obdsetup("status", name)
    obdsetup("open", name, *layers, status=5)
    verify(path, wanted, rounds=5)
    obdsetup("close", name)
    names = run("dmsetup", "ls")
    check(name not in names, f"dmsetup ls: {names!r}")


@test("close is refused while the disk is open; close --deferred removes it after its last user")
def close_busy():
    work = work_directory()
    layer = write(f"{work}/layer", image.zfile(image.lsmt(SIZE, [(0, DATA[:51200])])))
    name = f"obdtest-{os.getpid()}"
    disk = Disk(open_device(name, layer))
    obdsetup("close", name, status=5)
    same_bytes(disk.read(0, 51200), DATA[:51200], "content")
    obdsetup("close", "--deferred", name)
    disk.close()
    for _ in range(50):
        names = run("dmsetup", "ls")
        if name not in names:
            break
        time.sleep(0.05)
    check(name not in names, f"dmsetup ls: {names!r}")


@test("open of a broken layer fails with status 3 and leaves nothing behind")
def open_broken():
    work = work_directory()
    good = write(f"{work}/good", image.zfile(image.lsmt(SIZE, [(0, DATA[:51200])])))
    broken = bytearray(read(good))
    broken[len(broken) - 530] ^= 1
    bad = write(f"{work}/bad", broken)
    obdsetup("open", f"obdtest-{os.getpid()}", good, bad, status=3)
    obdsetup("open", f"obdtest-{os.getpid()}", good, f"{work}/none", status=4)
    obdsetup("verify", good)
    obdsetup("verify", bad, status=3)
    check(not [name for name in os.listdir("/sys/block") if name.startswith("dm-")], "a device is left")


@test("open of block devices with their blobs' sizes")
def open_devices():
    raws = [image.zfile(image.lsmt(SIZE, [(0, DATA[:102400])])), image.lsmt(SIZE, [(3, 50)])]
    loops = [dm.Loop(raw) for raw in raws]
    name = f"obdtest-{os.getpid()}"
    path = open_device(name, *[f"{loop.path}:{len(raw)}" for loop, raw in zip(loops, raws)])
    verify(path, image.flatten([stack.layer(raw) for raw in raws]), rounds=20)
    obdsetup("close", name)


@test("open of a config.v1.json")
def open_config():
    work = work_directory()
    raws = [image.zfile(image.lsmt(SIZE, [(0, DATA[:102400])])), image.lsmt(SIZE, [(3, 50)])]
    os.mkdir(f"{work}/1")
    write(f"{work}/base.obd", raws[0])
    write(f"{work}/1/overlaybd.commit", raws[1])
    lowers = [{"file": "base.obd"}, {"digest": "sha256:12", "size": 7, "dir": f"{work}/1"}]
    config = write(f"{work}/config.v1.json", json.dumps({"repoBlobUrl": "", "lowers": lowers}).encode())
    name = f"obdtest-{os.getpid()}"
    verify(open_device(name, config), image.flatten([stack.layer(raw) for raw in raws]), rounds=20)
    obdsetup("close", name)
    lowers[0]["file"] = "none"
    write(config, json.dumps({"lowers": lowers}).encode())
    obdsetup("open", name, config, status=4)


@test("open --zfile: the content of a ZFile")
def open_zfile():
    work = work_directory()
    data = DATA[:100001]
    path = write(f"{work}/data.zf", image.zfile(data, image.ZSTD, overwrite=False))
    name = f"obdtest-{os.getpid()}"
    verify(open_device(name, "--zfile", path), data + bytes(-len(data) % 512), rounds=20)
    obdsetup("close", name)


@test("open, status, list and close, whatever PATH is")
def paths():
    work = work_directory()
    layer = write(f"{work}/layer.obd", image.zfile(image.lsmt(SIZE, [(0, DATA)])))
    name = f"obdtest-{os.getpid()}"
    # A dmsetup in a relative directory of PATH must not be run.
    os.mkdir(f"{work}/bin")
    os.symlink("/bin/false", f"{work}/bin/dmsetup")
    for path in ("/bin", "", None, "bin:.", f"{layer}:/nonexistent"):
        env = {key: value for key, value in os.environ.items() if key != "PATH"}
        if path is not None:
            env["PATH"] = path

        def with_path(*args, env=env, path=path):
            out, err = obdsetup(*args, env=env, cwd=work)
            equal(err, "", f"PATH={path}: what obdsetup {' '.join(args)} says")
            return out

        defer(close, name)
        with_path("open", name, layer)
        same_bytes(read(f"/dev/mapper/{name}"), DATA, f"PATH={path}: content")
        check("health: ok" in with_path("status", name), "status does not say `health: ok'")
        check(name in with_path("list"), "list does not show the stack")
        with_path("close", name)
        check(not os.path.exists(f"/dev/mapper/{name}"), "the disk is still there")


@test("open and dump read the same, on golden stacks")
def golden_stacks():
    rows = golden.rows("MANIFEST.tsv")
    for stack_name in ("stack/s2", "stack/s3", "stack/v-grow", "stack/t-all"):
        if stack_name not in rows:
            golden.load(stack_name)
        layers = [f"{golden.ROOT}/{layer}" for layer in rows[stack_name]["layers_lowest_first"].split(",")]
        name = f"obdtest-{os.getpid()}"
        path = open_device(name, *layers)
        done = subprocess.run(f"{OBDSETUP} dump {' '.join(layers)} | cmp - {path}", shell=True, capture_output=True,
                              text=True, check=False)
        equal(done.returncode, 0, f"{stack_name}: cmp ({done.stdout.strip()}{done.stderr.strip()})")
        obdsetup("close", name)


if __name__ == "__main__":
    main()
