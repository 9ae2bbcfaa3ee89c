# SPDX-License-Identifier: GPL-2.0
"""Plots as SVG: bars and lines, light or dark as the viewer prefers."""

import math
from xml.sax.saxutils import escape

COLOURS = ("#3465a4", "#cc0000", "#4e9a06", "#c17d11", "#75507b", "#06989a", "#888a85")
STYLE = """<style>text{font:12px sans-serif;fill:#222}.t{font-size:14px;font-weight:bold}.a{stroke:#999;fill:none}
@media(prefers-color-scheme:dark){text{fill:#ddd}}</style>"""


def _save(path, width, height, body):
    with open(path, "w", encoding="utf-8") as file:
        file.write(f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
                   f'viewBox="0 0 {width} {height}">{STYLE}\n' + "\n".join(body) + "\n</svg>\n")


def _text(x, y, what, attributes=""):
    return f'<text x="{x:.0f}" y="{y:.0f}" {attributes}>{escape(str(what))}</text>'


def bars(path, title, rows, mark=None):
    """Draws horizontal bars for (name, value, least, most), with a line at mark."""
    left, width, step = 330, 760, 22
    top = max(most for _, _, _, most in rows)
    top = max(top, mark or 0) * 1.1
    scale = (width - left - 70) / top
    body = [_text(10, 20, title, 'class="t"')]
    for nth, (name, value, least, most) in enumerate(rows):
        y = 36 + nth * step
        body += [_text(left - 8, y + 13, name, 'text-anchor="end"'),
                 f'<rect x="{left}" y="{y}" width="{value * scale:.1f}" height="{step - 6}" fill="{COLOURS[0]}"/>',
                 f'<path class="a" d="M{left + least * scale:.1f} {y + 8}H{left + most * scale:.1f}"/>',
                 _text(left + most * scale + 6, y + 13, f"{value:.0f}" if value >= 10 else f"{value:.2f}")]
    height = 46 + len(rows) * step
    if mark:
        body.append(f'<path class="a" stroke-dasharray="4" d="M{left + mark * scale:.1f} 30V{height - 8}"/>')
    _save(path, width, height, body)


def lines(path, title, series, x_name, y_name):
    """Draws lines through the (x, y) of each name. Both axes are logarithmic."""
    width, height, left, right, top, bottom = 760, 420, 70, 230, 40, 50
    xs = sorted({x for points in series.values() for x, _ in points})
    ys = [y for points in series.values() for _, y in points]
    low, high = math.log(min(ys) / 1.2), math.log(max(ys) * 1.2)

    def place(x, y):
        span = math.log(xs[-1] / xs[0]) or 1
        return (left + (width - left - right) * math.log(x / xs[0]) / span,
                height - bottom - (height - top - bottom) * (math.log(y) - low) / (high - low))

    body = [_text(10, 20, title, 'class="t"'),
            f'<path class="a" d="M{left} {top}V{height - bottom}H{width - right}"/>',
            _text((left + width - right) / 2, height - 12, x_name, 'text-anchor="middle"'),
            _text(12, top - 8, y_name)]
    last = -100
    for x in xs:
        at, _ = place(x, min(ys))
        if at - last > 40:
            body.append(_text(at, height - bottom + 18, _short(x), 'text-anchor="middle"'))
            last = at
    tick = 10 ** math.floor(math.log10(min(ys)))
    while tick <= max(ys) * 1.2:
        for factor in (1, 2, 5):
            if low <= math.log(tick * factor) <= high:
                _, at = place(xs[0], tick * factor)
                body += [_text(left - 6, at + 4, _short(tick * factor), 'text-anchor="end"'),
                         f'<path class="a" d="M{left - 4} {at:.1f}h4"/>']
        tick *= 10
    for nth, (name, points) in enumerate(series.items()):
        colour = COLOURS[nth % len(COLOURS)]
        dash = ' stroke-dasharray="5 3"' if nth >= len(COLOURS) else ""
        way = "L".join("{:.1f} {:.1f}".format(*place(*point)) for point in sorted(points))
        y = top + 10 + nth * 18
        body += [f'<path d="M{way}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>',
                 f'<path d="M{width - right + 15} {y}h20" stroke="{colour}" stroke-width="2"{dash}/>',
                 _text(width - right + 41, y + 4, name)]
    _save(path, width, height, body)


def _short(number):
    powers = (("M", 1e6), ("k", 1e3)) if number % 1024 else ((" MiB", 1 << 20), (" KiB", 1 << 10))
    for unit, size in powers:
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:g}"
