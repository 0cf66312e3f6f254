"""The chart at the top of the results: for each load, how fast each server is beside nginx. An SVG, by hand.

It paints its own ground, light or dark as the reader's system has it, so that it can be read on any page.
"""

from collections.abc import Mapping, Sequence
from html import escape

from benchmarks.figures import Spread

_WIDTH = 860
_LEFT = 250
_RIGHT = 110
_BAR = 16
_GAP = 6
_GROUP = 34
_TOP = 64

_STYLE = """
    .ground { fill: #ffffff; } .text { fill: #1f2328; } .faint { fill: #59636e; } .line { stroke: #59636e; }
    .range { stroke: #1f2328; stroke-width: 2; }
    .figure { stroke: #ffffff; stroke-width: 5; paint-order: stroke; }
    .s0 { fill: #0969da; } .s1 { fill: #8c6d31; } .s2 { fill: #1a7f37; } .s3 { fill: #8250df; }
    @media (prefers-color-scheme: dark) {
      .ground { fill: #0d1117; } .text { fill: #f0f6fc; } .faint { fill: #9198a1; } .line { stroke: #9198a1; }
      .range { stroke: #f0f6fc; } .figure { stroke: #0d1117; }
      .s0 { fill: #4493f8; } .s1 { fill: #d2a54a; } .s2 { fill: #3fb950; } .s3 { fill: #ab7df8; }
    }
    text { font: 13px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
    .title { font-size: 16px; font-weight: 600; } .group { font-weight: 600; }"""


def chart(title: str, groups: Mapping[str, Mapping[str, Spread]]) -> str:
    """Draw the ratios to nginx: a group of bars for each load, a bar for each server, and a line at nginx.

    `groups` maps the name of a load to the ratios of the servers measured under it. A thin line across the
    end of a bar goes from the least ratio of a round to the most.
    """
    names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    most = max((spread.most for bars in groups.values() for spread in bars.values()), default=1.0)
    scale = (_WIDTH - _LEFT - _RIGHT) / max(most, 1.0)
    parts: list[str] = []
    y = _TOP
    for group, bars in groups.items():
        y += _GROUP
        parts.append(f'<text class="text group" x="20" y="{y - 8}">{escape(group)}</text>')
        for name, spread in bars.items():
            parts += _bar(name, spread, f"s{min(names.index(name), 3)}", y, scale)
            y += _BAR + _GAP
    one, height = _LEFT + scale, y + 24
    size = f'viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}"'
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(title)}">',
        f"<title>{escape(title)}</title>",
        f"<style>{_STYLE}\n</style>",
        f'<rect class="ground" width="{_WIDTH}" height="{height}" rx="6"/>',
        f'<text class="text title" x="20" y="32">{escape(title)}</text>',
        f'<text class="faint" x="{one:.1f}" y="{_TOP - 8}" text-anchor="middle">nginx = 1</text>',
        f'<line class="line" x1="{one:.1f}" x2="{one:.1f}" y1="{_TOP}" y2="{y}" stroke-dasharray="3 3"/>',
    ]
    return "\n".join([*head, *parts, "</svg>", ""])


def _bar(name: str, spread: Spread, style: str, y: int, scale: float) -> Sequence[str]:
    """Draw one bar: its name at its left, its figure at its right."""
    middle, least, most = (_LEFT + each * scale for each in (spread.middle, spread.least, spread.most))
    centre, base = y + _BAR / 2, y + _BAR - 4
    return [
        f'<text class="text" x="{_LEFT - 10}" y="{base}" text-anchor="end">{escape(name)}</text>',
        f'<rect class="{style}" x="{_LEFT}" y="{y}" width="{middle - _LEFT:.1f}" height="{_BAR}" rx="2"/>',
        f'<line class="range" x1="{least:.1f}" x2="{most:.1f}" y1="{centre}" y2="{centre}"/>',
        f'<text class="text figure" x="{max(most, middle) + 8:.1f}" y="{base}">{spread.middle:.2f}</text>',
    ]
