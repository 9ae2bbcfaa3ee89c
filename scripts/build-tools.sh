#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Builds or tests user space with cargo, in the root: build-tools.sh [build | test | clippy | fmt]. With CARGO=, on
# the host.
. "$(dirname "$0")/lib.sh"

what=${1:-build}
target=$BUILD/cargo
case $what in
build) args=(build --release --locked) ;;
test) args=(test --locked --workspace --no-fail-fast) ;;
clippy) args=(clippy --locked --workspace --all-targets --all-features -- -D warnings) ;;
fmt) args=(fmt --all -- --check) ;;
*) die "usage: build-tools.sh [build | test | clippy | fmt]" ;;
esac

[ -z "${QUIET:-}" ] || args=("${args[0]}" --quiet "${args[@]:1}")

# generate DIR SEEN OBDSETUP...: have obdsetup write its manual pages and completions, for installation. SEEN is the
# path of DIR as that obdsetup sees it.
generate() {
	local dir=$1/generated seen=$2/generated
	shift 2
	mkdir -p "$dir/man"
	"$@" man "$seen/man"
	for shell in bash zsh fish; do "$@" completions "$shell" >"$dir/obdsetup.$shell"; done
}

cd "$CLONE/tools"
if [ -n "${CARGO:-}" ]; then
	OBD_GOLDENS=$GOLDENS CARGO_TARGET_DIR=$target-host "$CARGO" "${args[@]}"
	[ "$what" != build ] || generate "$target-host/release" "$target-host/release" "$target-host/release/obdsetup"
else
	"$SCRIPTS/setup.sh"
	# Mount the golden images at a directory that the root has.
	binds=()
	[ ! -d "$GOLDENS" ] || binds=(-b "$(realpath "$GOLDENS"):/srv")
	"$SCRIPTS/in-root.sh" "${binds[@]}" env -C tools OBD_GOLDENS="${binds:+/srv}" cargo "${args[@]}"
	[ "$what" != build ] ||
		generate "$target/release" build/cargo/release "$SCRIPTS/in-root.sh" build/cargo/release/obdsetup
	if [ "$what" = build ] && [ -z "${QUIET:-}" ] && ! "$target/release/obdsetup" --version >/dev/null 2>&1; then
		warn "build/cargo/release/obdsetup runs in the test VM, not on this machine: it is built with Debian 13." \
			"For this machine: make tools CARGO=cargo (Rust 1.85 or later, libclang)"
	fi
fi
