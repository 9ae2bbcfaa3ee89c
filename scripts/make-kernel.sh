#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Makes the directory of $KERNEL in the cache, unless it exists: image, modules and a tree to build modules with.
. "$(dirname "$0")/lib.sh"
. "$SCRIPTS/cache.sh"
. "$SCRIPTS/kernel.sh"

# The root that the kernel and its modules are built in, if it is not the tool-chain root of Debian 13.
"$SCRIPTS/make-root.sh" kernel
kernel_look_up
[ -d "$K_DIR" ] && cache_used "${K_DIR##*/}" && exit
say "== $K_RELEASE"
cache_begin "${K_DIR##*/}" || exit 0
mkdir -p "$TMP"
"$SCRIPTS/in-root.sh" -r "$K_ROOT" -k "$TMP" -b "$K_APT:/srv" \
	bash -c "$(kernel_recipe); set -euo pipefail; build_kernel_$K_RECIPE \"\$@\"" - "$K_RELEASE" "$K_VERSION" "${K_CONFIG[@]}"

# A suite can have a newer rustc than the one that built its kernel, until the kernel is built again.
want=$(grep ^CONFIG_RUSTC_VERSION_TEXT= "$TMP/config")
have=$(grep ^CONFIG_RUSTC_VERSION_TEXT= "$TMP/kdir/.config")
[ "$have" = "$want" ] || die "another rustc than the kernel's: ${have#*=}, not ${want#*=}"
cache_commit "${K_DIR##*/}"
cache_used "${K_DIR##*/}"
