# SPDX-License-Identifier: GPL-2.0
"""Makes devices from blobs, as obdsetup open does."""

from . import dm, image


def layer(raw):
    """Returns the layer in a blob, to read it in memory."""
    inner = image.unwrap(raw)
    return image.Lsmt(image.Zfile(inner) if inner[:24] == image.MAGIC else inner)


def open_layer(raw, **options):
    """Returns (device, bytes) of a blob, as dm.lsmt() takes them. The device is a zfile device if the blob is a
    ZFile."""
    loop = dm.Loop(raw, **options)
    inner = image.unwrap(raw)
    if inner[:24] != image.MAGIC:
        return loop, len(raw)
    size = image.Zfile(inner).size
    return dm.zfile(loop, len(raw), size), size


def open_stack(*raws, **options):
    """Returns an lsmt device on layer blobs, lowest first."""
    size = [layer(raw).size for raw in raws if layer(raw).size][-1]
    return dm.lsmt(size, *[open_layer(raw, **options) for raw in raws])
