# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash disable=SC2034 # variables are for those who source this
# Chooses the kernel tree that a module is built with. Sourced.

# The kernel that the user has named, if any: kernel.sh sets a default.
KERNEL_GIVEN=${KERNEL:-}
# shellcheck source=scripts/cache.sh
. "$SCRIPTS/cache.sh"
# shellcheck source=scripts/kernel.sh
. "$SCRIPTS/kernel.sh"
# shellcheck source=scripts/kdir-check.sh
. "$SCRIPTS/kdir-check.sh"

# kdir_choose [WHAT]: use the user's KDIR, unless it is a tree that `make setup` has made; with KDIR, KERNEL is an error.
# Without KDIR and KERNEL, use the running kernel's tree if it is usable and USE_ROOT is not set; else the tree of KERNEL
# (stock by default), in the tool-chain root. Sets KDIR_USED (the tree's path), KDIR_RELEASE, KDIR_ARGS (arguments for
# make), KDIR_IN_ROOT (1 if in the root), KDIR_CLONE (the clone's path for the build, see kdir_place) and KDIR_ID, which
# identifies the tree. WHAT is install if the module will be installed on this machine: then, KERNEL is no way out.
kdir_choose() {
	kdir_choose_tree "$@"
	kdir_place
}

# kdir_running: print the path of the running kernel's tree, which may not exist.
kdir_running() { say "/lib/modules/$(uname -r)/build"; }

# kdir_choose_tree [WHAT]: kdir_choose without KDIR_CLONE.
kdir_choose_tree() {
	local problems running or="; KERNEL=stock instead of KDIR builds for Debian's kernel in the tool-chain root"
	[ "${1:-}" != install ] || or=
	running=$(kdir_running)
	KDIR_IN_ROOT=
	KDIR_USED=
	if [ -n "${KDIR:-}" ] && [[ $(realpath -m "$KDIR") != "$CACHE"/kernel-* ]]; then
		[ -z "$KERNEL_GIVEN" ] || die "KDIR=$KDIR and KERNEL=$KERNEL_GIVEN name two kernels: leave one of them out"
		problems=$(kdir_problems "$KDIR")
		[ -z "$problems" ] || die "cannot build for $KDIR: $problems. README.md, \"Building for your own kernel\", says" \
			"what is needed$or"
		KDIR_USED=$(realpath "$KDIR")
	elif [ -z "${KDIR:-}${USE_ROOT:-}$KERNEL_GIVEN" ] && [ -d "$running" ] && [ -z "$(kdir_problems "$running")" ]; then
		KDIR_USED=$(realpath "$running")
		say "Building for the running kernel ($KDIR_USED)"
	fi
	if [ -n "$KDIR_USED" ]; then
		KDIR_RELEASE=$(cat "$KDIR_USED/include/config/kernel.release")
		KDIR_ID=$KDIR_USED
		kdir_compiler "$KDIR_USED"
		return
	fi
	"$SCRIPTS/setup.sh"
	kernel_select
	KDIR_IN_ROOT=1
	KDIR_USED=/kernel/kdir
	KDIR_RELEASE=$K_RELEASE
	KDIR_ID=${K_DIR##*/}
	kdir_compiler "$K_DIR/kdir"
	local args=()
	[ ! -f "$K_DIR/makeargs" ] || mapfile -t args <"$K_DIR/makeargs"
	KDIR_ARGS+=("${args[@]}")
	[ ! -f "$K_DIR/rustflags" ] || KDIR_ARGS+=("KRUSTFLAGS=$(cat "$K_DIR/rustflags")")
	[ -n "${USE_ROOT:-}" ] || say "Building for $K_RELEASE in the tool-chain root; KDIR= names another kernel's tree"
}

# kdir_place: set KDIR_CLONE to a path of the clone without blanks, colons and the like, for the kernel's build.
# kdir_run mounts the clone there if needed.
kdir_place() {
	local odd='[^A-Za-z0-9._/+@-]'
	KDIR_CLONE=$CLONE
	if [ -n "$KDIR_IN_ROOT" ]; then
		KDIR_CLONE=$IN_ROOT
	elif [[ $KDIR_USED =~ $odd ]]; then
		die "KDIR=$KDIR_USED: the kernel's build accepts only letters, digits and ._/+@- in a path: rename the tree"
	elif [[ $CLONE =~ $odd ]]; then
		KDIR_CLONE=/mnt
		[[ $KDIR_USED != /mnt/* ]] ||
			die "$CLONE: the kernel's build accepts only letters, digits and ._/+@- in a path: rename the clone"
	fi
}

# kdir_run CMD...: run the command in the root if the tree is there, else on the host, with the clone at KDIR_CLONE.
kdir_run() {
	if [ -n "$KDIR_IN_ROOT" ]; then
		"$SCRIPTS/in-root.sh" -r "$K_ROOT" -k "$K_DIR" "$@"
	elif [ "$KDIR_CLONE" != "$CLONE" ]; then
		need_root
		"${LONG_SUDO[@]}" unshare --mount --propagation private "$SCRIPTS/host-enter.sh" \
			"$CLONE" "$KDIR_CLONE" "$(id -u)" "$(id -g)" env "PATH=$PATH" "HOME=$HOME" "$@"
	else
		"$@"
	fi
}
