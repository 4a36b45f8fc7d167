"""The command line: quick to start, mistakes in one line with code 2, rows kept on Ctrl-C, a run that repeats."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from pyrometer.benchmarks.cli import main

QUICK = ["--engines", "importance,enumeration", "--set", "num_data=5", "--set", "importance.num_samples=50"]


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def in_a_process(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "pyrometer.benchmarks", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_help_needs_neither_torch_nor_a_second():
    code = (
        "import sys\n"
        "from pyrometer.benchmarks.cli import main\n"
        "main(['--help'], standalone_mode=False)\n"
        "loaded = {'torch', 'pyro', 'arviz', 'numpy', 'scipy', 'sklearn'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    times = []
    for _ in range(3):  # the least of three: other work on the machine must not fail this
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        times.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
    assert min(times) < 1.0
    assert "compare" in done.stdout


def test_importing_the_package_imports_no_torch_and_gives_the_function():
    code = (
        "import sys, pyrometer.benchmarks\n"
        "assert 'torch' not in sys.modules\n"
        "import pyrometer.benchmarks.comparison\n"
        "from pyrometer.benchmarks import compare\n"
        "assert callable(compare) and compare.__name__ == 'compare'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_compare_prints_the_table_and_writes_json(tmp_path):
    path = tmp_path / "out.json"
    done = run("compare", "conjugate_gaussian", *QUICK, "--learn", "em", "--seed", 4, "--json", path)
    assert done.exit_code == 0, done.output
    assert "truth (exact)" in done.output
    assert "cannot run" in done.output
    read = json.loads(path.read_text())
    assert [row["engine"] for row in read["rows"]] == ["importance_sampling(num_samples=50)", "enumeration"]
    assert read["rows"][0]["settings"]["num_samples"] == 50
    assert read["problem"]["data"] == [[5]]
    assert read["seed"] == 4
    assert read["complete"] is True

    # The command that is stored gives the same numbers again.
    words = shlex.split(read["command"])
    assert words[0] == "pyrometer"
    again = tmp_path / "again.json"
    assert run(*words[1:], "--json", again).exit_code == 0
    repeated = json.loads(again.read_text())
    for first, second in zip(read["rows"], repeated["rows"], strict=True):
        assert (first["errors"], first["log_evidence"]) == (second["errors"], second["log_evidence"])
        assert first["seed"] == second["seed"]


def test_without_engines_all_are_tried():
    from pyrometer.inference.registry import engines

    done = run("compare", "conjugate_gaussian", "--set", "num_data=3", "--set", "svi.num_steps=2")
    assert done.exit_code == 0, done.output
    for name in engines():
        assert any(line.startswith(name) for line in done.stdout.splitlines()), name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["compare", "vee"], "did you mean 'vae'"),
        (["compare", "conjugate_gaussian", "--engines", "nutz"], "Did you mean 'nuts'"),
        (["compare", "conjugate_gaussian", "--engines", "svi,svi"], "given twice"),
        (["compare", "conjugate_gaussian", "--engines", "svi,svi(num_steps=1000)"], "given twice"),
        (["compare", "conjugate_gaussian", "--engines", "svi(num_stepz=3)"], "did you mean 'num_steps'"),
        (["compare", "conjugate_gaussian", "--engines", "svi(num_steps=3"], "no engine 'svi(num_steps=3'"),
        (["compare", "conjugate_gaussian", "--engines", "svi(num_steps)"], "expected key=value in the brackets"),
        (["compare", "conjugate_gaussian", "--engines", "svi(num_steps=x)"], "expected a whole number"),
        (["compare", "conjugate_gaussian", "--engines", "svi", "--learn", "nuts"], "no learner 'nuts'"),
        (["compare", "conjugate_gaussian", "--set", "num_dat=5"], "did you mean 'num_data'"),
        (["compare", "conjugate_gaussian", "--set", "num_data"], "expected key=value"),
        (["compare", "conjugate_gaussian", "--set", "num_data=two"], "expected a whole number"),
        (["compare", "conjugate_gaussian", "--set", "num_data=0"], "num_data"),
        (["compare", "conjugate_gaussian", "--engines", "svi", "--set", "svi.num_step=5"], "did you mean 'num_steps'"),
        (["compare", "conjugate_gaussian", "--engines", "svi", "--set", "nuts.num_samples=5"], "none of the methods"),
        (
            ["compare", "conjugate_gaussian", "--engines", "svi", "--set", "svi.num_steps=1.5"],
            "expected a whole number",
        ),
        (["compare", "conjugate_gaussian", "--engines", "svi", "--set", "svi.num_steps=0"], "at least 1"),
        (["compare", "conjugate_gaussian", "--engines", "svi", "--set", "svi.optimizer=Adam"], "use Python"),
        (["compare", "conjugate_gaussian", "--learn", "em", "--set", "em.e_step.num_samples=5"], "em:nuts"),
        (["compare", "conjugate_gaussian", "--seed", "-1"], "seed"),
        (["compare", "conjugate_gaussian", "--json", "/no/such/folder/out.json"], "no folder"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(arguments, words):
    done = run(*arguments)
    assert done.exit_code == 2
    assert isinstance(done.exception, SystemExit)
    (line,) = done.stderr.strip().splitlines()
    assert words in line
    assert done.stdout == ""


def test_settings_reach_model_engine_learner_and_e_step():
    from pyrometer.benchmarks.settings import configure

    problem, engines, learners = configure(
        "conjugate_gaussian",
        "svi,importance",
        "svi,em:importance",
        [
            "num_data=7",
            "svi.num_steps=11",
            "svi.learning_rate=1",
            "svi.guide=AutoNormal",
            "svi.batch_size=none",
            "em:importance.e_step.num_samples=13",
            "importance_sampling.pareto_smoothed=true",
        ],
    )
    assert problem.args[0].shape == (7,)
    by_name = {engine.name: engine for engine in engines.values()}
    svi, importance = by_name["svi"], by_name["importance_sampling"]
    assert (svi.num_steps, svi.learning_rate, svi.guide, svi.batch_size) == (11, 1.0, "AutoNormal", None)
    assert isinstance(svi.learning_rate, float)
    assert importance.pareto_smoothed is True
    em = next(learner for learner in learners.values() if learner.name == "em")
    assert em.e_step.num_samples == 13
    assert importance.num_samples != 13
    assert next(learner for learner in learners.values() if learner.name == "svi") == svi


def test_settings_in_brackets_are_of_one_method_of_several():
    from pyrometer.benchmarks.settings import configure

    _, engines, learners = configure(
        "conjugate_gaussian",
        "smc,smc(num_samples=50, kernel=langevin)",
        "svi(objective=iwae,num_particles=50),svi, em(num_steps=7):nuts(num_samples=9)",
        ["svi.num_steps=11", "svi.num_particles=3"],
    )
    assert list(engines) == ["smc", "smc(num_samples=50, kernel=langevin)"]
    assert engines["smc(num_samples=50, kernel=langevin)"].num_samples == 50
    first, second, em = learners.values()
    # in brackets is nearer than beside
    assert [(s.num_steps, s.objective, s.num_particles) for s in (first, second)] == [(11, "iwae", 50), (11, "elbo", 3)]
    assert (em.num_steps, em.e_step.name, em.e_step.num_samples) == (7, "nuts", 9)
    # what a table prints is what can be written
    again = configure("conjugate_gaussian", ",".join(engines), ",".join(learners), [])
    assert again[1:] == (engines, learners)
    # neither alone would do
    asleep = ["wake_sleep.wake_phi=false", "wake_sleep.sleep_phi=true"]
    beside = configure("vae", "", "wake_sleep", asleep)[2]
    assert beside == configure("vae", "", "wake_sleep(wake_phi=false,sleep_phi=true)", [])[2]
    (one,) = beside.values()
    assert (one.wake_phi, one.sleep_phi) == (False, True)


def test_ctrl_c_prints_what_is_ready_and_exits_130(tmp_path, monkeypatch):
    from pyrometer.benchmarks import comparison

    real = comparison.infer

    def interrupted(problem, engine, **more):
        if engine.name == "svi":
            raise KeyboardInterrupt
        return real(problem, engine, **more)

    monkeypatch.setattr(comparison, "infer", interrupted)
    path = tmp_path / "out.json"
    engines = ["--engines", "importance,svi,nuts", "--set", "importance.num_samples=50", "--json", path]
    done = run("compare", "conjugate_gaussian", "--set", "num_data=5", *engines)
    assert done.exit_code == 130
    assert "ended early" in done.stdout
    assert "interrupted" in done.stderr
    read = json.loads(path.read_text())
    assert read["complete"] is False
    assert [row["engine"] for row in read["rows"]] == ["importance_sampling(num_samples=50)"]


def test_an_unforeseen_error_loses_no_rows(tmp_path, monkeypatch):
    from pyrometer.benchmarks import comparison

    real = comparison.infer

    def broken(problem, engine, **more):
        if engine.name == "svi":
            raise ArithmeticError("a bug of ours")
        return real(problem, engine, **more)

    monkeypatch.setattr(comparison, "infer", broken)
    engines = ["--engines", "importance,svi", "--set", "importance.num_samples=50"]
    done = run("compare", "conjugate_gaussian", "--set", "num_data=5", *engines)
    assert isinstance(done.exception, ArithmeticError)
    assert "ended early" in done.stdout
    assert "importance_sampling" in done.stdout


def test_output_survives_a_terminal_without_unicode():
    done = in_a_process("compare", "conjugate_gaussian", *QUICK, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "+-" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120
    assert done.stderr == ""


@pytest.mark.parametrize("language", ["C", pytest.param("de_DE.UTF-8", marks=pytest.mark.slow)])
def test_a_run_needs_no_home_no_language_and_no_plain_path(language, tmp_path):
    """No terminal, a home that is not there, a folder with blanks and umlauts, a relative path, and a language of
    seven bits or of decimal commas."""
    folder = tmp_path / "a folder of Müller's"
    folder.mkdir()
    named = {"HOME": str(tmp_path / "no home"), "XDG_CACHE_HOME": "", "LC_ALL": language, "LANG": language}
    done = subprocess.run(
        [sys.executable, "-m", "pyrometer.benchmarks", "compare", "conjugate_gaussian", *QUICK, "--json", "é.json"],
        capture_output=True, text=True, check=False, cwd=folder, stdin=subprocess.DEVNULL,
        env={**os.environ, **named}, encoding="utf-8", errors="replace",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (written,) = folder.iterdir()
    read = json.loads(written.read_text(encoding="utf-8"))
    assert read["rows"][0]["status"]["state"] == "done"
    assert not re.search(r"\d,\d", done.stdout)


def test_a_record_that_cannot_be_written_is_kept_elsewhere(tmp_path, monkeypatch):
    """The disk of the file named is full; that of temporary files is not."""
    from pyrometer.benchmarks import tabled

    real = tabled.whole

    def whole(path):
        if path.parent == tmp_path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path)

    monkeypatch.setattr(tabled, "whole", whole)
    done = run("compare", "conjugate_gaussian", *QUICK, "--json", tmp_path / "out.json")
    assert done.exit_code == 2
    assert "truth (exact)" in done.stdout
    (line,) = done.stderr.strip().splitlines()
    path = Path(re.search(r"No space left on device; everything is in (\S+) instead\.$", line)[1])
    assert json.loads(path.read_text())["complete"] is True
    assert list(tmp_path.iterdir()) == []
    shutil.rmtree(path.parent)


@pytest.mark.parametrize("command", [["compare", "vae"], ["square", "vae", "--learn", "svi"], ["demo"], ["speed"]])
def test_a_folder_that_cannot_be_written_is_told_before_the_work(command, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    done = run(*command, "--json", tmp_path / "out.json")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "cannot be written" in done.stderr


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no full device here")
def test_what_standard_output_does_not_take_is_on_standard_error():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "pyrometer.benchmarks", "list"],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 2
    *shown, last = done.stderr.strip().splitlines()
    assert last == "Error: standard output: No space left on device."
    assert shown
    assert "Traceback" not in done.stderr


def test_a_reader_that_has_gone_costs_no_record(tmp_path):
    """`pyrometer ... --json out.json | true`"""
    path = tmp_path / "out.json"
    child = subprocess.Popen(
        [sys.executable, "-m", "pyrometer.benchmarks", "compare", "conjugate_gaussian", *QUICK, "--json", str(path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with child:
        child.stdout.close()
        assert child.stderr.read() == ""
    assert json.loads(path.read_text())["complete"] is True


@pytest.mark.parametrize("swallowed", [False, True])
def test_sigterm_ends_as_ctrl_c_does(swallowed, tmp_path, monkeypatch):
    """Also where a library that is being imported makes an ImportError of it."""
    from pyrometer.benchmarks import comparison

    before = signal.getsignal(signal.SIGTERM)

    def ended(problem, engine, **more):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except KeyboardInterrupt:
            if not swallowed:
                raise
        return real(problem, engine, **more)

    def broken(*arguments, **more):
        raise ImportError("cannot load module more than once per process")

    real = broken if swallowed else comparison.infer
    monkeypatch.setattr(comparison, "infer", ended)
    done = run("compare", "conjugate_gaussian", *QUICK)
    assert done.exit_code == 130
    assert done.stderr == "interrupted\n"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("command", ["calibrate", "bench"])
def test_draws_that_ctrl_c_cut_short_are_no_result_of_many(command, tmp_path, monkeypatch):
    """An engine keeps the draws it has; what runs it again and again has to end all the same."""
    from pyrometer.benchmarks import calibrate, task
    from pyrometer.inference import engine as harness

    module = {"calibrate": calibrate, "bench": task}[command]
    real, calls = harness.infer, []

    def infer(problem, method, **more):
        calls.append(1)
        posterior = real(problem, method, **more)
        if len(calls) < 2:
            return posterior
        words = replace(posterior.diagnostics, notes=("interrupted: 5 of 9 draws of each are there",))
        return replace(posterior, diagnostics=words)

    monkeypatch.setattr(module, "infer", infer)
    out = tmp_path / "runs"
    words = {
        "calibrate": ["gamma_poisson", "importance", "--replicates", "2000"],
        "bench": ["smoke", "--models", "conjugate_gaussian", "--backend", "in-process", "--out", out],
    }
    done = run(command, *words[command])
    assert (done.exit_code, done.stderr) == (130, "interrupted\n")
    assert len(calls) == 2
    if command == "calibrate":
        assert "undecided, interrupted after 1000 of 2000 replicates of round 1; the smallest p" in done.stdout
    if command == "bench":
        assert len(list(out.glob("*/record.json"))) == 1


def test_list_describes_every_model_engine_and_learner():
    from pyrometer.inference.registry import engines, learners
    from pyrometer.models import families

    done = run("list")
    assert done.exit_code == 0, done.output
    described = {line.split()[0]: line.split()[1:] for line in done.output.splitlines() if line.startswith("  ")}
    for name in (*families(), *engines(), *learners()):
        assert described[name], f"{name} has no description"


def test_doctor_checks_a_known_answer():
    done = run("doctor")
    assert done.exit_code == 0, done.output
    assert "passed" in done.output
    assert "torch" in done.output


def test_doctor_fails_where_the_answer_is_wrong(monkeypatch):
    from dataclasses import replace

    from pyrometer.benchmarks import doctor
    from pyrometer.inference.posterior import Evidence

    real = doctor.infer

    def wrong(*arguments, **more):
        posterior = real(*arguments, **more)
        evidence = posterior.log_evidence
        if evidence is None:
            return posterior
        return replace(posterior, log_evidence=Evidence(evidence.value + 0.1, evidence.std_error, "estimate"))

    monkeypatch.setattr(doctor, "infer", wrong)
    done = run("doctor")
    assert done.exit_code == 1
    assert "FAILED" in done.output


def test_the_cache_is_shown_and_cleared(tmp_path, monkeypatch):
    monkeypatch.setenv("PYROMETER_CACHE", str(tmp_path))
    kept = tmp_path / "native" / "abc-def.so"
    kept.parent.mkdir(mode=0o700)
    kept.write_bytes(b"x" * 2**20)
    assert "1 densities, 1.0 of 256 MB" in run("cache").output
    assert kept.exists()
    cleared = run("cache", "--clear").output
    assert "deleted 1 compiled densities, 1.0 MB" in cleared
    assert "0 densities, 0.0 of 256 MB" in cleared
    assert not kept.exists()


def test_doctor_says_how_densities_run(monkeypatch, tmp_path):
    monkeypatch.setenv("PYROMETER_CACHE", str(tmp_path))
    output = " ".join(run("doctor").output.split())
    assert "densities native (made in" in output
    assert re.search(r"compiled code \d densities, 0\.\d of 256 MB in ", output)


WIDTHS = (110, 100, 90, 80, 60, 40)
NUMBER = re.compile(r"(?<![\w.-])-?\d+(?:\.\d+)?(?:e[-+]\d+)?[kMG]?(?![\w.-])")


def printed(shown, width):
    buffer = io.StringIO()
    Console(file=buffer, width=width).print(shown)
    return buffer.getvalue()


def assert_whole_at_all_widths(shown, names):
    wide = set(NUMBER.findall(printed(shown, 120)))
    assert len(wide) > 5
    for width in WIDTHS:
        narrow = printed(shown, width)
        assert max(map(len, narrow.splitlines())) <= width
        assert wide <= set(NUMBER.findall(narrow)), width
        unbroken = "".join(narrow.split())
        assert all("".join(name.split()) in unbroken for name in names if width <= 60), width


def test_no_number_is_broken_on_a_narrow_terminal():
    """What '2.06k' is in 120 columns is not '2.06' over 'k' in 60: rows become paragraphs."""
    from pyrometer.benchmarks import compare
    from pyrometer.inference import Enumeration, ImportanceSampling
    from pyrometer.models import conjugate_gaussian

    engines = [ImportanceSampling(num_samples=1234, proposal="prior"), Enumeration()]
    shown = compare(conjugate_gaussian.problem(num_data=5), engines, learn="em")
    assert_whole_at_all_widths(shown, [row.engine for row in shown.rows] + ["truth (exact)", "evaluations 1.23k"])


def test_no_number_of_a_calibration_is_broken_on_a_narrow_terminal():
    from pyrometer.benchmarks.calibrate import calibrate
    from pyrometer.inference import ImportanceSampling
    from pyrometer.models import conjugate_gaussian

    shown = calibrate(conjugate_gaussian.problem(num_data=5), ImportanceSampling(num_samples=300), replicates=100)
    assert_whole_at_all_widths(shown, [quantity.name for quantity in shown.quantities])
