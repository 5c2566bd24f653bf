"""What the charts of the documentation have in common: written by hand, as SVG."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final
from xml.sax.saxutils import escape

_STYLE: Final = "text{font:12px sans-serif;fill:#333} .axis{stroke:#999} .grid{stroke:#eee}"


def document(width: int, height: int, title: str, parts: Iterable[str], *, left: int, style: str = "") -> str:
    """Return a picture on white, its title at `left`; `style` adds to what texts, axes and grid look like."""
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>{_STYLE}{style}</style>",
            f'<rect width="{width}" height="{height}" fill="#fff"/>',
            f'<text x="{left}" y="24" style="font-weight:bold">{escape(title)}</text>',
            *parts,
            "</svg>\n",
        ]
    )


def text(x: float, y: float, words: str, *, anchor: str = "start", style: str = "") -> str:
    """Return words that start, end or are centred (`middle`) at `x`."""
    how = f' text-anchor="{anchor}"' if anchor != "start" else ""
    look = f' style="{style}"' if style else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{how}{look}>{escape(words)}</text>'
