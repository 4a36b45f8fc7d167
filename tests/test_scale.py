"""Up to a hundred thousand data: cost in proportion, memory that of the answer and a constant."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from pyrometer.inference.batching import over_draws

SCRIPT = """
    import json, resource, sys, time
    import pyro, pyro.distributions as dist, torch
    from pyrometer.inference import HMC, NUTS, SMC, AnnealedImportance, ImportanceSampling, Problem, RandomWalk, infer

    torch.set_num_threads(1)

    def model(x, w):  # 5 latents and 8 pixels of each datum
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(5), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ w, 1.0).to_event(1), obs=x)

    def problem(n):
        g = torch.Generator().manual_seed(0)
        w, z = torch.randn(5, 8, generator=g).double(), torch.randn(n, 5, generator=g).double()
        return Problem(model, args=(z @ w + torch.randn(n, 8, generator=g), w))

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    engine, small, many = ENGINE, problem(SMALL), problem(MANY)
    infer(small, engine, seed=1)  # all that is loaded and compiled once
    began, before = time.process_time(), peak()
    posterior = infer(many, engine, seed=1)
    seconds, more = time.process_time() - began, peak() - before
    assert posterior.status.done, posterior.status
    tensors = [*posterior.draws.values(), *posterior.sample_stats.values(), *posterior.state.values()]
    tensors += [t for t in posterior.diagnostics.figures.values() if isinstance(t, torch.Tensor)]
    tensors += [] if posterior.log_weights is None else [posterior.log_weights]
    stored = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
    print(json.dumps({"seconds": seconds, "more": more, "answer": sum(stored.values()) / 2**20}))
"""
LITTLE = 400  # MB beside the answer and its copies, whatever the data
SMALL = 2_000  # data: more than stand side by side

ENGINES = {
    "hmc": ("HMC(num_samples=10, warmup_steps=10, num_chains=2)", 100_000),
    "random walk": ("RandomWalk(num_samples=10, warmup_steps=10, num_chains=2)", 100_000),
    "nuts": ("NUTS(num_samples=5, warmup_steps=5, num_chains=2)", 100_000),
    "importance": ("ImportanceSampling(num_samples=20, proposal='prior')", 100_000),
    "annealed": (
        "AnnealedImportance(num_samples=16, num_temperatures=4, schedule='linear', kernel='langevin')",
        100_000,
    ),
    "smc": ("SMC(num_samples=16, num_temperatures=3, num_moves=1)", 100_000),
}


def measured(engine, data):
    script = textwrap.dedent(SCRIPT)
    for name, value in {"ENGINE": engine, "SMALL": str(SMALL), "MANY": str(data)}.items():
        script = script.replace(name, value)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
def test_cost_is_in_proportion_and_memory_that_of_the_answer(name):
    """From half the data to all of them: processor time in proportion, within a half, and memory three times what the
    answer itself takes (the draws in both spaces, and a copy of one of them) and a constant. The same work by a Python
    loop over data, or all data's gradients held at once, would be ten times beyond."""
    engine, data = ENGINES[name]
    half, whole = measured(engine, data // 2), measured(engine, data)
    print(name, half, whole)
    assert whole["seconds"] / half["seconds"] < 3.0
    assert whole["more"] < 3 * whole["answer"] + LITTLE


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("count", [6, 7, 3])
def test_pieces_are_the_whole(count, compiled):
    """Rows in order, the last piece shorter; compiled or not; and every draw's random numbers its own."""

    def function(row):
        return {"twice": 2 * row, "pair": (row.sum(), torch.rand(3))}

    rows, seen = torch.arange(2.0 * count).reshape(count, 2), []

    def compile(flat, examples):
        seen.append(examples)
        return flat

    with torch.no_grad(), torch.random.fork_rng():
        found = over_draws(
            function, rows, count, vectorised=True, chunk=2, random=True, compile=compile if compiled else None
        )
    assert torch.equal(found["twice"], 2 * rows)
    assert torch.equal(found["pair"][0], rows.sum(1))
    assert len(found["pair"][1].unique()) == 3 * count
    assert len(seen) == (compiled and count > 4)
