"""Posteriors on disk: files come back whole, to the last bit, or not at all."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import pickle
import random
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from pyrometer.inference import storage
from pyrometer.inference.diagnostics import Diagnostics
from pyrometer.inference.posterior import Cost, Evidence, Posterior, Status
from pyrometer.inference.problem import Problem

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # arviz announces its next version at import
    import xarray


@pytest.mark.parametrize("kind", ["a pipe", "standard output"])
def test_what_is_no_file_is_written_to_and_not_replaced(kind, tmp_path):
    """A rename would put a file where a device was: as root even /dev/null. What redirected output has so far stays."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    path = pipe if kind == "a pipe" else Path("/dev/fd/1")
    program = (
        "import sys; from pathlib import Path; from pyrometer.inference.storage import whole; "
        "print('before', flush=True)\nwith whole(Path(sys.argv[1])) as file: file.write(b'all of it')"
    )
    with open(tmp_path / "out", "wb") as out:
        child = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=out)
        assert child.wait(60) == 0
    assert os.read(reader, 100) == (b"all of it" if kind == "a pipe" else b"")
    os.close(reader)
    assert (tmp_path / "out").read_text() == "before\n" + ("all of it" if kind != "a pipe" else "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "pipe"]
    assert pipe.is_fifo()


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rich_posterior():
    """Everything that a posterior can hold."""
    bound = Evidence(torch.tensor([-1.0, -math.inf]), torch.tensor([0.1, math.nan]), "lower bound")
    return Posterior(
        draws={
            "z": randn(2, 6, 2, 3).float(),
            "k": torch.randint(0, 5, (2, 6, 2), generator=torch.Generator().manual_seed(0)),
            "on": randn(2, 6, 2) > 0,
            "w": randn(2, 6, 2),
        },
        log_weights=torch.cat([randn(2, 5, 2), torch.full((2, 1, 2), -math.inf, dtype=torch.float64)], 1),
        log_evidence=dataclasses.replace(bound, refined=Evidence(randn(2), randn(2).abs(), "estimate")),
        parameters={"decoder.0.weight": randn(3, 4).float(), "scale": torch.tensor(0.1)},
        diagnostics=Diagnostics(
            {"r_hat": math.nan, "k_hat": -math.inf, "n": 3, "per_datum": randn(2)},
            "caution",
            "R-hat is nan",
            ("a", "b"),
        ),
        cost=Cost(1.5, 2.5, 0.5, 0.25, 0.1 + 0.2, 1e-9, 0.0, 2**40, "eager"),
        status=Status("timed out", "after 5 s; größer"),
        state={"step_size": torch.tensor(0.1), "rng": torch.arange(5, dtype=torch.uint8), "empty": torch.zeros(0, 3)},
        kind="weighted",
        sample_stats={"lp": randn(2, 6, 2), "diverging": torch.zeros(2, 6, dtype=torch.bool)},
        batch_shape=(2,),
        engine="ImportanceSampling",
        engine_options={"num_samples": 6, "proposal": "prior", "sizes": [1, 2], "nested": {"x": math.inf}, "no": None},
        seed=2**63,
    )


def same(a, b):
    """Equal to the last bit, in type and order, nan equal to nan."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5))
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


def test_what_is_saved_comes_back(tmp_path):
    posterior = rich_posterior()
    path = posterior.save(tmp_path / "größe 1.nc")
    assert path == tmp_path / "größe 1.nc"
    assert same(Posterior.load(str(path)), posterior)
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("state", ["failed", "unsupported"])
def test_a_run_without_draws_is_saved_too(state, tmp_path):
    for draws in ({}, {"z": torch.zeros(1, 0, 3)}):
        posterior = Posterior(draws, status=Status(state, "needs a guide"), engine_options={"at": (1, 2)})
        back = Posterior.load(posterior.save(tmp_path / "run.nc"))
        assert back.engine_options == {"at": [1, 2]}  # JSON has no tuples
        assert same(dataclasses.replace(back, engine_options={}), dataclasses.replace(posterior, engine_options={}))


def test_any_name_comes_back(tmp_path):
    names = [
        "a/b",
        "a%2Fb",
        ".",
        "..",
        "",
        " ",
        "chain",
        "draws",
        "mu:0",
        "größe",
        "module$$$net.0.weight",
        "/",
        "%.",
        "\n",
    ]
    tensors = {name: torch.full((1, 2), float(i)) for i, name in enumerate(names)}
    posterior = Posterior(tensors, parameters=tensors, sample_stats=tensors, state=tensors)
    assert same(Posterior.load(posterior.save(tmp_path / "names.nc")), posterior)


def test_the_problem_is_not_saved_and_unwritable_options_become_words(tmp_path):
    posterior = Posterior(
        {"z": torch.zeros(1, 3)},
        parameters={"w": torch.nn.Parameter(torch.ones(2))},
        engine_options={"kernel": rich_posterior, "step_size": math.nan},
        problem=Problem(rich_posterior),
    )
    back = Posterior.load(posterior.save(tmp_path / "a.nc"))
    assert back.problem is None
    assert "rich_posterior" in back.engine_options["kernel"]
    assert math.isnan(back.engine_options["step_size"])
    assert not back.parameters["w"].requires_grad


def test_a_large_header_is_saved(tmp_path):
    posterior = Posterior({"z": torch.zeros(1, 1)}, diagnostics=Diagnostics(notes=("n" * 300_000,)))
    assert Posterior.load(posterior.save(tmp_path / "a.nc")).diagnostics.notes == posterior.diagnostics.notes


def test_other_readers_of_netcdf_can_read_the_file(tmp_path):
    posterior = rich_posterior()
    tree = xarray.open_datatree(posterior.save(tmp_path / "a.nc"), engine="h5netcdf")
    try:
        np.testing.assert_array_equal(tree["draws"]["z"].values, posterior.draws["z"].numpy())
        np.testing.assert_array_equal(tree["log_weights"]["log_weights"].values, posterior.log_weights.numpy())
        assert json.loads(tree.attrs["pyrometer"])["status"]["state"] == "timed out"
    finally:
        tree.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return rich_posterior().save(tmp_path_factory.mktemp("saved") / "whole.nc").read_bytes()


def refused(path, content):
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not a saved posterior, or cut or changed") as caught:
        Posterior.load(path)
    return str(path) in str(caught.value)


def test_a_file_cut_anywhere_is_refused(saved, tmp_path):
    cuts = {0, 1, 8, 58, 59, 60, len(saved) - 60, len(saved) - 59, len(saved) - 32, len(saved) - 1}
    for end in sorted(cuts | set(np.linspace(0, len(saved) - 1, 30).astype(int))):
        assert refused(tmp_path / "cut.nc", saved[:end])
    assert refused(tmp_path / "long.nc", saved + b"\0")


def test_a_file_with_one_bit_flipped_is_refused(saved, tmp_path):
    draw = random.Random(0)
    for place in [0, len(saved) - 1, len(saved) - 40, *draw.choices(range(len(saved)), k=200)]:
        changed = bytearray(saved)
        changed[place] ^= 1 << draw.randrange(8)
        assert refused(tmp_path / "flipped.nc", bytes(changed))


class Canary:
    def __reduce__(self):
        return (open, ("canary", "w"))


def test_foreign_files_are_refused_and_nothing_in_them_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = io.BytesIO()
    torch.save({"draws": torch.zeros(3)}, other)
    for content in (b"", b"hello", b"\0" * 1000, pickle.dumps(Canary()), other.getvalue()):
        assert refused(Path("foreign.nc"), content)
    xarray.Dataset({"z": ("chain", [1.0, 2.0])}).to_netcdf("other.nc", engine="h5netcdf")
    assert refused(Path("copy.nc"), Path("other.nc").read_bytes())
    assert not Path("canary").exists()
    with pytest.raises(FileNotFoundError):
        Posterior.load("nothing.nc")


def test_another_schema_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "SCHEMA", 2)
    path = rich_posterior().save(tmp_path / "a.nc")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"a\.nc: written with schema 2 .* reads schema 1"):
        Posterior.load(path)


@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(step, tmp_path, monkeypatch):
    old = Posterior({"z": torch.ones(1, 3)})
    path = old.save(tmp_path / "a.nc")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space left"):
        rich_posterior().save(path)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["a.nc"]
    assert same(Posterior.load(path), old)
    rich_posterior().save(path)
    assert same(Posterior.load(path), rich_posterior())


def test_what_cannot_be_saved_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"state 'm' has dtype torch\.bfloat16, which netCDF cannot hold"):
        Posterior({"z": torch.zeros(1, 1)}, state={"m": torch.zeros(2, dtype=torch.bfloat16)}).save(tmp_path / "a.nc")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        rich_posterior().save(tmp_path / "no" / "a.nc")
    assert os.listdir(tmp_path) == []
