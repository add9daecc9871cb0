#!/usr/bin/env python3
"""Draws what tensord_bench measured: `bench/plot.py RESULTS.json [FOLDER] [--docs FILE]` writes
SVG files beside it.

ratios.svg has every figure "of ceiling" as a bar with its middle half; strided.svg has the rates of product
and ceiling over the size of rows; peers.svg has the times of other loaders as multiples of the product's.
figures.md is all of it as tables; with `--docs docs/BENCHMARKS.md` they also replace what stands there
between the two marks. Needs nothing but Python.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

FONT = 'font-family="sans-serif" font-size="12"'
COLOURS = {2: "#1b6ca8", 4: "#3a9d5d", 8: "#c2571a", 16: "#7a4fa3"}
GOAL_COLOUR, VOID_COLOUR, GRID_COLOUR = "#b00020", "#bbbbbb", "#dddddd"


def text(x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {FONT}>{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, colour: str, extra: str = "") -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" {extra}/>'


def svg(width: float, height: float, parts: list[str]) -> str:
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


def quantile(samples: list[float], at: float) -> float:
    ordered = sorted(samples)
    place = at * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def ratio_bars(results: dict[str, Any], title: str) -> str:
    """Horizontal bars of the figures that have a ceiling; a line at each one's goal."""
    figures = [figure for figure in results["figures"] if figure["unit"] == "of ceiling"]
    left, scale, row = 340, 400, 22
    most = max([1.1, *(figure["value"] * 1.1 for figure in figures)])
    bottom = 40 + row * len(figures)
    parts = [text(10, 20, title)]
    for tenth in range(0, int(most * 10) + 1, 2):
        x = left + scale * tenth / 10
        parts += [line(x, 30, x, bottom, GRID_COLOUR), text(x, bottom + 16, f"{tenth / 10:.1f}", "middle")]
    for position, figure in enumerate(figures):
        y = 36 + row * position
        width = scale * figure["value"]
        colour = VOID_COLOUR if figure["void"] else COLOURS[2]
        parts.append(text(left - 8, y + 13, f"{figure['case']}: {figure['name']}", "end"))
        parts.append(f'<rect x="{left}" y="{y}" width="{width:.1f}" height="{row - 6}" fill="{colour}"/>')
        low, high = (left + scale * quantile(figure["samples"], at) for at in (0.25, 0.75))
        parts.append(line(low, y + 8, high, y + 8, "black", 'stroke-width="2"'))
        if figure["goal"]:
            x = left + scale * figure["goal"]["value"]
            parts.append(line(x, y - 3, x, y + row - 3, GOAL_COLOUR))
        parts.append(text(left + width + 6, y + 13, f"{figure['value']:.2f}"))
    return svg(left + scale * most + 60, bottom + 26, parts)


def strided_lines(results: dict[str, Any], title: str) -> str:
    """GB/s over row size; a full line is the product, a broken one the ceiling."""
    figures = [figure for figure in results["figures"] if "row_bytes" in figure["details"]]
    left, top, width, height = 60, 40, 620, 320
    most = max(
        [1.0, *(figure["details"][f"{who}_gb_s"] for figure in figures for who in ("product", "ceiling"))]
    )

    def place(row_bytes: float, rate: float) -> str:
        x = left + width * (math.log2(row_bytes) - 8) / 12
        return f"{x:.1f},{top + height * (1 - rate / most / 1.05):.1f}"

    parts = [text(10, 20, title)]
    for power in range(8, 21, 2):
        x = left + width * (power - 8) / 12
        label = f"{2**power} B" if power < 10 else f"{2 ** (power - 10)} KiB"
        parts += [line(x, top, x, top + height, GRID_COLOUR), text(x, top + height + 18, label, "middle")]
    for rate in range(0, int(most) + 1, 5):
        y = top + height * (1 - rate / most / 1.05)
        parts += [line(left, y, left + width, y, GRID_COLOUR), text(left - 8, y + 4, f"{rate} GB/s", "end")]
    for position, (factor, colour) in enumerate(COLOURS.items()):
        chosen = [figure["details"] for figure in figures if figure["details"]["pitch_factor"] == factor]
        chosen.sort(key=lambda details: details["row_bytes"])
        for who, dashes in (("product", ""), ("ceiling", 'stroke-dasharray="5 4"')):
            points = " ".join(place(details["row_bytes"], details[f"{who}_gb_s"]) for details in chosen)
            parts.append(
                f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2" {dashes}/>'
            )
        y = top + 18 * position + 10
        parts.append(line(left + width + 10, y, left + width + 34, y, colour, 'stroke-width="2"'))
        parts.append(text(left + width + 40, y + 4, f"pitch {factor} x row"))
    return svg(left + width + 140, top + height + 30, parts)


def peer_bars(results: dict[str, Any], title: str) -> str:
    """Times of the peers over the product's in the same rounds, on a logarithmic scale around 1."""
    rows = [
        (f"{figure['case']}: {figure['name']}: {peer['name']}", peer)
        for figure in results["figures"]
        for peer in figure.get("peers", ())
        if "ratio" in peer
    ]
    left, octave, row = 560, 50, 20
    one = left + 4 * octave
    bottom = 40 + row * len(rows)
    parts = [text(10, 20, f"{title}: time / product's time")]
    for power in range(-4, 8):
        x = one + octave * power
        parts += [line(x, 30, x, bottom, GRID_COLOUR), text(x, bottom + 16, f"{2.0**power:g}", "middle")]
    for position, (name, peer) in enumerate(rows):
        y = 36 + row * position
        end = one + octave * min(7.0, max(-4.0, math.log2(peer["ratio"])))
        colour = VOID_COLOUR if peer["void"] else COLOURS[4] if peer["ratio"] >= 1 else COLOURS[8]
        parts.append(text(left - 8, y + 12, name, "end"))
        width = max(1.0, abs(end - one))
        parts.append(
            f'<rect x="{min(one, end):.1f}" y="{y}" width="{width:.1f}" height="{row - 6}" fill="{colour}"/>'
        )
        parts.append(text(max(one, end) + 6, y + 12, f"{peer['ratio']:.2f}"))
    return svg(one + 8 * octave, bottom + 26, parts)


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table(results: dict[str, Any], title: str) -> str:
    """All figures in Markdown; those that miss their goal or are void say so."""
    rows = [
        title,
        "",
        "| case | figure | value | spread | goal | rates, notes |",
        "|---|---|---|---|---|---|",
    ]
    for figure in results["figures"]:
        goal, details = figure["goal"], figure["details"]
        target = f"{goal['sign']} {number(goal['value'])}" if goal else ""
        if figure["void"]:
            target += " void"
        elif figure["met"] is False:
            target += " **missed**"
        spread = "" if figure["spread"] is None else f"{figure['spread']:.1%}"
        notes = []
        if "product_gb_s" in details:
            notes.append(f"{details['product_gb_s']:.1f} of {details['ceiling_gb_s']:.1f} GB/s")
        if "product_cpu_s" in details:
            seconds = (details["product_cpu_s"], details["ceiling_cpu_s"])
            notes.append("CPU {} of {} s".format(*(number(one) for one in seconds)))
        if "p99_ms" in details:
            notes.append(f"p99 {number(details['p99_ms'])} ms")
        if "first_byte_p50_ms" in details:
            notes.append(f"with the first byte {number(details['first_byte_p50_ms'])} ms")
        notes += [figure["note"]] if "note" in figure else []
        is_skipped = figure["unit"] == "skipped"
        value = "skipped" if is_skipped else f"{number(figure['value'])} {figure['unit']}"
        cells = (figure["case"], figure["name"], value, spread, target, "; ".join(notes))
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join([*rows, "", *peer_rows(results)]) + "\n"


def peer_rows(results: dict[str, Any]) -> list[str]:
    """The peers in Markdown, with the versions that were measured."""
    versions = ", ".join(f"{name} {version}" for name, version in sorted(results.get("peers", {}).items()))
    rows = [
        f"Peers: {versions}." if versions else "No peers were measured.",
        "",
        "| case | figure | peer | time | CPU | of the product's time | spread |",
        "|---|---|---|---|---|---|---|",
    ]
    for figure in results["figures"]:
        for peer in figure.get("peers", ()):
            if "cannot" in peer:
                cells = ("", "", f"cannot: {peer['cannot']}", "")
            else:
                spread = f"{peer['spread']:.1%}{' void' if peer['void'] else ''}"
                times = (f"{number(peer[which] * 1e3)} ms" for which in ("seconds", "cpu_s"))
                cells = (*times, f"{number(peer['ratio'])} x", spread)
            rows.append(f"| {' | '.join((figure['case'], figure['name'], peer['name'], *cells))} |")
    return rows


MARKS = ("<!-- figures: begin -->", "<!-- figures: end -->")


def replace_between_marks(document: str, tables: str) -> str:
    """The document with the tables between its marks; what stands outside is kept."""
    before, begin, rest = document.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not begin or not end:
        raise SystemExit(f"plot.py: the document lacks the marks {MARKS[0]} and {MARKS[1]}")
    return f"{before}{begin}\n{tables}{end}{after}"


def main() -> int:
    words = sys.argv[1:]
    document = None
    if "--docs" in words[:-1]:
        at = words.index("--docs")
        document = Path(words[at + 1])
        del words[at : at + 2]
    if len(words) not in (1, 2):
        print(__doc__, file=sys.stderr)
        return 2
    source = Path(words[0])
    folder = Path(words[1]) if len(words) == 2 else source.parent
    results = json.loads(source.read_text())
    machine = results["machine"]
    box = f"{machine['processor']}, {machine['cores']} cores"
    title = f"{box}, commit {results['commit']}, {results['build_type']}"
    folder.mkdir(parents=True, exist_ok=True)
    drawings = {"ratios.svg": ratio_bars, "strided.svg": strided_lines, "peers.svg": peer_bars}
    for name, draw in {**drawings, "figures.md": table}.items():
        (folder / name).write_text(draw(results, title))
        print(folder / name)
    if document is not None:
        document.write_text(replace_between_marks(document.read_text(), table(results, title)))
        print(document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
