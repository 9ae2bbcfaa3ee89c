#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Removes everything that was built in this clone.
. "$(dirname "$0")/lib.sh"

# An interrupted check can leave files of root.
rm -rf "$BUILD" 2>/dev/null || "${SUDO[@]}" rm -rf --one-file-system "$BUILD"
