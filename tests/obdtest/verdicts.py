# SPDX-License-Identifier: GPL-2.0
"""Malformed images with the expected results, computed once and stored in files.

The strict reader computes the expected result of each case. Then obdsetup reads the case, as a user would run it, and
its result must be the same. That takes thousands of processes, so scripts/vm.sh does it before the VM starts.
"""

import hashlib
import os
import pickle
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

from . import mutate, reader
from .ktap import Skip

_HERE = os.path.dirname(os.path.abspath(__file__))
BUILD = os.path.join(_HERE, "../../build")
_BAD_IMAGE = 3
# The field that obdsetup names, for each phrase of the kernel.
_FIELDS = {
    "Image is truncated": "size",
    "Invalid tar header": "tar header",
    "Invalid tar member size": "tar size",
    "Invalid tar pax record": "tar pax record",
    "Tar member is not a regular file": "tar typeflag",
    "Invalid ZFile header flags": "zfile header flags",
    "ZFile header digest mismatch": "zfile header digest",
    "Invalid ZFile trailer magic": "zfile trailer magic",
    "Invalid ZFile trailer flags": "zfile trailer flags",
    "ZFile trailer digest mismatch": "zfile trailer digest",
    "ZFile dictionaries are not supported": "zfile dict_size",
    "ZFile compressed index is not supported": "zfile flags",
    "Unknown ZFile algorithm": "zfile algo",
    "Invalid ZFile block size": "zfile block_size",
    "Too many ZFile index entries": "zfile index_size",
    "ZFile index size does not match the file size": "zfile index_size",
    "ZFile index out of range": "zfile index_offset",
    "ZFile index CRC mismatch": "zfile index_crc",
    "Invalid ZFile index entry": "zfile index entry",
    "ZFile blocks overlap the index": "zfile index entry",
    "Not an LSMT layer": "lsmt magic",
    "Layer is a ZFile, put a zfile device below": "lsmt magic",
    "Invalid LSMT header flags": "lsmt header flags",
    "Invalid LSMT trailer magic": "lsmt trailer magic",
    "Invalid LSMT trailer flags": "lsmt trailer flags",
    "Too many LSMT index entries": "lsmt index_size",
    "LSMT index out of range": "lsmt index_offset",
    "LSMT index entries out of order": "lsmt entry offset",
    "Invalid LSMT entry length": "lsmt entry length",
    "LSMT entry maps outside of the data": "lsmt entry moffset",
    "LSMT virtual size is too large": "lsmt virtual_size",
    "No layer has a virtual size": "lsmt virtual_size",
    "Invalid number of layers": "layers",
}


class Refused(NamedTuple):
    """The kernel refuses the table and logs this phrase. told is what obdsetup prints: field, byte, expected."""

    phrase: str
    told: tuple


class Disk(NamedTuple):
    """A device of size bytes. pieces are (sector, sectors, bytes or None), in windows (start, end)."""

    size: int
    windows: list
    pieces: list
    tail_is_corrupt: bool


class Verdict(NamedTuple):
    """A case, the size of each layer that is a ZFile (see _zfile_size), the expected result, and how the result of
    obdsetup differs from it, or None."""

    case: mutate.Case
    zfiles: tuple
    wanted: object
    quarrel: str


def told(message):
    """Returns (field, byte, expected) of a message about a fault by obdsetup or the kernel, or None."""
    special = {"image is truncated": r".*bytes wanted at byte (\d+) are", "bytes are wanted at": r".*wanted at byte (\d+)",
               "the file is empty": r"()", "a ZFile in a ZFile": None, "not an OverlayBD layer": None}
    # If obdsetup prints an explanation first, the fault follows in parentheses.
    detail = re.search(r" \(((?:zfile|lsmt|tar) [^()]*)\)$", message)
    message = detail[1] if detail else message
    for start, place in special.items():
        if start in message:
            at = (re.search(place, message, re.DOTALL)[1] or "0") if place else "0"
            return ("size", at, "the range within the blob") if place else ("lsmt magic", at, "the LSMT magic")
    found = re.search(r"(?:.*: )?(?:number of )?([a-z][a-z _]+?)(?: at byte (\d+))?: (?:not )?found.*?, expected (.*)",
                      message, re.DOTALL)
    return (found[1], found[2] or "0", found[3]) if found else None


# ---- obdsetup ----

class _Tool:
    """Runs obdsetup on the blobs of a case, in files."""

    def __init__(self, case, directory):
        self.command = ["obdsetup", "dump", "--whole-sectors"] + ["--zfile"] * (case.target == "zfile")
        paths = {}
        for blob in case.blobs:
            if blob not in paths:
                paths[blob] = f"{directory}/{len(paths)}"
                with open(paths[blob], "wb") as file:
                    file.write(blob)
        self.paths = [paths[blob] for blob in case.blobs]

    def run(self, *args):
        """Returns (status, output, message)."""
        done = subprocess.run([*self.command, *args, *self.paths], capture_output=True, timeout=60, check=False)
        return done.returncode, done.stdout, done.stderr.decode(errors="replace").strip()

    def sectors(self, start, count):
        return self.run("--offset", str(start * 512), "--length", str(count * 512))


def _quarrel_of_refusal(phrase, status, message):
    if status != _BAD_IMAGE:
        return f"obdsetup ends with {status}: {message}"
    if phrase == reader.NOT_ZFILE:
        return None if message.endswith("not a ZFile") else message
    if phrase == reader.CANNOT_READ:
        return None if re.search(r"zfile block \d+ at byte", message) else message
    field = (told(message) or [""])[0]
    return None if field.endswith(_FIELDS[phrase]) else f"obdsetup says: {message}"


def _quarrel_of_disk(disk, tool):
    small = disk.windows == [(0, -(-disk.size // 512))] or not disk.size
    if small:
        status, data, message = tool.run()
        bad = any(piece[2] is None for piece in disk.pieces)
        if status != (_BAD_IMAGE if bad else 0):
            return f"obdsetup ends with {status}: {message}"
        if bad and not re.search(r"zfile block \d+ at byte", message):
            return f"obdsetup says: {message}"
        if not bad:
            return None if data == b"".join(piece[2] for piece in disk.pieces) else "obdsetup gives other bytes"
    for start, count, wanted in disk.pieces:
        status, data, message = tool.sectors(start, count)
        if status != (_BAD_IMAGE if wanted is None else 0):
            return f"obdsetup ends with {status} at sector {start}: {message}"
        if wanted is not None and data != wanted:
            return f"obdsetup gives other bytes at sector {start}"
    return None


def judge(case):
    """Returns the verdict on a case."""
    directory = tempfile.mkdtemp(prefix="obdtest", dir="/dev/shm")
    try:
        tool = _Tool(case, directory)
        try:
            made = reader.ZfileDisk(case.blobs[0]) if case.target == "zfile" else reader.Stack(case.blobs)
        except reader.Refused as refused:
            status, _, message = tool.run()
            wanted = Refused(str(refused), told(message))
            quarrel = _quarrel_of_refusal(str(refused), status, message)
        else:
            corrupt = case.target == "lsmt" and made.tail_is_corrupt()
            wanted = Disk(made.size, made.windows(), list(made.pieces()), corrupt)
            quarrel = _quarrel_of_disk(wanted, tool)
        return Verdict(case, tuple(_zfile_size(case, blob) for blob in case.blobs), wanted, quarrel)
    finally:
        shutil.rmtree(directory)


def _zfile_size(case, blob):
    """Returns the size of the ZFile in a blob; -1 if it is refused, None if there is none."""
    try:
        inner = reader.unwrap(blob)
    except reader.Refused:
        inner = blob
    if case.target == "lsmt" and not reader.Zfile.is_zfile(inner):
        return None
    try:
        return reader.Zfile(inner).size
    except reader.Refused:
        return -1


# ---- the files ----

def _key():
    """Returns a hash of everything that the verdicts depend on."""
    key = hashlib.sha256()
    for name in ("image.py", "mutate.py", "reader.py", "verdicts.py"):
        with open(f"{_HERE}/{name}", "rb") as file:
            key.update(file.read())
    tool = os.stat(_obdsetup())
    key.update(f"{tool.st_size} {tool.st_mtime_ns}".encode())
    return key.hexdigest()[:12]


def _obdsetup():
    path = shutil.which("obdsetup")
    if not path:
        raise Skip("there is no obdsetup in PATH")
    return path


class _Packed:
    """The verdicts of a kind. Blobs are stored as differences from those of the first case; pieces with the same data
    as the first readable disk are left out."""

    def __init__(self, verdicts):
        self.blobs = verdicts[0].case.blobs
        whole = [v.wanted.pieces[0][2] for v in verdicts if isinstance(v.wanted, Disk) and len(v.wanted.pieces) == 1]
        self.content = next(filter(None, whole), b"")
        self.rows = [v._replace(case=v.case._replace(blobs=self._shrink(v.case.blobs)),
                                wanted=self._each_piece(v.wanted, self._fold)) for v in verdicts]

    def verdicts(self):
        """Returns the unpacked verdicts."""
        return [v._replace(case=v.case._replace(blobs=self._grow(v.case.blobs)),
                           wanted=self._each_piece(v.wanted, self._unfold)) for v in self.rows]

    def _shrink(self, blobs):
        if len(blobs) != len(self.blobs):
            return blobs
        return tuple((len(blob), [(at, blob[at:at + 512]) for at in range(0, len(blob), 512)
                                  if blob[at:at + 512] != base[at:at + 512]])
                     for blob, base in zip(blobs, self.blobs))

    def _grow(self, blobs):
        if len(blobs) != len(self.blobs):
            return blobs
        return tuple(map(self._patched, blobs, self.blobs))

    @staticmethod
    def _patched(packed, base):
        length, sectors = packed
        blob = bytearray(base[:length])
        for at, sector in sectors:
            blob[at:at + 512] = sector
        return bytes(blob)

    @staticmethod
    def _each_piece(wanted, function):
        if isinstance(wanted, Refused):
            return wanted
        return wanted._replace(pieces=[(*piece[:2], function(*piece)) for piece in wanted.pieces])

    def _fold(self, start, count, data):
        return "" if data is not None and data == self.content[start * 512:(start + count) * 512] else data

    def _unfold(self, start, count, data):
        return self.content[start * 512:(start + count) * 512] if data == "" else data


def kinds():
    """Returns the kinds of images. Computes the verdicts if there are none for the present key."""
    directory = f"{BUILD}/verdicts-{_key()}"
    if not os.path.exists(directory):
        _make(directory)
    with open(f"{directory}/kinds", encoding="ascii") as file:
        return file.read().split()


def load(kind):
    """Returns the verdicts of a kind."""
    with open(f"{BUILD}/verdicts-{_key()}/{kind}", "rb") as file:
        return pickle.load(file).verdicts()


def _make(directory):
    os.makedirs(BUILD, exist_ok=True)
    for old in os.listdir(BUILD):
        if old.startswith("verdicts-"):
            shutil.rmtree(f"{BUILD}/{old}", ignore_errors=True)
    new, names = tempfile.mkdtemp(prefix="verdicts-new-", dir=BUILD), []
    os.chmod(new, 0o755)
    with ProcessPoolExecutor() as pool:
        for kind, cases in mutate.cases():
            packed = _Packed(list(pool.map(judge, cases, chunksize=16)))
            with open(f"{new}/{kind}", "wb") as file:
                pickle.dump(packed, file)
            names.append(kind)
    with open(f"{new}/kinds", "w", encoding="ascii") as file:
        file.write("\n".join(names))
    os.rename(new, directory)
