"""NUTS by nutpie: chains in Rust, one thread each, on the cores there are.

Every chain is a sampler of its own, with its own seed and start, so that its draws do not depend on the cores. It
calls one C function for the log density and its gradient: machine code where the density has been compiled, else a
callback into Python, chain after chain, since Pyro's handlers are global.

A warm start keeps step size and mass matrix. nutpie has a setting for a fixed step size; its mass matrix starts at
1 / |gradient| at the first point and moves only in warm-up, of which it insists on one draw, too few to move it. So
the first call, which serves that and nothing else, is answered with a gradient of 1 / (inverse mass). In machine code
a few lines of C stand in between, which also count the calls.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .chains import Chain, ChainPlan, Tuning, cut_alike
from .compile import Compiled
from .density import Density
from .engine import EngineError, Run
from .native import toolchain
from .nutpie_private import LOG_DENSITY, LogDensity, collect, launch

NOT_FINITE = 1  # what a log density answers where it has no value: the trajectory diverges there
POLL = 0.05  # seconds
COUNTED = """
#include <stdint.h>
#include <string.h>
struct counted {
  int64_t (*density)(uint64_t, double*, double*, double*, void*);
  void* user;
  double* first;  /* the gradient that the first call is answered with, or null */
  int64_t calls;  /* the others */
};
int64_t pyrometer_counted(uint64_t dim, double* x, double* gradient, double* value, void* user) {
  struct counted* c = user;
  if (!c->first) {
    c->calls++;
    return c->density(dim, x, gradient, value, c->user);
  }
  memcpy(gradient, c->first, dim * sizeof(double));
  c->first = 0;
  *value = 0.0;
  return 0;
}
"""


def sample(
    density: Density, compiled: Compiled, starts: Tensor, tuned: Tuning | None, run: Run, plan: ChainPlan
) -> list[Chain]:
    """Run a chain from each of `starts` (C, *batch, D), with what was tuned before or after a warm-up.

    compiled  value and gradient of the log density, by a pointer if it is machine code, else called from Python
    On Ctrl-C what is there is returned, if any chain has a draw after its warm-up and the run stands alone.
    Raises `EngineError` where nutpie gives up, and whatever the density raises.
    """
    runner = _Runner(density, compiled, starts[0], plan, tuned, run)
    before, began = density.counts["gradients"], time.perf_counter()
    chains = runner.run_all(starts if tuned else _off_the_flat(runner.value_and_grad, starts))
    density.counts["gradients"] += sum(counted.calls for counted in runner.counted)
    kept, length = cut_alike(chains)
    total = density.counts["gradients"] - before
    drawing = sum(int(chain.stats["n_steps"][:length].sum()) for chain in kept)
    run.tuning_counts["gradients"] += total - drawing
    run.tuning_seconds += (time.perf_counter() - began) * (1 - drawing / max(total, 1))
    return chains


class _Runner:
    """The chains of one run: their threads, what they report, and what stops them."""

    def __init__(
        self, density: Density, compiled: Compiled, start: Tensor, plan: ChainPlan, tuned: Tuning | None, run: Run
    ) -> None:
        self.density, self.compiled, self.plan, self.tuned, self.run = density, compiled, plan, tuned, run
        self.value_and_grad = density.compiled_value_and_grad(start)
        self.pointer = compiled.pointer()
        self.library = _library() if self.pointer else None
        self.counted: list[_Counted] = []  # for each chain in machine code
        self.stop = threading.Event()
        self.error: BaseException | None = None  # raised by the density in Python

    def run_all(self, starts: Tensor) -> list[Chain]:
        self.done = [0] * len(starts)
        told = [0] * len(starts)
        with ThreadPoolExecutor(cores() if self.library else 1, "chain") as pool:
            jobs: list[Future[Chain | None]] = [pool.submit(self._chain, c, start) for c, start in enumerate(starts)]
            pending: set[Future[Chain | None]] = set(jobs)
            interrupt: KeyboardInterrupt | None = None
            while pending:
                try:
                    pending = wait(pending, POLL).not_done
                    self._tell(told)
                except KeyboardInterrupt as caught:
                    if interrupt is not None:
                        raise
                    interrupt = caught
                    self.stop.set()
                except BaseException:
                    self.stop.set()
                    raise
                if any(job.done() and job.exception() for job in jobs):
                    self.stop.set()
        if self.error is not None:
            raise self.error
        chains = [chain for job in jobs if (chain := job.result()) is not None and len(chain.positions)]
        if interrupt is not None and (self.run.nested or not chains):
            raise interrupt
        return chains

    def _tell(self, told: list[int]) -> None:
        """Hand on the progress of each chain that has moved."""
        warmup, draws = 0 if self.tuned else self.plan.warmup_steps, self.plan.num_samples
        for c, now in enumerate(self.done):
            if told[c] < warmup and now > told[c]:
                self.run.progress(f"chain {c + 1} warm-up", min(now, warmup), warmup)
            if now > max(told[c], warmup):
                self.run.progress(f"chain {c + 1} draws", min(now - warmup, draws), draws)
            told[c] = now

    def _chain(self, c: int, start: Tensor) -> Chain | None:
        """One chain from start to end, or to the stop. Runs in a thread of its own."""
        if self.stop.is_set():
            return None
        plan, tuned = self.plan, self.tuned
        flat = start.detach().double().cpu().reshape(-1).contiguous().numpy()
        warmup = 1 if tuned else max(1, plan.warmup_steps)  # nutpie insists on one
        options: dict[str, Any] = {
            "num_tune": warmup,
            "num_draws": plan.num_samples - 1 if tuned else plan.num_samples,
            "maxdepth": plan.max_tree_depth,
            "target_accept": plan.target_acceptance,
        }
        first = None
        if tuned:
            options["step_size_adapt_method"] = repr(float(tuned.step_size[c]))
            first = 1 / tuned.inverse_mass[c].double().cpu().numpy()
        density = self._machine_code(first) if self.library else self._python(start, first)
        seed = int(self.run.child(c).seed.generate_state(1, np.uint64)[0])

        def report(count: int) -> None:
            self.done[c] = count

        try:
            told = report if self.run.report else None
            sampler = launch(density, flat, seed, options, plan.low_rank, told)
            while True:
                try:
                    sampler.wait(POLL)
                    break
                except TimeoutError:
                    if self.stop.is_set():
                        sampler.abort()
                        break
            found = collect(sampler, flat.size)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of Rust is no Exception
            raise EngineError(f"nutpie stopped chain {c}: {str(error).splitlines()[0]}") from error
        self.done[c] = len(found["lp"])
        return _read(found, 0 if tuned else warmup, tuned, c)

    def _machine_code(self, first: np.ndarray | None) -> LogDensity:
        """The compiled density, counted; `first` is the gradient that its first call is answered with."""
        assert self.library is not None
        density, user = self.pointer or (0, 0)
        counted = _Counted(density, user, first.ctypes.data if first is not None else None, 0)
        self.counted.append(counted)
        return LogDensity(
            _address(self.library.pyrometer_counted), ctypes.addressof(counted), (self.compiled, counted, first)
        )

    def _python(self, start: Tensor, first: np.ndarray | None) -> LogDensity:
        """The density in Python, likewise, as a C function; what it raises ends the run."""
        shape, dtype, device = start.shape, self.density.dtype, start.device

        def value_and_grad(x: np.ndarray, gradient: np.ndarray) -> float:
            u = torch.from_numpy(x).to(dtype=dtype, device=device, copy=True).reshape(shape)
            with torch.no_grad(), device if device.type != "cpu" else nullcontext():
                value, slope = self.value_and_grad(u)
            gradient[:] = slope.reshape(-1).double().cpu().numpy()
            return float(value.sum())

        def call(dim: int, x: int, gradient: int, value: int, user: int) -> int:
            nonlocal first
            if self.error is not None:
                return NOT_FINITE
            out, answer = _array(gradient, dim), 0.0
            try:
                if first is None:
                    answer = value_and_grad(_array(x, dim), out)
                else:
                    out[:], first = first, None
            except Exception as error:
                if not _is_singular(error):
                    self.error = error
                    self.stop.set()
                return NOT_FINITE
            ctypes.c_double.from_address(value).value = answer
            return 0 if np.isfinite(answer) and np.isfinite(out).all() else NOT_FINITE

        function = LOG_DENSITY(call)
        return LogDensity(_address(function), 0, function)


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read(found: dict[str, np.ndarray], warmup: int, tuned: Tuning | None, c: int) -> Chain:
    """What is kept of a chain: all that comes after its warm-up, copied, so that the rest is let go."""
    vectors = ("position", "divergence", "inverse_mass", "tuned_step_size")
    stats = {n: torch.tensor(v[warmup:].astype(_plain(v.dtype))) for n, v in found.items() if n not in vectors}
    earlier = int(found["diverging"][:warmup].sum())
    inverse_mass = torch.tensor(found["inverse_mass"][-1]) if "inverse_mass" in found else None
    return Chain(
        positions=torch.tensor(found["position"][warmup:]),
        stats=stats,
        step_size=float(tuned.step_size[c]) if tuned else float(found["tuned_step_size"][-1]),
        inverse_mass=tuned.inverse_mass[c] if tuned else inverse_mass,
        divergences=torch.tensor(found["divergence"][earlier:]),
    )


def _plain(dtype: np.dtype[Any]) -> Any:
    return {"u": np.int64, "i": np.int64, "b": np.bool_}.get(dtype.kind, np.float64)


def _off_the_flat(value_and_grad: Callable[[Tensor], tuple[Tensor, Tensor]], starts: Tensor) -> Tensor:
    """Starts moved a little where the gradient is exactly zero in some direction: nutpie refuses these.

    Raises `EngineError` where it stays zero.
    """
    moved = []
    for c, start in enumerate(starts):
        for size in (1e-3, 1e-2, 1e-1, None):
            flat = value_and_grad(start)[1] == 0
            if not bool(flat.any()):
                break
            if size is None:
                raise EngineError(
                    f"around the start of chain {c} the log density does not change with {int(flat.sum())} of the "
                    f"{flat.numel()} unconstrained latents; start elsewhere (initial=...), or give these a prior"
                )
            start = torch.where(flat, start + size * torch.randn_like(start), start)
        moved.append(start)
    return torch.stack(moved)


class _Counted(ctypes.Structure):
    """`struct counted` of the C text."""

    calls: int
    _fields_ = (
        ("density", ctypes.c_void_p),
        ("user", ctypes.c_void_p),
        ("first", ctypes.c_void_p),
        ("calls", ctypes.c_int64),
    )


def _library() -> ctypes.CDLL | None:
    """The C text, compiled; None where that fails, and Python has to stand in between."""
    try:
        return toolchain.load(COUNTED)[0]
    except toolchain.CompileError:
        return None


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _array(address: int, size: int) -> np.ndarray:
    buffer: Any = (ctypes.c_double * size).from_address(address)
    return np.frombuffer(buffer)


def _is_singular(error: Exception) -> bool:
    """A matrix without a Cholesky factor or an inverse: no density there, but no mistake of the program either."""
    return isinstance(error, torch.linalg.LinAlgError) or "singular" in str(error)
