"""nutpie's sampler behind three functions: the only place that touches its private names.

nutpie (github.com/pymc-devs/nutpie, its core: github.com/pymc-devs/nuts-rs) runs NUTS in Rust threads that need no
interpreter. Its public door for a density in machine code is PyMC's own; behind it stand the names used here. They
are those of 0.16.8: from 0.16.9 on they take other arguments, so `load` compares their signatures before any use.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from typing import Any

import numpy as np

SIGNATURES = {
    "LogpFunc": "(ptr, user_data_ptr, keep_alive)",
    "ExpandFunc": "(dim, expanded_dim, ptr, user_data_ptr, keep_alive)",
    "PyMcModel": "(density, expand, variables, dim, dim_sizes, coords, init_func, transform_adapter)",
    "PyNutsSettings.Diag": "(seed=None)",
    "PyNutsSettings.LowRank": "(seed=None)",
    "PySampler.from_pymc": "(settings, cores, model, progress_type, store)",
    "PySampler.wait": "($self, timeout_seconds=None)",
    "PySampler.abort": "($self)",
    "PySampler.take_results": "($self)",
    "PyTrace.get_arrow_trace": "($self)",
    "PyVariable.new_variables": "($cls, names, item_types, shapes, dim_sizes, dims)",
    "PyStorage.arrow": "()",
    "ProgressType.none": "()",
    "ProgressType.template_callback": "(rate, template, n_cores, callback)",
}
COLUMNS = {  # of nutpie's statistics that are read -> under which name
    "unconstrained_draw": "position",
    "divergence_start": "divergence",
    "mass_matrix_inv": "inverse_mass",  # with a diagonal mass matrix
    "step_size_bar": "tuned_step_size",
    "logp": "lp",
    "energy": "energy",
    "diverging": "diverging",
    "mean_tree_accept": "acceptance_rate",
    "step_size": "step_size",
    "depth": "tree_depth",
    "maxdepth_reached": "reached_max_treedepth",
    "n_steps": "n_steps",
}
# int64_t logp(uint64_t dim, double *x, double *gradient, double *value, void *user): 0, or > 0 for "not finite here"
LOG_DENSITY = ctypes.CFUNCTYPE(
    ctypes.c_int64, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p
)


class UnavailableError(RuntimeError):
    """nutpie is not installed, or is not the one that this file was written for."""


@dataclass(frozen=True)
class LogDensity:
    """A C function of the kind `LOG_DENSITY`: its address, its last argument, and what must stay alive for it."""

    address: int
    user: int
    keep: Any


@cache
def load() -> Any:
    """nutpie's compiled module, without the rest of nutpie, which imports arviz and pandas.

    Raises `UnavailableError` where it is not there, or not as expected.
    """
    package = importlib.util.find_spec("nutpie")
    if package is None:
        raise UnavailableError("nutpie is not installed (pip install 'nutpie>=0.16.8,<0.16.9')")
    name = "nutpie._lib"
    if name not in sys.modules:
        spec = PathFinder.find_spec(name, package.submodule_search_locations)
        if spec is None or spec.loader is None:
            raise UnavailableError("nutpie has no compiled module any more")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    lib = sys.modules[name]
    if moved := [path for path, signature in SIGNATURES.items() if _signature(lib, path) != signature]:
        raise UnavailableError(
            f"nutpie {getattr(lib, '__version__', '?')} is not 0.16.8: it changed {', '.join(moved)}"
        )
    return lib


def _signature(lib: Any, path: str) -> str | None:
    for name in path.split("."):
        lib = getattr(lib, name, None)
    return getattr(lib, "__text_signature__", None)


def launch(
    density: LogDensity,
    start: np.ndarray,
    seed: int,
    options: Mapping[str, Any],
    low_rank: bool,
    report: Callable[[int], None] | None,
) -> Any:
    """Start one chain in a thread of its own; `report` is told now and then how many draws there are.

    options  nutpie's settings by name; what it answers is waited for by `wait(seconds)`, which raises TimeoutError,
             or ended by `abort()`, and then given to `collect`.
    """
    lib = load()
    settings = (lib.PyNutsSettings.LowRank if low_rank else lib.PyNutsSettings.Diag)(seed)
    for name, value in {
        "num_chains": 1,
        "store_unconstrained": True,
        "store_divergences": True,
        "store_mass_matrix": not low_rank,
        **options,
    }.items():
        setattr(settings, name, value)
    libc = ctypes.CDLL(None)  # labs(0) = 0 stands for "expanded well": draws are read from the statistics
    model = lib.PyMcModel(
        lib.LogpFunc(density.address, density.user, density),
        lib.ExpandFunc(0, 0, ctypes.cast(libc.labs, ctypes.c_void_p).value, 0, libc),
        lib.PyVariable.new_variables([], [], [], {}, {}),
        len(start),
        {"unconstrained_parameter": len(start)},
        {},
        lambda _: start,
        None,
    )
    progress = lib.ProgressType.none()
    if report is not None:
        template = "{% for chain in chains %}{{ chain.finished_draws }}{% endfor %}"
        progress = lib.ProgressType.template_callback(100, template, 1, lambda text: report(int(text)))
    return lib.PySampler.from_pymc(settings, 1, model, progress, lib.PyStorage.arrow())


def collect(sampler: Any, dim: int) -> dict[str, np.ndarray]:
    """What a chain that ended left, by the names of `COLUMNS`: (rows,), (rows, dim), or (divergences, dim)."""
    import pyarrow

    (batch,) = sampler.take_results().get_arrow_trace()[1]
    table = pyarrow.record_batch(batch)
    found: dict[str, np.ndarray] = {}
    for column, name in COLUMNS.items():
        if column in table.schema.names:
            values = table.column(column)
            lists = pyarrow.types.is_large_list(values.type)  # one that is null holds nothing
            found[name] = _array(values.values).reshape(-1, dim) if lists else _array(values)
    return found


def _array(values: Any) -> np.ndarray:
    """An Arrow array as NumPy's. Its own `to_numpy` imports pandas for that, in 0.3 s."""
    import pyarrow

    if pyarrow.types.is_boolean(values.type):  # kept as bits
        return np.array(values.to_pylist(), dtype=bool)
    return np.from_dlpack(values)
