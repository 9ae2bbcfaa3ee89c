#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Measures, and compares with the goals: bench.sh. PARTS='NAME...' selects parts of the benchmark, see PARTS in
# tests/bench/run.py. VM=uml (the default) measures at the machine's speed: without PARTS, all parts with one CPU, and
# block and file also with two; with PARTS, these parts with one CPU, and, if block or file is one of them, also with
# two. VM=qemu measures for a shorter time with the stock kernel: PARTS, or block and file. COMPARE=FILE prints what
# changed since that result. VM=guests measures the memory of guests instead: bench-guests.sh. VM=tools measures
# obdsetup, without a VM: bench-tools.sh.
. "$(dirname "$0")/lib.sh"
. "$SCRIPTS/cache.sh"
. "$SCRIPTS/kernel.sh"

VM=${VM:-uml}
case $VM in
uml) kernels=(uml uml-smp) ;;
qemu) kernels=(stock) ;;
guests) exec "$SCRIPTS/bench-guests.sh" ;;
tools) exec "$SCRIPTS/bench-tools.sh" ;;
*) die "VM=$VM: must be uml, qemu, guests or tools" ;;
esac
[ -z "${COMPARE:-}" ] || [ -s "$COMPARE" ] || die "COMPARE=$COMPARE: no such file, or it is empty"
out=$BUILD/bench
# The images are made again when images.sh, the tool-chain root, or obdsetup's source files in mkfs change.
images=$CACHE/bench-$({ cat "$SCRIPTS/bench/images.sh" && root_key &&
	find "$CLONE/tools/obdsetup/src" -path '*/mkfs*' -type f -print0 | sort -z | xargs -0r cat; } | short_hash)
export OBD_RAM_DISKS=900 OBD_RAM_KIB=$((512 << 10))

# A function called by step doesn't stop at an error, because step checks its status: hence the && below.

# shellcheck disable=SC2317 # step calls it
make_images() {
	[ -d "$images" ] && cache_used "${images##*/}" && return
	cache_begin "${images##*/}" || return 0
	mkdir -p "$TMP"
	"$SCRIPTS/in-root.sh" -b "$TMP:/srv" scripts/bench/images.sh /srv &&
		cache_commit "${images##*/}" &&
		cache_used "${images##*/}"
}

# shellcheck disable=SC2317
modules() {
	"$SCRIPTS/build-module.sh" && "$SCRIPTS/build-module.sh" bench
}

# shellcheck disable=SC2317
# measure ARGUMENTS...: run the benchmark in the VM with $KERNEL.
measure() {
	kernel_look_up
	rm -f "$images/result-$K_RELEASE.json"
	SHARE=$images QEMU_MEM=6144 TIMEOUT=${TIMEOUT:-3000} VM_LOG=$LOGS/kernel-bench-$KERNEL.log \
		KERNEL_ARGS="brd.rd_nr=$OBD_RAM_DISKS brd.rd_size=$OBD_RAM_KIB" \
		RUN="tests/bench/guest.sh $*" "$SCRIPTS/vm.sh" &&
		mv "$images/result-$K_RELEASE.json" "$out/$KERNEL.json"
}

must() { step "$@" || die "no result"; }

export USE_ROOT=1 KDIR='' CARGO='' QUIET=1
alone
mkdir -p "$out"
[ -z "${COMPARE:-}" ] || cp "$COMPARE" "$out/older"
rm -f "$out"/*.json
read -ra parts <<<"${PARTS:-}"
# A second CPU says nothing about the other parts: they have one reader, readers on one CPU, or measure no reads.
[[ ${#parts[@]} = 0 || " ${parts[*]} " =~ \ (block|file)\  || $VM != uml ]] || kernels=(uml)
steps $((4 + 3 * ${#kernels[@]}))
must "tool-chain root" "$SCRIPTS/make-root.sh"
must "kernel and its Rust tree" "$SCRIPTS/make-kernel.sh"
must "obdsetup" "$SCRIPTS/build-tools.sh"
must "images" make_images
for KERNEL in "${kernels[@]}"; do
	export KERNEL
	must "$KERNEL kernel" "$SCRIPTS/make-kernel.sh"
	must "modules for the $KERNEL kernel" modules
	words=("${parts[@]}")
	case $KERNEL in
	stock) words=(short "${parts[@]}") ;;
	uml-smp) [ "${#parts[@]}" != 0 ] || words=(block file) ;;
	esac
	must "measuring with the $KERNEL kernel" measure "${words[@]}"
done
"$SCRIPTS/in-root.sh" tests/bench/report.py build/bench ${COMPARE:+build/bench/older}
