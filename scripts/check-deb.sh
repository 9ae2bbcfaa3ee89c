#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Tests the Debian packages: check-deb.sh. Makes them, installs them in a Debian 13 with Debian's 7.3 kernel, where
# DKMS builds the module, and purges them; a VM with that kernel loads the module by its aliases. The last line has
# the numbers of tests that passed, failed and were skipped.
. "$(dirname "$0")/lib.sh"
. "$SCRIPTS/cache.sh"
. "$SCRIPTS/debian-root.sh"
. "$SCRIPTS/kernel.sh"

DEB=$BUILD/deb
WORK=$BUILD/deb-test

# build_debian DIR RELEASE VERSION DEPENDS: make a Debian 13 with that kernel, installed as Documentation/install.rst
# says, and with what our packages depend on.
# shellcheck disable=SC2016 # mmdebstrap's hooks get the root as their $1
build_debian() {
	local dir=$1 release=$2 version=$3 depends=$4 series
	series=$(cut -d. -f1,2 <<<"$release")
	debian_root "$dir" "$SUITE $SUITE-updates $SUITE-backports" \
		DEBIAN_FRONTEND=noninteractive DEPENDS="$depends" \
		KERNEL="linux-image-$release=$version linux-headers-$release=$version linux-source-$series=$version" \
		--variant=apt --format=directory \
		--customize-hook='chroot "$1" apt-get install -y -t '"$SUITE"'-backports $KERNEL libelf-dev' \
		--customize-hook='chroot "$1" apt-get satisfy -y "$DEPENDS"'
}

# depends: print what the packages depend on, in the form for apt-get satisfy.
depends() {
	local package
	for package in "$DEB"/*.deb; do "$SCRIPTS/in-root.sh" dpkg-deb -f "build/deb/${package##*/}" Depends; done | paste -sd,
}

# make_debian: make the root, unless the cache has one for these dependencies and this kernel, and make build/deb-root a
# link to it.
make_debian() {
	local name depends
	depends=$(depends)
	[ -n "$depends" ]
	name=debian-$({ declare -f build_debian && cat "$SCRIPTS/debian-root.sh" &&
		say "$K_RELEASE $K_VERSION $depends"; } | short_hash)
	if [ ! -d "$CACHE/$name" ] && cache_begin "$name"; then
		build_debian "$TMP" "$K_RELEASE" "$K_VERSION" "$depends"
		cache_commit "$name"
	fi
	cache_used "$name"
	ln -sfn "$CACHE/$name" "$BUILD/deb-root"
}

# in_debian: install, test and purge the packages in that Debian. Files that this makes or changes are in $WORK.
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

alone
trap '"${SUDO[@]}" rm -rf "$WORK"' EXIT
"$SCRIPTS/make-deb.sh"
"$SCRIPTS/setup.sh"
steps 3
step "Debian $SUITE with the kernel" "$0" --make_debian
results "packages, in that Debian" in_debian
results "module of the package, in the VM" in_vm
results_sum
