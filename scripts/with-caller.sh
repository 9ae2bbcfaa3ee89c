#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Runs a command, and kills it if one of the processes CALLER ends first: with-caller.sh CALLER[,CALLER] CMD...
# Runs as root, with sudo if needed. sudo doesn't end with its caller: the command would go on without the caller's
# lock. If a caller has ended already, the command doesn't run.
set -u

IFS=, read -ra callers <<<"$1"
shift

# started PID: print the start time of a process, which differs if the PID was reused; nothing if there is none.
started() { sed 's/.*) //' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; }

began=()
for caller in "${callers[@]}"; do
	began+=("$(started "$caller")")
	[ -n "${began[-1]}" ] || exit
done

# all_there: whether the callers and the command still run.
all_there() {
	local i
	[ -e "/proc/$$" ] || return
	for i in "${!callers[@]}"; do
		[ "$(started "${callers[i]}")" = "${began[i]}" ] || return
	done
}

(
	# Close inherited locks and pipes, so that nobody waits for this process to close them.
	for fd in "/proc/$BASHPID/fd"/*; do
		fd=${fd##*/}
		[ "$fd" -le 2 ] || [ "$fd" = 255 ] || eval "exec $fd>&-"
	done
	while all_there; do sleep 0.5; done
	kill -KILL $$ 2>/dev/null
) </dev/null >/dev/null 2>&1 &
exec setpriv --pdeathsig KILL "$@"
