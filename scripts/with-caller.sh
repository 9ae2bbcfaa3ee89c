#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Run a command until it ends, or until one of the processes CALLERS is gone: with-caller.sh CALLER[,CALLER] CMD... As root by
# sudo, which does not end with its caller: what it runs would go on without the caller's lock. Without sudo, a caller may
# be gone already.
set -u

IFS=, read -ra callers <<<"$1"
shift

# started PID: when it was; a number that is used again has another.
started() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; }

began=()
for caller in "${callers[@]}"; do
	began+=("$(started "$caller")")
	[ -n "${began[-1]}" ] || exit
done

# all_there: callers and command.
all_there() {
	local i
	[ -e "/proc/$$" ] || return
	for i in "${!callers[@]}"; do
		[ "$(started "${callers[i]}")" = "${began[i]}" ] || return
	done
}

(
	# Nobody waits for a lock or a pipe that this one has.
	for fd in "/proc/$BASHPID/fd"/*; do
		fd=${fd##*/}
		[ "$fd" -le 2 ] || [ "$fd" = 255 ] || eval "exec $fd>&-"
	done
	while all_there; do sleep 0.5; done
	kill -KILL $$ 2>/dev/null
) </dev/null >/dev/null 2>&1 &
exec setpriv --pdeathsig KILL "$@"
