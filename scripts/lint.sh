#!/bin/bash
# SPDX-License-Identifier: GPL-2.0
# Static checks: all of them as steps, or one by name: lint.sh [--list | NAME]
. "$(dirname "$0")/lib.sh"
. "$SCRIPTS/cache.sh"
. "$SCRIPTS/kernel.sh"

LINTS=(rustfmt clippy-module clippy-tools checkpatch shellcheck unsafe)

# with_kernel CMD...: run a command in the tool-chain root with the kernel's tree at /kernel/kdir.
with_kernel() {
	kernel_select
	"$SCRIPTS/in-root.sh" -k "$K_DIR" "$@"
}

# sources PATTERN...: print the clone's files whose names match a pattern, one per line, sorted, without build results.
sources() {
	local names=() pattern
	for pattern; do names+=(-o -name "$pattern"); done
	(cd "$CLONE" && find . \( -path ./build -o -path ./.git -o -name target \) -prune -o -type f \( "${names[@]:1}" \) -print) |
		sed 's,^\./,,' | sort
}

# shell_sources: print the clone's shell scripts, recognised by name or first line.
shell_sources() {
	local file first
	sources '*' | while read -r file; do
		read -r first <"$CLONE/$file" || :
		case $file:$first in
		*.sh:* | *:'#!'*[/\ ]sh | *:'#!'*[/\ ]sh\ * | *:'#!'*bash*) say "$file" ;;
		esac
	done 2>/dev/null
}

# lint_NAME: run the check NAME.
lint_rustfmt() {
	local files
	mapfile -t files < <(sources '*.rs')
	with_kernel rustfmt --check --edition 2021 --config-path /kernel/kdir/.rustfmt.toml "${files[@]}"
}

# Uses an object directory of its own, so that the module isn't rebuilt afterwards.
lint_clippy_module() { USE_ROOT=1 KDIR='' "$SCRIPTS/build-module.sh" clippy; }

lint_clippy_tools() { CARGO='' "$SCRIPTS/build-tools.sh" clippy; }

lint_checkpatch() {
	local files
	mapfile -t files < <(sources '*.[ch]')
	with_kernel perl /kernel/kdir/scripts/checkpatch.pl --no-tree --strict --terse --show-types --no-summary \
		-f "${files[@]}"
}

lint_shellcheck() {
	local files
	mapfile -t files < <(shell_sources)
	with_kernel shellcheck --external-sources --source-path=scripts "${files[@]}"
}

lint_unsafe() {
	local files
	mapfile -t files < <(sources '*.rs' | grep -Ev '^rust/(sys|dm|block|codec)/')
	with_kernel scripts/find-unsafe.py "${files[@]}"
}

case ${1:-} in
'')
	alone
	"$SCRIPTS/setup.sh"
	steps "${#LINTS[@]}"
	failed=0
	for lint in "${LINTS[@]}"; do
		step "$lint" "$0" "$lint" || failed=1
	done
	exit "$failed"
	;;
--list) say "${LINTS[@]}" ;;
*)
	declare -F "lint_${1//-/_}" >/dev/null || die "no lint $1; there are: ${LINTS[*]}"
	"lint_${1//-/_}"
	;;
esac
