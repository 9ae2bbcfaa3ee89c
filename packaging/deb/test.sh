#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# shellcheck disable=SC2317 # check calls them
# Tests the packages in the directory DEBS: test.sh ROOT WORK DEBS RELEASE USER. Called as root, in new namespaces. ROOT
# is a Debian with kernel RELEASE and all packages that these depend on. ROOT is not changed: an overlayfs keeps the
# changes in WORK. WORK/share gets the files that the VM needs, owned by USER. Prints a line for each test.
set -euo pipefail

root=$1 work=$2 debs=$3 release=$4 user=$5
failed=0

mkdir "$work"/{lower,upper,overlay,new}
new=$work/new
# With relative names: overlayfs does not accept colons and commas in its options.
mount --bind "$root" "$work/lower"
(cd "$work" && mount -t overlay overlay -o lowerdir=lower,upperdir=upper,workdir=overlay new)
mount -t proc proc "$new/proc"
mount --rbind /dev "$new/dev"
mount -t tmpfs tmpfs "$new/tmp"
mount -t tmpfs tmpfs "$new/mnt"
cp "$debs"/*.deb "$new/mnt/"
revision=$(basename "$debs"/obdsetup_*.deb | cut -d_ -f2)
version=${revision%-*}
source=/usr/src/dm-overlaybd-$version
headers=/usr/src/linux-headers-$release
tree=/var/cache/dm-overlaybd/$release

# there CMD...: run CMD in the copy of that Debian.
there() {
	chroot "$new" /usr/bin/env -i -C / PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 \
		DEBIAN_FRONTEND=noninteractive "$@" </dev/null
}

# check TITLE CMD...: run a test, which passes if CMD succeeds.
check() {
	local title=$1 start=$SECONDS
	shift
	if "$@"; then
		echo "ok $title ($((SECONDS - start)) s)"
	else
		echo "not ok $title"
		failed=1
	fi
}

# says TEXT CMD...: return whether CMD fails and prints exactly one line, which contains TEXT.
says() {
	local text=$1 out
	shift
	out=$("$@" 2>&1) && echo "it does not fail" && return 1
	echo "$out"
	[ "$(wc -l <<<"$out")" = 1 ] && [[ $out == *"$text"* ]]
}

install_packages() {
	there sh -c 'apt-get install -y /mnt/*.deb' || {
		tail -n 20 "$new/var/lib/dkms/dm-overlaybd/$version/build/make.log"
		return 1
	}
	du -sm "$new$tree" && there dkms status -m dm-overlaybd -v "$version" -k "$release" | grep ": installed\$" >/dev/null
}

# for_this_kernel: the module has the same vermagic as a module of the kernel package.
for_this_kernel() {
	there modinfo -k "$release" dm_overlaybd &&
		[ "$(there modinfo -k "$release" -F vermagic dm_overlaybd)" = "$(there modinfo -k "$release" -F vermagic dm_bufio)" ]
}

signed() {
	local key
	key=$(there openssl x509 -inform der -in /var/lib/dkms/mok.pub -noout -serial | sed 's/^serial=//; s/../&:/g; s/:$//')
	there modinfo -k "$release" -F sig_key dm_overlaybd
	[ -n "$key" ] && [ "$(there modinfo -k "$release" -F sig_key dm_overlaybd)" = "$key" ]
}

# aliases: each alias resolves to the module, and depmod knows the modules that it depends on.
aliases() {
	local alias
	grep ' dm_overlaybd$' "$new/usr/lib/modules/$release/modules.alias" || return
	for alias in dm-zfile dm-lsmt dm-zfile_target dm-lsmt_target; do
		[ "$(there modprobe -S "$release" -R "$alias")" = dm_overlaybd ] || return
	done
	there modprobe -S "$release" --show-depends dm-zfile | grep dm-mod
}

runs() {
	there obdsetup --version | grep -F "$version" && there obdsetup --help >/dev/null &&
		grep -q 'Yann Collet' "$new/usr/share/doc/obdsetup/copyright" &&
		there test -s /usr/share/man/man8/obdsetup.8.gz -a -s /usr/lib/udev/rules.d/56-dm-overlaybd.rules
}

# unchanged: the installed files are the same as in the packages.
unchanged() {
	local changed
	changed=$(there dpkg --verify obdsetup dm-overlaybd-dkms 2>&1) && [ -z "$changed" ] && return
	echo "$changed"
	return 1
}

probe() { there "$source/scripts/dkms.sh" check "$@"; }

# fake_headers NAME SED: make headers in /tmp/NAME, with the configuration of the kernel changed by the sed command SED.
fake_headers() {
	mkdir -p "$new/tmp/$1/include/config"
	touch "$new/tmp/$1/Makefile"
	cp "$new$headers/include/config/kernel.release" "$new/tmp/$1/include/config/"
	sed "$2" "$new$headers/include/config/auto.conf" >"$new/tmp/$1/include/config/auto.conf"
}

no_rust() {
	fake_headers norust '/^CONFIG_RUST=/d'
	says 'without CONFIG_RUST' probe "$release" /tmp/norust
}

other_rustc() {
	fake_headers rustc 's/^\(CONFIG_RUSTC_VERSION_TEXT=.*rustc \)[^ ]*/\11.99.9/'
	says 'not rustc 1.99.9' probe "$release" /tmp/rustc
}

# without FILE CMD...: run CMD while FILE is missing.
without() {
	local file=$new$1 status=0
	shift
	mv "$file" "$file.away"
	"$@" || status=$?
	mv "$file.away" "$file"
	return "$status"
}

no_bindgen() { without /usr/bin/bindgen says 'no bindgen' probe "$release"; }
no_headers() { says 'no headers' probe 7.3.0-none; }
# no_source: without the source and without the tree made from it. If the tree exists, the source is not needed.
no_source() {
	local package
	package=linux-source-$(cut -d. -f1,2 <<<"$release")
	without "/usr/src/$package.tar.xz" probe "$release" || return
	without "$tree/made-of" without "/usr/src/$package.tar.xz" says "apt install $package=" probe "$release"
}

# older_recipe: a tree that an older version of the scripts has made is used, if the source of this kernel is missing.
older_recipe() {
	local status=0
	cp "$new$tree/made-of" "$new/tmp/made-of"
	sed -i '$s/.*/000000000000/' "$new$tree/made-of"
	with_version "linux-source-$(cut -d. -f1,2 <<<"$release")" 9.9-1 probe "$release" || status=$?
	cp -p "$new/tmp/made-of" "$new$tree/made-of"
	return "$status"
}

# with_version PACKAGE VERSION CMD...: run CMD while dpkg shows VERSION as the version of PACKAGE.
with_version() {
	local package=$1 version=$2 file=$new/var/lib/dpkg/status status=0
	shift 2
	cp "$file" "$new/tmp/status"
	sed -i "/^Package: $package\$/,/^\$/s/^Version: .*/Version: $version/" "$file"
	"$@" || status=$?
	cp "$new/tmp/status" "$file"
	return "$status"
}

not_installed() { ! there dkms status -m dm-overlaybd -v "$version" -k "$release" | grep ": installed\$" >/dev/null; }

# kernel_hook DIR: the hook that an update of the kernel runs prints which source package is missing, but does not fail.
kernel_hook() {
	local out
	! there dkms remove -m dm-overlaybd -v "$version" -k "$release" || there dkms add -m dm-overlaybd -v "$version" || return
	not_installed || return
	out=$(with_version "linux-headers-$release" 9.9-1 there "/etc/kernel/$1/dkms" "$release" 2>&1) || return
	echo "$out"
	grep '^dm-overlaybd: cannot build .*apt install linux-source-.*=9.9-1' <<<"$out" && not_installed
}

# source_comes: the module is built when the source is installed after the headers of its kernel.
source_comes() {
	not_installed && there dpkg-trigger --no-await --by-package=linux-source /usr/src &&
		there dpkg --triggers-only dm-overlaybd-dkms && ! not_installed
}

# apt_says_why: the output of apt has the reason, not only a log; and apt does not fail.
apt_says_why() {
	local out
	out=$(without /usr/bin/bindgen there /var/lib/dpkg/info/dm-overlaybd-dkms.postinst configure 2>&1) || return
	echo "$out"
	grep '^dm-overlaybd: cannot build .*no bindgen' <<<"$out"
}

# excluded: DKMS skips a kernel without Rust (exit code 77), so that apt does not fail.
excluded() {
	local status=0
	mkdir -p "$new/usr/lib/modules/7.3.0-norust"
	ln -s /tmp/norust "$new/usr/lib/modules/7.3.0-norust/build"
	there dkms build -m dm-overlaybd -v "$version" -k 7.3.0-norust || status=$?
	rm -r "$new/usr/lib/modules/7.3.0-norust"
	[ "$status" = 77 ]
}

# upgrade: install the same package with another version, which uses the existing kernel tree.
upgrade() {
	local before
	before=$(stat -c %Y "$new$tree/made-of") || return
	# shellcheck disable=SC2016 # the inner shell's own
	there sh -ec 'dpkg-deb -R "$1" /tmp/next
		mv "/tmp/next/usr/src/dm-overlaybd-$2" "/tmp/next/usr/src/dm-overlaybd-$2.1"
		sed -i "s/$2/$2.1/g" /tmp/next/DEBIAN/* "/tmp/next/usr/src/dm-overlaybd-$2.1/dkms.conf"
		dpkg-deb -b /tmp/next /mnt/next.deb
		apt-get install -y /mnt/next.deb
	' - "/mnt/dm-overlaybd-dkms_${revision}_all.deb" "$version" || return
	there dkms status -m dm-overlaybd
	there dkms status -m dm-overlaybd -v "$version.1" -k "$release" | grep ": installed\$" >/dev/null &&
		[ ! -e "$new$source" ] && [ "$(stat -c %Y "$new$tree/made-of")" = "$before" ]
}

purge() { there apt-get purge -y dm-overlaybd-dkms obdsetup; }

# left: print the files that the packages have left behind, deleted or changed, except for those that apt, dpkg and DKMS
# itself keep.
left() {
	local path
	find "$work/upper" -mindepth 1 -printf '%y %P\n' | while read -r type path; do
		case $path in
		var/log/* | var/lib/apt/* | var/cache/apt/* | var/cache/ldconfig/* | etc/ld.so.cache) ;;
		var/lib/dpkg/info/*overlaybd* | var/lib/dpkg/info/obdsetup*) echo "$path" ;;
		var/lib/dpkg/*) ;;
		# The key of this machine, which DKMS makes once, for all modules.
		var/lib/dkms/mok.key | var/lib/dkms/mok.pub) ;;
		# Made again when hooks are installed or removed.
		boot/initrd.img-*) ;;
		*)
			if [ "$type" = d ]; then
				[ -d "$root/$path" ] || echo "$path/"
			else
				cmp -s "$work/upper/$path" "$root/$path" || echo "$path"
			fi
			;;
		esac
	done
}

nothing_left() {
	local left
	left=$(left)
	[ -z "$left" ] && return
	echo "$left"
	return 1
}

check "apt installs the packages, DKMS builds the module" install_packages
check "the module is for this kernel" for_this_kernel
check "DKMS has signed it with its key" signed
check "depmod has the aliases" aliases
check "obdsetup runs; manual page, notices and udev rule are there" runs
check "the files are those of the packages" unchanged

# The files that the VM needs.
share=$work/share
mkdir -p "$share/modules"
cp -r "$new/usr/lib/modules/$release"/{modules.*,updates} "$share/modules/"
cp "$new/usr/sbin/obdsetup" "$share/"
chown -R "$user" "$share"

check "the probe reports that a build is possible" probe "$release"
check "the probe reports a kernel without Rust" no_rust
check "the probe reports another rustc" other_rustc
check "the probe reports that bindgen is missing" no_bindgen
check "the probe reports that the headers are missing" no_headers
check "the probe reports that the source is missing" no_source
check "a tree of older scripts is used, if its source is missing" older_recipe
check "an update of the kernel does not fail without the source: headers" kernel_hook header_postinst.d
check "an update of the kernel does not fail without the source: image" kernel_hook postinst.d
check "the module is built when the source is installed" source_comes
check "apt shows why there is no module" apt_says_why
check "DKMS skips a kernel without Rust" excluded
check "an upgrade of the package builds with the same tree" upgrade
check "apt purges the packages" purge
check "nothing is left" nothing_left
echo "skipped: loading under Secure Boot, which the VM does not have"
exit "$failed"
