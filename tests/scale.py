#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Computes the tables of Documentation/scale.rst and compares them with the document. Nothing is measured: this is a
model with the parameters in the document.

With an argument, prints the tables.
"""

import os
import random
import sys

from obdtest.ktap import check, equal, main, test

DOCUMENT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../Documentation/scale.rst")
MB, GB = 10**6, 10**9
# The stored size of an image in bytes; the fraction of the image that is read until its container runs; the fraction in
# layers that other images have, too.
STORED, START, COMMON = 156 * MB, 0.064, 0.8
# The bytes per second that a server sends; the seconds for which a start may wait for the network.
LINK, PATIENCE = 3 * GB, 10
NODES = (10, 1000, 100000)
# The fleet: the number of base images; of images on each base image; of starts per node; of bytes that a node keeps.
# Of all images, image n is started 1/n times as often as image 1.
BASES, IMAGES, STARTS, KEPT = 20, 10, 40, 2 * GB
SEED = 14


def amount(count):
    """Returns a number of bytes as text, with at least two digits and a unit."""
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB")):
        if count >= unit:
            value = count / unit
            return f"{value:.1f} {name}" if value < 9.95 else f"{value:.0f} {name}"
    return f"{count:.0f} B"


def cold():
    """Returns rows for nodes that start one image that none of them has: bytes and servers, for whole images and for
    what is read."""
    rows = []
    for nodes in NODES:
        whole, read = nodes * STORED, nodes * STORED * START
        servers = [max(1, -(-count // (LINK * PATIENCE))) for count in (whole, read)]
        rows.append([f"{nodes:,}", amount(whole), f"{servers[0]:.0f}", amount(read), f"{servers[1]:.0f}"])
    return rows


class Node:
    """The data that a node has locally, least recently used first. shared: images share layers; whole: layers are
    fetched entirely, not only what is read."""

    def __init__(self, shared, whole):
        self.shared, self.whole, self.kept, self.fetched = shared, whole, {}, 0

    def start(self, base, image):
        """Starts an image: fetches the part of its base image, which other images may share, and its own part."""
        share = STORED if self.whole else STORED * START
        parts = {("own", base, image): share * (1 - COMMON),
                 ("base", base, None if self.shared else image): share * COMMON}
        for part, size in parts.items():
            if part not in self.kept:
                self.fetched += size
            self.kept.pop(part, None)
            self.kept[part] = size
        while sum(self.kept.values()) > KEPT:
            del self.kept[next(iter(self.kept))]


def fleet(nodes, shared, whole, seed=SEED):
    """Returns the bytes that a fleet fetches over the network."""
    rng = random.Random(seed)
    images = [(nth % BASES, nth // BASES) for nth in range(BASES * IMAGES)]
    rng.shuffle(images)
    weights = [1 / (nth + 1) for nth in range(len(images))]
    fetched = 0
    for _ in range(nodes):
        node = Node(shared, whole)
        for base, image in rng.choices(images, weights, k=STARTS):
            node.start(base, image)
        fetched += node.fetched
    return fetched


def popular(nodes=1000):
    """Returns rows of the bytes fetched per start: with private layers, with shared layers, and the second divided by
    the first."""
    starts = nodes * STARTS
    rows = []
    for what, whole in (("whole layers", True), ("what is read", False)):
        private, shared = (fleet(nodes, shared, whole) / starts for shared in (False, True))
        rows.append([what, amount(private), amount(shared), f"{shared / private:.2f}"])
    return rows


def rows_of(first):
    """Returns the rows of the document's table whose first cell is `first`."""
    with open(DOCUMENT, encoding="utf-8") as file:
        lines = file.read().splitlines()
    start = next(nth for nth, line in enumerate(lines) if line.startswith(first + "  "))
    rows = []
    for line in lines[start:]:
        if line.startswith("==="):
            return rows
        rows.append([cell for cell in line.split("  ") if cell])
    return rows


def cells(rows):
    return [[cell.strip() for cell in row] for row in rows]


@test("one image on many nodes that don't have it: the document's table")
def one_image():
    rows = cold()
    equal(cells(rows_of(rows[0][0])), rows, "rows")


@test("many images on many nodes: the document's table, and properties that hold for any random numbers")
def many_images():
    rows = popular()
    equal(cells(rows_of(rows[0][0])), rows, "rows")
    for seed in range(5):
        private, shared = (fleet(20, shared, False, seed) for shared in (False, True))
        check(shared < private, f"seed {seed}: {shared} of {private}")
        # Each node needs at least one image.
        check(shared > 20 * STORED * START, f"seed {seed}: {shared}")
    # With a single image, sharing changes nothing.
    node = [Node(shared, True) for shared in (False, True)]
    for one in node:
        for _ in range(3):
            one.start(0, 0)
    equal([one.fetched for one in node], [STORED, STORED], "bytes of one image, started three times")


if __name__ == "__main__":
    if sys.argv[1:]:
        for table in (cold(), popular()):
            print("\n".join("  ".join(row) for row in table))
    else:
        main()
