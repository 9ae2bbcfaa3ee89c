#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""How long obdsetup takes to make images, beside the tools that make images of other formats.

tools.py DIRECTORY ROUNDS [PART...], in the tool-chain root, with obdsetup in the PATH. OBD_TREE_MIB (1024) MiB of files
of /usr are the input: as a tree, as a tar of it, and as a disk with an ext4 of it. All ways of a part make an image of
the same input, with the same codec and level, with the same number of threads, on as many CPUs. tools.json and, where a
tmpfs has not enough memory for them, the files are in DIRECTORY.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time

MIB = 1 << 20
DIRECTORIES = ("bin", "include", "lib", "libexec", "sbin", "share")
THREADS = (1, 2)
# The UUID and the hash seed of the disk: the same in every run, so that each run has the same disk.
UUID = "6d616b69-6e67-4d69-8d61-676573212121"
# The work directory needs this many times the size of the tree: it always has the tree, a tar, a disk, and two layers
# or qcow2 images of the disk, and a way may need a copy of the content, a file system and its image.
ROOM = 9
# Seconds between two measurements of the memory that a way uses.
LOOK = 0.02

LZ4 = "--algorithm lz4 --block-size 4k --threads {n}"
LZ4_64K = "--algorithm lz4 --block-size 64k --threads {n}"
LZ4HC = "--algorithm lz4 --level 9 --block-size 4k --threads {n}"
ZSTD = "--algorithm zstd --level 3 --block-size 64k --threads {n}"
CREATE = "obdsetup create --directory tree --fs erofs"
TWO_STEPS = ("mkfs.erofs, then obdsetup create", "mkfs.erofs --quiet between tree && obdsetup create --image between")
MKFS_EROFS = "mkfs.erofs --quiet --workers={n}"
MKSQUASHFS = "mksquashfs tree out -quiet -no-progress -processors {n}"
SQFSTAR = "sqfstar -quiet -no-progress -processors {n}"
# Without -W, qemu-img compresses only one cluster at a time.
QEMU = "qemu-img convert -c -W -m {n} -O qcow2 -o compression_type=zstd"

# By name: what is made, and the ways to make it: a name, and commands that make the file `out'. The first way of each
# part is that of obdsetup, with which the others are compared.
PARTS = {
    "tree-lz4": ("the tree, LZ4, 4 KiB", (
        ("obdsetup create, erofs", f"{CREATE} {LZ4} out"),
        (TWO_STEPS[0], f"{TWO_STEPS[1]} {LZ4} out"),
        ("mkfs.erofs", f"{MKFS_EROFS} -zlz4 -C4096 out tree"))),
    "tree-lz4hc": ("the tree, LZ4 HC level 9, 4 KiB", (
        ("obdsetup create, erofs", f"{CREATE} {LZ4HC} out"),
        (TWO_STEPS[0], f"{TWO_STEPS[1]} {LZ4HC} out"),
        ("mkfs.erofs", f"{MKFS_EROFS} -zlz4hc,level=9 -C4096 out tree"))),
    "tree-lz4-large": ("the tree, LZ4, 64 KiB (mksquashfs: 128 KiB)", (
        ("obdsetup create, erofs", f"{CREATE} {LZ4_64K} out"),
        (TWO_STEPS[0], f"{TWO_STEPS[1]} {LZ4_64K} out"),
        ("mkfs.erofs", f"{MKFS_EROFS} -zlz4 -C65536 out tree"),
        ("mksquashfs", f"{MKSQUASHFS} -comp lz4 -b 128K"))),
    "tree-zstd": ("the tree, zstd level 3, 64 KiB (mksquashfs: 128 KiB)", (
        ("obdsetup create, erofs", f"{CREATE} {ZSTD} out"),
        (TWO_STEPS[0], f"{TWO_STEPS[1]} {ZSTD} out"),
        ("mkfs.erofs", f"{MKFS_EROFS} -zzstd,level=3 -C65536 out tree"),
        ("mksquashfs", f"{MKSQUASHFS} -comp zstd -Xcompression-level 3 -b 128K"))),
    "tar-lz4": ("a tar, LZ4, 4 KiB", (
        ("obdsetup convert, erofs", f"obdsetup convert --fs erofs {LZ4} tar out"),
        ("obdsetup convert, ext4", f"obdsetup convert --fs ext4 {LZ4} tar out"),
        ("mkfs.erofs --tar=f", f"{MKFS_EROFS} --tar=f -zlz4 -C4096 out tar"))),
    "tar-zstd": ("a tar, zstd level 3, 64 KiB (sqfstar: 128 KiB)", (
        ("obdsetup convert, erofs", f"obdsetup convert --fs erofs {ZSTD} tar out"),
        ("obdsetup convert, ext4", f"obdsetup convert --fs ext4 {ZSTD} tar out"),
        ("mkfs.erofs --tar=f", f"{MKFS_EROFS} --tar=f -zzstd,level=3 -C65536 out tar"),
        ("sqfstar", f"{SQFSTAR} -comp zstd -Xcompression-level 3 -b 128K out <tar"))),
    "disk-zstd": ("a raw disk, zstd level 3, 64 KiB", (
        ("obdsetup convert", f"obdsetup convert {ZSTD} disk out"),
        ("qemu-img convert", f"{QEMU} -f raw disk out"))),
    "layer-zstd": ("an uncompressed image, zstd level 3, 64 KiB", (
        ("obdsetup commit", f"obdsetup commit {ZSTD} layer out"),
        ("qemu-img convert", f"{QEMU} -f qcow2 qcow2 out"))),
    "layer-again": ("an image in LZ4 (qcow2: zlib), to zstd level 3, 64 KiB", (
        ("obdsetup commit", f"obdsetup commit {ZSTD} layer-lz4 out"),
        ("qemu-img convert", f"{QEMU} -f qcow2 qcow2-zlib out"))),
}

# What is made of the tree before the measurements, and the parts that need it.
INPUTS = (
    ("tar", "tar", "tar --sort=name --format=posix --pax-option=delete=atime,delete=ctime -C tree -cf tar ."),
    ("disk", "disk layer", f"mkfs.ext4 -q -U {UUID} -E hash_seed={UUID} -d tree disk {{disk}}m"),
    ("layer", "layer-zstd", "obdsetup create --image disk --algorithm none layer"),
    ("layer-lz4", "layer-again", "obdsetup create --image disk --algorithm lz4 --block-size 64k layer-lz4"),
    ("qcow2", "layer-zstd", "qemu-img convert -f raw -O qcow2 disk qcow2"),
    ("qcow2-zlib", "layer-again", "qemu-img convert -W -m 2 -c -f raw -O qcow2 disk qcow2-zlib"),
)

VERSIONS = ("obdsetup --version", "mkfs.erofs --version", "mksquashfs -version", "qemu-img --version")


def run(*args):
    done = subprocess.run(args, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(args)}: status {done.returncode}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def files_below(top):
    """Yields the paths of all files, directories and links below a directory, in the order of their names."""
    for entry in sorted(os.scandir(top), key=lambda entry: entry.name):
        yield entry.path
        if entry.is_dir(follow_symlinks=False) and os.access(entry.path, os.R_OK | os.X_OK):
            yield from files_below(entry.path)


def status_of(path):
    """Returns the status of a path that can be copied, else none."""
    status = os.lstat(path)
    kind = status.st_mode & 0o170000
    if kind in (0o040000, 0o120000) or kind == 0o100000 and os.access(path, os.R_OK):
        return status
    return None


def copy_directory(top, wanted):
    """Copies the first files below /usr/<top> to tree/<top>, up to wanted bytes. Leaves out what no longer fits.
    Returns the names and the bytes."""
    copied, count, size = {}, 0, 0
    os.mkdir(f"tree/{top}")
    for path in files_below(f"/usr/{top}"):
        status = status_of(path)
        to = f"tree{path.removeprefix('/usr')}"
        if status is None or size >= wanted:
            continue
        if not os.path.isdir(os.path.dirname(to)):
            continue
        if os.path.isdir(path) and not os.path.islink(path):
            os.mkdir(to)
        elif status.st_ino in copied:
            os.link(copied[status.st_ino], to)
        elif status.st_size <= wanted - size:
            shutil.copy2(path, to, follow_symlinks=False)
            copied[status.st_ino] = to
            size += status.st_size
        else:
            continue
        count += 1
    return count, size


def make_tree(wanted):
    """Makes a tree with wanted bytes of files: from each directory, the share that it has of all of them. Returns what
    it has."""
    os.mkdir("tree")
    tops = [top for top in DIRECTORIES if os.path.isdir(f"/usr/{top}")]
    sizes = {}
    for top in tops:
        found = {status.st_ino: status.st_size for status in map(status_of, files_below(f"/usr/{top}")) if status}
        sizes[top] = sum(found.values())
    there = sum(sizes.values())
    if there < wanted:
        sys.exit(f"OBD_TREE_MIB={wanted // MIB}: /usr has only {there // MIB} MiB of files")
    names = size = share = 0
    for top in tops:
        # What does not fit in the share of one directory is left to the next.
        share += sizes[top] * wanted / there
        of_top, bytes_of_top = copy_directory(top, int(share) - size)
        names, size = names + of_top, size + bytes_of_top
    return {"names": names, "MiB": round(size / MIB, 1)}


def resident(top):
    """Returns the resident memory of a process and of all below it, in bytes."""
    parents, pages = {}, {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", encoding="ascii", errors="replace") as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:
            # It has ended.
            continue
        parents[int(name)], pages[int(name)] = int(fields[1]), int(fields[21])
    found, left = 0, [top]
    while left:
        pid = left.pop()
        found += pages.get(pid, 0)
        left += [child for child, parent in parents.items() if parent == pid]
    return found * os.sysconf("SC_PAGE_SIZE")


class Watch(threading.Thread):
    """Finds the largest resident memory of a process and of all below it together."""

    def __init__(self, pid):
        super().__init__(daemon=True)
        self.pid, self.most = pid, 0
        self.ended = threading.Event()
        self.start()

    def run(self):
        while not self.ended.wait(LOOK):
            self.most = max(self.most, resident(self.pid))

    def stop(self):
        self.ended.set()
        self.join()
        return self.most


def own_peak():
    """Returns the largest resident memory that this process has had, in bytes."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmHWM"))


def measure_one(command, cpus):
    """Runs a command on these CPUs. Returns seconds, CPU seconds and bytes of memory."""
    words, _, stdin = command.partition("<")
    with open("said", "w+b") as said, open(stdin or os.devnull, "rb") as given:
        everything = os.sched_getaffinity(0)
        # Both are of this thread; the process below inherits them.
        os.sched_setaffinity(0, cpus)
        try:
            start = time.perf_counter()
            # pylint: disable-next=consider-using-with
            process = subprocess.Popen(words.split(), stdin=given, stdout=said, stderr=said)
        finally:
            os.sched_setaffinity(0, everything)
        watch = Watch(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        most = watch.stop()
        if process.returncode:
            said.seek(0)
            text = said.read().decode(errors="replace").strip()
            raise RuntimeError(f"{command}: status {process.returncode}: {text[-2000:]}")
    # The peak of the largest process alone. A process begins with the memory of this one: less than that says nothing.
    largest = usage.ru_maxrss << 10
    return wall, usage.ru_utime + usage.ru_stime, max(most, largest if largest > own_peak() else 0)


def measure(commands, threads):
    """Runs the commands of a way. Returns their figures."""
    for name in ("out", "between"):
        if os.path.exists(name):
            os.unlink(name)
    cpus = set(sorted(os.sched_getaffinity(0))[:threads])
    figures = [measure_one(command, cpus) for command in commands.format(n=threads).split(" && ")]
    return {"wall": round(sum(one[0] for one in figures), 3), "cpu": round(sum(one[1] for one in figures), 3),
            "memory": max(one[2] for one in figures), "size": os.path.getsize("out")}


def warm(tmpfs):
    """Reads all inputs, so that they are in the page cache."""
    if not tmpfs:
        run("sh", "-c", "find . -type f -exec cat {} + >/dev/null")


def measure_part(name, rounds, tmpfs):
    """Returns the rows of a part: each has a way and a number of threads, and the figures of all rounds."""
    title, ways = PARTS[name]
    rows = []
    for threads in THREADS:
        if threads > len(os.sched_getaffinity(0)):
            print(f"{name}: not with {threads} threads: there are fewer CPUs")
            continue
        here = [{"way": way, "command": commands.format(n=threads), "threads": threads, "rounds": []}
                for way, commands in ways]
        for _ in range(rounds):
            for row, (way, commands) in zip(here, ways):
                warm(tmpfs)
                row["rounds"].append(measure(commands, threads))
                print(f"{name}, {way}, {threads} threads: {row['rounds'][-1]}", flush=True)
        rows += here
    return {"title": title, "rows": rows}


def median(row, figure):
    return statistics.median(one[figure] for one in row["rounds"])


def cells(row, first):
    """Returns a row of the table. first is the row of obdsetup with as many threads."""
    walls = [one["wall"] for one in row["rounds"]]
    spread = f"{median(row, 'wall'):.2f} ({min(walls):.2f} to {max(walls):.2f})"
    ratios = ["", ""] if row is first else [
        f"{median(first, figure) / max(median(row, figure), 0.001):.2f}" for figure in ("wall", "cpu")]
    return [row["way"], str(row["threads"]), spread, f"{median(row, 'cpu'):.2f}", f"{median(row, 'memory') / MIB:.0f}",
            f"{median(row, 'size') / 1e6:.1f}", *ratios]


def report(result):
    """Prints the tables, in reStructuredText."""
    facts = result["facts"]
    print("\nOf all images:")
    for name, value in facts.items():
        print(f"  {name}: {value}")
    head = ["Way", "threads", "seconds", "CPU s", "MiB of memory", "MB of image", "ratio", "CPU ratio"]
    for part in result["parts"].values():
        print(f"\n{part['title']}; ratio: obdsetup, of the first row, to this way:\n")
        lines = [head]
        for row in part["rows"]:
            first = next(one for one in part["rows"] if one["threads"] == row["threads"])
            lines.append(cells(row, first))
        widths = [max(len(line[nth]) for line in lines) for nth in range(len(head))]
        rule = "  ".join("=" * width for width in widths)
        text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
        print("\n".join([rule, text[0], rule, *text[1:], rule]))


def facts_of(tree, place, rounds):
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        models = {line.partition(":")[2].strip() for line in file if line.startswith("model name")}
    versions = [subprocess.run(command.split(), capture_output=True, text=True, check=False).stdout.partition("\n")[0]
                for command in VERSIONS]
    return {"CPUs": f"{len(os.sched_getaffinity(0))} of {', '.join(sorted(models))}", "kernel": os.uname().release,
            "versions": "; ".join(versions), "tree": f"{tree['names']} names, {tree['MiB']} MiB", "place": place,
            "rounds": rounds}


def place_for(directory, wanted):
    """Returns the directory for the files, and whether it is on a tmpfs: one that has the room and the memory for them,
    else directory."""
    with open("/proc/meminfo", encoding="ascii") as file:
        memory = {line.split(":")[0]: int(line.split()[1]) << 10 for line in file}
    there = os.statvfs("/tmp")
    is_tmpfs = run("stat", "-f", "-c", "%T", "/tmp").strip() == "tmpfs"
    # What the ways themselves need of memory, too.
    if is_tmpfs and there.f_bavail * there.f_frsize > ROOM * wanted and \
            memory["MemAvailable"] > (ROOM + 2) * wanted + 512 * MIB:
        return "/tmp", True
    return directory, False


def main():
    directory, rounds, *parts = sys.argv[1:]
    directory, rounds = os.path.realpath(directory), int(rounds)
    if unknown := set(parts) - set(PARTS):
        sys.exit(f"PARTS: no {' '.join(sorted(unknown))}; there are: {' '.join(PARTS)}")
    if rounds < 1:
        sys.exit(f"RUNS={rounds}: must be 1 or more")
    parts = parts or list(PARTS)
    wanted = int(os.environ.get("OBD_TREE_MIB") or 1024) * MIB
    place, tmpfs = place_for(directory, wanted)
    result = {"parts": {}}
    with tempfile.TemporaryDirectory(prefix="tools-", dir=place) as work:
        os.chdir(work)
        tree = make_tree(wanted)
        kind = run("stat", "-f", "-c", "%T", ".").strip()
        result["facts"] = facts_of(tree, f"{kind}{'' if tmpfs else ': too little memory for a tmpfs'}", rounds)
        # Blocks of 4 KiB, and room for the metadata.
        disk = int(run("du", "-sm", "--apparent-size", "--block-size=4096", "tree").split()[0]) // 256 * 5 // 4 + 32
        for name, needed_by, command in INPUTS:
            if any(part.startswith(tuple(needed_by.split())) for part in parts):
                run(*command.format(disk=disk).split())
                print(f"{name}: {os.path.getsize(name)} bytes", flush=True)
        for name in parts:
            result["parts"][name] = measure_part(name, rounds, tmpfs)
        os.chdir(directory)
    with open("tools.json", "w", encoding="utf-8") as file:
        json.dump(result, file, indent=1)
    report(result)


if __name__ == "__main__":
    main()
