#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Remove everything that was built in this clone.
. "$(dirname "$0")/lib.sh"

rm -rf "$BUILD"
