#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Measures how long obdsetup takes to make images, beside the tools that make images of other formats: bench-tools.sh.
# Runs in no VM. RUNS=3 rounds, OBD_TREE_MIB=1024 MiB of files; PARTS='NAME...' selects what is made, see PARTS in
# tests/bench/tools.py.
. "$(dirname "$0")/lib.sh"
. "$SCRIPTS/cache.sh"

out=$BUILD/bench

# shellcheck disable=SC2317 # step calls it
# measure PARTS...: run the tools.
measure() {
	"$SCRIPTS/in-root.sh" env PATH="$IN_ROOT/build/cargo/release:/usr/sbin:/usr/bin:/sbin:/bin" \
		tests/bench/tools.py "$(in_root "$out")" "${RUNS:-3}" "$@"
}

must() { step "$@" || die "no result"; }

export USE_ROOT=1 KDIR='' CARGO='' QUIET=1
[ -z "${COMPARE:-}" ] || die "COMPARE is not for VM=tools"
alone
mkdir -p "$out"
rm -f "$out/tools.json"
steps 3
must "tool-chain root" "$SCRIPTS/make-root.sh"
must "obdsetup" "$SCRIPTS/build-tools.sh"
read -ra parts <<<"${PARTS:-}"
must "measuring tools" measure "${parts[@]}"
sed -n '/^Of all images:/,$p' "$STEP_LOG"
