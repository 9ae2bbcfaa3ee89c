# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# Chooses the kernel: KERNEL=stock (the default) is Debian's newest 7.3 from backports. KERNEL=forky is that of Debian
# forky, with forky's tool chain. KERNEL=debug and KERNEL=kcsan are small kernels with checkers, from the source of
# stock; KERNEL=uml and KERNEL=uml-smp are User-Mode Linux, for benchmarks, and KERNEL=uml-host to run virtual machines
# in. Sourced after cache.sh.
# To add a KERNEL, write a function kernel_look_up_NAME and, if the existing recipes don't make it, a
# build_kernel_RECIPE.
#
# A kernel directory in the cache, whatever it was made from, holds
#   vmlinuz, lib/modules/RELEASE/   the kernel as it boots; for User-Mode Linux, the program
#   kdir/                           the tree to build modules against, with Rust metadata
#   release                         its release, one line
#   cmdline, memory                 if it needs them: arguments for its command line, the VM's memory in MiB
#   rustflags, makeargs             if modules need them: KRUSTFLAGS, and arguments for make, a line each

# shellcheck source=scripts/kernel-debian.sh
. "$SCRIPTS/kernel-debian.sh"
# shellcheck source=scripts/kernel-tree.sh
. "$SCRIPTS/kernel-tree.sh"
# shellcheck source=scripts/kernel-test.sh
. "$SCRIPTS/kernel-test.sh"
# shellcheck source=scripts/kernel-uml.sh
. "$SCRIPTS/kernel-uml.sh"

KERNEL=${KERNEL:-stock}

# kernel_recipe: print the functions that make the kernel.
kernel_recipe() {
	declare -f "build_kernel_$K_RECIPE"
	[ "$K_RECIPE" != debian ] || declare -f debian_tree
}

# kernel_look_up: set K_RELEASE, K_VERSION (of the packages), K_RECIPE, K_CONFIG (files with its configuration, and
# patches of its source), K_APT (directory of apt's lists), K_ROOT (the root that the kernel and its modules are built
# in), K_TOOLS (the versions of the tools in that root that affect the result) and K_DIR (its directory in the cache,
# which may not exist yet).
kernel_look_up() {
	K_CONFIG=()
	K_ROOT=$ROOT
	K_TOOLS=$(cat "$ROOT/etc/tool-chain")
	declare -F "kernel_look_up_$KERNEL" >/dev/null || die "unknown KERNEL=$KERNEL"
	"kernel_look_up_$KERNEL"
	local key
	key=$({ say "$K_TOOLS" && kernel_recipe && say "$K_VERSION" &&
		cat "${K_CONFIG[@]}" /dev/null; } | short_hash)
	K_DIR=$CACHE/kernel-$K_RELEASE-$key
}

# kernel_select: look the kernel up; if it has not been made, fail and say how to make it.
kernel_select() {
	kernel_look_up
	{ [ -d "$K_DIR" ] && [ -d "$K_ROOT" ]; } || die "kernel $K_RELEASE is not set up; 'make setup' does that"
}

# ask_archive NAME SERIES [SOURCES]: print what newest_debian_kernel prints. Asks the archive at most once a day, and
# uses the last answer if the archive can't be reached.
ask_archive() {
	local latest=$CACHE/kernel.$1
	if [ -z "$(find "$latest" -mtime -1 2>/dev/null)" ]; then
		# Another run may ask at the same time.
		lock "$K_APT.lock" "question to the Debian archive"
		mkdir -p "$K_APT"
		if [ -n "$(find "$latest" -mtime -1 2>/dev/null)" ]; then
			:
		elif "$SCRIPTS/in-root.sh" -b "$K_APT:/srv" bash -c \
			"$(declare -f newest_debian_kernel); set -euo pipefail; newest_debian_kernel \"\$@\"" - "${@:2}" \
			>"$latest.$$" 2>"$K_APT/log" && [ -s "$latest.$$" ]; then
			mv "$latest.$$" "$latest"
		else
			rm -f "$latest.$$"
			[ -s "$latest" ] || die "no kernel found in the Debian archive for KERNEL=$1: $(tail -n 3 "$K_APT/log")"
			warn "could not ask the Debian archive for a newer kernel; going on with $(cut -d' ' -f1 "$latest")"
			touch "$latest"
		fi
		unlock
	fi
	cat "$latest"
}

# Debian's 7.3, from trixie-backports.
kernel_look_up_stock() {
	K_RECIPE=debian
	K_APT=$CACHE/apt
	local found
	found=$(ask_archive stock '7\.3')
	read -r K_RELEASE K_VERSION _ <<<"$found"
}

# Uses the series that forky has today. A newer rustc makes a new root and a new kernel directory.
kernel_look_up_forky() {
	K_RECIPE=debian
	K_SUITE=forky
	K_APT=$CACHE/apt-forky
	local found
	found=$(ask_archive forky '[0-9]+\.[0-9]+' "$(root_sources "$K_SUITE" "${MIRROR:-$(root_mirror)}")")
	read -r K_RELEASE K_VERSION K_GCC K_TOOLS <<<"$found"
	K_ROOT=$CACHE/root-$K_SUITE-$({ module_packages "$K_GCC" && declare -f root_sources build_root &&
		say "$K_TOOLS"; } | short_hash)
}

# kernel_of_ours NAME RECIPE CONFIG...: look up a kernel that is made here, from the source of the stock kernel. CONFIG
# are the ends of names, scripts/kernel-CONFIG.
kernel_of_ours() {
	kernel_look_up_stock
	K_RELEASE=${K_RELEASE%%[+-]*}-$1
	K_RECIPE=$2
	shift 2
	K_CONFIG=("${@/#/$SCRIPTS/kernel-}")
}

# Kernels with checkers, from the source of the stock kernel.
kernel_look_up_debug() { kernel_of_ours debug test test.config debug.config; }

kernel_look_up_kcsan() { kernel_of_ours kcsan test test.config kcsan.config; }

kernel_look_up_uml() { kernel_of_ours uml uml uml.config; }

kernel_look_up_uml-smp() { kernel_of_ours uml-smp uml uml.config uml-smp.config uml-smp.patch; }

kernel_look_up_uml-host() { kernel_of_ours uml-host uml uml.config uml-host.config; }
