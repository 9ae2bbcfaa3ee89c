#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Builds the module into build/RELEASE/: build-module.sh [build | bench | clippy | install]. KDIR=, KERNEL=, V= as for
# make. bench builds the load generator of the benchmark instead; clippy checks the module with clippy.
. "$(dirname "$0")/lib.sh"
. "$SCRIPTS/kdir.sh"

what=${1:-build}
if [ -n "${DESTDIR:-}" ]; then kdir_choose; else kdir_choose "$what"; fi
out=$BUILD/$KDIR_RELEASE
obj=$out/obj
[ "$what" != clippy ] || obj=$out/clippy
source=$CLONE
[ "$what" != bench ] || source=$CLONE/tests/bench obj=$out/bench

args=(-C "$KDIR_USED" "M=$KDIR_CLONE${source#"$CLONE"}" "MO=$KDIR_CLONE${obj#"$CLONE"}" "${KDIR_ARGS[@]}" "-j$(nproc)" --no-print-directory)
[ -z "${QUIET:-}" ] || args+=(-s)
[ -z "${V:-}" ] || args+=("V=$V")

# start_afresh: delete the objects if they were built with another tree of the same release.
start_afresh() {
	[ "$(cat "$obj/.kdir" 2>/dev/null)" = "$KDIR_ID" ] && return
	rm -rf "$obj"
	mkdir -p "$obj"
	say "$KDIR_ID" >"$obj/.kdir"
}

# install_module: with a DESTDIR, install through a directory below the clone, since DESTDIR may be any path.
install_module() {
	local staging=$obj/install
	if [ -z "${DESTDIR:-}" ]; then
		[ -z "$KDIR_IN_ROOT" ] ||
			die "the module that was built is for Debian's $KDIR_RELEASE: name your kernel's tree with KDIR=, or a DESTDIR="
		kdir_run make "${args[@]}" modules_install
		return
	fi
	# Don't sign: Debian's key for signing modules is not available.
	[ -z "$KDIR_IN_ROOT" ] || args+=(CONFIG_MODULE_SIG_ALL=)
	rm -rf "$staging"
	mkdir -p "$staging"
	kdir_run make "${args[@]}" "INSTALL_MOD_PATH=$KDIR_CLONE${staging#"$CLONE"}" DEPMOD=true modules_install
	(cd "$staging" && find . -type f) | while read -r file; do
		install -D -m 644 "$staging/$file" "$DESTDIR/$file"
	done
	rm -rf "$staging"
}

# build: build the module, and copy it to build/RELEASE/ if it has changed.
build() {
	start_afresh
	kdir_run make "${args[@]}" modules
	cmp -s "$obj/dm_overlaybd.ko" "$out/dm_overlaybd.ko" || cp "$obj/dm_overlaybd.ko" "$out/dm_overlaybd.ko"
}

mkdir -p "$out"
lock "$out/.lock" "build in $out"
case $what in
build) build ;;
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
	if [ ! -f "$obj/dm_overlaybd.ko" ]; then
		not_by_sudo
		build
	fi
	install_module
	;;
*) die "usage: build-module.sh [build | bench | clippy | install]" ;;
esac
