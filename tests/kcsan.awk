# SPDX-License-Identifier: GPL-2.0
# The kernel's log without KCSAN's reports of races that the module has no part in: a kernel has many of its own. A part
# has who makes one of the accesses, or calls the function that does.

/BUG: KCSAN/ { report = 1 }

report {
	text = text $0 "\n"
	if (/ by (task|interrupt)/)
		frames = 2
	else if (frames-- > 0 && /\[dm_overlaybd\]/)
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
	report = ours = 0
}
