#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Runs as root in a new mount namespace: mounts the clone at PLACE, a path without blanks, for a build with the tools of
# this machine, and runs the command as UID and GID, in /: host-enter.sh CLONE PLACE UID GID CMD...
set -euo pipefail

mount --bind "$1" "$2"
user=(--reuid "$3" --regid "$4" --init-groups)
shift 4
cd /
exec setpriv "${user[@]}" "$@"
