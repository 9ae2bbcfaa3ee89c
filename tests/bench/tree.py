#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Makes a tree of files that is the same on every machine: tree.py DIRECTORY. So figures of instructions in the source
tree are those of the same data. The text compresses about as well as headers and scripts do."""

import bisect
import itertools
import os
import random
import sys

KIB, MIB = 1 << 10, 1 << 20
# Number of files, and their smallest and largest size in bytes.
SIZES = ((6, 2 * MIB, 2 * MIB), (24, 64 * KIB, 256 * KIB), (500, 200, 24 * KIB))


class Text:
    """Lines of words, some of which repeat a recent line but for a word. Only random() is used, since only its sequence
    stays the same in later versions of Python."""

    LETTERS = "etaoinshrdlucmfwypvbgkqjxz_0123"
    WORDS = 6000
    RECENT = 48

    def __init__(self, seed):
        self.random = random.Random(seed).random
        self.words = [self.word() for _ in range(self.WORDS)]
        self.weights = list(itertools.accumulate(1 / (nth + 3) for nth in range(self.WORDS)))
        self.recent = [self.new_line() for _ in range(self.RECENT)]

    def below(self, limit):
        return int(self.random() * limit)

    def word(self):
        return "".join(self.LETTERS[self.below(self.below(len(self.LETTERS)) + 1)] for _ in range(2 + self.below(9)))

    def any_word(self):
        return self.words[bisect.bisect(self.weights, self.random() * self.weights[-1])]

    def new_line(self):
        return [self.any_word() for _ in range(1 + self.below(12))]

    def line(self):
        if self.random() < 0.45:
            words = list(self.recent[self.below(self.RECENT)])
            words[self.below(len(words))] = self.any_word()
        else:
            words = self.new_line()
        self.recent[self.below(self.RECENT)] = words
        return " ".join(words)

    def bytes(self, size):
        lines, length = [], 0
        while length < size:
            lines.append(self.line())
            length += len(lines[-1]) + 1
        return ("\n".join(lines) + "\n").encode()[:size]


def main():
    text = Text(1)
    for nth, (count, least, most) in enumerate(SIZES):
        for each in range(count):
            # Most are closer to the least size.
            size = least + int((most - least) * text.random() ** 2)
            path = f"{sys.argv[1]}/{nth}/{each // 50}/{each}.txt"
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as file:
                file.write(text.bytes(size))
            # Times and modes are in the images, too.
            os.chmod(path, 0o644)
            os.utime(path, (1700000000, 1700000000))


if __name__ == "__main__":
    main()
