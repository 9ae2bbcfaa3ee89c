#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Run a command until it ends, or until the process CALLER is gone: with-caller.sh CALLER CMD... As root by sudo, which does not
# end with its caller: what it runs would go on without the caller's lock. Without sudo, CALLER may be gone already.
set -u

caller=$1
shift

# started PID: when it was; a number that is used again has another.
started() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; }

began=$(started "$caller")
[ -n "$began" ] || exit
(
	while [ -e "/proc/$$" ] && [ "$(started "$caller")" = "$began" ]; do sleep 0.5; done
	kill -KILL $$ 2>/dev/null
) </dev/null >/dev/null 2>&1 &
exec "$@"
