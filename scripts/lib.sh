# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash disable=SC2034 # variables are for those who source this
# Common functions of the scripts: paths, messages, timed steps, locks. Sourced, not run.

set -euo pipefail

# Make the scripts independent of the caller's settings.
unset CDPATH BASH_ENV ENV GREP_OPTIONS POSIXLY_CORRECT LANGUAGE
export LC_ALL=C.UTF-8
umask 022
PATH=$PATH:/usr/sbin:/sbin
HOME=${HOME:-$(getent passwd "$(id -u)" | cut -d: -f6)}

CLONE=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
SCRIPTS=$CLONE/scripts
BUILD=$CLONE/build
# The path of the clone in the tool-chain root and in the VM, since the kernel's build, QEMU and others accept no blank,
# colon or comma, which the clone's path on the host may have.
IN_ROOT=/clone
[[ ${XDG_CACHE_HOME:-} == /* ]] || XDG_CACHE_HOME=${HOME:?HOME is not set}/.cache
CACHE=$XDG_CACHE_HOME/dm-overlaybd
LOGS=$BUILD/log
# Images made by other tools, which tests compare with if available: a directory goldens in a directory beside the clone
# (or in the clone itself).
near=("$CLONE"/../*/goldens)
GOLDENS=${OBD_GOLDENS:-${near[0]}}

# The command to become root: none if we are root, else sudo.
SUDO=()
[ "$(id -u)" = 0 ] || SUDO=(sudo)
# The same for commands that take long: they are killed when this process ends.
LONG_SUDO=("${SUDO[@]}" "$SCRIPTS/with-caller.sh" "$$")

# say TEXT...: print a line. (echo would take some texts for options.)
say() { printf '%s\n' "$*"; }
# warn TEXT...: print a line on standard error.
warn() { printf '%s\n' "$*" >&2; }
# die TEXT...: print an error, and exit with 1.
die() {
	warn "error: $*"
	exit 1
}

# need_root: check that we can become root, before a step hides sudo's question for a password.
need_root() {
	[ "${#SUDO[@]}" != 0 ] || return 0
	command -v sudo >/dev/null || die "root is needed for mounts and name spaces: install sudo, or run this as root"
	sudo -n true 2>/dev/null && return
	say "sudo is needed for mounts and name spaces"
	sudo -v || die "root is needed for mounts and name spaces: run this as root, or as a user whom sudo lets run everything"
}

# not_by_sudo: refuse to build as root in a user's clone: the user could not change those files. Called if something is
# not built yet.
not_by_sudo() {
	[ "$(id -u)" != 0 ] || [ "$(stat -c %u "$CLONE")" = 0 ] ||
		die "nothing is built yet: run 'make' and 'make tools' as $(stat -c %U "$CLONE") first, then this as root"
}

# need_places: check that we can write where we build, before a step fails.
need_places() {
	local dir
	[ -d "$BUILD" ] || [ -w "$CLONE" ] || die "$CLONE cannot be written: build in a clone of your own"
	for dir in "$BUILD" "$BUILD"/*/ "$CACHE" "$CACHE"/lock-* "$CACHE/cargo"; do
		if [ ! -e "$dir" ] || [ -L "${dir%/}" ] || [ -w "$dir" ]; then continue; fi
		die "$dir belongs to $(stat -c %U "$dir") and cannot be written: remove it, or run this as that user"
	done
}

# in_root PATH: print the path that a file in the clone has in the tool-chain root.
in_root() { say "$IN_ROOT${1#"$CLONE"}"; }

# attend CMD...: run a command that takes long. INT, TERM or HUP ends the command and everything that it has started. If
# the command ran in the foreground, bash would act on the signal only after the command's end; sudo and unshare don't
# pass signals on, and make ends only its own child.
attend() {
	local status=0
	"$@" <&0 &
	ATTENDED=$!
	trap 'attend_end INT' INT
	trap 'attend_end TERM' TERM
	trap 'attend_end HUP' HUP
	wait "$ATTENDED" || status=$?
	trap - INT TERM HUP
	return "$status"
}

# attend_end SIGNAL: end the command and its descendants, then this process with SIGNAL.
attend_end() {
	local pids me=$BASHPID
	trap '' INT TERM HUP
	mapfile -t pids < <(below "$me")
	kill -TERM "${pids[@]}" 2>/dev/null || :
	# Only root can kill sudo.
	[ ! -e "/proc/$ATTENDED" ] || [ -O "/proc/$ATTENDED" ] || "${SUDO[@]}" kill -KILL "$ATTENDED" || :
	wait "$ATTENDED" 2>/dev/null || :
	trap - "$1"
	kill "-$1" "$me"
}

# below PID: print the process IDs of the descendants of PID, children before grandchildren.
below() {
	{ sed 's/^\([0-9]*\) (.*) . \([0-9]*\) .*/\1 \2/' /proc/[0-9]*/stat 2>/dev/null || :; } |
		awk -v top="$1" '
			{ parent[$1] = $2 }
			function is_below(pid) { return pid in parent && (parent[pid] == top || is_below(parent[pid])) }
			function depth(pid) { return parent[pid] == top ? 0 : 1 + depth(parent[pid]) }
			END { for (pid in parent) if (is_below(pid)) print depth(pid), pid }' | sort -n | cut -d' ' -f2
}

# short_hash: print the first 12 digits of the SHA-256 of standard input.
short_hash() { sha256sum | cut -c1-12; }

# lock FILE WHAT: take an exclusive lock, until unlock or the end of this process and its children. If it has to wait,
# it prints "waiting for another WHAT".
lock() {
	mkdir -p "$(dirname "$1")"
	exec {LOCK_FD}>>"$1"
	flock -n "$LOCK_FD" && return
	warn "waiting for another $2"
	flock "$LOCK_FD"
}

# unlock: release the lock that lock has taken last.
unlock() { exec {LOCK_FD}>&-; }

# alone: wait until no other script with steps runs in this clone, since they share logs and results. Scripts called
# after this may call it again.
alone() {
	[ "${ALONE_IN:-}" != "$BUILD" ] || return 0
	need_places
	lock "$BUILD/.lock" "run in $CLONE"
	export ALONE_IN=$BUILD
}

# --- steps: one line each with the time it took, output to a log ---

STEP_NR=0
STEP_TOTAL=0
STEP_LOG=

# steps N: announce N calls of step. Checks what steps need, and asks for sudo's password.
steps() {
	STEP_NR=0
	STEP_TOTAL=$1
	need_places
	need_root
}

# last_line FILE [WIDTH]: print the last line of FILE that isn't empty, at most WIDTH (60) characters of it.
last_line() {
	tail -c 400 "$1" 2>/dev/null | tr '\r' '\n' | tr -cd '[:print:]\n' |
		awk -v max="${2:-60}" 'NF { l = $0 } END { print substr(l, 1, max) }'
}

# step_ticker HEAD LOG: show the time and the log's last line, every second on a terminal, else every 30 s. Runs until
# it is killed or the script ends.
step_ticker() {
	local head=$1 log=$2 start=$SECONDS parent=$$
	while sleep 1 && kill -0 "$parent" 2>/dev/null; do
		local now=$((SECONDS - start))
		# Keep sudo from asking again.
		[ "${#SUDO[@]}" = 0 ] || [ $((now % 60)) != 0 ] || sudo -n true >/dev/null 2>&1 </dev/null || :
		if [ -t 1 ]; then
			printf '\r\033[K%s ... %d s  %s' "$head" "$now" "$(last_line "$log" 50)"
		elif [ $((now % 30)) = 0 ]; then
			printf '      still at it after %d s: %s\n' "$now" "$(last_line "$log" 90)"
		fi
	done
}

# step TITLE CMD [ARGS]: run a command as the next step, and return its status. The command runs in a process of its
# own, so that locks that it takes are released at its end. A function run this way doesn't stop at an error.
step() {
	local title=$1 head status=0 start=$SECONDS
	shift
	STEP_NR=$((STEP_NR + 1))
	head="[$STEP_NR/$STEP_TOTAL] $title"
	mkdir -p "$LOGS"
	STEP_LOG=$LOGS/$(printf '%s' "$title" | tr -cs 'a-zA-Z0-9\n' '-').log
	: >"$STEP_LOG"
	[ -t 1 ] && printf '%s ...' "$head"
	step_ticker "$head" "$STEP_LOG" &
	local ticker=$!
	attend "$@" >>"$STEP_LOG" 2>&1 </dev/null || status=$?
	kill "$ticker" 2>/dev/null || :
	wait "$ticker" 2>/dev/null || :
	[ -t 1 ] && printf '\r\033[K'
	if [ "$status" = 0 ]; then
		say "$head ... $((SECONDS - start)) s"
	else
		say "$head ... FAILED after $((SECONDS - start)) s; the end of $STEP_LOG:"
		tail -n "${STEP_TAIL:-25}" "$STEP_LOG" | sed 's/^/    /'
	fi
	return "$status"
}

PASSED=0 FAILED=0 SKIPPED=0

# results TITLE FUNCTION: run a function of the calling script, by the script's option --FUNCTION, as a step. The
# function prints a line "ok", "not ok" or "skipped" for each test, and comments that begin with #. Print these lines,
# and count the results; a step without a "not ok" counts as a failure if its status is not 0 or no test has passed.
results() {
	local status=0 p f s
	step "$1" "$0" "--$2" || status=$?
	sed -nE '/^(#|ok|not ok|skipped)/s/^/      /p' "$STEP_LOG"
	p=$(grep -c '^ok' "$STEP_LOG") || :
	f=$(grep -c '^not ok' "$STEP_LOG") || :
	s=$(grep -c '^skipped' "$STEP_LOG") || :
	[ "$f" != 0 ] || { [ "$status" = 0 ] && [ "$p" != 0 ]; } || f=1
	PASSED=$((PASSED + p)) FAILED=$((FAILED + f)) SKIPPED=$((SKIPPED + s))
}

# results_sum: print the numbers of tests that passed, failed and were skipped; fail if one has failed.
results_sum() {
	say "$PASSED passed, $FAILED failed, $SKIPPED skipped"
	[ "$FAILED" = 0 ]
}
