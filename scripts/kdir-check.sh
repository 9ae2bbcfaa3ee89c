# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash disable=SC2034 # variables are for those who source this
# Checks whether a kernel tree and this machine can build a Rust module, and with which compiler. Sourced.

# config_value DIR NAME: print the value of CONFIG_NAME in a kernel tree, without quotes; nothing if it is not set.
config_value() { sed -n "s/^CONFIG_$2=\"\\?\\([^\"]*\\)\"\\?\$/\\1/p" "$1/include/config/auto.conf" 2>/dev/null || :; }

# kdir_compiler DIR: set KDIR_ARGS to the make arguments for the compiler that the kernel was built with: LLVM=1 for any
# clang, CC= for a gcc that is installed on this machine (or is in the root: KDIR_IN_ROOT), otherwise none.
kdir_compiler() {
	local cc
	KDIR_ARGS=()
	cc=$(config_value "$1" CC_VERSION_TEXT)
	cc=${cc%% *}
	if [ "$(config_value "$1" CC_IS_CLANG)" = y ]; then
		KDIR_ARGS=(LLVM=1)
	elif [ -n "${KDIR_IN_ROOT:-}" ] || command -v "$cc" >/dev/null; then
		KDIR_ARGS=("CC=$cc")
	fi
}

# One of the problems that kdir_problems prints. If there is no other, dkms.sh makes a tree.
KDIR_NO_METADATA='no Rust metadata in the tree (rust/libkernel.rmeta, rust/libmacros.so)'

# kdir_problems DIR: print, on one line, why no Rust module can be built for the kernel tree DIR on this machine; an
# empty line if one can be built.
kdir_problems() {
	local dir=$1 missing=() release want have cc
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
	cc=$(config_value "$dir" CC_VERSION_TEXT)
	cc=${cc%% *}
	# The text of a clang may begin with the distribution's name.
	[ "$(config_value "$dir" CC_IS_CLANG)" != y ] || cc=clang
	[ -z "$cc" ] || command -v "$cc" >/dev/null || missing+=("no $cc, which the kernel was built with")
	if [ "$(config_value "$dir" RUST)" != y ]; then
		missing+=("the kernel is built without CONFIG_RUST")
	else
		want=$(config_value "$dir" RUSTC_VERSION_TEXT)
		have=$(rustc --version 2>/dev/null | head -n 1 || :)
		if [ -z "$have" ]; then
			missing+=("no rustc (the kernel was built with: ${want:-unknown})")
		elif [ -n "$want" ] && [ "$have" != "$want" ]; then
			missing+=("another rustc than the kernel's: $have, not $want")
		fi
		bindgen --version >/dev/null 2>&1 || missing+=("no bindgen")
		if [ ! -f "$dir/rust/libkernel.rmeta" ] || ! ls "$dir"/rust/libmacros.* >/dev/null 2>&1; then
			missing+=("$KDIR_NO_METADATA")
			[ -z "$have" ] || [ -d "$(rustc --print sysroot)/lib/rustlib/src/rust/library/core" ] ||
				missing+=("no rust-src, which is needed to make it")
		fi
	fi
	local IFS=';'
	say "${missing[*]}" | sed 's/;/; /g'
}
