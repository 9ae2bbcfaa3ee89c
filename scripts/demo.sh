#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Sets up, builds, and runs scripts/demo-guest.sh in the test VM; /mnt/share in the VM is build/demo.
. "$(dirname "$0")/lib.sh"

export USE_ROOT=1 KDIR='' CARGO=''
alone
steps 4
step "tool-chain root" "$SCRIPTS/make-root.sh"
step "kernel and its Rust tree" "$SCRIPTS/make-kernel.sh"
step "module" "$SCRIPTS/build-module.sh"
step "obdsetup" "$SCRIPTS/build-tools.sh"
RUN=scripts/demo-guest.sh SHARE=$BUILD/demo TIMEOUT=${TIMEOUT:-600} "$SCRIPTS/vm.sh"
