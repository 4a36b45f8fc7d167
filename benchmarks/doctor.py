"""Whether this installation can be trusted: what it consists of, and a known answer worked out again."""

from __future__ import annotations

import time
from typing import Any

from pyrometer.inference import NUTS, ImportanceSampling, infer
from pyrometer.inference.native.toolchain import SIZE_LIMIT, cache_folder, compiler, entries
from pyrometer.models import conjugate_gaussian

from .facts import machine, versions


def examined() -> tuple[dict[str, Any], bool]:
    """Facts by name, and whether importance sampling finds the evidence of a model that has it in closed form."""
    found = compiler()
    problem = conjugate_gaussian.problem(num_data=20)
    start = time.perf_counter()
    posterior = infer(problem, ImportanceSampling(proposal="prior", num_samples=2000), seed=0)
    seconds = time.perf_counter() - start
    truth = problem.reference_at(posterior.parameters).log_evidence
    if posterior.log_evidence is None or truth is None:
        return {"self-test": f"FAILED: no evidence to compare; {posterior.status}"}, False
    value, error = posterior.log_evidence.total()
    exact = truth.total()[0]
    # |z| > 4.9 happens by chance once in a million; the error bar must be small as well, or anything passes.
    passed = abs(value - exact) < 4.9 * error and error < 0.5
    compiled = infer(problem, NUTS(num_samples=10, warmup_steps=10, num_chains=1), seed=0).cost
    facts = {**versions(), **machine(), "compiler": f"{found.path} ({found.version})" if found else "none found"}
    facts["densities"] = f"{compiled.backend} (made in {compiled.compile_seconds:.2f} s)"
    facts["compiled code"] = kept()
    facts["self-test"] = (
        f"{'passed' if passed else 'FAILED'}: log evidence {value:.3f} +- {error:.3f} by importance sampling, "
        f"{exact:.3f} exactly ({seconds:.1f} s)"
    )
    return facts, passed


def kept() -> str:
    """What the disk cache of compiled densities holds, in words."""
    folder = cache_folder()
    if folder is None:
        return "not kept: no folder is this user's alone (PYROMETER_CACHE names one)"
    found = entries()
    size = sum(entry.size for entry in found)
    return f"{len(found)} densities, {size / 2**20:.1f} of {SIZE_LIMIT // 2**20} MB in {folder}"
