# SPDX-License-Identifier: GPL-2.0
"""The golden images: made by upstream's tools, stored outside of the repository."""

import csv
import os

from .ktap import Skip

_PLACES = [os.environ.get("OBD_GOLDENS"), "/mnt/goldens"]
ROOT = next((place for place in _PLACES if place and os.path.exists(f"{place}/MANIFEST.tsv")), None)

# The names of all golden images, to report missing ones.
with open(f"{os.path.dirname(__file__)}/golden.names", encoding="ascii") as _file:
    NAMES = [name.strip() for name in _file if not name.startswith("#")]


def rows(name):
    """Returns the rows of a table of the golden images, by their first column; {} without golden images."""
    if not ROOT:
        return {}
    with open(f"{ROOT}/{name}", encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t")
        return {row[reader.fieldnames[0]]: row for row in reader}


def load(name):
    """Returns the bytes of an image."""
    if not ROOT:
        raise Skip("no golden images, see OBD_GOLDENS")
    try:
        with open(f"{ROOT}/{name}", "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise Skip(f"no golden image {name}") from None
