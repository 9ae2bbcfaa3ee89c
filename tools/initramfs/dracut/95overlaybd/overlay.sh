#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# Called when the root file system is mounted.

# shellcheck source=tools/initramfs/overlaybd.sh
. /usr/lib/overlaybd/initramfs.sh
overlaybd_overlay "${NEWROOT:?}" || die "overlaybd: no overlay on the root file system"
