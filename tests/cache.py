#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""The cache of zfile devices: it serves reads of parts of blocks, and with cache_all also reads of whole blocks."""

import errno
import os
import threading
import time

from obdtest import dm, image
from obdtest.disk import Disk, read_or_none, same_bytes, verify
from obdtest.dm import line
from obdtest.ktap import SLOW, add, check, defer, equal, main, test
from obdtest.memory import meminfo
from obdtest.tracing import Trace, device_filter

DATA = image.sample(700001, 61)
PADDED = DATA + bytes(-len(DATA) % 512)
READS, READ_BYTES, BLOCKS, READ_ERRORS, CORRUPT, CACHED, HITS, MODE, MEMORY, LIMIT = range(5, 15)


def parameter(name):
    """Returns the value of a module parameter in bytes."""
    with open(f"/sys/module/dm_overlaybd/parameters/{name}", encoding="ascii") as file:
        return int(file.read())


def set_limit(size):
    """Sets the limit of the cache in bytes. 0 sets the default."""
    with open("/sys/module/dm_overlaybd/parameters/cache_limit_bytes", "w", encoding="ascii") as file:
        file.write(str(size))


def until(condition, seconds=20):
    """Waits up to `seconds` (more on slow kernels) until the condition is true. Returns whether it is."""
    end = time.monotonic() + seconds * SLOW
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return condition()


def device(lower, raw, *options, size=len(DATA)):
    words = " ".join(map(str, options)).split()
    return dm.create(line(0, dm.sectors(size), "zfile", lower.path, len(raw), len(words), *words))


def counters(zfile):
    return [int(word) if word.isdigit() else word for word in zfile.info()]


def parts(algorithm, block):
    """Small reads of the same block load the block once."""
    raw = image.zfile(DATA, algorithm, block)
    zfile = device(dm.Loop(raw), raw)
    disk = Disk(zfile)
    for at in range(0, block, 512):
        same_bytes(disk.read(at, 512), DATA[at:at + 512], f"512 bytes at {at}")
    got = counters(zfile)
    equal((got[READS], got[BLOCKS], got[CACHED], got[HITS]), (1, 1, 1, block // 512 - 1), "reads, blocks, cached, hits")
    # Reads of whole blocks neither use nor fill the cache.
    disk.read(block, block)
    disk.read(0, block)
    got = counters(zfile)
    equal((got[READS], got[CACHED], got[HITS]), (3, 1, block // 512 - 1), "reads, cached, hits")


def everything(algorithm, block, crc):
    """With cache_all, a block that was read once is neither read nor decompressed again, whatever the size of the
    reads."""
    raw = image.zfile(DATA, algorithm, block, crc)
    zfile = device(dm.Loop(raw), raw, "cache_all")
    blocks = -(-len(DATA) // block)
    disk = Disk(zfile)
    same_bytes(disk.whole(), PADDED, "the first time")
    first = counters(zfile)
    equal((first[BLOCKS], first[CACHED]), (blocks, blocks), "blocks decompressed, cached")
    same_bytes(disk.whole(), PADDED, "the second time")
    same_bytes(disk.whole(70144), PADDED, "in reads of another size")
    verify(zfile, PADDED, rounds=40)
    last = counters(zfile)
    equal(last[:HITS], first[:HITS], "everything but hits")
    check(last[HITS] >= 2 * blocks, f"{last[HITS]} hits")


def small(places):
    """Reads are correct even if the cache has no room for all blocks of a read."""
    for algorithm, block in ((image.LZ4, 512), (image.LZ4, 4096), (image.ZSTD, 65536)):
        raw = image.zfile(DATA, algorithm, block)
        zfile = device(dm.Loop(raw), raw, f"cache_blocks {places} cache_all")
        verify(zfile, PADDED, rounds=60)
        cached = counters(zfile)[CACHED]
        check(0 < cached <= places, f"{cached} blocks cached")


@test("cache_all: layers that images share are read once")
def images():
    vsize = 1 << 20
    layers = [image.lsmt(vsize, [(0, image.sample(1500 * 512, 62)), (1600, 50)]),
              image.lsmt(vsize, [(100, image.sample(300 * 512, 63))]),
              image.lsmt(vsize, [(250, image.sample(100 * 512, 64)), (1990, image.sample(10 * 512, 65))])]
    zfiles = []
    for layer in layers:
        raw = image.zfile(layer)
        zfiles.append((device(dm.Loop(raw), raw, "cache_all", size=len(layer)), len(layer)))
    two, three = dm.lsmt(vsize, *zfiles[:2]), dm.lsmt(vsize, *zfiles)
    same_bytes(Disk(two).whole(), image.flatten([image.Lsmt(layer) for layer in layers[:2]]), "two layers")
    before = [counters(zfile) for zfile, _ in zfiles]
    same_bytes(Disk(three).whole(), image.flatten([image.Lsmt(layer) for layer in layers]), "three layers")
    after = [counters(zfile) for zfile, _ in zfiles]
    for nth in range(2):
        equal(after[nth][READS:HITS], before[nth][READS:HITS], f"reads and blocks of layer {nth}")
        check(after[nth][HITS] > before[nth][HITS], f"{after[nth][HITS]} hits of layer {nth}")
    check(after[2][READS] > before[2][READS], "no reads of the third layer")


@test("cache_all: with concurrent readers, each block is read and decompressed once")
def together():
    raw = image.zfile(DATA)
    loop = dm.Loop(raw)
    lower = dm.delayed(loop, loop.size // 512, 20)
    zfile = device(lower, raw, "cache_all")
    blocks = -(-len(DATA) // 4096)
    results = []

    def reader(piece):
        disk = Disk(zfile)
        results.append(disk.whole(piece) == PADDED)

    threads = [threading.Thread(target=reader, args=(piece,)) for piece in (65536, 65536, 131072, 12288)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    equal(results, [True] * 4, "content")
    got = counters(zfile)
    equal(got[BLOCKS], blocks, "blocks decompressed")
    check(got[HITS] > 0, "no hits")
    # A sector in which one lower read ends and the next one begins is read twice.
    most = len(raw) + got[READS] * 1024
    check(got[READ_BYTES] <= most, f"{got[READ_BYTES]} bytes read, {most} at most")


@test("cache_all: a corrupt block fails no other block")
def corrupt():
    places = image.Zfile(image.zfile(DATA)).places()
    raw = bytearray(image.zfile(DATA))
    raw[places[3][0] + 5] ^= 1
    raw = bytes(raw)
    zfile = device(dm.Loop(raw), raw, "cache_all")
    disk = Disk(zfile)
    equal(read_or_none(disk, 0, 65536), None, "a read of 16 blocks")
    got = counters(zfile)
    equal((got[CORRUPT], got[CACHED]), (1, 15), "corrupt, cached")
    for nth in range(16):
        wanted = None if nth == 3 else DATA[nth * 4096:nth * 4096 + 4096]
        equal(read_or_none(disk, nth * 4096, 4096), wanted, f"block {nth}")
    equal(counters(zfile)[CORRUPT], 2, "corrupt")


def start_together(count, function):
    """Starts count threads. They call function at the same time, even if starting a thread takes long."""
    there = threading.Barrier(count)

    def run():
        there.wait()
        function()

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads


def broken(options, milliseconds):
    """Returns a zfile device whose lower reads fail after some milliseconds, and the function that makes them
    succeed."""
    raw = image.zfile(DATA, image.ZSTD, 65536)
    loop = dm.Loop(raw)
    sectors = loop.size // 512
    below = dm.linear(loop, sectors, readonly=True)
    zfile = device(dm.delayed(below, sectors, milliseconds), raw, *options)

    def replace(*table):
        below.load(line(0, sectors, *table))
        below.resume()

    replace("error")
    return zfile, lambda: replace("linear", loop.path, 0)


def failing(options, length):
    """If a lower read fails while other readers wait for its blocks, one of these repeats it, once."""
    zfile, mend = broken(options, max(600, 300 * SLOW))
    results = []
    disk = Disk(zfile)
    threads = start_together(8, lambda: results.append(read_or_none(disk, 0, length)))
    for thread in threads:
        thread.join()
    equal(results, [None] * 8, "reads")
    got = counters(zfile)
    equal((got[CACHED], got[READS], got[READ_ERRORS], got[HITS]), (0, 2, 2, 7), "cached, lower reads, failed, hits")
    mend()
    verify(zfile, PADDED, rounds=10)


def mended(options, length):
    """If a lower read fails and is repeated with success, only the reader that issued the first one gets an error."""
    zfile, mend = broken(options, max(1000, 400 * SLOW))
    results = []
    disk = Disk(zfile)
    threads = start_together(8, lambda: results.append(read_or_none(disk, 0, length)))
    while counters(zfile)[READ_ERRORS] == 0:
        time.sleep(0.02)
    mend()
    for thread in threads:
        thread.join()
    equal(sorted(result == DATA[:length] for result in results), [False] + [True] * 7, "reads with the correct data")
    equal(results.count(None), 1, "failed reads")
    got = counters(zfile)
    equal((got[CACHED], got[READS], got[READ_ERRORS], got[BLOCKS]), (1, 2, 1, 1), "cached, reads, failed, decompressed")


@test("lower reads for the cache aren't marked as read-ahead, since other readers may wait for them")
def not_ahead():
    raw = image.zfile(DATA, image.ZSTD, 65536)
    loop = dm.Loop(raw)
    trace = Trace(("block:block_bio_queue", device_filter(loop)))
    for options, ahead in (("cache_all", False), ("cache_blocks 0", True)):
        zfile = device(loop, raw, options)
        trace.lines()
        fd = os.open(zfile.path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 262144, os.POSIX_FADV_WILLNEED)
        same_bytes(os.pread(fd, 262144, 0), DATA[:262144], options)
        os.close(fd)
        kinds = {text.split()[1] for name, text in trace.lines() if name.endswith("block_bio_queue")}
        check(kinds, "no read was traced")
        equal(any("A" in kind for kind in kinds), ahead, f"read-ahead below {options}, of {kinds}")


@test("cache_all: the cache is freed when the kernel needs memory")
def goes_back():
    raw = image.zfile(DATA)
    zfile = device(dm.Loop(raw), raw, "cache_all")
    disk = Disk(zfile)
    disk.whole()
    check(counters(zfile)[CACHED] > 0, "nothing cached")
    for _ in range(50 * SLOW):
        with open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as file:
            file.write("2")
        if counters(zfile)[CACHED] == 0:
            break
    equal(counters(zfile)[CACHED], 0, "cached")
    equal(parameter("cache_bytes"), 0, "bytes in the cache")
    same_bytes(disk.whole(), PADDED, "afterwards")


@test("a message changes which reads go through the cache of a live device")
def message():
    raw = image.zfile(DATA)
    loop = dm.Loop(raw)
    zfile = device(loop, raw, "cache_blocks 1000")
    disk = Disk(zfile)

    def read(mode, shown, cached, reads):
        got = counters(zfile)
        equal(got[MODE], mode, "mode in the status")
        equal(zfile.status(dm.TABLE)[0][3], f"{loop.number} {len(raw)}{shown}", f"table with {mode}")
        for length in (8192, 512):
            same_bytes(disk.read(0, length), DATA[:length], f"{length} bytes with {mode}")
        after = counters(zfile)
        equal((after[CACHED], after[READS] - got[READS]), (cached, reads), f"cached, lower reads with {mode}")

    parts_line, all_line = " 2 cache_blocks 1000", " 3 cache_blocks 1000 cache_all"
    read("parts", parts_line, 1, 2)
    zfile.message("cache none")
    read("none", " 3 cache_blocks 1000 cache_none", 1, 2)
    zfile.message("cache all")
    read("all", all_line, 2, 1)
    read("all", all_line, 2, 0)
    for word in ("default", "auto", "parts"):
        zfile.message("cache all")
        equal(counters(zfile)[MODE], "all", "mode")
        zfile.message(f"cache {word}")
        read("parts", parts_line, 2, 1)
    for words in ("cache", "cache some", "cache all all", "cache all all all", "caches all", "all"):
        try:
            zfile.message(words)
        except OSError as error:
            equal(error.errno, errno.EINVAL, words)
        else:
            check(False, f"{words!r} is accepted")
    equal(counters(zfile)[MODE], "parts", "mode after the refused messages")
    # A reload keeps the mode, which becomes the default.
    zfile.message("cache all")
    zfile.load(zfile.status(dm.TABLE)[0])
    zfile.resume()
    equal(counters(zfile)[MODE], "all", "mode after a reload")
    zfile.message("cache none")
    zfile.message("cache default")
    equal(counters(zfile)[MODE], "all", "default after a reload")


@test("the leaves of distant blocks count as memory of the cache")
def far():
    raw = image.zfile(DATA)
    start = parameter("cache_bytes")
    zfile = device(dm.Loop(raw), raw, "cache_all")
    disk = Disk(zfile)
    for nth in range(3):
        same_bytes(disk.read(nth << 18, 4096), DATA[nth << 18:(nth << 18) + 4096], f"block {nth * 64}")
    equal(counters(zfile)[CACHED], 3, "cached")
    more = parameter("cache_bytes") - start
    check(more >= 3 * (4096 + 512), f"{more} bytes for 3 blocks")
    disk.close()
    zfile.remove()
    equal(parameter("cache_bytes"), start, "bytes in the cache once the device is gone")


@test("the blocks of all devices have one limit, which can be changed")
def limit():
    raw = image.zfile(DATA)
    loop = dm.Loop(raw)
    default = parameter("cache_limit_bytes")
    total = meminfo()["MemTotal"] << 10
    check(total * 0.045 < default < total * 0.055, f"limit {default} of {total} bytes")
    defer(set_limit, 0)
    start = parameter("cache_bytes")
    # A limit with room for about 60 of the 171 blocks, and the number of bytes by which two workers may exceed it.
    room, more = 256 << 10, 64 << 10
    set_limit(start + room)
    zfiles = [device(loop, raw, "cache_all") for _ in range(3)]
    disks = [Disk(zfile) for zfile in zfiles]
    most = 0
    for nth in range(12):
        same_bytes(disks[nth % 3].whole(), PADDED, f"device {nth % 3}")
        most = max(most, parameter("cache_bytes") - start)
        check(most <= room + more, f"{most} bytes in the cache")
    check(most > room // 2, f"{most} bytes in the cache at most")
    got = counters(zfiles[0])
    equal((got[MEMORY], got[LIMIT]), (parameter("cache_bytes"), start + room), "memory and limit in the status")
    cached = sum(counters(zfile)[CACHED] for zfile in zfiles)
    check(30 <= cached <= 80, f"{cached} blocks in the cache")
    set_limit(start + (64 << 10))
    check(until(lambda: parameter("cache_bytes") <= start + (64 << 10)), "a lower limit takes no effect")
    set_limit(start + (64 << 20))
    for disk in disks:
        disk.whole()
    equal([counters(zfile)[CACHED] for zfile in zfiles], [-(-len(DATA) // 4096)] * 3, "cached with a higher limit")
    for disk in disks:
        disk.close()
    zfiles[0].remove()
    equal([counters(zfile)[CACHED] for zfile in zfiles[1:]], [-(-len(DATA) // 4096)] * 2, "cached by the others")
    for zfile in zfiles[1:]:
        zfile.remove()
    equal(parameter("cache_bytes"), start, "bytes in the cache once the devices are gone")
    set_limit(0)
    equal(parameter("cache_limit_bytes"), default, "the default")


@test("a device at its share evicts its own blocks only")
def share():
    raw = image.zfile(DATA)
    loop = dm.Loop(raw)
    small_one, other = device(loop, raw, "cache_all cache_blocks 10"), device(loop, raw, "cache_all")
    Disk(other).whole()
    for _ in range(4):
        same_bytes(Disk(small_one).whole(), PADDED, "the device with a share")
        check(0 < counters(small_one)[CACHED] <= 10, f"{counters(small_one)[CACHED]} blocks of the device with a share")
    equal(counters(other)[CACHED], -(-len(DATA) // 4096), "blocks of the other device")


@test("blocks that are used again stay cached")
def used_again():
    raw = image.zfile(DATA)
    zfile = device(dm.Loop(raw), raw, "cache_all cache_blocks 16")
    disk = Disk(zfile)
    for nth in range(1, 120):
        disk.read(0, 4096)
        same_bytes(disk.read(nth * 4096, 4096), DATA[nth * 4096:nth * 4096 + 4096], f"block {nth}")
    got = counters(zfile)
    check(got[BLOCKS] <= 119 + 3, f"{got[BLOCKS]} blocks decompressed, 120 are expected")
    equal(got[HITS] + got[BLOCKS], 2 * 119, "hits and misses")


@test("the table status has the options")
def options():
    raw = image.zfile(DATA)
    loop = dm.Loop(raw)
    for words, shown in (("", ""), ("cache_all", " 1 cache_all"), ("cache_blocks 0 cache_all", " 3 cache_blocks 0 cache_all"),
                         ("cache_all cache_blocks 16", " 3 cache_blocks 16 cache_all"),
                         ("cache_blocks 16777216", " 2 cache_blocks 16777216"),
                         ("cache_none", " 1 cache_none"), ("cache_none cache_blocks 8", " 3 cache_blocks 8 cache_none"),
                         ("cache_all cache_all", " 1 cache_all"),
                         ("panic_on_corruption", " 1 panic_on_corruption"),
                         ("panic_on_corruption cache_all cache_blocks 8",
                          " 4 cache_blocks 8 cache_all panic_on_corruption")):
        zfile = device(loop, raw, words)
        equal(zfile.status(dm.TABLE)[0][3], f"{loop.number} {len(raw)}{shown}", words)
        same_bytes(Disk(zfile).whole(), PADDED, words)
    for words in ("cache_blocks 16777217", "cache_blocks", "cache_all 1", "cache_all cache_none", "cache_none cache_all"):
        try:
            device(loop, raw, words)
        except OSError as error:
            equal(error.errno, errno.EINVAL, words)
        else:
            check(False, f"{words!r} is accepted")


for each_algorithm, each_name in image.NAMES.items():
    for each_block in (512, 4096, 65536):
        if each_block > 512:
            add(f"{each_name}, {each_block}: reads of parts load a block once", parts, each_algorithm, each_block)
        for each_crc in (True, False):
            add(f"{each_name}, {each_block}, {'CRC' if each_crc else 'no CRC'}: cache_all reads and decompresses once",
                everything, each_algorithm, each_block, each_crc)
for each_options, each_length in (((), 4096), (("cache_all",), 4096), (("cache_all",), 65536)):
    each_title = f"{' '.join(each_options) or 'default'}, reads of {each_length}"
    add(f"{each_title}: if a lower read fails while readers wait, one of them repeats it", failing, each_options,
        each_length)
    add(f"{each_title}: if a lower read fails and the next one succeeds, waiting readers get the data", mended,
        each_options, each_length)
for each_places in (1, 16, 40):
    add(f"cache_all with room for {each_places} blocks", small, each_places)


if __name__ == "__main__":
    main()
