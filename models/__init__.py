"""Families of models: one file each, with `problem(**settings) -> Problem` and the best reference there is.

    from pyrometer.models import vae
    vae.problem(latent_dim=2)

A file put into this folder is a family. Other packages add theirs through the entry point group 'pyrometer.models',
whose value names a module. Families are listed without being imported, and loaded when asked for by name.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.metadata import entry_points
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

ENTRY_POINT_GROUP = "pyrometer.models"


class Families(Mapping[str, ModuleType]):
    """Name -> module, in alphabetical order; a module is imported when it is looked up."""

    def __init__(self, loaders: Mapping[str, Callable[[], ModuleType]]) -> None:
        self._loaders = dict(sorted(loaders.items()))

    def __getitem__(self, name: str) -> ModuleType:
        load = self._loaders[name]
        try:
            module = load()
        except Exception as error:
            raise ValueError(f"model family {name!r} cannot be imported: {type(error).__name__}: {error}") from error
        if not callable(getattr(module, "problem", None)):
            raise ValueError(f"model family {name!r} has no function problem(**settings); add one to {module!r}.")
        return module

    def __contains__(self, name: object) -> bool:
        return name in self._loaders  # Mapping would look the name up, and so import it

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaders)

    def __len__(self) -> int:
        return len(self._loaders)


def families() -> Families:
    """All families: the files of this folder, then the plug-ins (which cannot take the name of a file here)."""
    loaders: dict[str, Callable[[], ModuleType]] = {
        info.name: partial(importlib.import_module, f"{__name__}.{info.name}")
        for info in pkgutil.iter_modules(__path__)
        if not info.name.startswith("_")
    }
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name in loaders:
            warnings.warn(f"plug-in {point.value!r} is ignored: the family {point.name!r} exists.", stacklevel=2)
        else:
            loaders[point.name] = point.load
    return Families(loaders)


def find(name: str) -> ModuleType:
    """The family of this name; of your own, in a file 'my_models.py' or an importable 'package.module'. Raises
    ValueError, with the nearest name, where there is none."""
    if name.endswith(".py"):
        return Families({name: partial(_from_file, Path(name))})[name]
    if "." in name:
        return Families({name: partial(importlib.import_module, name)})[name]
    known = families()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(known)}."
    own = f" For the file, write {name}.py." if Path(f"{name}.py").is_file() else ""
    raise ValueError(f"no model family {name!r}; {hint}{own}")


def _from_file(path: Path) -> ModuleType:
    name = f"{__name__}.file.{path.stem}"  # a name that no import asks for
    spec = spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"there is no file {path.absolute()}")
    module = sys.modules[name] = module_from_spec(spec)  # where dataclasses, for one, look it up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
