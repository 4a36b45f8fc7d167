"""Matplotlib's SVG, smaller by an order: the same picture, drawn with fewer letters.

Coordinates are rounded to a tenth of a point and told as steps from the last, styles are classes, lines of one style
are one path, a path that stands again in the same shape is drawn by reference, and what draws nothing is left out.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from itertools import count
from xml.sax.saxutils import escape

SVG, LINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
TOKEN = re.compile(r"[MLZz]|[A-Za-z]|-?[\d.]+(?:e[-+]?\d+)?")
FONT = re.compile(r"font-family: ([^;]*)(?:; )?")  # the same in all of a document
WORTH = 200  # letters of a path from which on a reference is shorter
REACH = 10_000.0  # points; what lies beyond is out of every picture


def slim(text: str) -> str:
    """The SVG document in few letters, with single quotes, on one line."""
    return _Slimmer(ET.fromstring(text)).document()


class _Slimmer:
    """What is known of one document on the way: names of classes and ids, and paths that were drawn."""

    def __init__(self, root: ET.Element) -> None:
        self.root = root
        self.classes: dict[str, str] = {}
        self.ids: dict[str, str] = {}
        self.drawn: dict[tuple[str, str], tuple[str, float, float]] = {}
        self.repeated = _repeated(root)
        self.fresh = (f"p{number}" for number in count())

    def document(self) -> str:
        root = self.root
        inside = "".join(self.element(child) for child in root)
        rules = "".join(f".{name}{{{rule}}}" for rule, name in self.classes.items())
        font = next((found[1] for rule in root.iter(f"{SVG}text") if (found := FONT.search(rule.get("style", "")))), "")
        style = f"<style>*{{stroke-linejoin:round;stroke-linecap:butt}}text{{font-family:{font}}}{rules}</style>"
        size = " ".join(f"{name}='{root.get(name)}'" for name in ("width", "height", "viewBox"))
        return f"<svg xmlns='http://www.w3.org/2000/svg' {size}>{style}{inside}</svg>"

    def element(self, node: ET.Element) -> str:
        tag = node.tag.removeprefix(SVG)
        if tag in ("g", "defs"):
            kept = {name: value for name, value in node.attrib.items() if name not in ("id", "style")}
            inside = "".join(self.group(list(node)))
            if not inside or (tag == "g" and not kept):
                return inside
            return f"<{tag}{self.attributes(kept)}>{inside}</{tag}>"
        if tag == "path":
            return self.path(dict(node.attrib))
        if tag in ("use", "text", "clipPath", "rect", "image"):
            inside = escape(node.text.strip()) if tag == "text" and node.text else ""
            inside += "".join(self.element(child) for child in node)
            opened = f"<{tag}{self.attributes(dict(node.attrib))}"
            return f"{opened}>{inside}</{tag}>" if inside else f"{opened}/>"
        return ""  # metadata, and the style that stands above

    def group(self, nodes: list[ET.Element]) -> Iterator[str]:
        """The elements; lines that differ in nothing but where they are, one after the other, as one path."""
        while nodes:
            node = nodes.pop(0)
            if _line(node):
                while nodes and nodes[0].get("d") and _line(nodes[0]) and _but_for_d(nodes[0]) == _but_for_d(node):
                    node.set("d", f"{node.get('d', '')} {nodes.pop(0).get('d')}")
            yield self.element(node)

    def path(self, of: dict[str, str]) -> str:
        style = of.get("style", "")
        if not of.get("d") or ("fill: none" in style and "stroke: #" not in style):
            return ""
        d, x, y = steps(of.pop("d"))
        name = ""
        if d in self.repeated and "id" not in of:
            known = self.drawn.get((d, style))
            if known is not None:
                of |= {"href": f"#{known[0]}", "x": str(x - known[1]), "y": str(y - known[2])}
                of.pop("clip-path", None)  # that of the first, which moves with it
                of.pop("style", None)
                return f"<use{self.attributes(of)}/>"
            name = next(self.fresh)
            self.drawn[d, style] = name, x, y
        named = f" id='{name}'" if name else ""
        return f"<path{named}{self.attributes(of)} d='M{_number(x)} {_number(y)}{d}'/>"

    def attributes(self, of: dict[str, str]) -> str:
        words = []
        for name, value in of.items():
            if name == "style":
                words.append(f"class='{self.class_of(value)}'")
            elif name == "id":
                words.append(f"id='{self.id_of(value)}'")
            elif name in (LINK, "href"):
                words.append(f"href='#{self.id_of(value[1:])}'")
            elif name == "clip-path":
                words.append(f"clip-path='url(#{self.id_of(value[5:-1])})'")
            elif name in ("x", "y", "width", "height"):
                words.append(f"{name}='{_number(float(value))}'")
            elif name != "transform" or not value.startswith("rotate(-0 "):
                words.append(f"{name}='{escape(_rounded(value), {chr(39): '&apos;'})}'")
        return "".join(f" {word}" for word in words)

    def class_of(self, style: str) -> str:
        rule = FONT.sub("", style).replace(": ", ":").replace("; ", ";").rstrip(";")
        return self.classes.setdefault(rule, f"c{len(self.classes)}")

    def id_of(self, name: str) -> str:
        return name if re.fullmatch(r"p\d+", name) else self.ids.setdefault(name, f"i{len(self.ids)}")


def steps(d: str) -> tuple[str, float, float]:
    """A path as the steps that it takes, without its beginning, and where that is: 'M 1 1 L 3 1' is 'h2' from 1, 1."""
    words: list[str] = []
    start: tuple[float, float] | None = None
    begin = at = (0.0, 0.0)  # from the start, so that a shape is rounded alike wherever it stands
    tokens = iter(TOKEN.findall(d))
    for token in tokens:
        if token in "Zz":
            words.append("z")
            at = begin
            continue
        if token not in "ML":
            return _curved(d)
        x, y = _within(next(tokens)), _within(next(tokens))
        if start is None:
            start = x, y
            continue
        to = round(x - start[0], 1), round(y - start[1], 1)
        dx, dy = round(to[0] - at[0], 1), round(to[1] - at[1], 1)
        if token == "M":
            words.append(f"m{_number(dx)}{_joined(dy)}")
            begin = to
        elif dy == 0 and (dx or not words or words[-1][0] == "m"):
            words.append(f"h{_number(dx)}")
        elif dx == 0 and dy:
            words.append(f"v{_number(dy)}")
        elif dx or dy:
            words.append(f"l{_number(dx)}{_joined(dy)}")
        at = to
    return "".join(words), *(start or begin)


def _curved(d: str) -> tuple[str, float, float]:
    """With curves: as it is, rounded; from 0, 0, where it moves to its own beginning."""
    return " " + " ".join(_rounded(token) for token in TOKEN.findall(d)), 0.0, 0.0


def _repeated(root: ET.Element) -> set[str]:
    """Long paths that stand more than once in the same shape and style."""
    seen: set[tuple[str, str]] = set()
    again: set[str] = set()
    for node in root.iter(f"{SVG}path"):
        shape = steps(node.get("d", ""))[0], node.get("style", "")
        if len(shape[0]) >= WORTH and shape in seen:
            again.add(shape[0])
        seen.add(shape)
    return again


def _line(node: ET.Element) -> bool:
    """Whether it is a path without an area, which may be drawn with others in one."""
    return node.tag == f"{SVG}path" and "fill: none" in node.get("style", "") and "opacity" not in node.get("style", "")


def _but_for_d(node: ET.Element) -> dict[str, str]:
    return {name: value for name, value in node.attrib.items() if name != "d"}


def _within(text: str) -> float:
    return min(max(float(text), -REACH), REACH)


def _number(value: float) -> str:
    """'0.5' is '.5', '2.0' is '2'."""
    text = f"{value:.1f}".removesuffix(".0")
    return "0" if text in ("-0", "0") else text.replace("0.", ".", 1) if text.lstrip("-").startswith("0.") else text


def _joined(value: float) -> str:
    text = _number(value)
    return text if text.startswith("-") else f" {text}"


def _rounded(text: str) -> str:
    return re.sub(r"\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), text)
