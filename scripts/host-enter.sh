#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Runs as root with mounts of its own: mounts the clone at a path without blanks, for a build with the tools of this
# machine, and runs the command there as its user: host-enter.sh CLONE PLACE UID GID CMD...
set -euo pipefail

mount --bind "$1" "$2"
user=(--reuid "$3" --regid "$4" --init-groups)
shift 4
cd /
exec setpriv "${user[@]}" "$@"
