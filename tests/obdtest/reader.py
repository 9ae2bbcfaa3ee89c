# SPDX-License-Identifier: GPL-2.0
"""A strict reader of blobs. It tells which images must be refused, and with which phrase, which blocks are corrupt, and
what the data is.

It implements Documentation/formats and shares no code with the module and obdsetup, so it finds checks that both of
them lack. It is slow: use it for images of some KiB.
"""

import re
import struct

from . import image

CANNOT_READ = "Cannot read metadata"
TRUNCATED = "Image is truncated"
NOT_ZFILE = "Not a ZFile"

_TAR_TYPES = (b"0", b"\0", b"7")
_U64 = 1 << 64
_MAX_END = 1 << 50


class Refused(Exception):
    """A malformed image. The argument is the kernel's phrase."""


class Corrupt(Exception):
    """A corrupt block of a ZFile. The argument is its number."""


def _require(condition, phrase):
    if not condition:
        raise Refused(phrase)


class Plain:
    """A file of bytes."""

    def __init__(self, raw):
        self.raw, self.size = raw, len(raw)

    def read(self, start, length):
        _require(start + length <= self.size, TRUNCATED)
        return self.raw[start:start + length]


# ---- tar ----

def _octal(field):
    """Returns the number in a field of a tar header, or None."""
    if field[0] == 0x80:
        number = int.from_bytes(field[1:], "big")
        return number if number < _U64 else None
    text = re.split(rb"[\0 ]", field.lstrip(b" \t\n\f\r"), maxsplit=1)[0]
    return int(text or b"0", 8) if re.fullmatch(rb"[0-7]*", text) else None


def _is_tar_header(block):
    if len(block) < 512 or not re.fullmatch(rb"ustar(  \0|.00)", block[257:265], re.DOTALL):
        return False
    cleared = block[:148] + b" " * 8 + block[156:]
    signed = sum(struct.unpack("512b", cleared))
    return _octal(block[148:156]) in (sum(cleared), signed)


def _pax_size(payload):
    """Returns the last size in a pax payload, or None."""
    phrase, size = "Invalid tar pax record", None
    while payload:
        length = re.match(rb"([0-9]+) ", payload)
        _require(length and int(length[1]) < _U64, phrase)
        end = int(length[1])
        _require(length.end() + 2 <= end <= len(payload), phrase)
        record, payload = payload[length.end():end], payload[end:]
        _require(record[-1:] == b"\n", phrase)
        record = record[:-1]
        if record.startswith(b"size="):
            _require(re.fullmatch(rb"size=[0-9]*", record) and int(record[5:] or b"0") < _U64, phrase)
            size = int(record[5:] or b"0")
        else:
            # The record must not end before its key differs from "size".
            common = next((i for i, (a, b) in enumerate(zip(record, b"size=")) if a != b), len(record))
            _require(record[common:common + 1] != b"\n", phrase)
    return size


def tar_payload(raw):
    """Returns (start, length) of the file in a tar; None if raw is no tar."""
    if not _is_tar_header(raw[:512]):
        return None
    at, pax = 0, None
    for _ in range(64):
        header = raw[at:at + 512]
        _require(_is_tar_header(header), "Invalid tar header")
        size, kind, data = _octal(header[124:136]), header[156:157], at + 512
        _require(size is not None, "Invalid tar member size")
        if kind == b"x":
            _require(size <= 1 << 20, "Invalid tar pax record")
            _require(data + size <= len(raw), TRUNCATED)
            found = _pax_size(raw[data:data + size])
            pax = pax if found is None else found
        elif kind in _TAR_TYPES:
            length = pax or size
            _require(data + length <= len(raw), "Invalid tar member size")
            return data, length
        elif kind not in (b"g", b"L", b"K"):
            raise Refused("Tar member is not a regular file")
        at = data + -(-size // 512) * 512
        _require(at + 512 <= len(raw), "Invalid tar member size")
    raise Refused("Invalid tar header")


def unwrap(raw):
    """Returns a blob without its tar wrapper."""
    inner = tar_payload(raw)
    return raw[inner[0]:inner[0] + inner[1]] if inner else raw


# ---- ZFile ----

class Zfile:
    """A checked ZFile. read() raises Corrupt."""

    def __init__(self, raw):
        _require(self.is_zfile(raw), NOT_ZFILE)
        self.raw = raw
        header = raw[:512]
        flags = struct.unpack_from("<Q", header, 32)[0]
        _require(flags & 1, "Invalid ZFile header flags")
        _require(self._digest_fits(header), "ZFile header digest mismatch")
        if flags & 8:
            self._take(header, len(raw))
            spare = raw[self.index_offset + 4 * self.count:][:512]
            _require(not self.is_zfile(spare) or self._digest_fits(spare), "ZFile trailer digest mismatch")
        else:
            _require(flags & 2, "Invalid ZFile header flags")
            _require(len(raw) >= 1024, TRUNCATED)
            trailer = raw[-512:]
            _require(self.is_zfile(trailer), "Invalid ZFile trailer magic")
            _require(struct.unpack_from("<Q", trailer, 32)[0] & 7 == 6, "Invalid ZFile trailer flags")
            _require(self._digest_fits(trailer), "ZFile trailer digest mismatch")
            self._take(trailer, len(raw) - 512)
        self._read_index()
        self._blocks = {}

    @staticmethod
    def is_zfile(raw):
        return len(raw) >= 512 and raw[:24] == image.MAGIC

    @staticmethod
    def _digest_fits(block):
        digest, flags = struct.unpack_from("<IQ", block, 28)
        return not flags & 16 or digest == image.crc32c(0, block[:28] + bytes(4) + block[32:])

    def _take(self, block, limit):
        flags, self.index_offset, self.count, self.size, self.index_crc = struct.unpack_from("<QQQQI", block, 32)
        self.block, self.algorithm = struct.unpack_from("<IB", block, 72)
        self.crc = block[88] != 0
        self.has_digest = bool(flags & 16)
        _require(not (self.has_digest and flags & 32), "ZFile compressed index is not supported")
        _require(self.algorithm in image.NAMES, "Unknown ZFile algorithm")
        _require(self.block in [512 << n for n in range(8)], "Invalid ZFile block size")
        _require(block[84:88] == bytes(4), "ZFile dictionaries are not supported")
        _require(self.count <= 10 ** 9, "Too many ZFile index entries")
        _require(self.count == -(-self.size // self.block), "ZFile index size does not match the file size")
        _require(512 <= self.index_offset <= limit - 4 * self.count, "ZFile index out of range")

    def block_length(self, number):
        """Returns the length of a block in the original file, in bytes."""
        return min(self.block, self.size - number * self.block)

    def _read_index(self):
        index = self.raw[self.index_offset:self.index_offset + 4 * self.count]
        self.places, at = [], 512
        for number, (stored,) in enumerate(struct.iter_unpack("<I", index)):
            length = self.block_length(number)
            bound = length + (length // 255 + 16 if self.algorithm == image.LZ4 else length // 256 + 64)
            extra = 4 if self.crc else 0
            _require(extra < stored <= bound + extra, "Invalid ZFile index entry")
            self.places.append((at, stored))
            at += stored
            _require(at <= self.index_offset, "ZFile blocks overlap the index")
        _require(not self.has_digest or image.crc32c(0, index) == self.index_crc, "ZFile index CRC mismatch")

    def read_block(self, number):
        """Returns the content of a block."""
        if number not in self._blocks:
            self._blocks[number] = self._decode(number)
        if self._blocks[number] is None:
            raise Corrupt(number)
        return self._blocks[number]

    def _decode(self, number):
        at, stored = self.places[number]
        payload = self.raw[at:at + stored]
        if self.crc:
            payload, crc = payload[:-4], payload[-4:]
            if struct.pack("<I", image.crc32c(image.BLOCK_SEED, payload)) != crc:
                return None
        try:
            return image.decompress(self.algorithm, payload, self.block_length(number))
        except ValueError:
            return None

    def corrupt_blocks(self):
        """Yields the numbers of the corrupt blocks."""
        for number in range(self.count):
            try:
                self.read_block(number)
            except Corrupt:
                yield number

    def read(self, start, length):
        _require(start + length <= self.size, TRUNCATED)
        first, last = start // self.block, -(-(start + length) // self.block)
        data = b"".join(self.read_block(number) for number in range(first, last))
        return data[start - first * self.block:][:length]


# ---- LSMT ----

class Layer:
    """A checked layer in a blob."""

    def __init__(self, blob):
        inner = unwrap(blob)
        self.zfile = Zfile(inner) if Zfile.is_zfile(inner) else None
        self.file = self.zfile or Plain(inner)
        header = self.file.read(0, 512)
        _require(not Zfile.is_zfile(header), "Layer is a ZFile, put a zfile device below")
        _require(header[:24] == image.LSMT_MAGIC, "Not an LSMT layer")
        _require(struct.unpack_from("<I", header, 28)[0] & 3 == 3, "Invalid LSMT header flags")
        at = self.file.size - 4096
        _require(at >= 4096, TRUNCATED)
        trailer = self.file.read(at, 512)
        _require(trailer[:24] == image.LSMT_MAGIC, "Invalid LSMT trailer magic")
        flags, index_offset, count, self.size = struct.unpack_from("<IQQQ", trailer, 28)
        _require(flags & 7 == 6, "Invalid LSMT trailer flags")
        _require(count <= 10 ** 6, "Too many LSMT index entries")
        _require(self.size <= _MAX_END * 512, "LSMT virtual size is too large")
        _require(4096 <= index_offset <= at - 16 * count, "LSMT index out of range")
        self.entries, end = [], 0
        for place, source in struct.iter_unpack("<QQ", self.file.read(index_offset, 16 * count)):
            offset, length = place % _MAX_END, place // _MAX_END
            moffset, zeroed = source % (1 << 55), bool(source >> 55 & 1)
            if offset == _MAX_END - 1:
                continue
            _require(length and offset + length <= _MAX_END, "Invalid LSMT entry length")
            _require(offset >= end, "LSMT index entries out of order")
            _require(8 <= moffset <= index_offset // 512 - (0 if zeroed else length),
                     "LSMT entry maps outside of the data")
            self.entries.append((offset, length, None if zeroed else moffset))
            end = offset + length


# ---- disks ----

class Disk:
    """The device that a target makes of blobs: its size in bytes, and the result of reading any sector.

    Pieces are (first sector, sectors, bytes or None). None means that the sectors are in one corrupt block.
    """

    WHOLE = 512

    def sectors(self):
        return -(-self.size // 512)

    def sector(self, number):
        """Returns the bytes of a sector, or (layer, block) if that block is corrupt."""
        raise NotImplementedError

    def windows(self):
        """Returns the ranges of sectors (start, end) to test: all of the disk if it is small."""
        return [(0, self.sectors())] if self.size else []

    def pieces(self):
        """Yields the pieces of the windows."""
        for start, end in self.windows():
            run, bad = [], None
            for number in range(start, end):
                what = self.sector(number)
                if run and not (isinstance(what, bytes) if bad is None else what == bad):
                    yield number - len(run), len(run), None if bad else b"".join(run)
                    run = []
                bad = None if isinstance(what, bytes) else what
                run.append(what)
            yield end - len(run), len(run), None if bad else b"".join(run)


class ZfileDisk(Disk):
    """A ZFile as a disk."""

    def __init__(self, blob):
        self.zfile = Zfile(unwrap(blob))
        self.size = self.zfile.size

    def sector(self, number):
        try:
            data = self.zfile.read(number * 512, min(512, self.size - number * 512))
        except Corrupt as corrupt:
            return (0, *corrupt.args)
        return data + bytes(512 - len(data))


class Stack(Disk):
    """Layers as a disk, lowest first."""

    def __init__(self, blobs):
        _require(1 <= len(blobs) <= 255, "Invalid number of layers")
        try:
            self.layers = [Layer(blob) for blob in blobs]
        except Corrupt:
            raise Refused(CANNOT_READ) from None
        sizes = [layer.size for layer in self.layers if layer.size]
        _require(sizes, "No layer has a virtual size")
        self.size = sizes[-1]

    def windows(self):
        if self.sectors() <= self.WHOLE:
            return super().windows()
        marks = [(0, 128), (self.sectors() - 64, self.sectors())]
        for layer in self.layers:
            for offset, length, _ in layer.entries:
                marks += [(offset - 4, offset + 4), (offset + length - 4, offset + length + 4)]
        windows = []
        for start, end in sorted((max(start, 0), min(end, self.sectors())) for start, end in marks):
            if windows and start <= windows[-1][1]:
                windows[-1][1] = max(end, windows[-1][1])
            elif start < end:
                windows.append([start, end])
        return windows

    def sector(self, number):
        for nth, layer in reversed(list(enumerate(self.layers))):
            for offset, length, moffset in layer.entries:
                if offset <= number < offset + length:
                    if moffset is None:
                        return bytes(512)
                    try:
                        data = layer.file.read((moffset + number - offset) * 512, 512)
                    except Corrupt as corrupt:
                        return (nth, *corrupt.args)
                    inside = min(512, self.size - number * 512)
                    return data[:inside] + bytes(512 - inside)
        return bytes(512)

    def tail_is_corrupt(self):
        """Returns whether the disk ends within a sector that can't be read."""
        return bool(self.size % 512) and not isinstance(self.sector(self.sectors() - 1), bytes)
