#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Tests the Debian packages: check-deb.sh. Makes them, installs them in a Debian 13 with Debian's 7.3 kernel, where
# DKMS builds the module, and purges them; a VM with that kernel loads the module by its aliases. The last line sums
# up.
. "$(dirname "$0")/lib.sh"
. "$SCRIPTS/cache.sh"
. "$SCRIPTS/kernel.sh"

DEB=$BUILD/deb
WORK=$BUILD/deb-test

# build_debian DIR RELEASE VERSION DEPENDS: make a Debian 13 with that kernel, installed as Documentation/install.rst
# says, and with what our packages depend on. It gets the mirror and settings of the tool-chain root.
# shellcheck disable=SC2016 # mmdebstrap's hooks get the root as their $1
build_debian() {
	local dir=$1 release=$2 version=$3 depends=$4 mirror series
	mirror=$(root_mirror)
	series=$(cut -d. -f1,2 <<<"$release")
	attend "${LONG_SUDO[@]}" env DEBIAN_FRONTEND=noninteractive DEPENDS="$depends" \
		KERNEL="linux-image-$release=$version linux-headers-$release=$version linux-source-$series=$version" \
		unshare --mount --pid --fork --kill-child --mount-proc \
		mmdebstrap --mode=root --variant=apt --format=directory \
		--aptopt='APT::Install-Recommends "false"' \
		--aptopt="$ROOT/etc/apt/apt.conf.d/99mmdebstrap" \
		--keyring=/usr/share/keyrings/debian-archive-keyring.gpg \
		--customize-hook='chroot "$1" apt-get install -y -t '"$SUITE"'-backports $KERNEL libelf-dev' \
		--customize-hook='chroot "$1" apt-get satisfy -y "$DEPENDS"' \
		"$SUITE" "$dir" \
		"deb $mirror $SUITE main" \
		"deb $mirror $SUITE-updates main" \
		"deb $mirror $SUITE-backports main"
}

# depends: print what the packages depend on, in the form for apt-get satisfy.
depends() {
	local package
	for package in "$DEB"/*.deb; do "$SCRIPTS/in-root.sh" dpkg-deb -f "build/deb/${package##*/}" Depends; done | paste -sd,
}

# make_debian: set DEBIAN to the cached root, which is made again for other dependencies or another kernel.
make_debian() {
	local name depends
	depends=$(depends)
	[ -n "$depends" ]
	name=debian-$({ declare -f build_debian && say "$K_RELEASE $K_VERSION $depends"; } | short_hash)
	if [ ! -d "$CACHE/$name" ] && cache_begin "$name"; then
		build_debian "$TMP" "$K_RELEASE" "$K_VERSION" "$depends"
		cache_commit "$name"
	fi
	cache_used "$name"
	ln -sfn "$CACHE/$name" "$BUILD/deb-root"
}

# in_debian: install, test and purge the packages there. Output goes to $WORK.
in_debian() {
	"${SUDO[@]}" rm -rf "$WORK"
	mkdir -p "$WORK/share"
	attend "${LONG_SUDO[@]}" unshare --mount --propagation private --pid --fork --kill-child \
		"$CLONE/packaging/deb/test.sh" "$(realpath "$BUILD/deb-root")" "$WORK" "$DEB" "$K_RELEASE" "$(id -u):$(id -g)"
}

# in_vm: test the module that DKMS has built, with depmod's files, in the VM.
in_vm() {
	RUN=packaging/deb/test-vm.sh SHARE=$WORK/share TIMEOUT=${TIMEOUT:-600} VM_LOG=$LOGS/kernel-deb.log "$SCRIPTS/vm.sh"
}

case ${1:-} in
--*)
	kernel_select
	"${1#--}"
	exit
	;;
'') ;;
*) die "usage: check-deb.sh" ;;
esac

passed=0 failed=0 skipped=0

# results TITLE FUNCTION: run a step that prints a line "ok", "not ok" or "skipped" for each test.
results() {
	local status=0 p f
	step "$1" "$0" "--$2" || status=$?
	grep -E '^(ok|not ok|skipped)' "$STEP_LOG" | sed 's/^/      /' || :
	p=$(grep -c '^ok' "$STEP_LOG") || :
	f=$(grep -c '^not ok' "$STEP_LOG") || :
	[ "$f" != 0 ] || { [ "$status" = 0 ] && [ "$p" != 0 ]; } || f=1
	passed=$((passed + p)) failed=$((failed + f))
	skipped=$((skipped + $(grep -c '^skipped' "$STEP_LOG" || :)))
}

alone
trap '"${SUDO[@]}" rm -rf "$WORK"' EXIT
"$SCRIPTS/make-deb.sh"
"$SCRIPTS/setup.sh"
steps 3
step "Debian $SUITE with the kernel" "$0" --make_debian
results "packages, in that Debian" in_debian
results "module of the package, in the VM" in_vm
say "$passed passed, $failed failed, $skipped skipped"
[ "$failed" = 0 ]
