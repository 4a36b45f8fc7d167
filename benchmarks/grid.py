"""Grids: problem x learner x engine x budget x seed, from names, a TOML file, or Python.

    name = "mine"
    seeds = 3                        # 0, 1, 2; or a list
    budgets = [2000, 8000]           # calls of the density for each cell; left out: the engines' own settings
    problems = ["ppca", {name = "vae", settings = {num_train = 100}}]
    learners = ["svi", "em:nuts"]    # left out: the problems' own theta
    engines = ["smc", {name = "nuts", label = "nuts, deep", settings = {max_tree_depth = 12}}]

Families, engines and learners are found, not listed: one that is added joins `standard` by existing. A family may say
in a constant `BENCH` with which settings it joins: one mapping, or several. `smoke` has those alone that say so in a
constant `SMOKE`, likewise: one of each kind, small, so that every engine has something that it serves.
"""

from __future__ import annotations

import difflib
import inspect
import itertools
import numbers
import tomllib
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from pyrometer import models
from pyrometer.inference import Problem, ProblemError, registry
from pyrometer.inference.registry import as_engine, as_learner

from .cell import Budget, Cell
from .facts import plain
from .methods import engines_from, label, learners_from

LADDER = (2000, 8000, 32000)  # calls: tuning takes the greater part of less than two thousand
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Grid:
    """Cells to run, each once; `objects` holds what was given in Python and has no name: (kind, label) -> instance,
    kind 'problem', 'engine' or 'learner'."""

    cells: tuple[Cell, ...]
    name: str = "grid"
    objects: Mapping[tuple[str, str], Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.cells)

    def problem(self, cell: Cell) -> Problem:
        """The problem of a cell. Raises ProblemError where its settings cannot be used."""
        if not cell.model:
            return self.objects["problem", cell.problem]
        return made(cell.model, family(cell.model), cell.model_settings)

    def engine(self, cell: Cell) -> Any:
        if not cell.method:
            return self.objects["engine", cell.engine]
        return built(cell.method, cell.engine_settings, as_engine)

    def learner(self, cell: Cell) -> Any:
        if not cell.learn_by:
            return self.objects["learner", cell.learner]
        return built(cell.learn_by, cell.learner_settings, as_learner)


def grid(
    problems: Any,
    engines: Any = None,
    *,
    learners: Any = None,
    budgets: Sequence[float | Budget | None] | float | Budget | None = None,
    seeds: Sequence[int] | int = SEEDS,
    name: str = "grid",
) -> Grid:
    """Every problem with every learner, engine, budget and seed.

    problems           names of families, `Problem`s, or a dict from labels to these or to (name, settings)
    engines, learners  as `compare` takes them; None: all engines, and the problems' own theta
    budgets            calls of the density, or `Budget`s; None: the engines' own settings
    seeds              a list, or how many
    Raises ProblemError for an unknown name, a setting that does not exist, or two of one label.
    """
    found: dict[tuple[str, str], Any] = {}
    chosen = [_problem_fields(label, item, found) for label, item in _problems(problems).items()]
    methods = engines_from(list(registry.engines()) if engines is None else engines)
    learned = {"": None} | ({} if learners is None else learners_from(learners))
    if learners is not None:
        del learned[""]
    if not chosen or not methods or not learned:
        raise ProblemError("a grid needs at least one problem and one engine.")
    by = [_method_fields("learner", label, method, found) if label else {} for label, method in learned.items()]
    using = [_method_fields("engine", label, method, found) for label, method in methods.items()]
    cells = tuple(
        Cell(**where, **learner, **engine, budget=budget, seed=seed)
        for where, learner, engine, budget, seed in itertools.product(
            chosen, by, using, _budgets(budgets), _seeds(seeds)
        )
    )
    return Grid(cells, name, found)


def named(what: str | Path) -> Grid:
    """The grid of this name, or of this TOML file. Raises ProblemError, with the nearest name."""
    if str(what) in NAMED:
        return NAMED[str(what)]()
    if Path(what).suffix != ".toml" and not Path(what).is_file():
        raise ProblemError(f"no grid {str(what)!r}: expected {', '.join(NAMED)}, or a file that ends in .toml.")
    try:
        data = tomllib.loads(Path(what).read_text(encoding="utf-8"))
    except OSError as error:
        raise ProblemError(f"{what}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ProblemError(f"{what}: not TOML: {error}.") from error
    try:
        return from_toml(data, Path(what).stem)
    except ProblemError as error:
        raise ProblemError(f"{what}: {error}") from error


def from_toml(data: Mapping[str, Any], name: str = "grid") -> Grid:
    """The grid of a parsed TOML file. Raises ProblemError for a key that is not known, with the nearest that is."""
    known: dict[str, Any] = dict.fromkeys(("problems", "learners", "engines", "budgets"), list)
    known |= {"name": str, "seeds": (int, list)}
    _check_keys(data, known, "the grid")
    for key, value in data.items():
        if not isinstance(value, known[key]) or isinstance(value, bool):
            words = {"name": "a text", "seeds": "a list, or how many"}.get(key, "a list")
            raise ProblemError(f"{key} = {value!r}: expected {words}.")
    if "problems" not in data:
        raise ProblemError("problems is missing: name at least one family, problems = ['ppca'].")
    return grid(
        _entries(data["problems"], "problems", lambda name, settings: (name, settings)),
        _entries(data["engines"], "engines", partial_built(as_engine)) if "engines" in data else None,
        learners=_entries(data["learners"], "learners", partial_built(as_learner)) if "learners" in data else None,
        budgets=data.get("budgets"),
        seeds=data.get("seeds", SEEDS),
        name=data.get("name", name),
    )


def selected(
    whole: Grid,
    *,
    models: Sequence[str] = (),
    engines: Sequence[str] = (),
    budgets: Sequence[float] = (),
    seeds: Sequence[int] = (),
) -> Grid:
    """The part of a grid with these families, engines, budgets and seeds, where they are given; budgets and seeds take
    the place of the grid's own. Raises ProblemError for a name that no cell has."""
    cells = list(whole.cells)
    for given, of in ((models, lambda c: (c.model, c.problem)), (engines, lambda c: (c.method, c.engine))):
        known = {name for cell in cells for name in of(cell) if name}
        for name in given:
            if name not in known:
                raise ProblemError(f"no cell of the grid has {name!r}; {near(name, known)}")
        cells = [cell for cell in cells if not given or set(given) & set(of(cell))]
    if budgets:
        cells = [replace(cell, budget=budget) for cell in cells for budget in _budgets(budgets)]
    if seeds:
        cells = [replace(cell, seed=seed) for cell in cells for seed in _seeds(seeds)]
    once = {cell.key(): cell for cell in cells}
    return replace(whole, cells=tuple(once.values()))


# -- grids with a name -----------------------------------------------------------------------------------------------


def standard() -> Grid:
    """Every family with a reference, every engine, three seeds, a ladder of three budgets."""
    return grid(_joining("BENCH", {}), budgets=LADDER, name="standard")


def smoke() -> Grid:
    """About a minute with two jobs: a family of each kind, every engine, once, with few calls."""
    return grid(_joining("SMOKE"), budgets=LADDER[:1], seeds=1, name="smoke")


def dlvm() -> Grid:
    """Variational autoencoders: each learner's theta, judged by every engine."""
    settings = {"num_train": 200, "num_test": 100}
    learners = [name for name in registry.learners() if name != "ml"]  # that one is for models without latents
    return grid(
        {"vae": ("vae", settings)}, learners=learners, budgets=LADDER[1:2], seeds=SEEDS[:1], name="dlvm"
    )  # fmt: skip


NAMED: dict[str, Callable[[], Grid]] = {"smoke": smoke, "standard": standard, "dlvm": dlvm}


def _joining(constant: str, unsaid: Mapping[str, Any] | tuple[()] = ()) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Families that know the truth, in the settings that they say they join with in this constant, or else `unsaid`."""
    found: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for name, module in models.families().items():
        said = getattr(module, constant, unsaid)
        for settings in [said] if isinstance(said, Mapping) else said:
            if module.problem(**settings).reference is not None:
                found[_label(name, settings)] = (name, settings)
    return found


# -- from what is given to fields of a cell --------------------------------------------------------------------------


def family(name: str) -> Any:
    """A family of models by name, file or 'package.module'. Raises ProblemError."""
    try:
        return models.find(name)
    except ValueError as error:
        raise ProblemError(str(error)) from error


def made(name: str, module: Any, settings: Mapping[str, Any]) -> Problem:
    """A family's problem in these settings. Raises ProblemError where its function fails, or gives no problem."""
    try:
        problem = module.problem(**settings)
    except ProblemError:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise ProblemError(
            f"model {name}: problem() failed: {type(error).__name__}: {error} ({place.filename}, line {place.lineno})."
        ) from error
    if not isinstance(problem, Problem):
        raise ProblemError(f"model {name}: problem() gave a {type(problem).__name__}, and not a Problem.")
    return problem


def built(name: str, settings: Mapping[str, Any], as_method: Callable[[Any], Any]) -> Any:
    """A method from its name and settings, where {"name": ..., ...} stands for a method. Raises ProblemError."""
    of = {key: _inner(value) for key, value in settings.items()}
    return type(as_method(name))(**of)


def _inner(value: Any) -> Any:
    if not isinstance(value, Mapping) or "name" not in value:
        return value
    return built(value["name"], {key: item for key, item in value.items() if key != "name"}, as_engine)


def partial_built(as_method: Callable[[Any], Any]) -> Callable[[str, Mapping[str, Any]], Any]:
    """(name, settings) -> method; 'em:nuts' is EM with a NUTS E-step."""

    def make(name: str, settings: Mapping[str, Any]) -> Any:
        if ":" in name:
            name, e_step = name.split(":", 1)
            settings = {"e_step": {"name": e_step}, **settings}
        return built(name, settings, as_method)

    return make


def _entries(items: Sequence[Any], where: str, make: Callable[[str, Mapping[str, Any]], Any]) -> dict[str, Any]:
    """label -> what `make` makes of a list of names and of tables with name, label, settings."""
    found: dict[str, Any] = {}
    for item in items:
        table: Any = {"name": item} if isinstance(item, str) else item
        if not isinstance(table, Mapping):
            raise ProblemError(f"{where}: {item!r} is neither a name nor a table with one.")
        _check_keys(table, ("name", "label", "settings"), where)
        if not isinstance(table.get("name"), str) or not isinstance(table.get("settings", {}), Mapping):
            raise ProblemError(f"{where}: {item!r}: expected name = '...' and settings = {{...}}.")
        made = make(table["name"], table.get("settings", {}))
        name = table.get("label") or (_label(*made) if isinstance(made, tuple) else label(made))
        if name in found:
            raise ProblemError(f"{where}: {name} is given twice; tell them apart by label = '...'.")
        found[str(name)] = made
    return found


def _problems(given: Any) -> dict[str, Any]:
    """label -> Problem or (family, settings)."""
    if isinstance(given, str):
        given = [name.strip() for name in given.split(",") if name.strip()]
    if isinstance(given, Problem):
        given = [given]
    if not isinstance(given, Mapping):
        items = list(given)
        given = {item.name if isinstance(item, Problem) else str(item): item for item in items}
        if len(given) < len(items):
            raise ProblemError("a problem is given twice; tell them apart by a dict: {'first': ..., 'second': ...}.")
    return {str(name): (item, {}) if isinstance(item, str) else item for name, item in given.items()}


def _problem_fields(name: str, item: Any, objects: dict[tuple[str, str], Any]) -> dict[str, Any]:
    if isinstance(item, Problem):
        objects["problem", name] = item
        return {"problem": name, "model": ""}
    if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], Mapping)):
        raise ProblemError(f"problem {name!r}: expected a Problem, a family's name, or (name, settings).")
    model, settings = item
    known = inspect.signature(family(model).problem).parameters
    for key in settings:
        if key not in known:
            raise ProblemError(f"model {model} has no setting {key!r}; {near(key, known)}")
    return {"problem": name, "model": model, "model_settings": dict(settings)}


def _method_fields(kind: str, name: str, method: Any, objects: dict[tuple[str, str], Any]) -> dict[str, Any]:
    """The fields of a cell that name a method; what has no name, or settings that are no plain values, is kept."""
    changed = _changed(method)
    known = registry.engines() if kind == "engine" else registry.learners()
    by_name = changed is not None and known.get(method.name) is type(method)
    if not by_name:
        objects[kind, name] = method
    fields_of = {
        "engine": ("engine", "method", "engine_settings"),
        "learner": ("learner", "learn_by", "learner_settings"),
    }
    values = (name, method.name if by_name else "", changed if by_name else plain(method))
    return dict(zip(fields_of[kind], values, strict=True))


def _changed(method: Any) -> dict[str, Any] | None:
    """The settings that differ from the defaults, as plain values; None where one cannot be written so."""
    if not is_dataclass(method):
        return None
    found: dict[str, Any] = {}
    for f in fields(method):
        value = getattr(method, f.name)
        if value is f.default or (isinstance(value, bool | int | float | str) and value == f.default):
            continue
        name = getattr(value, "name", None)
        if is_dataclass(value) and isinstance(name, str):
            inner = _changed(value)
            if inner is None or registry.engines().get(name) is not type(value):
                return None
            value = {"name": name, **inner}
        elif not (value is None or isinstance(value, bool | int | float | str)):
            return None
        found[f.name] = value
    return found


def _label(name: str, settings: Mapping[str, Any]) -> str:
    words = ", ".join(f"{key}={plain(value)}" for key, value in settings.items())
    return f"{name}({words})" if words else name


def _budgets(given: Any) -> list[Budget]:
    several = given if isinstance(given, Sequence) else [given]
    return [item if isinstance(item, Budget) else Budget(calls=item) for item in several] or [Budget()]


def _seeds(given: Any) -> list[int]:
    several = list(range(given)) if isinstance(given, numbers.Integral) and not isinstance(given, bool) else list(given)
    for seed in several:
        if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or not 0 <= int(seed) < 2**63:
            raise ProblemError(f"seeds: {seed!r}: expected whole numbers from 0.")
    if not several or len(set(several)) < len(several):
        raise ProblemError("seeds: expected at least one, each once.")
    return [int(seed) for seed in several]


def _check_keys(data: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    for key in data:
        if key not in known:
            raise ProblemError(f"{where} has no key {key!r}; {near(key, known)}")


def near(name: str, known: Iterable[str]) -> str:
    """The nearest of the known names, or all of them, in words."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, 1)
    return f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(known)}."
