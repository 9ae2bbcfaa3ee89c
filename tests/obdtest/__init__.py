# SPDX-License-Identifier: GPL-2.0
"""Building blocks of the tests: KTAP output, devices, images, reads."""
