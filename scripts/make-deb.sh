#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Makes the Debian packages in build/deb: make-deb.sh. Uses this machine's cargo if this is a Debian 13 with cargo, cc,
# dpkg-shlibdeps and libclang, or if CARGO= names it; else the tool-chain root.
. "$(dirname "$0")/lib.sh"

DEB=$BUILD/deb
FILES=$BUILD/deb-files
VERSION=$(sed -n 's/^version = "\(.*\)"/\1/p' "$CLONE/tools/Cargo.toml")
grep -qxF "PACKAGE_VERSION=\"$VERSION\"" "$CLONE/dkms.conf" || die "dkms.conf: not version $VERSION, as tools/Cargo.toml has it"

# The version with Debian's revision, which is increased when the same version is packaged again.
REVISION=$(sed -n "1s/^dm-overlaybd (\(${VERSION//./\\.}-[0-9.]*\)) .*/\1/p" "$CLONE/packaging/deb/changelog")
[ -n "$REVISION" ] || die "packaging/deb/changelog: not version $VERSION, as tools/Cargo.toml has it"

# The files that DKMS builds from.
DKMS_SOURCES=(COPYING Kbuild dkms.conf include rust scripts/{dkms,kdir-check,kernel-tree,lib}.sh)

# notices: print the licences and notices of the crates that are linked into obdsetup, in the form of Debian's
# copyright files. If a crate offers several licences, use the MIT licence: Apache-2.0 is incompatible with GPL-2.0.
notices() {
	local crates name version dir files license
	crates=$("${CARGO:-cargo}" tree --manifest-path "$CLONE/tools/Cargo.toml" --offline --locked -p obdsetup -e normal \
		--prefix none --no-dedupe -f '{p}|{l}')
	sort -u <<<"$crates" | while IFS='|' read -r name license; do
		[[ $name != *"($CLONE"* ]] || continue
		read -r name version _ <<<"$name"
		case $name:$license in
		lz4-sys:MIT) license="MIT and BSD-2-Clause" ;;
		libbz2-rs-sys:bzip2-1.0.6) license=bzip2-1.0.6 ;;
		liblzma-sys:*MIT*) license="MIT and 0BSD" ;;
		*Unicode*) license="MIT and Unicode-3.0" ;;
		*MIT*) license=MIT ;;
		*:BSD-3-Clause) ;;
		*) die "crate $name: licence $license?" ;;
		esac
		dir=$(echo "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*/"$name-${version#v}")
		mapfile -t files < <(find "$dir" -maxdepth 3 -type f \( -iname 'LICENSE*' -o -iname COPYRIGHT -o -name COPYING.0BSD \) ! -iname '*APACHE*' \
			! -name '*.sh' | sort)
		[ "${#files[@]}" -gt 0 ] || die "crate $name: no licence in $dir"
		printf '\nFiles: crates/%s-%s/*\nCopyright: The authors of %s, see the notices below\nLicense: %s\n' \
			"$name" "${version#v}" "$name" "$license"
		cat "${files[@]}" | sed 's/\r$//; s/[[:space:]]*$//; s/^/ /; s/^ $/ ./'
	done
	printf '\nFiles: rust/library/*\nCopyright: The Rust Project contributors\nLicense: MIT\nComment: %s\n' \
		"Rust's standard library. The text of the licence is that of the crate libc above."
}

# pack_one PACKAGE ARCH SHLIBS: make the package from the directory $DEB/PACKAGE, and remove the directory. SHLIBS are
# the libraries that it depends on.
pack_one() {
	local package=$1 arch=$2 shlibs=$3 tree=$DEB/$1 script file=$DEB/$1_${REVISION}_$2.deb
	install -D -m 644 "$CLONE/packaging/deb/copyright" "$tree/usr/share/doc/$package/copyright"
	[ "$package" != obdsetup ] || cat "$DEB/notices" >>"$tree/usr/share/doc/$package/copyright"
	gzip -9nc "$CLONE/packaging/deb/changelog" >"$tree/usr/share/doc/$package/changelog.Debian.gz"
	mkdir "$tree/DEBIAN"
	(cd "$tree" && find usr -type f -print0 | LC_ALL=C sort -z | xargs -0 md5sum) >"$tree/DEBIAN/md5sums"
	{
		sed "s/@REVISION@/$REVISION/; s/@ARCH@/$arch/; s/@SHLIBS@/$shlibs/" "$CLONE/packaging/deb/$package.control"
		say "Installed-Size: $(du -sk "$tree/usr" | cut -f1)"
	} >"$tree/DEBIAN/control"
	for script in postinst prerm postrm; do
		[ -f "$CLONE/packaging/deb/$package.$script" ] || continue
		sed "s/@VERSION@/$VERSION/g" "$CLONE/packaging/deb/$package.$script" >"$tree/DEBIAN/$script"
		chmod 755 "$tree/DEBIAN/$script"
	done
	[ ! -f "$CLONE/packaging/deb/$package.triggers" ] || cp "$CLONE/packaging/deb/$package.triggers" "$tree/DEBIAN/triggers"
	chmod -R u=rwX,go=rX "$tree"
	dpkg-deb --root-owner-group --build "$tree" "$file"
	rm -r "$tree"
}

# pack OBDSETUP: make both packages. Runs where the program OBDSETUP was built: on this machine, or in the tool-chain
# root.
pack() {
	local source=$DEB/dm-overlaybd-dkms/usr/src/dm-overlaybd-$VERSION shlibs
	rm -rf "$DEB"
	mkdir -p "$source" "$DEB/shlibs/debian"

	tar -C "$CLONE" -c --null --no-recursion -T "$FILES" | tar -x -C "$source"
	pack_one dm-overlaybd-dkms all ''

	DESTDIR=$DEB/obdsetup PREFIX=/usr OBDSETUP=$1 "$SCRIPTS/install.sh" tools
	# Debian's zsh looks for the completions of packages elsewhere.
	[ ! -d "$DEB/obdsetup/usr/share/zsh/site-functions" ] ||
		mv "$DEB"/obdsetup/usr/share/zsh/{site-functions,vendor-completions}
	strip "$DEB/obdsetup/usr/sbin/obdsetup"
	find "$DEB/obdsetup/usr/share/man" -type f -exec gzip -9n {} +
	: >"$DEB/shlibs/debian/control"
	shlibs=$(cd "$DEB/shlibs" && dpkg-shlibdeps -O -e "$DEB/obdsetup/usr/sbin/obdsetup" | sed -n 's/^shlibs:Depends=//p')
	[ -n "$shlibs" ] || die "no libraries found that obdsetup needs"
	rm -r "$DEB/shlibs"
	notices >"$DEB/notices"
	pack_one obdsetup "$(dpkg --print-architecture)" "$shlibs"
}

# debian_13: whether this machine can build obdsetup as Debian 13 does.
debian_13() {
	local tool
	# shellcheck disable=SC1091 # the machine's own
	[ "$(. /etc/os-release && say "${ID:-}${VERSION_ID:-}")" = debian13 ] || return
	for tool in cargo cc dpkg-shlibdeps; do command -v "$tool" >/dev/null || return; done
	ldconfig -p | grep libclang >/dev/null
}

# list_files: print the files that DKMS builds from: those in git, or all in a release's archive.
list_files() {
	cd "$CLONE"
	if [ -e .git ] && command -v git >/dev/null; then
		git -c safe.directory="*" ls-files -z -- "${DKMS_SOURCES[@]}"
	else
		find "${DKMS_SOURCES[@]}" -type f ! -name '*.o' ! -name '.*' -print0
	fi
}

if [ "${1:-}" = --pack ]; then
	pack "$2"
	exit
fi
alone
[ -n "${CARGO:-}" ] || ! debian_13 || CARGO=cargo
export CARGO="${CARGO:-}"
# The files in the packages have the time of the commit.
export SOURCE_DATE_EPOCH="${SOURCE_DATE_EPOCH:-$(git -c safe.directory="*" -C "$CLONE" log -1 --format=%ct 2>/dev/null || date +%s)}"
[ -n "$CARGO" ] || "$SCRIPTS/setup.sh"
mkdir -p "$BUILD"
list_files >"$FILES"
steps 2
step "obdsetup" "$SCRIPTS/build-tools.sh"
if [ -n "$CARGO" ]; then
	step "packages" "$0" --pack "$BUILD/cargo-host/release/obdsetup"
else
	step "packages" "$SCRIPTS/in-root.sh" env SOURCE_DATE_EPOCH="$SOURCE_DATE_EPOCH" \
		scripts/make-deb.sh --pack "$IN_ROOT/build/cargo/release/obdsetup"
fi
ls "$DEB"/*.deb
