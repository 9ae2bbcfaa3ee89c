#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Installs what was built: the module, obdsetup, its udev rules, the units and hooks that open images at boot, the
# manual pages, completions. install.sh tools: all except the module. DESTDIR=, PREFIX= (/usr/local), KDIR= as for make.
# Builds what isn't built yet.
. "$(dirname "$0")/lib.sh"

[ -z "${DESTDIR:-}" ] || DESTDIR=$(realpath -m "$DESTDIR")
[[ ${PREFIX:-/} == /* ]] || die "PREFIX=$PREFIX: must begin with /"
prefix=${DESTDIR:-}${PREFIX:-/usr/local}

# OBDSETUP if it is set, else the obdsetup that this machine's cargo has built, else that of the tool-chain root.
# Without DESTDIR, it must run on this machine.
obdsetup=${OBDSETUP:-$BUILD/cargo-host/release/obdsetup}
[ -x "$obdsetup" ] || obdsetup=$BUILD/cargo/release/obdsetup
if [ ! -x "$obdsetup" ]; then
	not_by_sudo
	"$SCRIPTS/build-tools.sh"
fi
"$obdsetup" --version >/dev/null 2>&1 || [ -n "${DESTDIR:-}" ] ||
	die "obdsetup from the tool-chain root does not run on this machine; build it with your cargo: make tools CARGO=cargo"

# Packages have the module's source: they call install.sh tools.
[ "${1:-}" = tools ] || "$SCRIPTS/build-module.sh" install
install -D -m 755 "$obdsetup" "$prefix/sbin/obdsetup"
install -D -m 644 -t "${DESTDIR:-}/usr/lib/udev/rules.d" "$CLONE"/tools/udev/*.rules

# Boot: systemd and the initramfs generators look only in these directories. The generator is obdsetup with another
# name.
lib=${DESTDIR:-}/usr/lib
install -D -m 644 -t "$lib/systemd/system" "$CLONE/tools/systemd/overlaybdsetup.target"
mkdir -p "$lib/systemd/system/sysinit.target.wants" "$lib/systemd/system-generators"
ln -sfn ../overlaybdsetup.target "$lib/systemd/system/sysinit.target.wants/overlaybdsetup.target"
ln -sfn "${PREFIX:-/usr/local}/sbin/obdsetup" "$lib/systemd/system-generators/systemd-overlaybdsetup-generator"
install -D -m 644 "$CLONE/tools/initramfs/overlaybd.sh" "$lib/overlaybd/initramfs.sh"
install -D -m 644 "$CLONE/tools/initramfs/hook-files.sh" "$lib/overlaybd/hook-files.sh"
install -D -m 755 -t "$lib/dracut/modules.d/95overlaybd" "$CLONE"/tools/initramfs/dracut/95overlaybd/*
for file in hooks scripts/local-block scripts/local-bottom; do
	install -D -m 755 -t "${DESTDIR:-}/usr/share/initramfs-tools/$file" "$CLONE/tools/initramfs/initramfs-tools/$file/overlaybd"
done

generated=${obdsetup%/*}/generated
install -D -m 644 "$generated/obdsetup.bash" "$prefix/share/bash-completion/completions/obdsetup"
install -D -m 644 "$generated/obdsetup.zsh" "$prefix/share/zsh/site-functions/_obdsetup"
install -D -m 644 "$generated/obdsetup.fish" "$prefix/share/fish/vendor_completions.d/obdsetup.fish"
find "$CLONE/Documentation" "$generated/man" -name '*.[1-8]' 2>/dev/null | while read -r page; do
	install -D -m 644 "$page" "$prefix/share/man/man${page##*.}/${page##*/}"
done
