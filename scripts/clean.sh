#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Remove everything that was built in this clone.
. "$(dirname "$0")/lib.sh"

# Some of it may be root's, where a check was interrupted.
rm -rf "$BUILD" 2>/dev/null || "${SUDO[@]}" rm -rf --one-file-system "$BUILD"
