#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Runs a command as the calling user in the tool-chain root, a directory with a Debian, by chroot:
# in-root.sh [-r OTHER_ROOT] [-k KERNEL_DIR] [-b SRC:DST]... CMD...
# This git clone is mounted at /clone, the current directory. If possible, its path on the host is a link to /clone.
# -k: mount a kernel's directory in the cache at /kernel. -b: mount SRC at DST. -r: use another root. All mounts end
# with the command.
. "$(dirname "$0")/lib.sh"
. "$SCRIPTS/cache.sh"

kernel=-
binds=()
while getopts +r:k:b: opt; do
	case $opt in
	r) ROOT=$OPTARG ;;
	k) kernel=$OPTARG ;;
	b) binds+=("$OPTARG") ;;
	*) die "usage: in-root.sh [-r OTHER_ROOT] [-k KERNEL_DIR] [-b SRC:DST]... CMD..." ;;
	esac
done
shift $((OPTIND - 1))

need_root
[ -d "$ROOT" ] || die "no tool-chain root yet; 'make setup' makes it"
mkdir -p "$CACHE/cargo" "$BUILD"

# The environment is fixed, except for the caller's variables that are listed here.
env=(PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
	"TERM=${TERM:-dumb}" CARGO_HOME=/cargo "CARGO_TARGET_DIR=$IN_ROOT/build/cargo"
	CARGO_HTTP_CAINFO=/etc/ssl/certs/ca-certificates.crt)
while IFS='=' read -r -d '' name value; do
	case $name in
	OBD_* | CARGO_HTTP_* | CARGO_NET_* | RUST_BACKTRACE | RUST_LOG | http_proxy | https_proxy | no_proxy | \
		HTTP_PROXY | HTTPS_PROXY | NO_PROXY | ALL_PROXY | V) env+=("$name=$value") ;;
	esac
done < <(env -0)

# The command is killed when this process or its caller ends: with-caller.sh.
attend "${SUDO[@]}" "$SCRIPTS/with-caller.sh" "$PPID,$$" unshare --mount --propagation private --pid --fork --kill-child \
	"$SCRIPTS/root-enter.sh" "$ROOT" "$CLONE" "$IN_ROOT" "$CACHE/cargo" "$kernel" "$(id -u):$(id -g)" \
	"${#binds[@]}" "${binds[@]}" env -i "${env[@]}" "$@"
