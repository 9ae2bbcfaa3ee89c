#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""In the guest: profile() counts the instructions of one job by function, with profile_plugin.c. On the host:
by_function.py DIRECTORY reports what was counted: instructions per request, by group of functions and by function."""

import glob
import json
import os
import re
import sys

# A function belongs to the first group whose expression matches its name and module, "NAME [MODULE]".
GROUPS = (("decompression", r"^(LZ4_|ZSTD_|HUF_|FSE_|BIT_)|^xxh|^crc32c"),
          ("copies", r"^(memcpy|memmove|__memcpy|__memmove)"),
          ("clearing", r"^(__)?(memset|clear_pages|clear_highpages)"),
          ("dm_overlaybd", r"\[dm_overlaybd\]$"),
          ("device-mapper", r"\[dm_mod\]$"),
          ("RAM disk", r"\[brd\]$"),
          ("load generator", r"\[obd_bench\]$"),
          ("block layer", r"^(__)?((bio|blk|blkg|bvec|blkcg|bdev|part|disk|mempool)_|submit_bio)"),
          ("scheduler, workqueue", r"sched|task_fair|_se$|cfs_rq|psi_|wake|switch|eevdf|vruntime|entity|load_avg|"
                                   r"rq_clock|task_rq|^(__)?(en|de)queue_task|^(update_curr|task_tick|cpuacct_)|"
                                   r"^(record_times|dl_server|hrtick)|"
                                   r"workqueue|_works?$|_work_on$|kthread|worker|^(pwq_|kick_pool)"))
OTHER = "other code: locks, allocator, timers"
# Number of functions that the report has for each profile: those with the most instructions.
MOST = 30


def profile(directory, title, job):
    """Runs a job, and has QEMU's plugin write its instructions by address to directory, which the plugin watches.
    Returns the job's figures."""
    name = re.sub(r"[^a-z0-9]+", "-", title)
    if not os.path.exists(f"{directory}/kallsyms"):
        with open("/proc/kallsyms", encoding="ascii") as symbols, \
                open(f"{directory}/kallsyms", "w", encoding="ascii") as file:
            file.write(symbols.read())

    def counts(wanted):
        with open(f"{directory}/wanted", "w", encoding="ascii") as file:
            file.write(f"{wanted}\n")
        while os.path.exists(f"{directory}/wanted"):
            pass

    # Resets the counters, which have the instructions of earlier jobs.
    counts("unused")
    figures = job()
    counts(name)
    with open(f"{directory}/{name}.json", "w", encoding="ascii") as file:
        json.dump({"title": title, "requests": figures["requests"]}, file)
    return figures


def readable(symbol):
    """Returns the first five names in the mangled name of a Rust function, without dm_overlaybd, as a path. Returns
    other names unchanged."""
    if not symbol.startswith("_R"):
        return symbol
    name, _, module = symbol.partition(" ")
    # Identifiers of the v0 scheme: a length in decimal, an underscore if the identifier begins with a digit, the bytes.
    words, at = [], 2
    while at < len(name):
        found = re.match(r"(\d+)_?", name[at:])
        if not found:
            # A disambiguator (s) or a reference to an earlier part (B): each ends with an underscore.
            skipped = re.match(r"[sB][0-9A-Za-z]*_", name[at:])
            at += len(skipped.group()) if skipped else 1
            continue
        at += len(found.group())
        words.append(name[at:at + int(found.group(1))])
        at += int(found.group(1))
    words = [word for word in words if word != "dm_overlaybd"]
    return f"{'::'.join(words[:5])} {module}".rstrip()


def load(directory, name, symbols):
    """Returns the number of instructions for each symbol."""
    starts = [start for start, _ in symbols]
    found, at = {}, 0
    with open(f"{directory}/{name}.counts", encoding="ascii") as file:
        for row in file:
            address, count = row.split()
            address = int(address, 16)
            if address == 0:
                symbol = "code that is not kernel text"
            else:
                # The rows of the file and the symbols are sorted by address.
                while at + 1 < len(starts) and starts[at + 1] <= address:
                    at += 1
                symbol = symbols[at][1]
            found[symbol] = found.get(symbol, 0) + int(count)
    return found


def report(directory, out):
    """Appends lines of Markdown to out: a table of the groups of all profiles, and one of the functions of each."""
    with open(f"{directory}/kallsyms", encoding="ascii") as file:
        rows = (row.split() for row in file)
        symbols = sorted((int(start, 16), " ".join(name)) for start, kind, *name in rows if kind in "tTwW")
    profiles = []
    for path in sorted(glob.glob(f"{directory}/*.json")):
        with open(path, encoding="ascii") as file:
            what = json.load(file)
        counts = load(directory, os.path.basename(path)[:-len(".json")], symbols)
        profiles.append((what["title"], {symbol: count / what["requests"] for symbol, count in counts.items()}))
    titles = [title for title, _ in profiles]
    out += ["| instructions per request | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    sums = [{} for _ in profiles]
    for nth, (_, counts) in enumerate(profiles):
        for symbol, count in counts.items():
            group = next((group for group, pattern in GROUPS if re.search(pattern, symbol)), OTHER)
            sums[nth][group] = sums[nth].get(group, 0) + count
    for group in [group for group, _ in GROUPS] + [OTHER]:
        out.append(f"| {group} | " + " | ".join(f"{one.get(group, 0):,.0f}" for one in sums) + " |")
    out.append("| all | " + " | ".join(f"{sum(one.values()):,.0f}" for one in sums) + " |")
    for title, counts in profiles:
        out += ["", f"### {title}", "", "| function | instructions per request |", "|---|---|"]
        for symbol, count in sorted(counts.items(), key=lambda item: -item[1])[:MOST]:
            out.append(f"| {readable(symbol)} | {count:,.0f} |")
    out.append("")


def main():
    if not os.path.exists(f"{sys.argv[1]}/kallsyms"):
        print("no row was counted by function: only rows of the part block are")
        return
    out = []
    report(sys.argv[1], out)
    print("\n".join(out))
    with open(f"{sys.argv[1]}/profile.md", "w", encoding="utf-8") as file:
        file.write("\n".join(out))


if __name__ == "__main__":
    main()
