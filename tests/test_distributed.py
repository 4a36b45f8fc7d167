"""The same learner on two processes: equal parameters on both, and the gradient of all rows."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from pyrometer.inference import ML, SVI, Problem, learn
from pyrometer.models import ppca

SCRIPT = """
import json, sys, torch, pyro
import pyro.distributions as dist
from torch import distributed
sys.path.insert(0, sys.argv[1])
from test_distributed import observed, LEARNERS, PROBLEMS
from pyrometer.inference import learn, ProblemError
from pyrometer.inference.distributed import own_noise

distributed.init_process_group("gloo")
rank = distributed.get_rank()
found = {}
for name, (problem, learner) in LEARNERS.items():
    fit = learn(PROBLEMS[problem](), learner, seed=3)
    found[name] = {
        "status": str(fit.status), "theta": {n: v.flatten().tolist() for n, v in fit.parameters.items()},
        "objective": fit.trail.value.tolist(), "evaluations": fit.cost.evaluations, "gradients": fit.cost.gradients,
    }
torch.manual_seed(5)
with own_noise() as common:
    inside = torch.rand(3).tolist(), torch.rand(3, generator=common).tolist()
found["noise"] = {"own": inside[0], "common": inside[1], "after": torch.rand(3).tolist()}
try:
    learn(PROBLEMS["observed"](), LEARNERS["few rows"][1].__class__(batch_size=1, num_steps=3), seed=0)
except ProblemError as error:
    found["error"] = str(error)
with open(f"{sys.argv[2]}/{rank}.json", "w") as file:
    json.dump(found, file)
distributed.destroy_process_group()
"""


def observed() -> Problem:
    """x ~ N(mean, sd), nothing latent: 21 rows, which two processes cannot halve."""
    import pyro
    import pyro.distributions as dist

    def model(x):
        mean = pyro.param("mean", lambda: torch.zeros((), dtype=torch.float64))
        sd = pyro.param("sd", lambda: torch.ones((), dtype=torch.float64), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, sd), obs=x)

    return Problem(model, args=(torch.linspace(-1, 3, 21, dtype=torch.float64),))


PROBLEMS = {"observed": observed, "ppca": lambda: ppca.problem(num_data=60)}
LEARNERS = {
    "all rows": ("observed", ML(optimizer=torch.optim.Adam, num_steps=40, learning_rate=0.1)),
    "few rows": ("observed", ML(batch_size=4, num_steps=30)),
    "guide": ("ppca", SVI(num_steps=300, batch_size=20, learning_rate=0.02)),
}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What both processes found."""
    folder = tmp_path_factory.mktemp("two")
    script = folder / "learner.py"
    script.write_text(SCRIPT)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    answer = subprocess.run(
        [*run, __file__.rpartition("/")[0], str(folder)], capture_output=True, text=True, timeout=300
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", LEARNERS)
def test_both_processes_hold_the_same_parameters(two, name):
    first, second = (found[name] for found in two)
    assert first["status"] == "done"
    assert first["theta"] == second["theta"]
    assert first["objective"] == second["objective"]


def test_gradients_are_those_of_all_rows(two):
    """Without noise the processes do together what one does alone, to rounding, each with its share of the cost."""
    for name in ("all rows", "few rows"):
        problem, learner = LEARNERS[name]
        alone = learn(PROBLEMS[problem](), learner, seed=3)
        torch.testing.assert_close(torch.tensor(two[0][name]["objective"], dtype=torch.float64), alone.trail.value)
        for parameter, value in alone.parameters.items():
            torch.testing.assert_close(
                torch.tensor(two[0][name]["theta"][parameter], dtype=value.dtype), value.flatten(), rtol=1e-9, atol=1e-9
            )
    gradients = [found["all rows"]["gradients"] for found in two]
    assert gradients == [pytest.approx(40 * 11 / 21), pytest.approx(40 * 10 / 21)]


def test_a_guide_learned_by_two_is_as_good_as_by_one(two):
    """Last ELBOs of 60 data, in nats: those of six seeds lay within 2; a sum for an average would double them."""
    alone = learn(PROBLEMS["ppca"](), LEARNERS["guide"][1], seed=4).trail.value[-50:].mean()
    together = torch.tensor(two[0]["guide"]["objective"])[-50:].mean()
    assert abs(float(alone - together)) < 8, (alone, together)


def test_noise_is_each_ones_own_and_what_all_need_alike_is_alike(two):
    first, second = (found["noise"] for found in two)
    assert first["own"] != second["own"]
    assert first["common"] == second["common"]
    assert first["after"] == second["after"]


def test_rows_that_cannot_be_shared_are_refused(two):
    assert all("2 processes cannot share 1 rows" in found["error"] for found in two)
