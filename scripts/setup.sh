#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Sets up the tool-chain root and the kernel, which everything else needs, as two steps: setup.sh. Prints nothing if
# both exist.
. "$(dirname "$0")/lib.sh"
. "$SCRIPTS/cache.sh"
. "$SCRIPTS/kernel.sh"

need_places
need_root
if [ -d "$ROOT" ]; then
	kernel_look_up
	if [ -d "$K_DIR" ] && [ -d "$K_ROOT" ]; then
		cache_used "${ROOT##*/}"
		cache_used "${K_ROOT##*/}"
		cache_used "${K_DIR##*/}"
		exit
	fi
fi
say "Setting up in $CACHE (once for all clones; safe to delete)"
steps 2
step "tool-chain root (Debian $SUITE)" "$SCRIPTS/make-root.sh"
step "kernel and its Rust tree" "$SCRIPTS/make-kernel.sh"
