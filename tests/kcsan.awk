# SPDX-License-Identifier: GPL-2.0
# The kernel's log without KCSAN's reports of races that the module has no part in: a kernel has many of its own. A part
# has who makes one of the accesses, or calls what does; not who was interrupted, nor who has handed on a bio or work.

/BUG: KCSAN/ { finish(); report = 1 }

# What other CPUs say meanwhile.
report && /WARNING:|BUG: [^K]|Oops|panic|INFO: task/ { print; next }

report {
	text = text $0 "\n"
	if (/ by (task|interrupt)/)
		calls = 1
	else if (/ (asm_(sysvec|common)_|submit_bio|bio_endio|queue_work)/)
		calls = 0
	else if (calls && /\[dm_overlaybd\]/)
		ours = 1
	if (/=====/)
		finish()
	next
}

{ print }

END { finish() }

function finish() {
	if (ours)
		printf "%s", text
	text = ""
	report = calls = ours = 0
}
