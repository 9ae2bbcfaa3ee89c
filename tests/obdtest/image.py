# SPDX-License-Identifier: GPL-2.0
"""Images: writers and readers of ZFile, LSMT and tar that share no code with the tested programs."""

import ctypes
import random
import struct

_lz4 = ctypes.CDLL("liblz4.so.1")
_zstd = ctypes.CDLL("libzstd.so.1")
_zstd.ZSTD_compress.restype = ctypes.c_size_t
_zstd.ZSTD_compress.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int]
_zstd.ZSTD_decompress.restype = ctypes.c_size_t
_zstd.ZSTD_decompress.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t]
_zstd.ZSTD_createCCtx.restype = ctypes.c_void_p
_zstd.ZSTD_freeCCtx.argtypes = [ctypes.c_void_p]
_zstd.ZSTD_CCtx_setParameter.restype = ctypes.c_size_t
_zstd.ZSTD_CCtx_setParameter.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
_zstd.ZSTD_compress2.restype = ctypes.c_size_t
_zstd.ZSTD_compress2.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t]
_crc = ctypes.CDLL("libext2fs.so.2").ext2fs_crc32c_le
_crc.restype = ctypes.c_uint32
_crc.argtypes = [ctypes.c_uint32, ctypes.c_char_p, ctypes.c_size_t]

LZ4, ZSTD = 1, 2
NAMES = {LZ4: "lz4", ZSTD: "zstd"}
MAGIC = b"ZFile\0\1\0tuji.yyf@Alibaba"
LSMT_MAGIC = bytes.fromhex("4c534d5400010200657e63d29444084ca2d2c8ec4fcfae8a")
BLOCK_SEED = 100007
INVALID = struct.pack("<QQ", (1 << 50) - 1, 0)


def crc32c(seed, data):
    """Returns the CRC-32C without the inversions before and after it."""
    return _crc(seed, data, len(data))


def compress(algorithm, data):
    room = len(data) + len(data) // 128 + 1024
    out = ctypes.create_string_buffer(room)
    if algorithm == LZ4:
        length = _lz4.LZ4_compress_default(data, out, len(data), room)
        assert length > 0
    else:
        length = _zstd.ZSTD_compress(out, room, data, len(data), 3)
        assert length <= room
    return out.raw[:length]


def zstd_frame(data, checksum, content_size=True):
    """Returns a zstd frame with or without a checksum and the size of its content."""
    room = len(data) + len(data) // 128 + 1024
    out = ctypes.create_string_buffer(room)
    context = _zstd.ZSTD_createCCtx()
    # ZSTD_c_contentSizeFlag, ZSTD_c_checksumFlag
    for parameter, value in ((200, content_size), (201, checksum)):
        assert _zstd.ZSTD_CCtx_setParameter(context, parameter, int(value)) <= 1
    length = _zstd.ZSTD_compress2(context, out, room, data, len(data))
    _zstd.ZSTD_freeCCtx(context)
    assert length <= room
    return out.raw[:length]


def decompress(algorithm, data, length):
    out = ctypes.create_string_buffer(length)
    if algorithm == LZ4:
        got = _lz4.LZ4_decompress_safe(data, out, len(data), length)
    else:
        got = _zstd.ZSTD_decompress(out, length, data, len(data))
    if got != length:
        raise ValueError("block does not decompress")
    return out.raw


def sample(size, seed=1):
    """Returns bytes like those of images: text, zeros and noise, in runs of any length."""
    rng = random.Random(seed)
    words = [rng.randbytes(rng.randrange(2, 12)) for _ in range(40)]
    out = bytearray()
    while len(out) < size:
        length = rng.randrange(1, 24000)
        kind = rng.randrange(4)
        if kind == 0:
            out += bytes(length)
        elif kind == 1:
            out += rng.randbytes(length)
        else:
            out += (b" ".join(rng.choices(words, k=100)) * (length // 500 + 1))[:length]
    return bytes(out[:size])


# ---- ZFile ----

def zfile_struct(flags, index_offset=0, count=0, size=0, index_crc=0, block=4096, algorithm=LZ4, verify=1,
                 digest=True, **other):
    """Returns the header or trailer of a ZFile."""
    raw = bytearray(512)
    flags |= 16 if digest else 0
    struct.pack_into("<24sIIQQQQIIIBBBxIIB", raw, 0, MAGIC, 96, 0, flags, index_offset, count, size, index_crc,
                     0, block, algorithm, 0, other.get("use_dict", 0), 0, other.get("dict_size", 0), verify)
    if digest:
        struct.pack_into("<I", raw, 28, crc32c(0, bytes(raw)))
    return bytes(raw)


def zfile(data, algorithm=LZ4, block=4096, crc=True, overwrite=True, digest=True, compressor=None):
    """Returns data as a ZFile. If compressor is given, this function compresses the blocks."""
    stored = []
    for at in range(0, len(data), block):
        piece = data[at:at + block]
        payload = compressor(piece) if compressor else compress(algorithm, piece)
        if crc:
            payload += struct.pack("<I", crc32c(BLOCK_SEED, payload))
        stored.append(payload)
    return zfile_of(stored, len(data), algorithm, block, crc, overwrite, digest)


def zfile_of(stored, size, algorithm=LZ4, block=4096, crc=True, overwrite=True, digest=True, **other):
    """Returns a ZFile of stored blocks."""
    index = struct.pack(f"<{len(stored)}I", *map(len, stored))
    blocks = b"".join(stored)
    options = {"block": block, "algorithm": algorithm, "verify": int(crc), "digest": digest, **other}
    filled = {"index_offset": 512 + len(blocks), "count": len(stored), "size": size,
              "index_crc": crc32c(0, index) if digest else 0, **options}
    header = zfile_struct(0xB, **filled) if overwrite else zfile_struct(0x3, **options)
    return header + blocks + index + zfile_struct(0x6, **filled)


class Zfile:
    """A ZFile in memory, read as its format prescribes."""

    def __init__(self, raw):
        if raw[:24] != MAGIC:
            raise ValueError("not a ZFile")
        head = raw[:512]
        if not struct.unpack_from("<Q", head, 32)[0] & 8:
            head = raw[-512:]
        self.index_offset, self.count, self.size = struct.unpack_from("<QQQ", head, 40)
        self.block, self.algorithm = struct.unpack_from("<IB", head, 72)
        self.crc = bool(head[88])
        self.raw = raw
        self._places = None

    def places(self):
        """Returns (offset, length) of the stored bytes of each block."""
        if self._places is None:
            at, self._places = 512, []
            for length in struct.unpack_from(f"<{self.count}I", self.raw, self.index_offset):
                self._places.append((at, length))
                at += length
        return self._places

    def read_block(self, number):
        at, length = self.places()[number]
        payload = self.raw[at:at + length - (4 if self.crc else 0)]
        return decompress(self.algorithm, payload, min(self.block, self.size - number * self.block))

    def read(self, start=0, length=None):
        """Returns a range of the original file, or all of it."""
        end = self.size if length is None else min(start + length, self.size)
        if start >= end:
            return b""
        first = start // self.block
        blocks = b"".join(self.read_block(number) for number in range(first, -(-end // self.block)))
        return blocks[start - first * self.block:end - first * self.block]


# ---- LSMT ----

def lsmt_entry(offset, length, moffset, zeroed=False, tag=0):
    return struct.pack("<QQ", offset | length << 50, moffset | int(zeroed) << 55 | tag << 56)


def lsmt_struct(flags, virtual_size, index_offset=0, count=0):
    """Returns the header or trailer of an LSMT file."""
    raw = bytearray(4096)
    struct.pack_into("<24sIIQQQ", raw, 0, LSMT_MAGIC, 390, flags, index_offset, count, virtual_size)
    raw[132] = raw[133] = 1
    return bytes(raw)


def lsmt_of(entries, data, virtual_size, pad=True):
    """Returns a layer of raw entries."""
    entries = list(entries)
    if pad:
        entries += [INVALID] * (-len(entries) % 256)
    index_offset = 4096 + len(data)
    return (lsmt_struct(7, virtual_size) + data + b"".join(entries) +
            lsmt_struct(6, virtual_size, index_offset, len(entries)))


def lsmt(virtual_size, extents, pad=True):
    """Returns a layer with these parts of the disk: (sector, bytes), or (sector, number of sectors) if zeroed. A long
    part becomes several segments."""
    entries, data = [], bytearray()
    for sector, what in sorted(extents, key=lambda extent: extent[0]):
        zeroed = isinstance(what, int)
        left = what if zeroed else len(what) // 512
        while left:
            length = min(left, 16383)
            entries.append(lsmt_entry(sector, length, 8 + len(data) // 512, zeroed))
            if not zeroed:
                start = len(what) - left * 512
                data += what[start:start + length * 512]
            sector, left = sector + length, left - length
    return lsmt_of(entries, bytes(data), virtual_size, pad)


class Lsmt:
    """A layer in memory, bytes or a Zfile, read as its format prescribes."""

    def __init__(self, file):
        self.file = file
        trailer = self.read((file.size if isinstance(file, Zfile) else len(file)) - 4096, 4096)
        if self.read(0, 24) != LSMT_MAGIC or trailer[:24] != LSMT_MAGIC:
            raise ValueError("not an LSMT layer")
        index_offset, count, self.size = struct.unpack_from("<QQQ", trailer, 32)
        words = struct.unpack(f"<{2 * count}Q", self.read(index_offset, 16 * count))
        self.entries = [(a & (1 << 50) - 1, a >> 50, b & (1 << 55) - 1, bool(b >> 55 & 1))
                        for a, b in zip(words[::2], words[1::2]) if a & (1 << 50) - 1 != (1 << 50) - 1]

    def read(self, start, length):
        """Returns a range of the layer's file."""
        if isinstance(self.file, Zfile):
            return self.file.read(start, length)
        return self.file[start:start + length]

    def extents(self):
        """Yields (sector, bytes) for segments with data, (sector, number of sectors) for zeroed ones."""
        for offset, length, moffset, zeroed in self.entries:
            yield (offset, length if zeroed else self.read(moffset * 512, length * 512))


def merge(layers):
    """Merges layers, lowest first. Returns the segments, sorted: (sector, number of sectors, layer, sector in the
    layer's file or None if zeroed)."""
    merged = []
    for layer in layers:
        upper = [(offset, length, layer, None if zeroed else moffset)
                 for offset, length, moffset, zeroed in layer.entries]
        lower, merged, at = merged, list(upper), 0
        for offset, length, owner, moffset in lower:
            end = offset + length
            while at < len(upper) and upper[at][0] + upper[at][1] <= offset:
                at += 1
            nth = at
            while offset < end:
                over = upper[nth] if nth < len(upper) else (end, 0)
                stop = min(end, max(over[0], offset))
                if stop > offset:
                    merged.append((offset, stop - offset, owner, moffset))
                following = min(end, max(stop, over[0] + over[1]))
                if moffset is not None:
                    moffset += following - offset
                offset, nth = following, nth + 1
        merged.sort(key=lambda extent: extent[0])
    return merged


def flatten(layers, size=None):
    """Returns the content of the disk of these layers, lowest first, computed in the simplest way. size is in bytes."""
    if size is None:
        size = [layer.size for layer in layers if layer.size][-1]
    out = bytearray(-(-size // 512) * 512)
    for layer in layers:
        for sector, what in layer.extents():
            data = bytes(what * 512) if isinstance(what, int) else what
            data = data[:max(len(out) - sector * 512, 0)]
            out[sector * 512:sector * 512 + len(data)] = data
    out[size:] = bytes(len(out) - size)
    return bytes(out)


def random_layer(rng, virtual_size, count=60, longest=64, unit=1):
    """Returns the parts of the disk for a random layer, as lsmt() takes them, aligned to unit sectors."""
    total = virtual_size // 512 // unit
    marks = sorted(rng.sample(range(total), min(2 * count, total) // 2 * 2))
    extents = []
    for start, end in zip(marks[::2], marks[1::2]):
        length = min(end - start, rng.randrange(1, longest + 1)) * unit
        kind = rng.randrange(4)
        extents.append((start * unit, length if kind == 0 else
                        rng.randbytes(512) * length if kind == 1 else sample(length * 512, rng.random())))
    return extents


# ---- tar ----

def _tar_header(name, size, kind, magic=b"ustar\x0000"):
    raw = bytearray(512)
    raw[:len(name)] = name
    raw[100:108], raw[108:116], raw[116:124] = b"0000644\0", b"0000000\0", b"0000000\0"
    raw[124:136], raw[136:148] = b"%011o\0" % size, b"00000000000\0"
    raw[156:157], raw[257:265] = kind, magic
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)


def _pad(data):
    return data + bytes(-len(data) % 512)


def pax_record(key, value):
    length = len(key) + len(value) + 3
    while len(str(length)) + len(key) + len(value) + 3 != length:
        length = len(str(length)) + len(key) + len(value) + 3
    return f"{length} {key}={value}\n".encode()


def tar(data, pax=True, records=b"", magic=b"ustar\x0000"):
    """Returns data in a tar: with a pax header as upstream's tool writes it, or plain ustar."""
    head = b""
    if pax:
        payload = pax_record("size", str(len(data))) + records
        head = _tar_header(b"overlaybd.pax", len(payload), b"x", magic) + _pad(payload)
    head += _tar_header(b"overlaybd.commit", 0 if pax else len(data), b"0", magic)
    return head + _pad(data) + bytes(1024)


def peel_tar(raw):
    """Returns (offset, size) of the file in a tar; None if raw is no tar."""
    if raw[257:262] != b"ustar":
        return None
    total = sum(raw[:148]) + 8 * 32 + sum(raw[156:512])
    if int(raw[148:156].strip(b" \0") or b"0", 8) != total:
        return None
    at, size = 0, None
    while raw[at + 156:at + 157] in (b"x", b"g"):
        length = int(raw[at + 124:at + 136].strip(b" \0"), 8)
        for record in raw[at + 512:at + 512 + length].splitlines():
            key, _, value = record.partition(b" ")[2].partition(b"=")
            if key == b"size" and raw[at + 156:at + 157] == b"x":
                size = int(value)
        at += 512 + -(-length // 512) * 512
    if size is None:
        size = int(raw[at + 124:at + 136].strip(b" \0"), 8)
    return at + 512, size


def unwrap(raw):
    """Returns the blob without its tar wrapper."""
    inner = peel_tar(raw)
    return raw[inner[0]:inner[0] + inner[1]] if inner else raw
