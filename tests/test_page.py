"""The report page: its numbers against the records they came from, its verdicts, what it does with hostile or broken
runs, and that it needs nothing but itself."""

from __future__ import annotations

import base64
import csv
import dataclasses
import hashlib
import html
import itertools
import json
import math
import re
import tomllib
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from pyrometer.benchmarks.cli import main
from pyrometer.benchmarks.comparison import PerDatum, Row, Theta
from pyrometer.benchmarks.facts import plain
from pyrometer.benchmarks.gaps import Gap, Gaps, Losses
from pyrometer.benchmarks.square import Cell as SquareCell
from pyrometer.benchmarks.square import Difference, Square, Trained
from pyrometer.inference import ImportanceSampling, ProblemError, infer
from pyrometer.inference.posterior import Cost, Status
from pyrometer.models import conjugate_gaussian, vae

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from pages import ladder, made, put, seal

from pyrometer.benchmarks.page import report
from pyrometer.benchmarks.page.changes import FALSE_ALARM, changes, welch
from pyrometer.benchmarks.page.marks import COLOURS, mark
from pyrometer.benchmarks.page.posteriors import curve, drawn
from pyrometer.benchmarks.page.summary import Interval, summarise
from pyrometer.benchmarks.page.verdicts import verdict
from pyrometer.benchmarks.page.write import records


class Page(HTMLParser):
    """What a test asks of a page: ids, links, images, heads of tables, scripts, and the rows of every table."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.ids, self.links, self.images, self.tags, self.sources = [], [], [], [], []
        self.rows: dict[str, list[list[tuple[str, str]]]] = {}
        self.table, self.cell, self.text, self.heads = "", None, "", []
        self.raw = file.read_text(encoding="utf-8")
        self.feed(self.raw)

    def handle_starttag(self, tag, attributes):
        of = dict(attributes)
        self.tags.append((tag, of))
        self.ids += [of["id"]] if "id" in of else []
        self.links += [of["href"]] if "href" in of else []
        self.images += [of] if tag == "img" else []
        self.sources += [of["src"]] if "src" in of else []
        if tag == "table":
            self.table = of.get("id", "")
            self.rows.setdefault(self.table, [])
        if tag == "tr":
            self.rows.setdefault(self.table, []).append([])
        if tag in ("td", "th"):
            self.cell, self.text = of, ""
            self.heads += [of] if tag == "th" and of.get("scope") == "col" else []

    def handle_data(self, data):
        self.text += data

    def handle_endtag(self, tag):
        if tag in ("td", "th") and self.cell is not None:
            self.rows[self.table][-1].append((self.text.strip(), self.cell.get("data-value")))
            self.cell = None


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder of two engines at two budgets, one that failed and one that was refused, and its page."""
    folder = tmp_path_factory.mktemp("page")
    found = ladder("nuts", (0.06123, 0.05871, 0.06435)) + ladder("svi", (0.3147, 0.3213, 0.3077), level="caution")
    found += [made("smc", seed, state="failed", reason="the weights vanished at step 3") for seed in range(3)]
    found += [made("quadrature", 0, state="unsupported", reason="9 latent dimensions are too many")]
    put(folder / "runs", *found)
    written = report(folder / "runs", folder / "report.html")
    return found, written, Page(written.page)


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_an_interval_is_students():
    # t_{2, 0.975} = 4.30265, from a printed table
    found = Interval.of([1.0, 2.0, 4.0])
    half = 4.30265 * np.std([1, 2, 4], ddof=1) / math.sqrt(3)
    assert found.mean == pytest.approx(7 / 3)
    assert found.high == pytest.approx(7 / 3 + half, rel=1e-5)
    assert found.low == 0.0, "no error is below zero"
    assert Interval.of([-1.0, 2.0, 4.0]).low < -1.0


@pytest.mark.parametrize("values", [[0.3], [0.1, math.nan, 0.2], [0.1, math.inf]])
def test_there_is_no_interval_of_one_seed_nor_of_what_is_not_finite(values):
    found = Interval.of(values)
    assert found.low is None
    assert found.high is None
    assert len(values) == 1 or not math.isfinite(found.mean)


def test_intervals_hold_the_mean_as_often_as_they_say():
    # 95 % of 4,000 intervals of 3 normal values: sd 0.34 %; fails by chance 1 time in 15,000 (4 sd: 1.4 %); a normal
    # quantile in place of t's would hold 81 %
    values = np.random.default_rng(1).normal(5.0, 1.0, (4000, 3))
    held = np.mean([i.low <= 5.0 <= i.high for i in map(Interval.of, values.tolist())])
    assert abs(held - 0.95) < 0.014


def test_the_page_has_the_numbers_of_the_records(two):
    found, _, page = two
    table = next(rows for name, rows in page.rows.items() if name.endswith("-table"))
    head = [text for text, _ in table[0]]
    for engine, calls in itertools.product(("nuts", "svi"), (1000.0, 4000.0)):
        of = [r for r in found if r.cell.engine == engine and r.cell.budget.calls == calls]
        row = next(r for r in table[1:] if r[0][0] == engine and r[1][0] == f"{calls:g} calls")
        by_name = dict(zip(head, row, strict=True))
        for metric in ("error of means", "error of sds"):
            mean = np.mean([r.row.errors[metric].average for r in of])
            assert float(by_name[metric][1]) == pytest.approx(mean, rel=1e-12)
            assert by_name[metric][0].startswith(f"{mean:.2g}")
        assert float(by_name["calls"][1]) == pytest.approx(calls)
        assert float(by_name["seconds"][1]) == pytest.approx(calls / 1000)
        assert by_name["seeds"][0] == "3"


def test_json_csv_and_page_agree(two):
    found, written, page = two
    files = {file.name.removeprefix("report."): file for file in written.files}
    assert all(file.name in page.links for file in written.files)
    summary = json.loads(files["summary.json"].read_text())
    table = next(rows for name, rows in page.rows.items() if name.endswith("-table"))
    column = [text for text, _ in table[0]].index("error of means")
    shown = {(row[0][0], row[1][0]): row[column][1] for row in table[1:]}
    listed = list(csv.DictReader(files["summary.csv"].read_text().splitlines()))
    for group in summary["blocks"][0]["groups"]:
        error = group["errors"].get("error of means")
        if (
            group["engine"] == "quadrature"
        ):  # cannot run here: that is said once, with the reason, not in rows of dashes
            assert (group["engine"], group["budget"]) not in shown
            continue
        assert shown[group["engine"], group["budget"]] == ("" if error is None else repr(error["mean"]))
        if error:
            name = (group["engine"], group["budget"], "error of means")
            line = next(line for line in listed if (line["engine"], line["budget"], line["figure"]) == name)
            assert [float(line[k]) for k in ("mean", "low", "high")] == [error[k] for k in ("mean", "low", "high")]
    assert summary["blocks"][0]["verdict"][0] in html.unescape(page.raw)
    cells = json.loads(files["cells.json"].read_text())
    assert {cell["key"] for cell in cells} == {record.key for record in found}
    assert len(list(csv.DictReader(files["cells.csv"].read_text().splitlines()))) == len(found) == written.cells


def test_best_is_bold_only_where_its_interval_excludes_the_next():
    def best(*groups, budget="1000 calls", **other):
        found = [made(name, seed, e, e, **other) for name, errors in groups for seed, e in enumerate(errors)]
        return {g.engine for g in summarise(found).groups if "error of means" in g.best and g.budget == budget}

    apart = ("a", (0.010, 0.011, 0.012)), ("b", (0.030, 0.031, 0.032))
    assert best(*apart) == {"a"}
    assert best(("a", (0.010, 0.011, 0.012)), ("b", (0.012, 0.020, 0.028))) == set(), "b's interval reaches a"
    assert best(("a", (0.010, 0.011, 0.050)), apart[1]) == set(), "a's own interval reaches b"
    assert best(("a", (0.01,)), ("b", (0.9,))) == set(), "one seed has no interval"
    assert best(apart[0]) == set(), "nothing to be better than"
    assert best(*apart, reference_error=0.05) == set(), "the truth cannot tell them apart"
    assert best(apart[0], ("b", (math.inf,) * 3)) == {"a"}
    assert best(("a", (math.nan,) * 3), *apart[1:], ("c", (0.5, 0.51, 0.52))) == {"b"}, "nan is no best"


# -- verdicts ---------------------------------------------------------------------------------------------------------


def said(*found):
    return " ".join(verdict(summarise(found).blocks[0]))


def test_the_cheapest_accurate_engine_is_to_be_trusted_with_its_interval_and_cost():
    found = ladder("nuts", (0.061, 0.058, 0.064)) + ladder("smc", (0.03, 0.031, 0.032), calls=(3000.0,))
    found += ladder("svi", (0.31, 0.32, 0.30))
    words = said(*found)
    assert words.startswith("Trust nuts at 1k calls (1.0 s): means off by 0.061 [0.054, 0.068] sd")
    assert "cheapest in calls of the 2 engines (of 3)" in words


def test_an_interval_that_reaches_beyond_is_not_accurate():
    assert said(*ladder("nuts", (0.05, 0.09, 0.12), calls=(1000.0,))).startswith("Trust none yet")


def test_an_engine_that_failed_at_a_seed_is_not_trusted_there():
    found = [made("nuts", 0), made("nuts", 1), made("nuts", 2, state="failed", reason="x")]
    assert said(*found).startswith("Trust none yet")
    assert "2 of 3 seeds" in said(*found)


def test_a_coarse_reference_is_not_good_enough():
    assert "reference is not good enough" in said(*ladder("nuts", (0.01, 0.01, 0.01), reference_error=0.06))
    both = ladder("a", (0.01, 0.011, 0.012), reference_error=0.02) + ladder(
        "b", (0.01, 0.011, 0.013), reference_error=0.02
    )
    assert "not good enough to rank a and b" in said(*both)


def test_without_a_truth_there_is_no_verdict():
    unknown = Theta(provenance="nobody knows")
    words = said(*[dataclasses.replace(made(seed=s, theta=unknown), row=Row("", "svi")) for s in range(3)])
    assert words.startswith("No verdict: the truth is not known here (nobody knows)")


def test_errors_without_an_alarm_and_latents_far_out_are_said():
    assert "No alarm, yet beyond 0.1: svi" in said(*ladder("svi", (0.31, 0.32, 0.30)))
    assert "No alarm" not in said(*ladder("svi", (0.31, 0.32, 0.30), level="bad"))
    assert "z[1] the error of means is 2.5 sd" in said(*ladder("nuts", (0.05, 0.05, 0.05), largest=2.5))
    assert "z[1] the error of means is nan sd" in said(*ladder("nuts", (0.05, 0.05, 0.05), largest=math.nan))


def test_an_engine_that_is_right_and_doubts_itself_is_said():
    assert "Its own diagnosis there is 'bad'" in said(*ladder("nuts", (0.05, 0.05, 0.05), level="bad"))
    assert "Its own diagnosis" not in said(*ladder("nuts", (0.05, 0.05, 0.05)))


def test_an_upper_bound_beside_the_evidence_is_drawn_and_told(tmp_path):
    record = made(evidence=-3.2)
    evidence = dataclasses.replace(record.row.log_evidence, refined=PerDatum(-2.95, 0.01, "upper bound", 1))
    record = dataclasses.replace(record, row=dataclasses.replace(record.row, log_evidence=evidence))
    page = Page(report(put(tmp_path / "runs", record), tmp_path / "r.html").page)
    assert any("svi: -0.2, bracketed from above 0.25 further up" in image["alt"] for image in page.images)
    assert "upper bound 0.25 above" in page.raw


def test_one_seed_and_no_answer_are_said():
    assert "one seed, so without an interval" in said(made())
    assert said(made(state="failed", reason="x")).startswith("No engine gave an answer (failed)")
    assert "Never came to an answer: smc" in said(made(), made("smc", state="timed out"))
    assert "Cannot run here: smc" in said(made(), made("smc", state="unsupported"))


# -- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_but_itself(two):
    _, written, page = two
    assert all(image["src"].startswith("data:image/") and image["alt"].strip() for image in page.images)
    assert len(page.images) >= 2
    assert page.sources == [image["src"] for image in page.images]
    assert not re.search(r"url\(|@import", page.raw.partition("<body>")[0])
    beside = {file.name for file in written.files}
    for link in page.links:
        assert link.startswith("#") or link in beside or link == "data:,", link
        assert not link.startswith("#") or link[1:] in page.ids, f"{link} leads nowhere"
    assert all((written.page.parent / file).is_file() for file in beside)
    assert len(page.ids) == len(set(page.ids)), "an id stands twice"
    policy = next(of["content"] for tag, of in page.tags if tag == "meta" and "http-equiv" in of)
    script = re.search(r"<script>(.*?)</script>", page.raw, re.DOTALL)[1]
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
    assert policy.startswith("default-src 'none'")
    assert written.page.stat().st_size < 3 * 2**20


def test_tables_can_be_sorted_by_keyboard_and_read_aloud(two):
    _, _, page = two
    sortable = [of for of in page.heads if "aria-sort" in of]
    assert sortable
    assert all(of["aria-sort"] == "none" for of in sortable)
    assert sum(tag == "button" for tag, _ in page.tags) == len(sortable)
    wide = [of for tag, of in page.tags if tag == "div" and "wide" in of.get("class", "")]
    assert all(of["tabindex"] == "0" and of["role"] == "region" and of["aria-label"] for of in wide)
    assert ("html", {"lang": "en"}) in page.tags
    assert any(of.get("name") == "viewport" for tag, of in page.tags if tag == "meta")


def test_levels_are_words_and_failures_have_reasons(two):
    _, _, page = two
    text = html.unescape(re.sub(r"<[^>]*>", " ", page.raw))
    assert "the weights vanished at step 3" in text
    assert "9 latent dimensions are too many" in text
    assert '<span class="light caution">caution</span>' in page.raw
    assert '<span class="light failed">failed</span>' in page.raw
    assert '<span class="light refused">cannot run</span>' in page.raw


def test_what_is_missing_is_a_dash_and_sorts_as_missing(two):
    _, _, page = two
    table = next(rows for name, rows in page.rows.items() if name.endswith("-table"))
    smc = next(row for row in table if row[0][0] == "smc")
    assert smc[3] == ("\u2013", "")


def test_every_figure_has_a_command_that_makes_its_runs_again(two):
    _, _, page = two
    blocks = [html.unescape(text) for text in re.findall(r"<pre>(.*?)</pre>", page.raw, re.DOTALL)]
    grids = [text for text in blocks if text.startswith("cat > grid.toml <<'END'\n")]
    assert grids
    assert all(text.endswith("END\npyrometer bench grid.toml --out again") for text in grids)
    read = tomllib.loads(grids[0].partition("\n")[2].rpartition("END\n")[0])
    assert read["seeds"] == [0, 1, 2]
    assert read["budgets"] == [1000.0, 4000.0]
    assert read["problems"] == [{"name": "no_such_family", "label": "coin"}]
    assert set(read["engines"]) == {"nuts", "svi", "smc", "quadrature"}


def drawings(page: Page) -> list[ET.Element]:
    """The figures that are SVG, parsed."""
    heads = [image["src"].partition(",") for image in page.images]
    return [ET.fromstring(unquote(text)) for kind, _, text in heads if kind == "data:image/svg+xml"]


HOSTILE = (
    "<script>alert(1)</script>", "../../etc/passwd", '"><img src=x onerror=alert(1)>', "$\\frac{a}{$", "_hidden",
    "a\x00b\x1b[31m\ud800", "\u202eevil", "END\nrm -rf /", "=cmd|' /C calc'!A0", "n" * 300, "{{ 7 * 7 }}",
    "\u5f15\u64ce",
)  # fmt: skip


def test_hostile_names_are_escaped(tmp_path):
    found = [
        made(name, seed, 0.1 * (1 + place), problem=HOSTILE[seed], evidence=-3.0 - place)
        for place, name in enumerate(HOSTILE)
        for seed in range(2)
    ]
    found += [made(state="failed", reason=name, problem=name) for name in HOSTILE[2:]]
    found += [
        made("x", 0, state="failed", reason="</pre><script>alert(2)</script>", problem=HOSTILE[0], learner=HOSTILE[2])
    ]
    written = report(put(tmp_path / "runs", *found), tmp_path / "r.html")
    page = Page(written.page)
    assert written.cells == len(found)
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert not [of for _, of in page.tags if any(name.startswith("on") for name in of)]
    assert "{{ 7 * 7 }}" in html.unescape(page.raw)
    assert "49" not in [text for rows in page.rows.values() for row in rows for text, _ in row]
    assert not re.search("[\x00\x1b\u202e]", page.raw)
    assert drawings(page)
    for root in drawings(page):  # every figure is XML that a browser can read
        assert not [e for e in root.iter() if e.tag.endswith("script")]
    for text in re.findall(r"<pre>(cat .*?)</pre>", page.raw, re.DOTALL):
        inside = html.unescape(text).splitlines()[1:-1]
        assert inside.index("END") == len(inside) - 1, "a name ended the text early"
    assert {file.parent for file in tmp_path.rglob("*.*")} >= {tmp_path}
    assert not (tmp_path.parent / "etc").exists()


def test_a_spreadsheet_finds_no_formula(tmp_path):
    names = ("=1+1", "+1", "-1", "@SUM(A1)", "\t=1")
    written = report(put(tmp_path / "runs", *(made(name, problem=names[0]) for name in names)), tmp_path / "r.html")
    for file in (written.files[1], written.files[3]):
        for row in csv.DictReader(file.read_text(encoding="utf-8").splitlines()):
            assert row["engine"].startswith("'")
            assert row["problem"].startswith("'")


def test_an_empty_folder_says_so(tmp_path):
    (tmp_path / "runs").mkdir()
    written = report(tmp_path / "runs", tmp_path / "r.html")
    assert written.cells == 0
    assert "There are no runs in this folder" in written.page.read_text()
    assert json.loads(written.files[2].read_text()) == []


@pytest.mark.parametrize(
    "found",
    [
        [made(seed=s, state="failed", reason="x") for s in range(3)],
        [made()],
        [made(seed=0, means=math.nan, sds=math.inf, evidence=math.nan), made(seed=1, means=0.1, evidence=-math.inf)],
        [made(seed=s, means=0.0, sds=0.0, evidence=None) for s in range(2)],
        [made(seed=s, seconds=0.0) for s in range(2)],
        [dataclasses.replace(made(), row=dataclasses.replace(made().row, cost=Cost()))],
    ],
    ids=["all failed", "one seed, one engine", "nan and inf", "no error at all", "no seconds", "no cost"],
)
def test_odd_runs_make_a_page(tmp_path, found):
    written = report(put(tmp_path / "runs", *found), tmp_path / "r.html")
    page = Page(written.page)
    json.loads(written.files[0].read_text(), parse_constant=lambda c: pytest.fail(f"{c} is no JSON"))
    table = next(rows for name, rows in page.rows.items() if name.endswith("-table"))
    assert len(table) == 2
    assert not any(value in ("nan", "inf") for _, value in table[1])


def test_fifty_engines_make_a_page_of_modest_size(tmp_path):
    found = [made(f"engine_{n}", seed, 0.01 * (n + 1 + seed), 0.02) for n in range(50) for seed in range(2)]
    written = report(put(tmp_path / "runs", *found), tmp_path / "r.html")
    assert written.page.stat().st_size < 3 * 2**20
    assert len({(m.colour, m.marker, m.line) for m in (mark(f"engine_{n}") for n in range(50))}) > 40


# -- broken runs ------------------------------------------------------------------------------------------------------


def test_a_damaged_record_is_named_and_is_no_number(tmp_path):
    folder = put(tmp_path / "runs", *(made(seed=s) for s in range(8)))
    files = sorted(folder.glob("*/record.json"))
    whole = files[0].read_bytes()
    files[0].write_bytes(whole[:-40])
    files[1].write_bytes(files[1].read_bytes().replace(b'"average": 0.05', b'"average": 0.04'))  # one bit of one number
    files[2].write_text("{}")
    files[3].write_text(whole.decode().partition("\n")[0])
    seal(files[4], {**json.loads(files[4].read_text()), "key": "../../outside"})
    seal(files[5], {**json.loads(files[5].read_text()), "row": {"engine": 3}})
    read = json.loads(files[6].read_text())
    del read["digest"]
    body = json.dumps(read)[1:].replace('"seed": ', '"seed": NaN, "x": ', 1).encode()
    files[6].write_bytes(f'{{"digest": "{hashlib.sha256(body).hexdigest()}",\n'.encode() + body)
    unreadable: dict[str, str] = {}
    assert [r.key for r in records(folder, unreadable)] == [files[7].parent.name]
    assert set(unreadable) == {file.parent.name for file in files[:7]}
    written = report(folder, tmp_path / "r.html")
    assert all(key in written.page.read_text() for key in unreadable)
    assert written.cells == 1


def test_records_are_read_as_they_were_written(tmp_path):
    record = made(means=math.inf, evidence=math.nan, learner="em:nuts")
    (read,) = records(put(tmp_path / "runs", record))
    assert plain(read) == plain(record)
    assert read.row.errors["error of means"].average == math.inf


def test_links_and_foreign_folders_are_passed_over(tmp_path):
    outside = put(tmp_path / "outside", made())
    folder = put(tmp_path / "runs", made(seed=1))
    key = next(outside.iterdir()).name
    (folder / key).symlink_to(outside / key)
    (folder / "theta-0123456789abcdef").mkdir()
    (folder / ".0123456789abcdef.tmp").mkdir()
    (folder / "notes.txt").write_text("mine")
    assert [r.cell.seed for r in records(folder)] == [1]


def test_a_module_that_a_record_names_is_not_imported(tmp_path, monkeypatch):
    (tmp_path / "canary_module.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef problem(): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    posterior = infer(conjugate_gaussian.problem(num_data=4), ImportanceSampling(num_samples=50), seed=0)
    put(tmp_path / "runs", made(model="canary_module"), draws=posterior)
    block = summarise(records(tmp_path / "runs")).blocks[0]
    found = drawn(tmp_path / "runs", block)
    assert found.panels, "the draws are shown, without the truth"
    assert "no family that is installed here" in found.missing[0]
    assert not (tmp_path / "ran").exists()


# -- draws ------------------------------------------------------------------------------------------------------------


def test_a_curve_is_the_weighted_distribution_function():
    generator = np.random.default_rng(0)
    values, weights = generator.normal(size=5000), generator.gamma(0.5, size=5000)
    found = curve(values, weights / weights.sum())
    assert len(found.x) <= 80
    for x, p in zip(found.x, found.p, strict=True):
        assert p == pytest.approx(weights[values <= x].sum() / weights.sum(), abs=1e-12)
    assert np.diff(found.p).max() < 0.03, "the thinned curve has lost a step"
    assert found.p[-1] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="no finite draw"):
        curve(np.array([math.nan, 1.0]), np.array([1.0, 0.0]))


@pytest.fixture(scope="module")
def drawn_runs(tmp_path_factory):
    """Two engines on four data with a truth: a real one, and the same draws with the sign turned."""
    folder = tmp_path_factory.mktemp("drawn")
    problem = conjugate_gaussian.problem(num_data=4)
    posterior = infer(problem, ImportanceSampling(proposal="prior", num_samples=2000), seed=0)
    turned = dataclasses.replace(posterior, draws={name: -value for name, value in posterior.draws.items()})
    for engine, answer in (("importance_sampling", posterior), ("turned", turned)):
        put(folder, made(engine, model="conjugate_gaussian"), draws=answer)
    for file in folder.glob("*/record.json"):  # the data that were inferred from
        read = json.loads(file.read_text())
        del read["digest"]
        read["cell"]["model_settings"] = {"num_data": 4}
        seal(file, read)
    return folder, problem, posterior


def test_draws_stand_beside_the_truth(drawn_runs):
    folder, problem, posterior = drawn_runs
    block = summarise(records(folder)).blocks[0]
    found = drawn(folder, block)
    truth = problem.reference_at(posterior.parameters)
    assert found.missing == []
    assert found.panels[0].name == "z[1]", "the worst first"
    for panel in found.panels:
        index = panel.index[0]
        w, z = posterior.weights()[..., index], posterior.draws["z"][..., index]
        x = float(panel.curves["importance_sampling"].x[30])
        assert panel.curves["importance_sampling"].p[30] == pytest.approx(float(w[z <= x].sum()), abs=1e-9)
        if panel.truth is None:
            assert panel.moments == pytest.approx((float(truth.mean["z"][index]), float(truth.sd["z"][index])))
        assert panel.curves["turned"].x[0] == pytest.approx(-float(z[w > 0].max()))
    assert len(found.doubts["importance_sampling"].k_hats) == 4


def test_draws_that_are_not_those_recorded_are_not_shown(drawn_runs, tmp_path):
    posterior = drawn_runs[2]
    put(tmp_path / "runs", made("a"), draws=posterior)
    put(tmp_path / "runs", made("b"), draws=posterior)
    file = tmp_path / "runs" / made("a").key / "draws.nc"
    whole = bytearray(file.read_bytes())
    whole[len(whole) // 2] ^= 1
    file.write_bytes(whole)
    found = drawn(tmp_path / "runs", summarise(records(tmp_path / "runs")).blocks[0])
    assert set(found.keys) == {"b"}
    assert any(line.startswith("a: the draws are not those") for line in found.missing)


def test_the_page_of_real_runs_shows_its_figures(drawn_runs, tmp_path):
    folder, _, _ = drawn_runs
    page = Page(report(folder, tmp_path / "r.html").page)
    words = [image["alt"] for image in page.images]
    assert any(word.startswith("Distribution functions. z[1]") for word in words)
    assert any(word.startswith("k-hat of each datum") for word in words)
    assert any(word.startswith("error of means against cost") for word in words)
    assert any(word.startswith("Log evidence less the truth") for word in words)


def test_every_result_is_told_by_the_key_that_it_is_stored_under(drawn_runs, tmp_path):
    folder, _, _ = drawn_runs
    page = report(folder, tmp_path / "r.html").page.read_text()
    stored = [path.name for path in folder.iterdir() if path.is_dir()]
    assert stored
    assert [key for key in stored if key not in page] == []
    assert "built-in method" not in page  # an attribute of a dict in the place of its entry


def test_images_of_doubtful_data_are_shown(tmp_path):
    problem = vae.problem(num_train=12)
    with torch.no_grad():
        posterior = infer(problem, ImportanceSampling(proposal="prior", num_samples=120), seed=0)
    # weights that one draw carries, at two data
    log_weights = posterior.log_weights.clone()
    log_weights[..., [3, 7]] = 30.0 * torch.randn(120, 2, generator=torch.Generator().manual_seed(0)).double()
    posterior = dataclasses.replace(posterior, log_weights=log_weights)
    record = made("importance_sampling", model="vae", problem="vae")
    record = dataclasses.replace(record, cell=dataclasses.replace(record.cell, model_settings={"num_train": 12}))
    folder = put(tmp_path / "runs", record, draws=posterior)
    found = drawn(folder, summarise(records(folder)).blocks[0])
    images = found.doubts["importance_sampling"].images
    assert {3, 7} <= set(images)
    assert np.array_equal(images[3], problem.args[0][3].reshape(8, 8).numpy())
    page = Page(report(folder, tmp_path / "r.html").page)
    assert any("largest k-hat as images" in image["alt"] for image in page.images)


# -- squares and gaps -------------------------------------------------------------------------------------------------


def test_a_square_and_its_gaps_are_shown_with_their_numbers(tmp_path):
    cells = [
        SquareCell("svi", "reference", value=-1.25, std_error=0.01, data_error=0.1, kind="exact", level="good",
                   difference=Difference("svi", 0.0, 0.0, 0.0), values=(-1.0, -1.5), errors=(0.01, 0.01)),
        SquareCell("<em>", "reference", value=-2.25, std_error=0.01, data_error=0.1, kind="exact", level="bad",
                   difference=Difference("svi", -1.0, 0.01, 0.2)),
        SquareCell("svi", "smc", status=Status("failed", "no weight")),
    ]  # fmt: skip
    square = Square((Trained("svi"), Trained("<em>")), tuple(cells), problem={"name": "coin"})
    parts = {name: Gap(0.5, 0.01, 0.1) for name in ("learning", "approximation", "amortisation", "inference", "total")}
    gaps = Gaps((Losses("svi", gaps=parts, level="good"), Losses("<em>", status=Status("failed", "no guide"))))
    folder = put(tmp_path / "runs", made())
    (folder / "square.json").write_text(json.dumps({**square.to_dict(), "gaps": gaps.to_dict()}))
    (folder / "other.json").write_text('{"rows": 1}')
    (folder / "broken.json").write_text('{"learners": [], "cells": [{"learner": 1}]}')
    page = Page(report(folder, tmp_path / "r.html").page)
    rows = next(rows for name, rows in page.rows.items() if name.startswith("m-square"))
    assert [text for text, _ in rows[0]] == ["theta by", "reference", "smc"]
    assert rows[1][1] == ("-1.250 \u00b1 0.010best", "-1.25")
    assert rows[2][0][0] == "<em>"
    assert rows[2][1] == ("-2.250 \u00b1 0.010-1 \u00b1 0.2trust: bad", "-2.25")
    assert rows[1][2] == ("\u2013failed", "")
    assert any("Where the nats go. svi: learning 0.5" in image["alt"] for image in page.images)
    assert "no guide" in page.raw
    assert "broken.json" in page.raw
    assert "other.json" not in page.raw


def test_learners_of_a_grid_have_a_heat_map_of_its_own_runs(tmp_path):
    """At the largest budget, the mean over seeds; a dash where an engine has no evidence; the best of a column is said,
    and what a square would add."""
    of = {"learner": "em", "model": "vae"}
    found = [made("smc", seed, evidence=-3.0 - seed, calls=9000.0, **of) for seed in range(2)]
    found += [made("smc", 0, evidence=-99.0, calls=10.0, **of), made("nuts", 0, evidence=None, **of)]
    found += [made("smc", 0, evidence=-2.5, **{**of, "learner": "svi"})]
    found += [made("is", 0, evidence=-2.75, level="bad", **{**of, "learner": "svi"})]
    page = Page(report(put(tmp_path / "runs", *found), tmp_path / "r.html").page)
    rows = next(rows for name, rows in page.rows.items() if name.startswith("m-learned"))
    assert [text for text, _ in rows[0]] == ["theta by", "is", "smc"]
    em, svi = rows[1:]
    assert [row[0][0] for row in (em, svi)] == ["em", "svi"]
    assert em[1] == ("\u2013", "")
    assert em[2] == ("-3.500 \u00b1 0.010-1", "-3.5")
    assert svi[1] == ("-2.750 \u00b1 0.010besttrust: bad", "-2.75")
    assert svi[2] == ("-2.500 \u00b1 0.010best", "-2.5")
    assert "pyrometer square vae --learn em,svi --gaps --json RUNS/square.json" in html.unescape(page.raw)
    alone = Page(report(put(tmp_path / "one", *found[:2]), tmp_path / "o.html").page)
    assert not any(name.startswith("m-learned") for name in alone.rows)


# -- changes ----------------------------------------------------------------------------------------------------------


def test_equal_runs_have_not_changed():
    found = summarise(ladder("nuts", (0.061, 0.058, 0.064)))
    same = changes(found, found)
    assert (same.changed, same.ended, same.new, same.gone) == ((), (), (), ())
    assert same.compared == 2 * 5


def test_what_changed_is_told_from_what_did_not():
    before = summarise(ladder("nuts", (0.061, 0.058, 0.064)) + ladder("svi", (0.31, 0.32, 0.30)) + [made("old")])
    after = summarise(
        ladder("nuts", (0.62, 0.58, 0.64)) + ladder("svi", (0.315, 0.305, 0.32))
        + [made("new"), *(made("smc", s) for s in range(2))]
    )  # fmt: skip
    found = changes(before, after)
    assert {(c.engine, c.figure) for c in found.changed} == {("nuts", "error of means"), ("nuts", "error of sds")}
    assert all(c.z > 4 for c in found.changed)
    assert {name[2] for name in found.new} == {"new", "smc"}
    assert {name[2] for name in found.gone} == {"old"}


def test_what_is_the_same_at_every_seed_changes_beyond_rounding_only():
    assert welch([0.5, 0.5], [0.5, 0.5 * (1 + 1e-12)]) == (0.0, 1.0)
    assert welch([0.5, 0.5], [0.6, 0.6]) == (math.inf, 0.0)
    assert welch([0.5], [0.6, 0.61]) is None
    assert welch([0.5, math.nan], [0.6, 0.61]) is None


def test_an_answer_that_is_gone_is_a_change():
    after = summarise(made("nuts", s, state="failed", reason="new bug") for s in range(3))
    (ended,) = changes(summarise(made("nuts", s) for s in range(3)), after).ended
    assert ended.before == "3 of 3 seeds answered"
    assert ended.after == "0 of 3 seeds answered (failed: new bug)"


@pytest.mark.parametrize("sides", [(3, 3), (3, 6)])
def test_false_alarms_are_as_rare_as_promised(sides):
    # 4,000 pairs without a change, on the log scale: at p < 0.01 at most 1 % + 4.5 sd (0.71 %), which chance exceeds
    # 3 times in a million; a normal quantile in place of Welch's t would give 6 % of 3 and 3 seeds
    generator = np.random.default_rng(0)
    left, right = (np.exp(generator.normal(-3.0, 0.4, (4000, n))).tolist() for n in sides)
    p = np.array([welch(a, b)[1] for a, b in zip(left, right, strict=True)])
    assert (p < FALSE_ALARM).mean() <= FALSE_ALARM + 4.5 * math.sqrt(FALSE_ALARM * (1 - FALSE_ALARM) / len(p))
    assert (p < 0.5).mean() > 0.4, "a test that never speaks has no false alarms either"


def test_a_page_says_what_changed(tmp_path):
    put(tmp_path / "old", *ladder("nuts", (0.061, 0.058, 0.064)))
    put(tmp_path / "new", *ladder("nuts", (0.62, 0.58, 0.64)), made("svi"))
    written = report(tmp_path / "new", tmp_path / "r.html", against=tmp_path / "old")
    page = Page(written.page)
    rows = page.rows["changes-table"][1:]
    assert {(row[1][0], row[3][0]) for row in rows} == {("nuts", "error of means"), ("nuts", "error of sds")}
    assert "\u00d7 10.05" in rows[0][6][0]
    assert "coin: svi (1000 calls)" in page.raw
    assert len(json.loads(written.files[0].read_text())["changes"]["changed"]) == len(rows)


# -- engines' marks ---------------------------------------------------------------------------------------------------


def light(colour: str) -> list[float]:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]


def test_colours_are_apart_for_every_eye():
    # Machado et al. 2009, doi:10.1109/TVCG.2009.113, severity 1; distances in CIE Lab, where 2.3 can just be seen
    eyes = {
        "all three": np.eye(3),
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
        "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
    }
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    for eye, seen_by in eyes.items():
        seen = []
        for colour in COLOURS:
            xyz = to_xyz @ np.clip(np.array(seen_by) @ light(colour), 0, 1) / [0.9505, 1.0, 1.089]
            f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
            seen.append([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])
        for a, b in itertools.combinations(seen, 2):
            assert math.dist(a, b) > 15, eye
    for colour in COLOURS:
        r, g, b = light(colour)
        assert 1.05 / (0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05) >= 3, f"{colour} is too faint on white"


def test_an_engine_looks_the_same_on_every_page(two):
    _, _, page = two
    engines = ["svi", "nuts", "hmc", "importance_sampling", "smc", "annealed_importance", "quadrature"]
    assert len({mark(name).colour for name in engines}) == len(engines)
    symbols = re.findall(r'<symbol id="(.*?)".*? d="(M[^"]*)" fill="(.*?)"', page.raw)
    name = next(name for name, path, colour in symbols if (path, colour) == (mark("nuts").path, mark("nuts").colour))
    assert page.links.count(f"#{name}") >= 3
    assert (mark("svi"), mark("nuts")) == (mark("svi"), mark("nuts"))


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command_writes_the_page(tmp_path):
    put(tmp_path / "runs", made())
    result = CliRunner().invoke(main, ["report", str(tmp_path / "runs"), "--out", str(tmp_path / "r.html")])
    assert result.exit_code == 0, result.output
    assert "1 runs" in result.output
    assert f"pyrometer report {tmp_path / 'runs'} --out {tmp_path / 'r.html'}" in (tmp_path / "r.html").read_text()


def test_mistakes_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    invoke = CliRunner().invoke
    for words, expected in (
        (["report", str(tmp_path / "none"), "--out", str(tmp_path / "r.html")], "no folder of runs"),
        (["report", str(tmp_path / "runs"), "--out", str(tmp_path / "r.pdf")], "ends in .html"),
        (["report", str(tmp_path / "runs"), "--out", str(tmp_path / "x" / "r.html")], "make it first"),
        (
            ["report", str(tmp_path / "runs"), "--out", str(tmp_path / "r.html"), "--compare", "nowhere"],
            "no folder of runs",
        ),
    ):
        result = invoke(main, words)
        assert result.exit_code == 2
        assert expected in result.output
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ProblemError, match=re.escape("pip install 'pyrometer[report]'")):
        report(tmp_path / "runs", tmp_path / "r.html")
    assert not list(tmp_path.glob("*.html"))
