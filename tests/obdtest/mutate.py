# SPDX-License-Identifier: GPL-2.0
"""Malformed images: valid ones of every kind, each changed in one way. Every run makes the same images.

A case is a name that describes the change, a target, and the blobs of its disk. If a digest or CRC covers the change,
there are two cases: one with wrong checksums, and one with correct checksums, which tests the checks that follow.
"""

import random
import struct
from typing import NamedTuple

from . import image

ZFILE_FIELDS = (("magic0", 0, 8), ("magic1", 8, 16), ("size", 24, 4), ("digest", 28, 4), ("flags", 32, 8),
                ("index_offset", 40, 8), ("index_size", 48, 8), ("original_file_size", 56, 8), ("index_crc", 64, 4),
                ("reserved", 68, 4), ("block_size", 72, 4), ("algo", 76, 1), ("level", 77, 1), ("use_dict", 78, 1),
                ("pad", 79, 5), ("dict_size", 84, 4), ("verify", 88, 1), ("rest", 96, 416))
LSMT_FIELDS = (("magic0", 0, 8), ("magic1", 8, 16), ("size", 24, 4), ("flags", 28, 4), ("index_offset", 32, 8),
               ("index_size", 40, 8), ("virtual_size", 48, 8), ("uuid", 56, 37), ("parent_uuid", 93, 37),
               ("reserved", 130, 2), ("version", 132, 1), ("sub_version", 133, 1), ("user_tag", 134, 256),
               ("rest", 390, 3706))
LSMT_ENTRY_FIELDS = (("offset", 0, 50), ("length", 50, 14), ("moffset", 64, 55), ("zeroed", 119, 1), ("tag", 120, 8))
TAR_FIELDS = (("name", 0, 100), ("mode", 100, 8), ("uid", 108, 8), ("size", 124, 12), ("mtime", 136, 12),
              ("chksum", 148, 8), ("typeflag", 156, 1), ("linkname", 157, 100), ("magic", 257, 6), ("version", 263, 2),
              ("prefix", 345, 155), ("rest", 500, 12))


class Case(NamedTuple):
    """A malformed image. The target is zfile or lsmt; blobs are layers, lowest first."""

    name: str
    target: str
    blobs: tuple


# ---- values ----

def _values(old, bits, others=()):
    """Yields (name, value) for changes of a field that has the value old and this number of bits."""
    top = (1 << bits) - 1
    wanted = [("0", 0), ("1", 1), ("max", top), ("max/2", top >> 1), ("sign", 1 << bits - 1), ("+1", old + 1),
              ("-1", old - 1), ("negated", -old)]
    if bits % 8 == 0 and bits > 8:
        wanted.append(("bytes swapped", int.from_bytes(old.to_bytes(bits // 8, "little"), "big")))
    seen = {old}
    for name, value in wanted + [(f"{other & top:#x}", other) for other in others]:
        value &= top
        if value not in seen:
            seen.add(value)
            yield name, value


def _bytes_values(old):
    """Yields (name, bytes) for changes of a field that is not a number."""
    for name, new in (("0", bytes(len(old))), ("max", b"\xff" * len(old)), ("swapped", old[::-1]),
                      ("first bit", bytes([old[0] ^ 1]) + old[1:]), ("last bit", old[:-1] + bytes([old[-1] ^ 0x80]))):
        if new != old:
            yield name, new


def _put(raw, at, new):
    return raw[:at] + new + raw[at + len(new):]


def _fields(raw, at, fields, others):
    """Yields (name, blob) with one field of a structure changed, or two of the same size swapped."""
    previous = None
    for name, offset, size in fields:
        old = raw[at + offset:at + offset + size]
        if size <= 8:
            number = int.from_bytes(old, "little")
            for what, value in _values(number, size * 8, others.get(name, ())):
                yield f"{name}={what}", _put(raw, at + offset, value.to_bytes(size, "little"))
        else:
            for what, new in _bytes_values(old):
                yield f"{name}={what}", _put(raw, at + offset, new)
        if previous and previous[2] == size:
            other = raw[at + previous[1]:at + previous[1] + size]
            if other != old:
                yield f"{previous[0]} and {name} swapped", _put(_put(raw, at + previous[1], old), at + offset, other)
        previous = name, offset, size


def _cuts(raw, edges):
    """Yields (name, blob) cut at each edge of a structure, a byte before it, and a byte after it."""
    seen = set()
    for name, edge in edges:
        for by in (-1, 0, 1):
            if 0 <= edge + by < len(raw) and edge + by not in seen:
                seen.add(edge + by)
                yield f"cut at {name}{by or '':+}" if by else f"cut at {name}", raw[:edge + by]


def _longer(raw):
    for count in (1, 511, 512, 4096):
        yield f"{count} bytes more", raw + b"\x5a" * count
    yield "twice", raw + raw


def _flips(raw, rng, count):
    """Yields (name, blob) with random bits flipped."""
    for nth in range(count):
        new, places = bytearray(raw), []
        for _ in range(1 if nth % 2 else rng.randrange(2, 9)):
            at, bit = rng.randrange(len(raw)), rng.randrange(8)
            new[at] ^= 1 << bit
            places.append(f"{at}.{bit}")
        yield f"bits flipped at {' '.join(places)}", bytes(new)


# ---- ZFile ----

class _Zfile:
    """A ZFile to change."""

    def __init__(self, data, **options):
        self.data, self.options = data, {"algorithm": image.LZ4, "block": 4096, "crc": True, "overwrite": True,
                                         "digest": True, **options}
        self.raw = image.zfile(data, **self.options)
        self.digest, self.crc = self.options["digest"], self.options["crc"]
        self.algorithm, self.block = self.options["algorithm"], self.options["block"]
        self.end = len(self.raw) - 512
        self.main = 0 if self.options["overwrite"] else self.end
        self.index_offset, self.count = struct.unpack_from("<QQ", self.raw, self.main + 40)
        self.lengths = struct.unpack_from(f"<{self.count}I", self.raw, self.index_offset)
        self.places, at = [], 512
        for length in self.lengths:
            self.places.append((at, length))
            at += length
        self.stored = [self.raw[at:at + length] for at, length in self.places]

    def sign(self, raw):
        """Returns raw with correct digests, and a correct index CRC if there is an index."""
        if not self.digest:
            return raw
        index = raw[self.index_offset:self.index_offset + 4 * self.count]
        for at in (0, self.end):
            if at == self.main or self.main == 0:
                raw = _put(raw, at + 64, struct.pack("<I", image.crc32c(0, index)))
            raw = self.digest_of(raw, at)
        return raw

    def digest_of(self, raw, at):
        """Returns raw with a correct digest in the structure that begins at byte `at`."""
        block = raw[at:at + 28] + bytes(4) + raw[at + 32:at + 512]
        return _put(raw, at + 28, struct.pack("<I", image.crc32c(0, block)))

    def of(self, stored, **other):
        """Returns the ZFile with other stored blocks."""
        return image.zfile_of(stored, len(self.data), **{**self.options, **other})

    def seal(self, payload):
        """Returns the stored block of a payload: with a CRC, if the ZFile has CRCs."""
        return payload + (struct.pack("<I", image.crc32c(image.BLOCK_SEED, payload)) if self.crc else b"")

    def with_index(self, lengths):
        return self.sign(_put(self.raw, self.index_offset, struct.pack(f"<{self.count}I", *lengths)))

    def length(self, nth):
        return min(self.block, len(self.data) - nth * self.block)

    def bound(self, nth):
        length = self.length(nth)
        extra = length // 255 + 16 if self.algorithm == image.LZ4 else length // 256 + 64
        return length + extra + (4 if self.crc else 0)


def _zfile_structs(zf):
    total = zf.count * zf.block
    others = {"flags": [zf_flags ^ 1 << bit for bit in range(7)
                        for zf_flags in {struct.unpack_from("<Q", zf.raw, 32)[0],
                                         struct.unpack_from("<Q", zf.raw, zf.end + 32)[0]}],
              "index_offset": [511, 512, 513, zf.index_offset - 4, zf.index_offset + 4, zf.index_offset + 511,
                               zf.index_offset + 512, zf.end, len(zf.raw), (1 << 64) - 4 * zf.count,
                               (1 << 64) - 4 * zf.count + 512],
              "index_size": [10 ** 9, 10 ** 9 + 1, 1 << 62, (1 << 62) + zf.count],
              "original_file_size": [total - zf.block, total - zf.block + 1, total - 1, total, total + 1, 512,
                                     (1 << 64) - zf.block],
              "block_size": [256, 511, 513, 1 << 16, 1 << 17, zf.block * 4, zf.block - 512],
              "algo": [2, 3, 4], "verify": [2]}
    # Of the structure that readers don't use (header or trailer), only the first fields matter.
    for struct_name, at in (("header", 0), ("trailer", zf.end)):
        for name, raw in _fields(zf.raw, at, ZFILE_FIELDS if at == zf.main else ZFILE_FIELDS[:6], others):
            covered = zf.digest and not name.startswith("digest") and raw[at + 32] & 16
            if covered:
                yield f"{struct_name}.{name}, digest fixed", zf.digest_of(raw, at)
            # The digest detects any change, so test only some changes of each field.
            if not covered or name.endswith(("=0", "=1", "=max", "=+1", "swapped")):
                yield f"{struct_name}.{name}", raw
    # Fields that must agree, changed together.
    main = zf.main
    for name, size in (("0", 0), ("1", 1), ("a sector less", len(zf.data) - 512), ("a byte more", len(zf.data) + 1),
                       ("10^9 blocks", 10 ** 9 * zf.block), ("2^64 - 1", (1 << 64) - 1)):
        count = -(-size // zf.block)
        raw = _put(zf.raw, main + 48, struct.pack("<QQ", count, size))
        index = raw[zf.index_offset:zf.index_offset + 4 * count] if count < 10 ** 6 else b""
        raw = _put(raw, main + 64, struct.pack("<I", image.crc32c(0, index)))
        yield f"size and count={name}", zf.digest_of(raw, main) if zf.digest else raw
    for block in (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536):
        if block != zf.block:
            raw = _put(zf.raw, main + 72, struct.pack("<I", block))
            raw = _put(raw, main + 56, struct.pack("<Q", zf.count * block))
            yield f"block and file size={block}", zf.digest_of(raw, main) if zf.digest else raw
    yield "trailer in the header's place", _put(zf.raw, 0, zf.raw[zf.end:])
    yield "header in the trailer's place", _put(zf.raw, zf.end, zf.raw[:512])
    yield "header gone", zf.raw[512:]


def _zfile_index(zf):
    wanted = sorted({0, 1, zf.count // 2, zf.count - 2, zf.count - 1} & set(range(zf.count)))
    for nth in wanted:
        others = (4, 5, zf.bound(nth), zf.bound(nth) + 1, zf.lengths[nth] + 4, zf.lengths[nth] - 4, 1 << 16)
        for name, value in _values(zf.lengths[nth], 32, others):
            lengths = (*zf.lengths[:nth], value, *zf.lengths[nth + 1:])
            yield f"index[{nth}]={name}, CRC fixed", zf.with_index(lengths)
            if zf.digest and name in ("0", "+1", "max"):
                yield f"index[{nth}]={name}", _put(zf.raw, zf.index_offset + 4 * nth, struct.pack("<I", value))
        if nth + 1 < zf.count:
            one, two = zf.lengths[nth:nth + 2]
            rest = zf.lengths[nth + 2:]
            for name, pair in (("swapped", (two, one)), ("edge a byte later", (one + 1, two - 1)),
                               ("edge a byte earlier", (one - 1, two + 1)), ("edge 4 bytes later", (one + 4, two - 4))):
                yield f"index[{nth}] and the next {name}", zf.with_index((*zf.lengths[:nth], *pair, *rest))
    bounds = [zf.bound(nth) for nth in range(zf.count)]
    yield "index: all as long as can be", zf.with_index(bounds)
    yield "index: all longer than can be", zf.with_index([bound + 1 for bound in bounds])
    yield "index: all 0", zf.with_index([0] * zf.count)
    yield "index: all -1", zf.with_index([0xffffffff] * zf.count)
    yield "index: all 5", zf.with_index([5] * zf.count)
    yield "index: all 65535", zf.with_index([65535] * zf.count)
    yield "index: reversed", zf.with_index(zf.lengths[::-1])
    yield "index: rotated", zf.with_index(zf.lengths[1:] + zf.lengths[:1])
    yield "index: sums to 2^32", zf.with_index((*zf.lengths[:-1], (1 << 32) - sum(zf.lengths[:-1])))
    for gap in (1, 100, 512, 70000):
        stored = zf.stored[:-1] + [zf.stored[-1] + b"\xa5" * gap]
        grown = bytearray(zf.of(stored))
        at = len(grown) - 512 - 4
        struct.pack_into("<I", grown, at, zf.lengths[-1])
        other = _Zfile.__new__(_Zfile)
        other.__dict__.update(zf.__dict__, end=len(grown) - 512, index_offset=zf.index_offset + gap)
        yield f"{gap} stray bytes before the index", other.sign(bytes(grown))


def _lz4_blocks(length):
    """Yields (name, payload) of invalid LZ4 blocks. Some decoders accept some of them."""
    tail = b"\x50abcde"

    def run(extra):
        return b"\xff" * (extra // 255) + bytes([extra % 255])

    yield "a byte", b"\0"
    yield "a match first", b"\x00\x01\x00" + tail
    yield "a bomb of matches", b"\x1fA\x01\x00" + b"\xff" * min(250, length - 20) + b"\0" + tail
    yield "a bomb that fits, and one byte", b"\x1fA\x01\x00" + run(length - 1 - 19 - 5 + 1) + tail
    yield "a bomb that fits", b"\x1fA\x01\x00" + run(length - 1 - 19 - 5) + tail
    yield "a bomb that fits, short of one byte", b"\x1fA\x01\x00" + run(length - 1 - 19 - 5 - 1) + tail
    yield "a bomb of literals", b"\xf0" + b"\xff" * min(250, length - 20) + b"\0abc"
    yield "literals beyond the end", b"\xf0\xc8abc"
    yield "a match cut in its offset", b"\x10A\x01"
    yield "a match cut in its length", b"\x1fA\x01\x00\xff"
    yield "length bytes without end", b"\x1fA\x01\x00" + b"\xff" * (length // 2)
    yield "a match to the very end", b"\x1fA\x01\x00" + run(length - 1 - 19)
    yield "bytes after the end", b"\x1fA\x01\x00" + run(length - 1 - 19 - 5) + tail + b"\0\0\0"
    for offset in (0, 2, 3, 0x8000, 0xffff):
        for before in (1, 9, 300):
            head = bytes([before << 4 | 15]) if before < 15 else b"\xff" + run(before - 15)
            for tail_length in (5, 12):
                left = length - before - 19 - tail_length
                if left < 0:
                    continue
                yield (f"offset {offset} after {before} bytes, {tail_length} at the end",
                       head + b"B" * before + struct.pack("<H", offset) + run(left) +
                       bytes([tail_length << 4]) + b"C" * tail_length)
    if length > 64:
        # Many matches of all lengths, all with offset 0.
        payload, left = b"\x10A", length - 1
        first = True
        while left > 60:
            size = 4 + left % 11
            payload = payload[:-2] + bytes([0x10 | size - 4]) + b"D\0\0" if first else \
                payload + bytes([0x10 | size - 4]) + b"D\0\0"
            left -= size + (0 if first else 1)
            first = False
        yield "matches with offset 0", payload + b"\xf0" + run(left - 15) + b"E" * left


def _zstd_frame(blocks, size=None, window=None, unused=0, checksum=b"", dictionary=b"", checked=None):
    """Returns a zstd frame of blocks (type, length, bytes)."""
    code = {None: 0, 1: 0, 2: 1, 4: 2, 8: 3}
    width = None if size is None else size[0]
    single = window is None
    descriptor = code[width] << 6 | int(single) << 5 | unused << 3
    descriptor |= int(bool(checksum) if checked is None else checked) << 2 | {0: 0, 1: 1, 2: 2, 4: 3}[len(dictionary)]
    out = struct.pack("<IB", 0xFD2FB528, descriptor) + (b"" if single else bytes([window])) + dictionary
    if size is not None:
        out += ((size[1] - (256 if width == 2 else 0)) & (1 << 8 * width) - 1).to_bytes(width, "little")
    for nth, (kind, length, data) in enumerate(blocks):
        out += (int(nth == len(blocks) - 1) | kind << 1 | length << 3).to_bytes(3, "little") + data
    return out + checksum


def _zstd_blocks(length):
    """Yields (name, payload) of invalid zstd frames. Some decoders accept some of them."""
    good = [(1, length, b"R")]
    width = (4, length)
    skip = struct.pack("<II", 0x184D2A50, 4) + b"skip"
    yield "a byte", b"\0"
    yield "magic only", struct.pack("<I", 0xFD2FB528)
    yield "a run", _zstd_frame(good, width)
    for name, size in (("0", 0), ("-1", length - 1), ("+1", length + 1), ("2^31", 1 << 31), ("max", (1 << 32) - 1)):
        yield f"content size {name}", _zstd_frame(good, (4, size))
    for name, size in (("2^32", 1 << 32), ("2^63", 1 << 63), ("max", (1 << 64) - 1), ("max-1", (1 << 64) - 2)):
        yield f"content size {name}", _zstd_frame(good, (8, size))
    yield "no content size", _zstd_frame(good, window=0x30)
    for window in (0, 0x40, 0x58, 0xa8, 0xf8, 0xff):
        yield f"window {window:#x}", _zstd_frame(good, window=window)
        yield f"window {window:#x}, content size", _zstd_frame(good, width, window=window)
    yield "a bomb of a run", _zstd_frame([(1, 128 << 10, b"R")], width)
    yield "a bomb of the longest run", _zstd_frame([(1, (1 << 21) - 1, b"R")], width)
    yield "a bomb of runs", _zstd_frame([(1, 128 << 10, b"R")] * min(60, length // 5), width)
    yield "a bomb of runs, content size", _zstd_frame([(1, 128 << 10, b"R")] * 30, (4, 30 << 17))
    yield "a bomb of runs, no content size", _zstd_frame([(1, 128 << 10, b"R")] * 30, window=0x58)
    yield "a bomb of empty blocks", _zstd_frame([(0, 0, b"")] * (length // 4) + good, width)
    for name, by in (("short", -1), ("long", 1)):
        yield f"a run {name} of a byte", _zstd_frame([(1, length + by, b"R")], width)
        yield f"a run {name} of a byte, no content size", _zstd_frame([(1, length + by, b"R")], window=0x30)
    yield "stored bytes beyond the end", _zstd_frame([(0, length, b"abc")], width)
    yield "a compressed block of nothing", _zstd_frame([(2, 0, b"")], width)
    yield "a compressed block of noise", _zstd_frame([(2, 40, bytes(range(7, 47)))], width)
    yield "a block of the reserved type", _zstd_frame([(3, length, b"R")], width)
    yield "the reserved bit", _zstd_frame(good, width, unused=1)
    yield "the unused bit", _zstd_frame(good, width, unused=2)
    yield "no last block", _zstd_frame(good + [(0, 0, b"")], width)[:-3]
    yield "no block", _zstd_frame([], width)
    yield "a wrong checksum", _zstd_frame(good, width, checksum=b"abcd")
    yield "a missing checksum", _zstd_frame(good, width, checked=True)
    for size in (1, 2, 4):
        yield f"a dictionary ID of {size} bytes", _zstd_frame(good, width, dictionary=b"\1" * size)
        yield f"a dictionary ID of {size} zeros", _zstd_frame(good, width, dictionary=bytes(size))
    yield "two frames", _zstd_frame([(1, length - 9, b"R")], (4, length - 9)) + _zstd_frame([(1, 9, b"S")], (4, 9))
    yield "two frames that are too long", _zstd_frame(good, width) + _zstd_frame(good, width)
    yield "a skippable frame first", skip + _zstd_frame(good, width)
    yield "a skippable frame last", _zstd_frame(good, width) + skip
    yield "a skippable frame only", skip
    yield "a skippable frame that ends late", struct.pack("<II", 0x184D2A50, 0xfffffff0) + _zstd_frame(good, width)
    yield "a byte after the end", _zstd_frame(good, width) + b"\0"
    for old in range(0x22, 0x28):
        yield f"magic of version 0.{old - 0x20}", struct.pack("<I", 0xFD2FB500 | old) + _zstd_frame(good, width)[4:]


def _zfile_blocks(zf, rng):
    handmade = _lz4_blocks if zf.algorithm == image.LZ4 else _zstd_blocks
    other = image.ZSTD if zf.algorithm == image.LZ4 else image.LZ4
    for nth in sorted({0, zf.count // 2, zf.count - 1}):
        length, payload = zf.length(nth), zf.stored[nth][:-4] if zf.crc else zf.stored[nth]
        plain = zf.data[nth * zf.block:nth * zf.block + length]

        def put(new, nth=nth):
            return zf.of(zf.stored[:nth] + [new] + zf.stored[nth + 1:])

        made = [("empty block, CRC right", b"")]
        made += [(f"{name} bytes", image.compress(zf.algorithm, bytes(size)))
                 for name, size in (("0", 0), ("1", 1), ("2 blocks of", 2 * length), ("16 MiB of", 1 << 24))
                 if size < 1 << 23 or nth == 0]
        made += [("a byte less", image.compress(zf.algorithm, plain[:-1])),
                 ("a byte more", image.compress(zf.algorithm, plain + b"!")),
                 ("half of it", image.compress(zf.algorithm, plain[:length // 2])),
                 ("the other algorithm", image.compress(other, plain)), ("not compressed", plain),
                 ("zeros", bytes(len(payload))), ("ones", b"\xff" * len(payload)),
                 ("noise", rng.randbytes(len(payload))), ("cut by a byte", payload[:-1]),
                 ("cut in half", payload[:len(payload) // 2]), ("a byte of noise added", payload + b"\x5a")]
        room = zf.bound(nth) - len(zf.stored[nth])
        made += [("as long as can be", payload + b"\x5a" * room), ("a byte longer", payload + b"\x5a" * (room + 1))]
        if nth == 0 or nth == zf.count - 1 and zf.block <= 4096:
            made += handmade(length)
        for _ in range(12):
            new = bytearray(payload)
            at, bit = rng.randrange(len(new)), rng.randrange(8)
            new[at] ^= 1 << bit
            made.append((f"bit {at}.{bit} flipped", bytes(new)))
        for name, new in made:
            if 0 < len(new) or not zf.crc:
                yield f"block[{nth}]: {name}", put(zf.seal(new))
        if zf.crc:
            crc = payload + struct.pack("<I", image.crc32c(0, payload))
            for name, new in (("CRC 0", payload + bytes(4)), ("CRC max", payload + b"\xff" * 4), ("CRC of seed 0", crc),
                              ("CRC swapped", payload + zf.stored[nth][:-5:-1]), ("no CRC", payload)):
                yield f"block[{nth}]: {name}", put(new)
    for one, two in ((0, 1), (0, zf.count - 1)):
        stored = list(zf.stored)
        stored[one], stored[two] = stored[two], stored[one]
        yield f"blocks {one} and {two} swapped", zf.of(stored)
    yield "the first block everywhere", zf.of([zf.stored[0]] * zf.count)
    yield "a block less", zf.of(zf.stored[:-1])
    yield "a block more", zf.of(zf.stored + zf.stored[-1:])


def _zfile_all(zf, rng, flips, structs=True):
    edges = [("0", 0), ("the magic", 24), ("the header's fields", 96), ("the header's end", 512),
             ("the index", zf.index_offset), ("the index's first entry", zf.index_offset + 4),
             ("the trailer", zf.end), ("the trailer's magic", zf.end + 24), ("the trailer's fields", zf.end + 96),
             ("the end", len(zf.raw))]
    edges += [(f"block {nth}", zf.places[nth][0]) for nth in (1, zf.count // 2, zf.count - 1)]
    if structs:
        yield from _zfile_structs(zf)
    yield from _zfile_index(zf)
    yield from _zfile_blocks(zf, rng)
    yield from _cuts(zf.raw, edges)
    yield from _longer(zf.raw)
    yield from _flips(zf.raw, rng, flips)


# ---- LSMT ----

class _Lsmt:
    """A layer to change."""

    def __init__(self, virtual_size, extents, pad=True):
        self.raw = image.lsmt(virtual_size, extents, pad)
        self.virtual_size = virtual_size
        self.end = len(self.raw) - 4096
        self.index_offset, self.count = struct.unpack_from("<QQ", self.raw, self.end + 32)
        self.entries = [self.raw[at:at + 16] for at in range(self.index_offset, self.end, 16)]
        self.used = len(extents)

    def with_entries(self, changed):
        """Returns the layer with entries {number: bytes} changed."""
        raw = self.raw
        for nth, entry in changed.items():
            raw = _put(raw, self.index_offset + 16 * nth, entry)
        return raw


def _lsmt_structs(la):
    most = (la.end - la.index_offset) // 16
    others = {"flags": [flags ^ 1 << bit for bit in range(6) for flags in (6, 7)],
              "index_offset": [4095, 4096, 4097, la.index_offset - 16, la.index_offset + 16, la.end - 16 * la.count,
                               la.end, la.end - 16, len(la.raw), (1 << 64) - 16 * la.count,
                               (1 << 64) - 16 * la.count + 4096],
              "index_size": [most, most + 1, la.used, la.used - 1, 10 ** 6, 10 ** 6 + 1, 1 << 60, (1 << 60) + la.count],
              "virtual_size": [511, 512, 513, la.virtual_size + 511, la.virtual_size + 512, la.virtual_size - 512,
                               la.virtual_size - 4096, 1 << 20, 1 << 41, 1 << 58, 1 << 59, (1 << 59) + 1]}
    # Of the header, only the first fields matter.
    for struct_name, at, fields in (("header", 0, LSMT_FIELDS[:5]), ("trailer", la.end, LSMT_FIELDS)):
        for name, raw in _fields(la.raw, at, fields, others):
            yield f"{struct_name}.{name}", raw
    yield "trailer in the header's place", _put(la.raw, 0, la.raw[la.end:])
    yield "header in the trailer's place", _put(la.raw, la.end, la.raw[:4096])
    yield "header gone", la.raw[4096:]
    yield "a ZFile's magic", _put(la.raw, 0, image.MAGIC)


def _lsmt_entries(la, full=True):
    """Yields (name, blob) with entries changed in every way. With full unset, the fields of only one entry are
    changed."""
    limit, index = 1 << 50, la.index_offset // 512
    for nth in sorted({0, 1, la.used // 2, la.used - 1} if full else {1}):
        word = int.from_bytes(la.entries[nth], "little")
        offset, length = word % limit, word >> 50 & 16383
        others = {"offset": [offset + 8, limit - 2, limit - length, limit - length - 1, la.virtual_size // 512,
                             la.virtual_size // 512 - 1],
                  "length": [length + 8, 16382], "zeroed": [],
                  "moffset": [7, 8, 9, index - length, index - length + 1, index - length - 1, index, index + 1,
                              (1 << 55) - length, (1 << 55) - length + 8, la.end // 512]}
        for name, shift, bits in LSMT_ENTRY_FIELDS:
            old = word >> shift & (1 << bits) - 1
            for what, value in _values(old, bits, others.get(name, ())):
                entry = word ^ (old ^ value) << shift
                yield f"entry[{nth}].{name}={what}", la.with_entries({nth: entry.to_bytes(16, "little")})

    def entry(*fields):
        return image.lsmt_entry(*fields)

    one, two = la.entries[0], la.entries[1]
    first = int.from_bytes(one, "little")
    offset, length, moffset = first % limit, first >> 50 & 16383, first >> 64 & (1 << 55) - 1
    following = int.from_bytes(two, "little") % limit
    yield "entries 0 and 1 swapped", la.with_entries({0: two, 1: one})
    yield "entry 0 twice", la.with_entries({1: one})
    yield "entry 1 inside entry 0", la.with_entries({0: entry(offset, 8, 8), 1: entry(offset + 2, 2, 8)})
    yield "entry 1 overlaps by a sector", la.with_entries({0: entry(offset, following - offset + 1, 8)})
    yield "entry 1 follows at once", la.with_entries({0: entry(offset, min(following - offset, 8), 8)})
    yield "entries of the same offset", la.with_entries({1: entry(offset, 1, 8)})
    yield "all entries reversed", la.with_entries(dict(enumerate(la.entries[:la.used][::-1])))
    yield "all entries at sector 0", la.with_entries({nth: entry(0, 1, 8) for nth in range(la.used)})
    yield "all entries from the same data", la.with_entries(
        {nth: entry(8 * nth, 8, 8) for nth in range(la.used)})
    yield "no entries but padding", la.with_entries({nth: image.INVALID for nth in range(la.used)})
    yield "padding first", la.with_entries({0: image.INVALID})
    yield "padding that holds more", la.with_entries({0: entry(limit - 1, 16383, (1 << 55) - 1, True, 255)})
    yield "padding between", la.with_entries({1: image.INVALID})
    yield "entries of zeros", la.with_entries({nth: bytes(16) for nth in range(la.used)})
    yield "entries of ones", la.with_entries({nth: b"\xff" * 16 for nth in range(la.used)})
    last = la.used - 1
    yield "last entry ends at 2^50", la.with_entries({last: entry(limit - 8, 8, 8)})
    yield "last entry ends beyond 2^50", la.with_entries({last: entry(limit - 8, 9, 8)})
    yield "last entry wraps", la.with_entries({last: entry(limit - 2, 16383, 8, True)})
    yield "last entry ends at 2^50, zeroed", la.with_entries({last: entry(limit - 16383, 16383, 8, True)})
    yield "last entry crosses the end", la.with_entries({last: entry(la.virtual_size // 512 - 1, 8, 8)})
    yield "last entry beyond the end", la.with_entries({last: entry(la.virtual_size // 512, 8, 8)})
    yield "mapping up to the index", la.with_entries({0: entry(offset, length, index - length)})
    yield "mapping into the index", la.with_entries({0: entry(offset, length, index - length + 1)})
    yield "mapping from the header", la.with_entries({0: entry(offset, length, 7)})
    yield "mapping of the trailer", la.with_entries({0: entry(offset, 1, la.end // 512)})
    yield "mapping that wraps", la.with_entries({0: entry(offset, length, (1 << 55) - length)})
    yield "zeroed, mapping the index", la.with_entries({0: entry(offset, length, index, True)})
    yield "zeroed, mapping beyond the index", la.with_entries({0: entry(offset, length, index + 1, True)})
    yield "zeroed, mapping nothing", la.with_entries({0: entry(offset, length, 0, True)})
    yield "zeroed, the longest", la.with_entries({last: entry(la.virtual_size // 512 - 1, 16383, 8, True)})
    yield "a tag", la.with_entries({0: entry(offset, length, moffset, False, 255)})


def _lsmt_all(la, rng, flips, structs=True):
    edges = [("0", 0), ("the magic", 24), ("the header's fields", 512), ("the header's end", 4096), ("8 KiB", 8192),
             ("the index", la.index_offset), ("the index's first entry", la.index_offset + 16), ("the trailer", la.end),
             ("the trailer's first sector", la.end + 512), ("the end", len(la.raw))]
    if structs:
        yield from _lsmt_structs(la)
    yield from _lsmt_entries(la)
    yield from _cuts(la.raw, edges)
    yield from _longer(la.raw)
    yield from _flips(la.raw, rng, flips)


# ---- tar ----

def _checksum(raw, at):
    block = raw[at:at + 148] + b" " * 8 + raw[at + 156:at + 512]
    return _put(raw, at + 148, b"%06o\0 " % sum(block))


def _tar_structs(raw, headers):
    sizes = [b"00000000000\0", b"00000000001\0", b"77777777777\0", b"777777777777", b"0000000000 \0", b"           0",
             b"            ", b"9" * 11 + b"\0", b"-0000000001\0", b"\x80" + bytes(11), b"\x80" + b"\xff" * 11,
             b"\x80" + bytes(3) + b"\xff" * 8, b"\xff" * 12, b"0x000000100\0", b"%011o\0" % len(raw)]
    for struct_name, at in headers:
        changed = list(_fields(raw, at, TAR_FIELDS, {}))
        old = int(raw[at + 124:at + 135].strip(b" ") or b"0", 8)
        for what, size in (("+1", old + 1), ("-1", max(old - 1, 0)), ("+512", old + 512), ("doubled", old * 2)):
            changed.append((f"size={what}", _put(raw, at + 124, b"%011o\0" % size)))
        changed += [(f"size={text!r}", _put(raw, at + 124, text)) for text in sizes]
        changed += [(f"typeflag={chr(kind)!r}", _put(raw, at + 156, bytes([kind]))) for kind in b"\0001234567xgLKVS"]
        changed += [(f"magic={text!r}", _put(raw, at + 257, text)) for text in
                    (b"ustar  \0", b"ustar\00000", b"ustar 00", b"ustar\0\0\0", b"xxtar\0xx", b"USTAR\x0000")]
        for name, new in changed:
            if new == raw:
                continue
            if not name.startswith("chksum"):
                yield f"{struct_name}.{name}, checksum fixed", _checksum(new, at)
            # The checksum detects any change, so test only some changes of each field.
            if name.startswith("chksum") or name.endswith(("=0", "=max", "swapped")):
                yield f"{struct_name}.{name}", new


def _tar_pax(data):
    """Yields (name, blob) of tars with unusual pax records."""
    size = len(data)
    record = image.pax_record
    huge = 10 ** 30

    def made(payload, kind=b"x", octal=0):
        head = image._tar_header(b"overlaybd.pax", len(payload), kind) + image._pad(payload)
        return head + image._tar_header(b"overlaybd.commit", octal, b"0") + image._pad(data) + bytes(1024)

    good = record("size", str(size))
    for name, payload in (
            ("nothing", b""), ("no size", record("path", "x")), ("size 0", record("size", "0")),
            ("size a byte less", record("size", str(size - 1))), ("size a byte more", record("size", str(size + 1))),
            ("size 2^63", record("size", str(1 << 63))), ("size 2^64 - 1", record("size", str((1 << 64) - 1))),
            ("size 2^64", record("size", str(1 << 64))), ("size 10^30", record("size", str(huge))),
            ("size negative", record("size", "-1")), ("size empty", record("size", "")),
            ("size in octal", record("size", "0%o" % size)), ("size with a blank", record("size", f" {size}")),
            ("size with a plus", record("size", f"+{size}")), ("size with zeros", record("size", "0" * 40 + str(size))),
            ("size twice, the first right", good + record("size", "1")),
            ("size twice, the last right", record("size", "1") + good),
            ("a key like size", record("sizes", "1") + record("siz", "2") + good),
            ("length 0", b"0 size=1\n"), ("length a byte less", b"8 size=1\n"), ("length a byte more", b"10 size=1\n"),
            ("length 2^64", b"%d size=1\n" % (1 << 64)), ("length 10^30", b"%d size=1\n" % huge),
            ("length of itself only", b"2 " + good), ("length missing", b" size=1\n"), ("no blank", b"9size=1\n"),
            ("a tab", b"9\tsize=1\n"), ("no newline", good[:-1]), ("a newline too many", good + b"\n"),
            ("a newline in the key", b"11 si\nze=1\n"), ("a newline in the value", b"12 size=1\n1\n" + good),
            ("a newline in another value", record("comment", "a\nb") + good), ("no equals sign", b"7 size\n" + good),
            ("NUL bytes at the end", good + bytes(100)), ("zeros before the length", b"000" + good),
            ("two blocks", record("comment", "c" * 600) + good), ("binary", record("comment", "\x01" * 30) + good)):
        yield f"pax: {name}", made(payload)
        if name in ("nothing", "no size", "size 0", "size a byte less"):
            yield f"pax: {name}, octal size right", made(payload, octal=size)
        if name == "size a byte less":
            yield "a global pax header, size a byte less", made(payload, kind=b"g", octal=size)
    head = image._tar_header(b"x", 0, b"g")
    for count in (1, 62, 63, 64, 65, 200):
        yield f"{count} global headers before", head * count + image.tar(data, pax=False)
    yield "a pax header only", image.tar(data)[:1024]
    yield "two pax headers, the last right", image._tar_header(b"p", 512, b"x") + image._pad(
        record("size", "1") + record("comment", "c" * (512 - 9 - 12))) + image.tar(data)
    yield "a tar in a tar", image.tar(image.tar(data))
    yield "empty", image.tar(b"")
    long = image._tar_header(b"x", (1 << 20) + 1, b"x") + bytes(4096)
    yield "a pax header of more than 1 MiB", long
    yield "a pax header beyond the end", image._tar_header(b"x", 1 << 20, b"x") + bytes(4096)


# ---- kinds of images ----

def _content(size, seed):
    """Returns bytes in which each KiB is repeated text, zeros or noise."""
    rng = random.Random(seed)
    out = b""
    while len(out) < size:
        kind = rng.randrange(8)
        word = rng.randbytes(rng.randrange(3, 12))
        out += bytes(1024) if kind == 0 else rng.randbytes(1024) if kind == 1 else (word * 400)[:1024]
    return out[:size]


def _extents(seed, zeroed=True):
    """Returns parts of a disk of 64 KiB: with data, and, if zeroed is set, a zeroed one. Between them are holes."""
    data = _content(24 << 10, seed)
    extents = [(0, data[:4096]), (10, data[4096:5632]), (16, data[5632:12800]), (40, data[12800:13312]),
               (64, data[13312:21504]), (100, data[21504:])]
    return extents + [(112, 6)] if zeroed else extents


def _kinds():
    """Yields (kind, target, made). made yields (name, blobs)."""
    rng = random.Random(20240607)
    lz4, zstd = image.LZ4, image.ZSTD

    def plain(mutants):
        return ((name, (raw,)) for name, raw in mutants)

    for name, data, flips, structs, options in (
            ("zfile-lz4-4k", _content(76 << 10, 1)[:-200], 60, True, {}),
            ("zfile-zstd-4k-trailer", _content(20 << 10, 2)[:-512], 60, True, {"algorithm": zstd, "overwrite": False}),
            ("zfile-lz4-512-nodigest-trailer", _content(8 << 10, 3),
             40, True, {"block": 512, "digest": False, "overwrite": False}),
            ("zfile-zstd-64k-nodigest", _content(140 << 10, 6),
             40, False, {"algorithm": zstd, "block": 65536, "digest": False}),
            ("zfile-zstd-512-nocrc", _content(8 << 10, 4)[:-1],
             40, False, {"algorithm": zstd, "block": 512, "crc": False}),
            ("zfile-lz4-64k-nocrc", _content(130 << 10, 5), 40, False, {"block": 65536, "crc": False}),
            ("zfile-lz4-16k-bare", _content(50 << 10, 7),
             40, False, {"block": 16384, "crc": False, "digest": False, "overwrite": False}),
            ("zfile-lz4-64k-noise", random.Random(8).randbytes(132 << 10), 20, False, {"block": 65536})):
        zf = _Zfile(data, **options)
        yield name, "zfile", plain(_zfile_all(zf, rng, flips, structs))

    layer = _Lsmt(64 << 10, _extents(10))
    yield "lsmt", "lsmt", plain(_lsmt_all(layer, rng, 60))
    dense = _Lsmt((60 << 10) - 100, _extents(11, False), pad=False)
    yield "lsmt-unpadded", "lsmt", plain(_lsmt_all(dense, rng, 40, structs=False))

    pax = image.tar(layer.raw)
    yield "tar-lsmt", "lsmt", plain(_tar_mutants(pax, (("pax", 0), ("member", 1024)), layer.raw, rng))
    inner = image.zfile(dense.raw)
    ustar = image.tar(inner, pax=False, magic=b"ustar  \0")
    yield "tar-zfile", "lsmt", plain(_tar_mutants(ustar, (("member", 0),), inner, rng))

    yield "zlsmt-lz4-4k", "lsmt", plain(_zlsmt(layer, rng))
    yield "zlsmt-zstd-16k-trailer", "lsmt", plain(
        _zlsmt(dense, rng, structs=False, algorithm=zstd, block=16384, overwrite=False))

    lower, upper = image.lsmt(64 << 10, _extents(12)), image.lsmt(64 << 10, [(4, _content(20 << 9, 13)), (90, 20)])
    middle = _Lsmt(64 << 10, [(2, _content(6 << 9, 14)), (20, 10), (60, _content(24 << 9, 15))])
    stacks = {"lowest": lambda raw: (raw, image.zfile(lower), upper), "middle": lambda raw: (lower, raw, upper),
              "middle-zfile": lambda raw: (lower, image.zfile(raw, zstd), upper),
              "top": lambda raw: (image.tar(lower), upper, raw)}
    for name, stack in stacks.items():
        changed = [*_lsmt_entries(middle, full=False), *_flips(middle.raw, rng, 20),
                   *((what, raw) for what, raw in _lsmt_structs(middle) if what.startswith("trailer.virtual_size")),
                   ("cut in half", middle.raw[:len(middle.raw) // 2])]
        yield f"stack-{name}", "lsmt", ((what, stack(raw)) for what, raw in changed)
    yield "stack-count", "lsmt", ((f"{count} layers", (lower,) * count) for count in (1, 2, 254, 255, 256))


def _tar_mutants(raw, headers, data, rng):
    yield from _tar_structs(raw, headers)
    yield from _tar_pax(data)
    edges = [("0", 0), ("the pax payload", 512), ("the member", 1024), ("its data", 1536), ("the end", len(raw)),
             ("the last block", len(raw) - 1024)]
    yield from _cuts(raw, edges)
    for name, new in _flips(raw[:1536], rng, 40):
        yield name, new + raw[1536:]


def _zlsmt(layer, rng, structs=True, **options):
    """Yields (name, blob) of layers in a ZFile. In each, the layer is malformed, a block is corrupt, or bits are
    flipped."""
    for name, raw in [*(_lsmt_structs(layer) if structs else ()), *_lsmt_entries(layer, full=structs)]:
        if not name.startswith(("header", "trailer.uuid", "trailer.parent", "trailer.user", "trailer.rest")):
            yield f"inside: {name}", image.zfile(raw, **options)
    for name, raw in _cuts(layer.raw, [("4 KiB", 4096), ("8 KiB", 8192), ("the trailer", layer.end),
                                       ("the end", len(layer.raw))]):
        yield f"inside: {name}", image.zfile(raw, **options)
    zf = _Zfile(layer.raw, **options)
    for nth in range(zf.count):
        stored = bytearray(zf.stored[nth])
        stored[len(stored) // 2] ^= 1
        yield f"block {nth} corrupt", zf.of(zf.stored[:nth] + [bytes(stored)] + zf.stored[nth + 1:])
    yield "inside: a ZFile", image.zfile(zf.raw, **options)
    yield "inside: nothing", image.zfile(b"", **options)
    yield "inside: a byte", image.zfile(b"L", **options)
    yield "inside: noise", image.zfile(rng.randbytes(9000), **options)
    yield from _flips(zf.raw, rng, 60)


def cases():
    """Yields every case, by kind: (kind, [Case])."""
    for kind, target, made in _kinds():
        seen, out = set(), []
        for what, blobs in made:
            if what not in seen:
                seen.add(what)
                out.append(Case(f"{kind}/{what}", target, blobs))
        yield kind, out
