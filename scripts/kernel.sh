# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# Which kernel: KERNEL=stock (the default) is Debian's newest 7.3 from backports. KERNEL=debug and KERNEL=kcsan are
# small kernels with checkers, from the same source; KERNEL=uml and KERNEL=uml-smp are User-Mode Linux, for benchmarks.
# Sourced after cache.sh.
# Another kernel is another kernel_look_up_NAME and, if made in another way, another build_kernel_RECIPE.
#
# A kernel directory in the cache, whatever it was made from, holds
#   vmlinuz, lib/modules/RELEASE/   the kernel as it boots; for User-Mode Linux, the program
#   kdir/                           the tree to build modules against, with Rust metadata
#   release                         its release, one line
#   cmdline, memory                 if it needs them: more of the command line, MiB
#   rustflags, makeargs             if modules need them: KRUSTFLAGS, and what make gets, a line each

# shellcheck source=scripts/kernel-debian.sh
. "$SCRIPTS/kernel-debian.sh"
# shellcheck source=scripts/kernel-tree.sh
. "$SCRIPTS/kernel-tree.sh"
# shellcheck source=scripts/kernel-test.sh
. "$SCRIPTS/kernel-test.sh"
# shellcheck source=scripts/kernel-uml.sh
. "$SCRIPTS/kernel-uml.sh"

KERNEL=${KERNEL:-stock}
K_APT=$CACHE/apt

# kernel_recipe: the functions that make it.
kernel_recipe() {
	declare -f "build_kernel_$K_RECIPE"
	[ "$K_RECIPE" != debian ] || declare -f debian_tree
}

# kernel_look_up: set K_RELEASE, K_VERSION (of the packages), K_RECIPE, K_CONFIG (its files) and K_DIR.
kernel_look_up() {
	K_CONFIG=()
	declare -F "kernel_look_up_$KERNEL" >/dev/null || die "unknown KERNEL=$KERNEL"
	"kernel_look_up_$KERNEL"
	local key
	key=$({ cat "$ROOT/etc/tool-chain" && kernel_recipe && say "$K_VERSION" &&
		cat "${K_CONFIG[@]}" /dev/null; } | short_hash)
	K_DIR=$CACHE/kernel-$K_RELEASE-$key
}

# kernel_select: look it up, and say how to get it if it has not been made.
kernel_select() {
	kernel_look_up
	[ -d "$K_DIR" ] || die "kernel $K_RELEASE is not set up; 'make setup' does that"
}

# Debian's 7.3: ask the archive at most once a day, and live with what was there last when it does not answer.
kernel_look_up_stock() {
	local latest=$CACHE/kernel.stock
	K_RECIPE=debian
	if [ -z "$(find "$latest" -mtime -1 2>/dev/null)" ]; then
		mkdir -p "$K_APT"
		if "$SCRIPTS/in-root.sh" -b "$K_APT:/srv" bash -c \
			"$(declare -f newest_debian_kernel); set -euo pipefail; newest_debian_kernel 7.3" >"$latest.$$" 2>"$K_APT/log" &&
			[ -s "$latest.$$" ]; then
			mv "$latest.$$" "$latest"
		else
			rm -f "$latest.$$"
			[ -s "$latest" ] || die "no kernel 7.3 found in the Debian archive: $(tail -n 3 "$K_APT/log")"
			warn "could not ask the Debian archive for a newer kernel; going on with $(cut -d' ' -f1 "$latest")"
			touch "$latest"
		fi
	fi
	read -r K_RELEASE K_VERSION <"$latest"
}

# kernel_of_ours NAME RECIPE CONFIG...: it has whatever version the stock kernel has.
kernel_of_ours() {
	kernel_look_up_stock
	K_RELEASE=${K_RELEASE%%[+-]*}-$1
	K_RECIPE=$2
	shift 2
	K_CONFIG=("${@/#/$SCRIPTS/kernel-}")
}

kernel_look_up_debug() { kernel_of_ours debug test test.config debug.config; }

kernel_look_up_kcsan() { kernel_of_ours kcsan test test.config kcsan.config; }

kernel_look_up_uml() { kernel_of_ours uml uml uml.config; }

kernel_look_up_uml-smp() { kernel_of_ours uml-smp uml uml.config uml-smp.config; }
