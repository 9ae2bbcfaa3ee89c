#!/usr/bin/python3
# SPDX-License-Identifier: GPL-2.0
"""Finds the token `unsafe` in Rust files that must not have it. Comments and literals don't count.

find-unsafe.py FILE... prints a line for each place. Exits with 1 if there is one.
"""

import re
import sys

# What is not code: line comments, the start of block comments, raw strings, strings, characters. A lifetime such as 'a
# is no character literal.
NOT_CODE = re.compile(
    r"""//[^\n]*
      | /\*
      | b?r(\#*)".*?"\1
      | [bc]?"(?:\\.|[^"\\])*"
      | b?'(?:\\(?:x..|u\{[^}]*\}|.)|[^'\\\n])'
    """,
    re.DOTALL | re.VERBOSE,
)


def blank(text: str) -> str:
    """Returns the line breaks of text, or a blank."""
    return "\n" * text.count("\n") or " "


def block_comment_end(text: str, start: int) -> int:
    """Returns the end of the block comment that begins at start. Block comments nest."""
    depth = 0
    for mark in re.finditer(r"/\*|\*/", text[start:]):
        depth += 1 if mark.group() == "/*" else -1
        if depth == 0:
            return start + mark.end()
    return len(text)


def code_of(text: str) -> str:
    """Returns the code without comments and literals, with the same lines."""
    parts = []
    at = 0
    while match := NOT_CODE.search(text, at):
        end = match.end()
        if match.group() == "/*":
            end = block_comment_end(text, match.start())
        parts += [text[at : match.start()], blank(text[match.start() : end])]
        at = end
    return "".join(parts) + text[at:]


def main(paths: list[str]) -> int:
    found = 0
    for path in paths:
        with open(path, encoding="utf-8") as file:
            lines = code_of(file.read()).split("\n")
        for number, line in enumerate(lines, 1):
            if re.search(r"\bunsafe\b", line):
                print(f"{path}:{number}: unsafe outside rust/{{sys,dm,block,codec}}: {line.strip()}")
                found += 1
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
