#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Build the module into build/RELEASE/: build-module.sh [build | bench | clippy | install]. KDIR=, KERNEL=, V= as for make.
# bench is the load generator of the benchmark.
. "$(dirname "$0")/lib.sh"
. "$SCRIPTS/kdir.sh"

what=${1:-build}
kdir_choose
out=$BUILD/$KDIR_RELEASE
obj=$out/obj
[ "$what" != clippy ] || obj=$out/clippy
source=$CLONE
[ "$what" != bench ] || source=$CLONE/tests/bench obj=$out/bench
seen_source=$source seen_obj=$obj
[ -z "$KDIR_IN_ROOT" ] || seen_source=$(in_root "$source") seen_obj=$(in_root "$obj")

args=(-C "$KDIR_USED" "M=$seen_source" "MO=$seen_obj" "${KDIR_ARGS[@]}" "-j$(nproc)" --no-print-directory)
[ -z "${QUIET:-}" ] || args+=(-s)
[ -z "${V:-}" ] || args+=("V=$V")

# Objects made against another tree of the same release are of no use to this one.
start_afresh() {
	[ "$(cat "$obj/.kdir" 2>/dev/null)" = "$KDIR_ID" ] && return
	rm -rf "$obj"
	mkdir -p "$obj"
	say "$KDIR_ID" >"$obj/.kdir"
}

mkdir -p "$out"
lock "$out/.lock" "build in $out"
case $what in
build)
	start_afresh
	kdir_run make "${args[@]}" modules
	cmp -s "$obj/dm_overlaybd.ko" "$out/dm_overlaybd.ko" || cp "$obj/dm_overlaybd.ko" "$out/dm_overlaybd.ko"
	;;
bench)
	start_afresh
	kdir_run make "${args[@]}" modules
	cp "$obj/obd_bench.ko" "$out/obd_bench.ko"
	;;
clippy)
	start_afresh
	kdir_run make "${args[@]}" CLIPPY=1 KRUSTFLAGS=-Dwarnings modules
	;;
install)
	[ -f "$obj/dm_overlaybd.ko" ] || die "build the module first"
	[ -z "$KDIR_IN_ROOT" ] || die "this module is for the test VM's kernel; name yours with KDIR="
	make "${args[@]}" ${DESTDIR:+"INSTALL_MOD_PATH=$DESTDIR"} ${DESTDIR:+DEPMOD=true} modules_install
	;;
*) die "usage: build-module.sh [build | bench | clippy | install]" ;;
esac
