#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Install what was built: the module, obdsetup, its udev rules, the manual pages, completions. DESTDIR=, PREFIX= (/usr/local), KDIR= as for make.
. "$(dirname "$0")/lib.sh"

prefix=${DESTDIR:-}${PREFIX:-/usr/local}

# obdsetup as this machine's cargo built it, or as the tool-chain root did where that runs here too.
obdsetup=${OBDSETUP:-$BUILD/cargo-host/release/obdsetup}
[ -x "$obdsetup" ] || obdsetup=$BUILD/cargo/release/obdsetup
[ -x "$obdsetup" ] || die "obdsetup is not built; run 'make tools'"
"$obdsetup" --version >/dev/null 2>&1 || [ -n "${DESTDIR:-}" ] ||
	die "obdsetup from the tool-chain root does not run here; build it with your cargo: make tools CARGO=cargo"

# Packages have the module as source: install.sh tools.
[ "${1:-}" = tools ] || "$SCRIPTS/build-module.sh" install
install -D -m 755 "$obdsetup" "$prefix/sbin/obdsetup"
install -D -m 644 -t "${DESTDIR:-}/usr/lib/udev/rules.d" "$CLONE"/tools/udev/*.rules
generated=${obdsetup%/*}/generated
install -D -m 644 "$generated/obdsetup.bash" "$prefix/share/bash-completion/completions/obdsetup"
install -D -m 644 "$generated/obdsetup.zsh" "$prefix/share/zsh/site-functions/_obdsetup"
install -D -m 644 "$generated/obdsetup.fish" "$prefix/share/fish/vendor_completions.d/obdsetup.fish"
find "$CLONE/Documentation" "$generated/man" -name '*.[1-8]' 2>/dev/null | while read -r page; do
	install -D -m 644 "$page" "$prefix/share/man/man${page##*.}/${page##*/}"
done
