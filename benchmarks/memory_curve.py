"""A picture of seconds against bytes, as SVG, without a library for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 640, 400, 60, 50, 20, 150
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b")


@dataclass(frozen=True)
class Mark:
    """``peak`` in MiB, ``ratio`` of a step's time to the reference's."""

    variant: str
    peak: float
    ratio: float


def picture(marks: Sequence[Mark]) -> str:
    """The marks of each variant, joined by a line from the largest peak to the smallest."""
    xs, ys = _ticks([m.peak for m in marks]), _ticks([m.ratio for m in marks])

    def at(peak: float, ratio: float) -> tuple[float, float]:
        across, up = (peak - xs[0]) / (xs[-1] - xs[0]), (ratio - ys[0]) / (ys[-1] - ys[0])
        x = _LEFT + across * (_WIDTH - _LEFT - _RIGHT)
        return x, _HEIGHT - _BOTTOM - up * (_HEIGHT - _BOTTOM - _TOP)

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
    ]
    for x in xs:
        left, low = at(x, ys[0])
        lines.append(f'<path d="M{left:.1f} {low:.1f}V{_TOP}" stroke="#ddd"/>')
        lines.append(f'<text x="{left:.1f}" y="{low + 18:.1f}" text-anchor="middle">{x:g}</text>')
    for y in ys:
        left, low = at(xs[0], y)
        lines.append(f'<path d="M{left:.1f} {low:.1f}H{_WIDTH - _RIGHT}" stroke="#ddd"/>')
        lines.append(f'<text x="{left - 8:.1f}" y="{low + 4:.1f}" text-anchor="end">{y:g}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    lines.append(f'<text x="{middle}" y="{_HEIGHT - 10}" text-anchor="middle">peak, MiB</text>')
    lines.append(f'<text x="{_LEFT}" y="{_TOP - 6}">time of a step, to training as it is</text>')
    for number, variant in enumerate(dict.fromkeys(m.variant for m in marks)):
        colour = _COLOURS[number % len(_COLOURS)]
        own = sorted((m for m in marks if m.variant == variant), key=lambda m: -m.peak)
        places = [at(m.peak, m.ratio) for m in own]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        lines.append(f'<polyline points="{path}" fill="none" stroke="{colour}"/>')
        lines += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in places]
        low = _TOP + 20 + 20 * number
        lines.append(f'<circle cx="{_WIDTH - _RIGHT + 16}" cy="{low - 4}" r="4" fill="{colour}"/>')
        lines.append(f'<text x="{_WIDTH - _RIGHT + 26}" y="{low}">{variant}</text>')
    return "\n".join([*lines, "</svg>", ""])


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers, some five of them, from below the smallest value to above the largest."""
    low, high = min(values), max(values)
    step = 1.0
    while (high - low) / step > 5:
        step *= 2
    while (high - low) / step < 2.5 and step > 0.01:
        step /= 2
    first = int(low // step)
    return [step * i for i in range(first, int(high // step) + 2)]


__all__ = ["Mark", "picture"]
