#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Reports instructions per request: instructions.py DIRECTORY [update]. Reads what was counted with each model of CPU
(icount-MODEL.json), writes instructions.json and instructions.md beside it, and compares with the figures in the
source tree (FIGURES). Fails if a row of this project costs more than 2 % more than there; with update, writes the
figures instead."""

import glob
import json
import os
import sys

FIGURES = os.environ.get("OBD_INSTRUCTIONS") or f"{os.path.dirname(os.path.abspath(__file__))}/instructions.json"
MOST = 0.02
MODELS = {"erms": "CPU with ERMS and FSRM: an instruction that copies or clears counts once for each byte",
          "no-erms": "CPU without these: once for each 8 bytes"}


def counted(data):
    """Returns the instructions per request by row and device: the least of the rounds. What does not come from the reads
    only adds to them: timers, and pages that have to be allocated because the pool was empty."""
    return {row: {device: round(min(one["ns"] / one["requests"] for one in rounds))
                  for device, rounds in devices.items()} for row, devices in data["rows"].items()}


def limit(rows, row, kind):
    """Returns the least that a read of a zfile device can cost: its decompression and lower read."""
    codec, lower = rows.get(row, {}).get(f"codec {kind}"), rows.get(row, {}).get(f"lower {kind}")
    return codec + lower if codec and lower else None


def is_ours(device):
    return "zfile" in device or "lsmt" in device


def others(rows, row, device):
    """Returns what code of others costs for the same read, in the same boot, or None."""
    if device.startswith(("zfile ", "lsmt-zfile ")):
        return limit(rows, row, device.split(" ", maxsplit=1)[1])
    if device == "lsmt-raw":
        return rows.get(row, {}).get("linear")
    return None


def worse(rows, figures, same_kernel):
    """Returns the rows of ours that cost more than in the figures, and the others that differ: lines of text. With
    another kernel, compares how many times as much as the code of others they cost."""
    bad, notes = [], []
    for row, devices in rows.items():
        for device, now in devices.items():
            was = figures.get(row, {}).get(device)
            if not was:
                if is_ours(device):
                    bad.append(f"{row}, {device}: {now}, and no figure")
                continue
            growth = now / was - 1
            what = f"{row}, {device}: {was} -> {now} ({growth:+.1%})"
            if not same_kernel:
                base, base_was = others(rows, row, device), others(figures, row, device)
                if not base or not base_was:
                    continue
                growth = (now / base) / (was / base_was) - 1
                what = f"{row}, {device} / code of others: {was / base_was:.3f} -> {now / base:.3f} ({growth:+.1%})"
            if is_ours(device) and growth > MOST + 1e-9:
                bad.append(what)
            elif abs(growth) > MOST:
                notes.append(what)
    return bad, notes


def table(rows, out):
    """Appends a Markdown table for each kind of rows: instructions, and shares of the limit."""
    for some in ([row for row in rows if "cold" not in row and "warm" not in row],
                 [row for row in rows if "cold" in row or "warm" in row]):
        if not some:
            continue
        out += ["| | " + " | ".join(some) + " |", "|---" * (len(some) + 1) + "|"]
        devices = list(dict.fromkeys(device for row in some for device in rows[row]))
        for device in devices:
            cells = []
            for row in some:
                number = rows[row].get(device)
                if number is None:
                    cells.append("")
                    continue
                kind = device.split(" ", maxsplit=1)[-1]
                least = None
                if device.startswith(("zfile ", "lsmt-zfile ")) and ("-4k" in kind or row.startswith("4k random")):
                    # Other reads share blocks that they have in common by means of the cache.
                    least = limit(rows, row, kind)
                cells.append(f"{number:,}" + (f" ({least / number:.2f})" if least else ""))
            out.append(f"| {device} | " + " | ".join(cells) + " |")
        for kind in [device[6:] for device in devices if device.startswith("codec ")]:
            found = [limit(rows, row, kind) for row in some]
            out.append(f"| limit {kind} | " + " | ".join(f"{one:,}" if one else "" for one in found) + " |")
        out.append("")


def main():
    directory, *words = sys.argv[1:]
    runs = {}
    for path in sorted(glob.glob(f"{directory}/icount-*.json")):
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
        runs[os.path.basename(path)[len("icount-"):-len(".json")]] = (data["kernel"], counted(data))
    out = []
    for model, (kernel, rows) in runs.items():
        out += [f"## Instructions per request, kernel {kernel}", "",
                f"{MODELS[model]}. In brackets: share of the limit.", ""]
        table(rows, out)
    print("\n".join(out))
    with open(f"{directory}/instructions.md", "w", encoding="utf-8") as file:
        file.write("\n".join(out))
    new = {model: {"kernel": kernel, "instructions": rows} for model, (kernel, rows) in runs.items()}
    with open(f"{directory}/instructions.json", "w", encoding="utf-8") as file:
        json.dump(new, file, indent=1)
        file.write("\n")
    figures = {}
    if os.path.exists(FIGURES):
        with open(FIGURES, encoding="utf-8") as file:
            figures = json.load(file)
    if "update" in words:
        for model, data in new.items():
            kept = figures.get(model, {})
            same = kept.get("kernel") == data["kernel"]
            # Rows that were not counted stay, if they are of the same kernel.
            rows = dict(kept["instructions"]) if same else {}
            for row, devices in data["instructions"].items():
                rows[row] = {**rows.get(row, {}), **devices}
            figures[model] = {"kernel": data["kernel"], "instructions": rows}
        with open(FIGURES, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=1)
            file.write("\n")
        print(f"{FIGURES}: written")
        return
    sys.exit(judge(new, figures))


def judge(new, figures):
    """Prints what differs from the figures. Returns 1 if a row of this project costs too much, else 0."""
    failed = 0
    for model, data in new.items():
        was = figures.get(model, {"kernel": "none", "instructions": {}})
        same = was["kernel"] == data["kernel"]
        if not same:
            print(f"{model}: the figures are of kernel {was['kernel']}: only the ratios to the code of others are "
                  "compared")
        bad, notes = worse(data["instructions"], was["instructions"], same)
        for line in notes:
            print(f"{model}: differs: {line}")
        for line in bad:
            print(f"{model}: costs more: {line}")
        failed += len(bad)
        count = sum(is_ours(device) for devices in data["instructions"].values() for device in devices)
        print(f"{model}: {count} rows of this project, {len(bad)} of them cost more than 2 % more than the figures")
    if failed:
        print("if this is meant: make bench VM=icount UPDATE=y, and commit tests/bench/instructions.json with the "
              "change")
    return int(failed > 0)


if __name__ == "__main__":
    main()
