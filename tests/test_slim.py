"""Smaller figures are the same figures: every coordinate, style and word, against matplotlib's own document."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

pytest.importorskip("matplotlib")

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from pyrometer.benchmarks.page.slim import slim, steps

SVG = "{http://www.w3.org/2000/svg}"
NUMBER = r"-?(?:\d+\.?\d*|\.\d+)"


def walked(d: str) -> list[tuple[float, float]]:
    """Where the pen has been, of a path with M, m, L, l, h, v and z, relative or not."""
    at, begin, places = (0.0, 0.0), (0.0, 0.0), []
    for command, arguments in re.findall(rf"([A-Za-z])((?:[\s,]*{NUMBER})*)", d):
        numbers = [float(text) for text in re.findall(NUMBER, arguments)]
        if command in "zZ":
            at = begin
            continue
        if command in "hv":
            numbers = [n for number in numbers for n in ((number, 0.0) if command == "h" else (0.0, number))]
        for x, y in zip(numbers[::2], numbers[1::2], strict=True):
            at = (x, y) if command in "ML" else (at[0] + x, at[1] + y)
            begin = at if command in "Mm" else begin
            places.append(at)
    return places


@pytest.mark.parametrize(
    ("d", "expected"),
    [
        ("M 1 1 L 3 1", ("h2", 1.0, 1.0)),
        ("M 1 1 \nL 1 0.5 \nL 2.04 0.56", ("v-.5l1 .1", 1.0, 1.0)),
        ("M 0.04 0 L 1.04 0 L 1.04 2 z", ("h1v2z", 0.04, 0.0)),
        ("M 5 5 L 5 5 M 6 7 L 6 7", ("h0m1 2h0", 5.0, 5.0)),
        ("M 0 0 L 1 0 z M 3 3 L 4 3", ("h1zm3 3h1", 0.0, 0.0)),
        ("M 0 0 L 1e7 0", ("h10000", 0.0, 0.0)),
    ],
)
def test_a_path_is_told_as_steps(d, expected):
    assert steps(d) == expected


def test_a_long_walk_does_not_drift():
    """Rounded steps that are added up would go astray by sqrt(n) / 30 points; rounded places never by more than one."""
    places = np.random.default_rng(0).normal(100.0, 40.0, (3000, 2))
    d, x, y = steps("M " + " L ".join(f"{a:.6f} {b:.6f}" for a, b in places))
    assert np.abs(np.array(walked(f"M{x} {y}{d}")) - places).max() < 0.0501


def figure() -> Figure:
    """Two panels with the same cloud, a step curve, bars, markers, a wash, names that are markup, and an empty line."""
    generator = np.random.default_rng(0)
    cloud, walk = generator.normal(size=(200, 2)), np.sort(generator.normal(size=60))
    drawn = Figure(figsize=(6, 3))
    for axes in drawn.subplots(1, 2):
        axes.set_xlim(-3, 3)
        axes.set_ylim(-3, 3)
        path = Path(np.repeat(cloud, 2, 0), np.tile([Path.MOVETO, Path.LINETO], len(cloud)))
        path.should_simplify = False
        axes.add_patch(PathPatch(path, fill=False, edgecolor="#cdcdcd", lw=2, capstyle="round"))
        axes.step(walk, np.linspace(0, 1, 60), where="post", color="#009e73", ls="--")
        axes.errorbar([0, 1, 2], [0, 1, 2], yerr=0.3, marker="o", color="#332288")
        axes.axhspan(-1, -0.5, color="#e3e3e3", alpha=0.5)
        axes.plot([], [], color="#ff0000")
        axes.set_title("<b>'a' & \"b\" \u2264 1")
    return drawn


@pytest.fixture(scope="module")
def both() -> tuple[ET.Element, ET.Element, str, str]:
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans"], "text.parse_math": False}):
        figure().savefig(buffer, format="svg")
    text = buffer.getvalue()
    short = slim(text)
    return ET.fromstring(text), ET.fromstring(short), text, short


def clipped(root: ET.Element) -> set[tuple[float, float]]:
    """Everywhere that a pen has been in the panels, to a point, references resolved."""
    by_id = {node.get("id"): node for node in root.iter() if node.get("id")}
    found = set()
    for node in root.iter():
        dx, dy, target = 0.0, 0.0, node
        if node.tag == f"{SVG}use":
            name = (node.get("href") or node.get("{http://www.w3.org/1999/xlink}href") or "")[1:]
            dx, dy, target = float(node.get("x", 0)), float(node.get("y", 0)), by_id[name]
        d = target.get("d", "")
        if target.tag == f"{SVG}path" and not re.search("[CQ]", d):
            found |= {(round(x + dx), round(y + dy)) for x, y in walked(d) if abs(x) < 900 and abs(y) < 900}
    return found


def test_nothing_is_lost_or_moved(both):
    """Every place of the original has one in the smaller document, a point or less away, and the other way round."""
    before, after, _, _ = both
    one, other = (np.array(sorted(clipped(root))) for root in (before, after))
    for of, near in ((one, other), (other, one)):
        distance = np.abs(of[:, None] - near[None]).max(-1).min(1)
        assert distance.max() <= 1, of[distance.argmax()]


def test_words_and_colours_are_kept(both):
    before, after, _, short = both
    words = [[node.text.strip() for node in root.iter(f"{SVG}text")] for root in (before, after)]
    assert words[0] == words[1]
    assert "<b>'a' & \"b\" \u2264 1" in words[1]
    colours = lambda root: set(re.findall("#[0-9a-f]{6}", ET.tostring(root, encoding="unicode")))  # noqa: E731
    assert colours(before) - colours(after) <= {"#ff0000", "#ffffff"}, "only what draws nothing is left out"
    assert before.get("viewBox") == after.get("viewBox")
    assert "opacity:0.5" in short.replace(" ", "")


def test_references_lead_to_one_thing_each(both):
    _, after, _, _ = both
    names = [node.get("id") for node in after.iter() if node.get("id")]
    assert len(names) == len(set(names))
    wanted = re.findall(r"(?:href=\"#|url\(#)([^\")]+)", ET.tostring(after, encoding="unicode"))
    assert set(wanted) <= set(names)
    assert any(node.tag == f"{SVG}use" and node.get("href", "").startswith("#p") for node in after.iter()), (
        "the cloud stands in both panels, and is told once"
    )


def test_it_is_much_smaller(both):
    _, _, text, short = both
    assert len(short) < 0.4 * len(text)
    assert "\n" not in short
    assert '"' not in short.replace("'a' &amp; \"b\"", "")
