#!/bin/sh
# SPDX-License-Identifier: GPL-2.0
# Called again and again until the root device is there.

. /usr/lib/overlaybd/initramfs.sh
overlaybd_attach
