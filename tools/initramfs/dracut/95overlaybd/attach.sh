#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# Called again and again until the root device is there.

# shellcheck source=tools/initramfs/overlaybd.sh
. /usr/lib/overlaybd/initramfs.sh
overlaybd_attach
