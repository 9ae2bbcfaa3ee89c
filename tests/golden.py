#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Every golden image and stack has the content that upstream's tools have recorded for it."""

import bisect
import errno
import hashlib
import random

from obdtest import dm, golden, image, stack
from obdtest.disk import Disk, fails_with, verify, verify_sha256
from obdtest.ktap import add, alone, check, equal, main, same_bytes

# Disks with more bytes than WHOLE take too long to read: only about PARTS bytes of them are compared.
WHOLE = 64 << 20
PARTS = 32 << 20

MANIFEST = golden.rows("MANIFEST.tsv")


def open_row(row):
    """Returns a device with the image of a row of the manifest."""
    raws = [golden.load(name) for name in row["layers_lowest_first"].split(",")]
    size = int(row["virtual_size"])
    if row["kind"] == "zfile":
        return dm.zfile(dm.Loop(raws[0]), len(raws[0]), size)
    return dm.lsmt(size, *map(stack.open_layer, raws))


def golden_image(name):
    row = MANIFEST.get(name) or golden.load(name)
    size = int(row["virtual_size"])
    if not size:
        # Device-mapper has no devices without sectors.
        fails_with(errno.EINVAL, open_row, row)
        return
    device = open_row(row)
    if size > WHOLE:
        check_sparse(device, row)
    else:
        verify(device, verify_sha256(device, row["sha256_raw"], size), rounds=24, whole=False)


def golden_layers():
    """Tests layers of stacks, each as a disk of its own. Of the many small layers of stack/deep, tests every 25th."""
    rows = [row for row in MANIFEST.values() if row["kind"] == "layer"]
    deep = [row for row in rows if row["path"].startswith("stack/deep/")]
    rows = [row for row in rows if row not in deep] + deep[::25]
    if not rows:
        golden.load("stack/s3-l0.obd")
    for row in rows:
        try:
            alone(golden_layer, row)
        except Exception as error:
            error.args = (f"{row['path']}: {error}",)
            raise


def golden_layer(row):
    size = int(row["virtual_size"])
    if size > WHOLE:
        check_sparse(open_row(row), row)
    else:
        verify_sha256(open_row(row), row["sha256_raw"], size)


def check_sparse(device, row):
    """Compares parts of a large disk with what the tests' own reader returns: segments with data, random sectors, and
    the sectors after segments."""
    layers = [stack.layer(golden.load(name)) for name in row["layers_lowest_first"].split(",")]
    merged = image.merge(layers)
    disk = Disk(device)
    equal(disk.size, int(row["virtual_size"]), "size")
    rng = random.Random(1)
    mapped = [extent for extent in merged if extent[3] is not None]
    budget = PARTS
    for sector, length, layer, moffset in rng.sample(mapped, len(mapped)):
        length = min(length, 2048)
        budget -= length * 512
        if budget < 0:
            break
        same_bytes(disk.read(sector * 512, length * 512), layer.read(moffset * 512, length * 512),
                   f"{length} sectors from {sector}")
    starts = [extent[0] for extent in merged]
    last = disk.size // 512 - 1
    places = [rng.randrange(last) for _ in range(100)]
    places += [extent[0] + extent[1] for extent in rng.sample(merged, min(100, len(merged)))]
    for sector in places + [last]:
        if sector > last:
            continue
        at = bisect.bisect_right(starts, sector) - 1
        wanted = bytes(512)
        if at >= 0:
            start, length, layer, moffset = merged[at]
            if moffset is not None and sector < start + length:
                wanted = layer.read((moffset + sector - start) * 512, 512)
        same_bytes(disk.read(sector * 512, 512), wanted, f"sector {sector}")


def probes():
    """Reads a disk of 4 TiB on both sides of 2 TiB."""
    raw = golden.load("special/big-4t.lsmt")
    device = stack.open_stack(raw)
    disk = Disk(device)
    equal(disk.size, 4 << 40, "size")
    for offset, row in golden.rows("special/big-4t.probes.tsv").items():
        data = disk.read(int(offset), int(row["length"]))
        equal(hashlib.sha256(data).hexdigest(), row["sha256_wanted"], f"sha256 at {offset}")


def refused(name, phrase):
    row = MANIFEST.get(name) or golden.load(name)
    layers = row["layers_lowest_first"].split("@")[0] or name
    names = layers.split(",")
    # The number of layers is checked before any layer is read.
    opened = [stack.open_layer(golden.load(layer)) for layer in names[:1]] * len(names)
    log = dm.KernelLog()
    fails_with(errno.EINVAL, dm.lsmt, int(row["virtual_size"]), *opened)
    lines = "\n".join(log.lines())
    check(f"lsmt: {phrase}" in lines, f"the kernel log has {lines!r}, wanted: {phrase}")


REFUSED = {
    "stack/s256": "Invalid number of layers",
    "special/idx-1000001.obd": "Too many LSMT index entries",
    # TurboOCI layers: a part of their data is in another file.
    "turbo/warp-plain.obd": "LSMT entry maps outside of the data",
    "turbo/warp-lz4.obd": "LSMT entry maps outside of the data",
    "turbo/cli-warp.obd": "LSMT entry maps outside of the data",
}

for image_name in golden.NAMES:
    if image_name.startswith("malformed/"):
        continue
    if image_name in REFUSED:
        add(f"{image_name} is refused", refused, image_name, REFUSED[image_name])
    elif image_name == "special/big-4t.lsmt":
        add(f"{image_name}, probes on both sides of 2 TiB", probes)
    else:
        add(image_name, golden_image, image_name, alike=True)
add("layers of stack/*, each as a disk", golden_layers)

if __name__ == "__main__":
    main()
