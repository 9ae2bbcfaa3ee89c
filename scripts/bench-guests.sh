#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Measures virtual machines (guests) whose images have layers in common, on this machine: bench-guests.sh.
# PARTS='WAY...' selects how the guests get their images, see WAYS in tests/bench/guests.py.
. "$(dirname "$0")/lib.sh"
. "$SCRIPTS/cache.sh"
. "$SCRIPTS/kernel.sh"
. "$SCRIPTS/accel.sh"

out=$BUILD/bench

# shellcheck disable=SC2317 # step calls it
# measure WAYS...: run the guests, with KVM if it works on this machine.
measure() {
	rm -rf "$out/guests"
	mkdir -p "$out/guests"
	VM_RUN=$out/guests
	accel
	"$SCRIPTS/in-root.sh" -k "$K_DIR" scripts/vm/boot-files.sh scripts/vm/init "$(in_root "$out/guests")" &&
		"$SCRIPTS/in-root.sh" -k "$K_DIR" \
			env PATH="$IN_ROOT/build/cargo/release:/usr/sbin:/usr/bin:/sbin:/bin" \
			tests/bench/guests.py "$(in_root "$out/guests")" "$(in_root "$out/guests/kernel")" "$VM_ACCEL" "$@" &&
		mv "$out/guests/guests.json" "$out/"
}

# must TITLE CMD...: run a step; exit if it fails.
must() { step "$@" || die "no result"; }

export USE_ROOT=1 KDIR='' CARGO='' QUIET=1 KERNEL=stock
[ -z "${COMPARE:-}" ] || die "COMPARE is not for VM=guests"
alone
steps 5
must "tool-chain root" "$SCRIPTS/make-root.sh"
must "kernel and its Rust tree" "$SCRIPTS/make-kernel.sh"
must "obdsetup" "$SCRIPTS/build-tools.sh"
must "module" "$SCRIPTS/build-module.sh"
kernel_look_up
read -ra ways <<<"${PARTS:-}"
must "measuring guests" measure "${ways[@]}"
sed -n "/^MiB of this machine's memory/,\$p" "$STEP_LOG"
rm -rf "$out/guests"
