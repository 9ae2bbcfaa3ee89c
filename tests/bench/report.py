#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Reports benchmark results: report.py DIRECTORY [OLD]. Reads the figures of each kernel (KERNEL.json), writes
result.json with all of them, result.md and plots. Prints which goals are reached and, given an older result.json,
which figures changed. Fails if interrupts were lost."""

import json
import os
import statistics
import sys

import plot

# A smaller change can be noise. Nor is a change reported if the ranges overlap.
CHANGED = 0.05


class Run:
    """The figures of one kernel."""

    def __init__(self, data):
        self.data = data
        self.rows = data["rows"]
        self.facts = data["facts"]

    def all(self, row, device):
        """Returns the nanoseconds per request of each turn."""
        return [one["ns"] / one["requests"] for one in self.rows[row][device]]

    def ns(self, row, device):
        """Returns the nanoseconds per request: the median."""
        return statistics.median(self.all(row, device))

    def rate(self, row, device):
        """Returns the MB/s: median, lower and upper quartile."""
        return quartiles([one["bytes"] * 1000 / max(one["ns"], 1) for one in self.rows[row][device]])

    def figure(self, row, device, name):
        return statistics.median(one[name] for one in self.rows[row][device])

    def times(self, row, device, other):
        """Returns how many times as fast a device is as another one in the same row, from turns of both that follow one
        another: median, lower and upper quartile."""
        return quartiles([b / a for a, b in zip(self.all(row, device), self.all(row, other))])

    def growth(self, rows, device):
        """Returns how many times as fast the second row is as the first one: median, lower and upper quartile."""
        return quartiles([a / b for a, b in zip(self.all(rows[0], device), self.all(rows[1], device))])

    def share(self, row, kind, device="zfile"):
        """Returns the share of the limit that a device reaches, from turns that follow one another. The limit is the
        least time of a request: its lower read and decompression."""
        least = [a + b for a, b in zip(self.all(row, f"lower {kind}"), self.all(row, f"codec {kind}"))]
        return quartiles([a / b for a, b in zip(least, self.all(row, f"{device} {kind}"))])


def quartiles(values):
    """Returns median, lower and upper quartile."""
    low, mid, high = statistics.quantiles(values, n=4, method="inclusive")
    return mid, low, high


class Goals:
    """Goals, and whether they are reached. There are none for what wasn't measured."""

    def __init__(self):
        self.lines = []

    def add(self, name, measured, least=None, most=None):
        """Adds a goal for a figure, or for the median of (median, lower quartile, upper quartile)."""
        wanted = f">= {least:g}" if most is None else f"<= {most:g}"
        spread = ""
        if isinstance(measured, tuple):
            measured, *rest = measured
            spread = " ({:.3g} to {:.3g})".format(*rest)
        good = measured >= least if most is None else measured <= most
        self.lines.append(f"goal: {name} measured {measured:.3g}{spread} wanted {wanted} {'ok' if good else 'short'}")


def block_goals(run, goals):
    """Adds goals for reads of block devices with one CPU."""
    if "4k random, 1 deep" not in run.rows:
        return
    for row, least in (("4k random, 1 deep", 0.85), ("4k random, 32 deep", 0.85), ("128k sequential", 0.9),
                       ("1m sequential", 0.9)):
        goals.add(f"zfile LZ4 4k, {row}, share of the limit", run.share(row, "lz4-4k"), least)
    row = "4k random, 32 deep"
    p50, p99 = (run.figure(row, "zfile lz4-4k", name) for name in ("p50", "p99"))
    goals.add(f"zfile LZ4 4k, {row}, p99 / p50", p99 / p50, most=3)
    row = "4k random, 1 deep"
    goals.add(f"lsmt on zfile LZ4 4k / zfile, {row}", run.times(row, "lsmt-zfile lz4-4k", "zfile lz4-4k"), 0.97)


def growth_goals(run, goals):
    """Adds goals for throughput with more depth and readers: the least fraction of the throughput with fewer."""
    if "4k random, 1 deep" not in run.rows:
        return
    for name, rows in (("4k random, depth 32 / 1", ("4k random, 1 deep", "4k random, 32 deep")),
                       ("4k random, 2 x 16 deep / 1", ("4k random, 1 deep", "4k random, 2 x 16 deep")),
                       ("128k sequential, depth 8 / 1", ("128k sequential", "128k sequential, 8 deep")),
                       ("128k sequential, 2 readers / 1", ("128k sequential", "128k sequential, 2 readers")),
                       ("1m sequential, 2 readers / 1", ("1m sequential", "1m sequential, 2 readers"))):
        goals.add(f"zfile LZ4 4k, two CPUs, {name}", run.growth(rows, "zfile lz4-4k"), 1)


def file_goals(run, goals, squashfs_only=False):
    """Adds goals for reads of files."""
    rows = ("sequential, cold", "random 4k, cold", "small files, cold")
    if rows[0] not in run.rows:
        return
    for kind in ("lz4-4k", "lz4-64k", "zstd-4k", "zstd-64k"):
        for row in rows:
            if f"erofs {kind}" in run.rows[row] and not squashfs_only:
                goals.add(f"ext4 on zfile / erofs, {kind}, {row}",
                          run.times(row, f"ext4 on lsmt on zfile {kind}", f"erofs {kind}"), 1)
    for row, least in zip(rows, (1.2, 1, 1)):
        goals.add(f"ext4 on zfile lz4-4k / squashfs lz4-128k, {row}",
                  run.times(row, "ext4 on lsmt on zfile lz4-4k", "squashfs lz4-128k"), least)


def other_goals(run, goals):
    """Adds goals for caches, latency, indexes and memory."""
    rows, facts = run.rows, run.facts
    row = "hot 4k random, zstd-64k"
    if row in rows:
        goals.add(f"{row}, cache / no cache", run.times(row, "cache", "no cache"), 5)
        for row in ("cold 128k scan, zstd-64k", "cold 1m scan, zstd-64k"):
            goals.add(f"{row}, cache / no cache", run.times(row, "cache", "no cache"), 0.97)
    for name, least in (("brd", 1.5), ("delay", 5)):
        row = f"shared layers, {name}"
        if row in rows:
            goals.add(f"{row}, A+B+C after A+B / cold", run.times(row, "A+B+C after A+B", "A+B+C, cold"), least)
            for fact in facts:
                if fact.startswith(row) and " of " in fact:
                    goals.add(fact, facts[fact], most=1 if "readers" in fact else 0)
    row = "4k random on dm-delay"
    if row in rows:
        wanted = run.figure(row, "delay", "p50") + facts["codec, ns per 4k block"]
        goals.add(f"{row}, latency / (delay + codec)", run.figure(row, "zfile", "p50") / wanted, most=1.05)
    fact = "bytes read beyond those stored, per 4k request"
    if fact in facts:
        goals.add(fact, facts[fact], most=2 * 511)
    row = "4k random, by segments"
    if row in rows:
        for name, least in (("1000 segments, 1 layers", 0.97), ("1000000 segments, 255 layers", 0.93)):
            goals.add(f"lsmt / linear, {name}", run.times(row, name, f"linear as {name}"), least)
        name = "1000000 segments, 255 layers"
        goals.add(f"lsmt / linear on the same disks, {name}", run.times(row, name, f"spread as {name}"), 0.93)
    for name, most in (("1000000 segments, 255 layers", 150), ("zfile of 64 GiB", 250)):
        if f"construction, {name}, ms" in facts:
            goals.add(f"construction, {name}, ms beyond reading",
                      facts[f"construction, {name}, ms"] - facts[f"reading for it, {name}, ms"], most=most)
    for fact, most in (("bytes of memory per block, 64 GiB", 2.6), ("bytes of memory per segment", 16),
                       ("KiB per idle zfile device", 96), ("MiB for 2000 idle zfile devices", 300)):
        if fact in facts:
            goals.add(fact, facts[fact], most=most)


def pairs(run, row, scan, name):
    """Returns figures of turns alone and of turns beside a scan, and the ratios of the pairs: three tuples of lower
    quartile, median, upper quartile."""
    found = run.data["fairness"][row][scan]
    alone, beside = ([turn[nth][name] for turn in found] for nth in (0, 1))
    return [statistics.quantiles(values, n=4, method="inclusive")
            for values in (alone, beside, [b / max(a, 1) for a, b in zip(alone, beside)])]


def fairness_goals(run, goals):
    """Adds goals for small reads beside a thread that reads much."""
    for row, scans in run.data.get("fairness", {}).items():
        for scan in scans:
            if "1m" in scan and not scan.startswith("dm-linear"):
                goals.add(f"4k reads of {row}, p99 beside {scan} / alone", pairs(run, row, scan, "p99")[2][1], most=3)


def fairness_table(run, out):
    """Appends a Markdown table of small reads beside a thread that reads much."""
    out += ["4 KiB reads beside another thread, µs: median of turns (quartiles)", "",
            "| read | beside | p50 alone | p50 | p50 / alone | p99 alone | p99 | p99 / alone | late, p99 | max | "
            "MB/s beside |",
            "|---" * 11 + "|"]
    for row, scans in run.data["fairness"].items():
        for scan, found in scans.items():
            cells = [row, scan]
            for name in ("p50", "p99"):
                *times, ratio = pairs(run, row, scan, name)
                cells += [f"{mid / 1000:.1f} ({low / 1000:.1f}-{high / 1000:.1f})" for low, mid, high in times]
                cells.append("{1:.2f} ({0:.2f}-{2:.2f})".format(*ratio))
            cells.append("{1:.1f} ({0:.1f}-{2:.1f})".format(*(ns / 1000 for ns in pairs(run, row, scan, "late99")[1])))
            cells.append(f"{max(turn[1]['max'] for turn in found) / 1000:.0f}")
            cells.append(f"{statistics.median(turn[1]['scanned'] * 1000 / turn[1]['ns'] for turn in found):.0f}")
            out.append("| " + " | ".join(cells) + " |")
    out.append("")


def interrupt_goals(run, goals):
    """Adds goals for a kernel with two CPUs: no interrupt is lost. Returns whether they are reached."""
    late = {fact: value for fact, value in run.facts.items()
            if fact.startswith("interrupts") and fact.endswith("_late")}
    for fact, value in late.items():
        goals.add(f"{fact}: interrupts lost, or later than 2 s", value, most=0)
    return not any(late.values())


def scaling_goals(one, two, goals):
    """Adds goals for one reader with two CPUs instead of one. The kernels differ, so each is compared with its own
    limit."""
    row = "1m sequential"
    if row in one.rows and row in two.rows:
        goals.add(f"zfile LZ4 4k, {row}, one reader, two CPUs / one",
                  two.share(row, "lz4-4k")[0] / one.share(row, "lz4-4k")[0], 1.8)


def plots(directory, runs):
    """Draws the plots."""
    run = runs.get("uml")
    if not run:
        return
    if "4k random, 1 deep" in run.rows:
        rows = []
        for row in ("4k random, 1 deep", "4k random, 32 deep", "64k random, 1 deep", "4k sequential", "128k sequential",
                    "1m sequential"):
            rows.append((row, *run.share(row, "lz4-4k")))
        plot.bars(f"{directory}/limit.svg", "zfile LZ4 4 KiB, one CPU: share of the limit", rows, 1)
        sizes = {"4k sequential": 4 << 10, "128k sequential": 128 << 10, "1m sequential": 1 << 20}
        series = {name: [(size, run.rate(row, name)[0]) for row, size in sizes.items()]
                  for name in ["linear", "lsmt-raw"] + [name for name in run.rows["1m sequential"] if name.startswith("zfile")]}
        plot.lines(f"{directory}/sizes.svg", "Sequential reads, one CPU", series, "bytes per read", "MB/s")
    for row, name in (("sequential, cold", "sequential"), ("random 4k, cold", "random"), ("small files, cold", "small")):
        if row in run.rows:
            found = {device: run.rate(row, device) for device in run.rows[row]}
            plot.bars(f"{directory}/files-{name}.svg", f"Files, {row}, one CPU, MB/s",
                      [(device, *found[device]) for device in sorted(found, key=lambda one: -found[one][0])])
    row = "4k random, by segments"
    if row in run.rows:
        series = {}
        for name in run.rows[row]:
            if not name.startswith(("linear", "spread")):
                segments, layers = (int(word) for word in name.split() if word.isdigit())
                extra = run.ns(row, name) - run.ns(row, f"linear as {name}")
                series.setdefault(f"{layers} layers", []).append((segments, max(extra, 1)))
        series = {name: points for name, points in series.items() if len(points) > 1}
        plot.lines(f"{directory}/lookup.svg", "lsmt: what a 4 KiB read takes beyond dm-linear", series, "segments", "ns")


def table(run, rows, devices, out):
    """Appends a Markdown table of MB/s."""
    out.append("| | " + " | ".join(rows) + " |")
    out.append("|---" * (len(rows) + 1) + "|")
    for device in devices:
        cells = []
        for row in rows:
            if device in run.rows[row]:
                cells.append("{:.0f} ({:.0f}-{:.0f})".format(*run.rate(row, device)))
            else:
                cells.append("")
        out.append(f"| {device} | " + " | ".join(cells) + " |")
    out.append("")


def share_table(run, out):
    """Appends a Markdown table of the shares of the limit, and of lsmt on zfile beside zfile."""
    rows = [row for row in run.rows if any(device.startswith("codec ") for device in run.rows[row])]
    if not rows:
        return
    kinds = [device[len("codec "):] for device in run.rows[rows[0]] if device.startswith("codec ")]
    out += ["Ratios of turns that follow one another: median (quartiles)", "", "| | " + " | ".join(rows) + " |",
            "|---" * (len(rows) + 1) + "|"]
    ratios = []
    for kind in kinds:
        ratios += [(f"limit / zfile {kind}", lambda row, kind=kind: run.share(row, kind)),
                   (f"zfile / lsmt-zfile {kind}",
                    lambda row, kind=kind: run.times(row, f"lsmt-zfile {kind}", f"zfile {kind}"))]
    ratios.append(("linear / lsmt-raw", lambda row: run.times(row, "lsmt-raw", "linear")))
    for name, ratio in ratios:
        out.append(f"| {name} | " + " | ".join("{:.2f} ({:.2f}-{:.2f})".format(*ratio(row)) for row in rows) + " |")
    out.append("")


def markdown(runs):
    out = []
    for name, run in runs.items():
        out += [f"## {name}: kernel {run.data['kernel']}, {run.data['cpus']} CPUs", "", "MB/s: median of turns (quartiles)", ""]
        for rows in ([row for row in run.rows if not row.endswith(("cold", "warm"))],
                     [row for row in run.rows if row.endswith(("cold", "warm"))]):
            if rows:
                table(run, rows, sorted({device for row in rows for device in run.rows[row]}), out)
        share_table(run, out)
        if "fairness" in run.data:
            fairness_table(run, out)
        if run.facts:
            out += ["| | |", "|---|---|"] + [f"| {key} | {value} |" for key, value in run.facts.items()] + [""]
    return "\n".join(out)


def compare(runs, old):
    """Prints which figures have changed."""
    changed = 0
    for name, run in runs.items():
        before = Run(old[name]) if name in old else None
        for row in run.rows if before else ():
            for device in run.rows[row]:
                if device not in before.rows.get(row, {}):
                    continue
                new, was = run.rate(row, device), before.rate(row, device)
                if abs(new[0] / was[0] - 1) > CHANGED and (new[1] > was[2] or new[2] < was[1]):
                    changed += 1
                    print(f"changed: {name}: {row}, {device}: {was[0]:.0f} -> {new[0]:.0f} MB/s "
                          f"({new[0] / was[0] - 1:+.0%})")
    print(f"{changed} figures have changed")


def main():
    directory, *older = sys.argv[1:]
    runs = {}
    for kernel in ("uml", "uml-smp", "stock"):
        path = f"{directory}/{kernel}.json"
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                runs[kernel] = Run(json.load(file))
    with open(f"{directory}/result.json", "w", encoding="utf-8") as file:
        json.dump({name: run.data for name, run in runs.items()}, file, indent=1)
    text = markdown(runs)
    with open(f"{directory}/result.md", "w", encoding="utf-8") as file:
        file.write(text)
    print(text)
    goals, arrived = Goals(), True
    if "uml" in runs:
        block_goals(runs["uml"], goals)
        file_goals(runs["uml"], goals)
        other_goals(runs["uml"], goals)
        fairness_goals(runs["uml"], goals)
    if "uml-smp" in runs:
        if "uml" in runs:
            scaling_goals(runs["uml"], runs["uml-smp"], goals)
        growth_goals(runs["uml-smp"], goals)
        arrived = interrupt_goals(runs["uml-smp"], goals)
        # erofs and squashfs with small blocks lose time in this kernel's remapping of memory.
        two = Goals()
        file_goals(runs["uml-smp"], two, squashfs_only=True)
        goals.lines += [line.replace("goal: ", "goal: two CPUs, ") for line in two.lines]
    if "stock" in runs:
        emulated = Goals()
        file_goals(runs["stock"], emulated)
        growth_goals(runs["stock"], emulated)
        fairness_goals(runs["stock"], emulated)
        arrived = interrupt_goals(runs["stock"], emulated) and arrived
        goals.lines += [line.replace("goal: ", "goal: emulated, ") for line in emulated.lines]
    plots(directory, runs)
    if older:
        with open(older[0], encoding="utf-8") as file:
            compare(runs, json.load(file))
    print("\n".join(goals.lines))
    # The part interrupts is a test, not a measurement.
    sys.exit(0 if arrived else 1)


if __name__ == "__main__":
    main()
