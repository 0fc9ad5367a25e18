"""The picture at the head of the README, drawn by hand as SVG: what defenses seem to do, and what is left of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from html import escape
from typing import Any

COLOURS = ("#57606a", "#0072b2", "#d55e00", "#cc79a7", "#009e73")
"""Grey for the undefended model, then colours of Okabe and Ito, which colour-blind readers can tell apart."""
LEFT, TOP, WIDTH, HEIGHT, GAP = 56, 62, 330, 230, 44
PAPER, INK, GRID = "#ffffff", "#1f2328", "#d0d7de"
"""A ground of its own: the page behind it may be light or dark."""


def curves(result: dict[str, Any], kind: str) -> dict[str, list[tuple[float, float]]]:
    """(eps, share) of each defense, from no attack on, of the strongest attack; `kind` is static or adaptive."""
    clean = {t["defense"]: t["clean_accuracy"]["value"] for t in result["threats"]}
    lines = {defense: {0.0: value} for defense, value in clean.items()}
    for cell in result["cells"]:
        # Images for the undefended model are made on itself, either way.
        found = cell["robust_accuracy" if cell["defense"] == "none" else f"{kind}_robust_accuracy"]
        eps, line = float(Fraction(cell["eps"])), lines[cell["defense"]]
        line[eps] = min(found, line.get(eps, found))
    return {defense: sorted(line.items()) for defense, line in lines.items()}


def svg(result: dict[str, Any]) -> str:
    """The picture of one run with several budgets: two panels with the same lines and axes."""
    both = [curves(result, kind) for kind in ("static", "adaptive")]
    widest = max(x for line in both[0].values() for x, _ in line)
    width, height = LEFT + 2 * WIDTH + GAP + 24, TOP + HEIGHT + 84
    clean = next(t["clean_accuracy"] for t in result["threats"])
    about = f"Accuracy of {len(both[0])} models along the budget, {clean['n']} images"
    body = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img" font-family="-apple-system, Segoe UI, Helvetica, Arial, sans-serif" font-size="12">',
        f"<title>{escape(about)}</title>",
        f'<rect width="{width}" height="{height}" rx="6" fill="{PAPER}" stroke="{GRID}"/>',
        *_panel(LEFT, "What it looks like", "attacks that do not know of the defense", both[0], widest),
        *_panel(LEFT + WIDTH + GAP, "What it is", "attacks made for the defense", both[1], widest),
        *_legend(list(both[0]), width, TOP + HEIGHT + 62),
        "</svg>",
    ]
    return "\n".join(body) + "\n"


def _panel(
    left: int, title: str, under: str, lines: dict[str, list[tuple[float, float]]], widest: float
) -> Iterator[str]:
    def at(x: float, y: float) -> tuple[float, float]:
        return round(left + WIDTH * x / widest, 1), round(TOP + HEIGHT * (1 - y), 1)

    yield _text(left, 26, title, size=15, weight="600")
    yield _text(left, 45, under)
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        (x0, y), (x1, _) = at(0, share), at(widest, share)
        yield f'<line x1="{x0}" y1="{y}" x2="{x1}" y2="{y}" stroke="{GRID}"/>'
        yield _text(x0 - 8, y + 4, f"{100 * share:.0f} %" if left == LEFT else "", anchor="end")
    for eps in (x for x, _ in next(iter(lines.values()))):
        x, y = at(eps, 0)
        yield f'<line x1="{x}" y1="{y}" x2="{x}" y2="{y + 4}" stroke="{INK}"/>'
        yield _text(x, y + 18, f"{eps:g}", anchor="middle")
    yield _text(left + WIDTH / 2, TOP + HEIGHT + 36, "L-inf budget, 1 is the range of pixels", anchor="middle")
    for colour, line in zip(COLOURS, lines.values(), strict=False):
        points = [at(x, y) for x, y in line]
        path = " ".join(f"{x},{y}" for x, y in points)
        yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.5" stroke-linejoin="round"/>'
        yield from (f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in points)


def _legend(names: Sequence[str], width: int, y: int) -> Iterator[str]:
    shown = [("undefended" if name == "none" else name) for name in names]
    room = [46 + 7 * len(name) for name in shown]
    x = (width - sum(room)) / 2
    for colour, name, wide in zip(COLOURS, shown, room, strict=False):
        yield f'<line x1="{x:.0f}" y1="{y - 4}" x2="{x + 18:.0f}" y2="{y - 4}" stroke="{colour}" stroke-width="3"/>'
        yield _text(round(x + 24), y, name)
        x += wide


def _text(x: float, y: float, words: str, size: int = 12, weight: str = "400", anchor: str = "start") -> str:
    style = f'font-size="{size}" font-weight="{weight}" text-anchor="{anchor}"'
    return f'<text x="{x:g}" y="{y:g}" fill="{INK}" {style}>{escape(words)}</text>'
