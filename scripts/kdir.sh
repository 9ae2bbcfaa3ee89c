# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash disable=SC2034 # variables are for those who source this
# Which kernel tree a module is built against, and whether it and this machine can do that. Sourced.

# shellcheck source=scripts/cache.sh
. "$SCRIPTS/cache.sh"
# shellcheck source=scripts/kernel.sh
. "$SCRIPTS/kernel.sh"

# config_value DIR NAME: the value of CONFIG_NAME in a kernel tree.
config_value() { sed -n "s/^CONFIG_$2=\"\\?\\([^\"]*\\)\"\\?\$/\\1/p" "$1/include/config/auto.conf" 2>/dev/null || :; }

# kdir_compiler DIR: set KDIR_ARGS to the make arguments that choose the compiler the kernel was built with.
kdir_compiler() {
	local cc
	KDIR_ARGS=()
	cc=$(config_value "$1" CC_VERSION_TEXT)
	cc=${cc%% *}
	if [ "$(config_value "$1" CC_IS_CLANG)" = y ]; then
		KDIR_ARGS=(LLVM=1)
	elif [ -n "$KDIR_IN_ROOT" ] || command -v "$cc" >/dev/null; then
		KDIR_ARGS=("CC=$cc")
	fi
}

# kdir_problems DIR: print, on one line, what keeps a Rust module from being built against it here; nothing if nothing.
kdir_problems() {
	local dir=$1 missing=() release want have
	if [ ! -f "$dir/Makefile" ]; then
		say "not a kernel tree"
		return
	fi
	release=$(cat "$dir/include/config/kernel.release" 2>/dev/null || :)
	if [ -z "$release" ]; then
		say "not prepared for modules (no include/config/kernel.release)"
		return
	fi
	[ "$(printf '%s\n' 7.2 "$release" | sort -V | head -n 1)" = 7.2 ] || missing+=("kernel $release is older than 7.2")
	if [ "$(config_value "$dir" RUST)" != y ]; then
		missing+=("the kernel is built without CONFIG_RUST")
	else
		want=$(config_value "$dir" RUSTC_VERSION_TEXT)
		have=$("${RUSTC:-rustc}" --version 2>/dev/null || :)
		if [ -z "$have" ]; then
			missing+=("no rustc (the kernel was built with: ${want:-unknown})")
		elif [ -n "$want" ] && [ "$have" != "$want" ]; then
			missing+=("another rustc than the kernel's: $have, not $want")
		fi
		"${BINDGEN:-bindgen}" --version >/dev/null 2>&1 || missing+=("no bindgen")
		if [ ! -f "$dir/rust/libkernel.rmeta" ] || ! ls "$dir"/rust/libmacros.* >/dev/null 2>&1; then
			missing+=("no Rust metadata in it (rust/libkernel.rmeta, rust/libmacros.so)")
			[ -z "$have" ] || [ -d "$("${RUSTC:-rustc}" --print sysroot)/lib/rustlib/src/rust/library/core" ] ||
				missing+=("no rust-src to make that with")
		fi
	fi
	local IFS=';'
	say "${missing[*]}" | sed 's/;/; /g'
}

# kdir_choose: the user's KDIR; else the running kernel's tree if it is usable; else the stock kernel's, in the root.
# Sets KDIR_USED, KDIR_RELEASE, KDIR_ARGS, KDIR_IN_ROOT and KDIR_ID, which changes when the tree is another.
kdir_choose() {
	local problems running
	running=/lib/modules/$(uname -r)/build
	KDIR_IN_ROOT=
	KDIR_USED=
	if [ -n "${KDIR:-}" ] && [[ $(realpath -m "$KDIR") != "$CACHE"/kernel-* ]]; then
		problems=$(kdir_problems "$KDIR")
		[ -z "$problems" ] || die "cannot build for $KDIR: $problems"
		KDIR_USED=$(realpath "$KDIR")
	elif [ -z "${KDIR:-}${USE_ROOT:-}" ] && [ -d "$running" ] && [ -z "$(kdir_problems "$running")" ]; then
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

# kdir_run CMD...: run where the tree can be used.
kdir_run() {
	if [ -n "$KDIR_IN_ROOT" ]; then
		"$SCRIPTS/in-root.sh" -k "$K_DIR" "$@"
	else
		"$@"
	fi
}
