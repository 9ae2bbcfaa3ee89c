# SPDX-License-Identifier: GPL-2.0
"""Tests and their KTAP version 1 output.

A script declares tests with @test or add(), and ends with main(). A test fails by raising, usually through check()
and equal(); a test that checks nothing fails as well. Deferred functions are called after the test, in reverse order,
and count as part of it.

Tests that are alike, such as one for each of many images, can be sampled: OBD_SAMPLE=N runs every Nth of them. The
first one that runs depends on the day, so that N days run all; OBD_SAMPLE_FIRST=I makes test I the first, counted
from 0.
"""

import os
import signal
import sys
import threading
import time
import traceback

_tests = []
_deferred = []
_checks = 0

# The factor by which kernels with checkers (KASAN and kmemleak, or KCSAN) are slower, roughly.
SLOW = 4 if any(os.path.exists(f"/sys/kernel/debug/{name}") for name in ("kmemleak", "kcsan")) else 1

# Seconds after which a test fails by default; on slow kernels, SLOW times as many.
TIMEOUT = 150


class Failure(Exception):
    """A check that failed."""


class Skip(Exception):
    """A test that cannot run here. The argument is the reason."""


def add(title, function, *args, timeout=TIMEOUT, alike=False):
    """Declares a test. alike is set if it is one of many that are alike."""
    _tests.append((title, function, args, timeout, alike))


def test(title, timeout=TIMEOUT):
    """Declares the function below as a test."""
    def declare(function):
        add(title, function, timeout=timeout)
        return function
    return declare


def defer(function, *args):
    """Calls function at the end of the test."""
    _deferred.append((function, args))


def check(condition, what):
    """Fails the test with the message `what` if condition is false."""
    global _checks
    _checks += 1
    if not condition:
        raise Failure(what)


def equal(got, wanted, what):
    """Fails the test if the values differ."""
    check(got == wanted, f"{what}: got {_short(got)}, wanted {_short(wanted)}")


def same_bytes(got, wanted, what):
    """Fails the test if the bytes differ, and says where."""
    if len(got) == len(wanted) and got == wanted:
        check(True, what)
        return
    at = next((i for i, (a, b) in enumerate(zip(got, wanted)) if a != b), min(len(got), len(wanted)))
    check(False, f"{what}: {len(got)} bytes, wanted {len(wanted)}; first difference at byte {at}: "
          f"{_short(bytes(got[at:at + 8]))}, wanted {_short(bytes(wanted[at:at + 8]))}")


def note(text):
    """Prints a diagnostic line."""
    for line in str(text).splitlines():
        print(f"# {line}", flush=True)


def skip_all(why):
    """Ends the script: none of its tests can run."""
    print(f"KTAP version 1\n1..0 # SKIP {why}", flush=True)
    sys.exit(4)


def _short(value):
    text = value.hex() if isinstance(value, bytes) else repr(value)
    return text if len(text) <= 300 else text[:300] + "..."


def alone(function, *args):
    """Calls function, which is a part of a test, then the functions that it deferred."""
    level = len(_deferred)
    try:
        return function(*args)
    finally:
        error = _undo(level)
        if error:
            raise error


def _undo(level=0):
    """Calls the functions that were deferred since level. Returns the first error."""
    first = None
    while len(_deferred) > level:
        function, args = _deferred.pop()
        try:
            function(*args)
        except Exception as error:  # pylint: disable=broad-except
            first = first or error
    return first


def _timeout(_signal, _frame):
    raise Failure("timed out")


def _explain(error):
    if isinstance(error, Failure):
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "obdtest" not in f.filename]
        where = f" (line {frames[-1].lineno})" if frames else ""
        note(f"{error}{where}")
    else:
        note("".join(traceback.format_exception(error)).rstrip())


def _run(function, args, timeout):
    """Runs a test. Returns what it raised."""
    global _checks
    _checks = 0
    error = None
    lost = []
    threading.excepthook = lambda hook: lost.append(hook.exc_value)
    signal.alarm(timeout * SLOW)
    try:
        function(*args)
        if not _checks:
            raise Failure("the test has checked nothing")
    except Exception as caught:  # pylint: disable=broad-except
        error = caught
    signal.alarm(0)
    undo_error = _undo()
    if undo_error and isinstance(undo_error, Skip):
        undo_error = Failure(f"undoing the test: {undo_error}")
    # Errors in threads and in deferred functions count, and take precedence over a skip.
    if lost and (not error or isinstance(error, Skip)):
        error = lost[0]
    return undo_error if undo_error and (not error or isinstance(error, Skip)) else error


SAMPLE = int(os.environ.get("OBD_SAMPLE", "1"))


def _sample(tests):
    """Returns the tests that are not alike, and the sample of those that are. Prints the sample's parameters."""
    alike = [t for t in tests if t[-1]]
    if SAMPLE == 1 or not alike:
        return tests
    first = int(os.environ.get("OBD_SAMPLE_FIRST", time.time() // 86400)) % SAMPLE
    chosen = alike[first::SAMPLE]
    note(f"{len(chosen)} of {len(alike)} tests that are alike: OBD_SAMPLE={SAMPLE} OBD_SAMPLE_FIRST={first}")
    return [t for t in tests if not t[-1] or t in chosen]


def main():
    """Runs the tests: all, or those whose titles contain a word of the command line."""
    words = sys.argv[1:]
    tests = _sample([t for t in _tests if not words or any(word in t[0] for word in words)])
    signal.signal(signal.SIGALRM, _timeout)
    print(f"KTAP version 1\n1..{len(tests)}", flush=True)
    failed = skipped = 0
    for number, (title, function, args, timeout, _) in enumerate(tests, 1):
        start = time.monotonic()
        error = _run(function, args, timeout)
        if "OBD_TEST_TIMES" in os.environ:
            note(f"{time.monotonic() - start:.2f} s {title}")
        if isinstance(error, Skip):
            skipped += 1
            print(f"ok {number} {title} # SKIP {error}", flush=True)
        elif error:
            failed += 1
            _explain(error)
            print(f"not ok {number} {title}", flush=True)
        else:
            print(f"ok {number} {title}", flush=True)
    if failed:
        sys.exit(1)
    sys.exit(4 if tests and skipped == len(tests) else 0)
