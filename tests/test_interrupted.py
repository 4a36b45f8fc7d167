"""Ctrl-C while chains of many data are sampled: what is there is kept, and only that."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from test_lanes import conjugate, narrow

from pyrometer.inference import EM, HMC, NUTS, SMC, AnnealedImportance, RandomWalk, infer, learn
from pyrometer.inference.recorded import Record
from pyrometer.models import conjugate_gaussian

ENGINES = {
    "nuts": NUTS(num_samples=30, warmup_steps=20, num_chains=3),
    "hmc": HMC(num_samples=30, warmup_steps=20, num_chains=3),
    "random walk": RandomWalk(num_samples=30, warmup_steps=20, num_chains=3),
}
DATA = 40


@pytest.fixture(params=["together", "in blocks"])
def blocks(request, monkeypatch):
    """All 120 lanes side by side, or 48 at a time."""
    if request.param == "in blocks":
        narrow(monkeypatch)
    return request.param


def pressing(monkeypatch, share):
    """Ctrl-C once so large a share of the draws is written, in the middle of the next. Answers a list of the number of
    draws, (C, N), that are there then."""
    plain, there = Record.write, []

    def write(record, ids, draw, u, **figures):
        if not there and float(record.drawn.double().mean()) >= share * record.positions.shape[1]:
            there.append(record.drawn.reshape(record.positions.shape[0], -1).clone())
            record.positions[ids // DATA, draw, ids % DATA] = torch.nan  # half of it
            raise KeyboardInterrupt
        plain(record, ids, draw, u, **figures)

    monkeypatch.setattr(Record, "write", write)
    return there


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", ENGINES)
def test_what_is_kept_are_the_draws_of_the_whole_run(name, share, blocks, monkeypatch):
    """Bit for bit: of the chains and lengths that all data have, those that together are most; none where there are
    none. `state` is that of the last draw which is kept."""
    problem, *_ = conjugate(DATA)
    whole = infer(problem, ENGINES[name], seed=5)
    there = pressing(monkeypatch, share)
    try:
        cut = infer(problem, ENGINES[name], seed=5)
    except KeyboardInterrupt:
        assert int(there[0].amin(1).max()) == 0
        return
    each = there[0].amin(1)
    most = max(int(n) * int((each >= n).sum()) for n in each)
    told = re.search(r"interrupted: (\d of 3 chains, |)(\d+) of 30 draws of each", cut.diagnostics.verdict)
    assert told
    chains, length = int((told[1] or "3")[0]), int(told[2])
    kept = each >= length
    assert cut.status.done
    assert (cut.num_chains, cut.num_samples) == (chains, length)
    assert 0 < chains * length == most < 90
    assert chains == int(kept.sum())
    assert torch.equal(cut.draws["z"], whole.draws["z"][kept, :length])
    for figure, value in cut.sample_stats.items():
        assert torch.equal(value, whole.sample_stats[figure][kept, :length])
    for setting in ("step_size", "inverse_mass"):
        assert torch.equal(cut.state[setting], whole.state[setting][kept])
    assert torch.equal(cut.state["position"][..., 0], cut.draws["z"][:, -1])
    assert 0 < cut.cost.gradients + cut.cost.evaluations < whole.cost.gradients + whole.cost.evaluations


@pytest.mark.parametrize("name", ENGINES)
def test_without_a_draw_of_all_data_there_is_no_answer(name, monkeypatch):
    problem, *_ = conjugate(DATA)
    pressing(monkeypatch, 0.0)
    with pytest.raises(KeyboardInterrupt):
        infer(problem, ENGINES[name])


@pytest.mark.parametrize("name", ENGINES)
def test_an_e_step_that_is_interrupted_ends_the_learning(name, monkeypatch):
    problem = conjugate_gaussian.problem(num_data=DATA)
    there = pressing(monkeypatch, 0.9)
    with pytest.raises(KeyboardInterrupt):
        learn(problem, EM(e_step=ENGINES[name], num_steps=2))
    assert int(there[0].amin(1).max()) > 0  # alone it would have been an answer


@pytest.mark.parametrize("engine", [AnnealedImportance(num_samples=16, num_temperatures=10), SMC(num_samples=50)])
def test_half_a_path_is_no_estimate(engine, monkeypatch):
    """Particles that have not arrived say nothing about the posterior, nor do data that have about those that have not.
    Nothing is left behind: the next run answers as if there had been none."""
    problem, *_ = conjugate(DATA)
    before = infer(problem, engine, seed=1)
    state = torch.random.get_rng_state()

    def press(stage, step, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        infer(problem, engine, seed=1, progress=press)
    assert torch.equal(state, torch.random.get_rng_state())
    after = infer(problem, engine, seed=1)
    assert torch.equal(before.log_evidence.value, after.log_evidence.value)


SCRIPT = """
    import signal, sys
    import pyro, pyro.distributions as dist, torch
    from pyrometer.inference import HMC, NUTS, Problem, infer
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    engine = ENGINE(num_samples=300_000, warmup_steps=20, num_chains=2)
    counted = []

    def tell(stage, step, total):
        counted.append(step)
        if len(counted) == 100:
            print("drawing", flush=True)

    if ENGINE is NUTS:  # its chains tell of themselves when they are complete
        from pyrometer.inference.recorded import Record
        plain = Record.write
        Record.write = lambda *args, **more: (tell("", 0, 0), plain(*args, **more))[1]
    posterior = infer(Problem(model, args=(torch.zeros(5),)), engine, progress=tell)
    print(posterior.status, posterior.num_chains, posterior.num_samples, posterior.diagnostics.verdict)
"""


@pytest.mark.parametrize("engine", ["HMC", "NUTS"])
def test_a_signal_from_outside_does_the_same(engine):
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT).replace("ENGINE", engine)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert child.stdout.readline() == "drawing\n"
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=120)
    finally:
        child.kill()
    assert child.returncode == 0, err
    state, chains, draws, *_ = out.split()
    assert state == "done"
    assert 1 <= int(draws) < 300_000
    part = "" if chains == "2" else "1 of 2 chains, "
    assert f"interrupted: {part}{draws} of 300000 draws of each are there" in out
