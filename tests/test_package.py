"""The package as installed: what is in it, what may import what, and that everything public says what it is."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("inference", "models", "benchmarks")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# The name that is imported, where it is not the name that is installed; the last two come with arviz.
DISTRIBUTIONS = {
    "pyro": "pyro-ppl",
    "sklearn": "scikit-learn",
    "h5netcdf": "h5netcdf[h5py]",
    "arviz_stats": "arviz",
    "markupsafe": "jinja2",
    "xarray": "arviz",
}


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    """Every module a file imports, anywhere in it, with relative imports written out."""
    package = ("pyrometer", *path.relative_to(ROOT).with_suffix("").parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) + "." if node.level else ""
            module = base + (node.module or "")
            # `from pyrometer import models` imports a package as well.
            found |= {module} | {f"{module.rstrip('.')}.{alias.name}" for alias in node.names}
    return found


def offenders(folder: str, forbidden: tuple[str, ...]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in sources(folder)
        for module in sorted(imports(path))
        if module.startswith(forbidden)
    ]


def test_every_folder_with_code_is_in_the_package_list():
    folders = {
        "pyrometer." + ".".join(path.parent.relative_to(ROOT).parts)
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("__init__.py")
    }
    assert folders == set(PYPROJECT["tool"]["setuptools"]["packages"])
    # A folder without __init__.py would be left out of both.
    assert {path.parent for path in sources(*FOLDERS)} == {
        path.parent for path in sources(*FOLDERS) if path.name == "__init__.py"
    }


@pytest.mark.parametrize("folder", FOLDERS)
def test_types_are_shipped(folder):
    assert (ROOT / folder / "py.typed").is_file()
    assert PYPROJECT["tool"]["setuptools"]["package-data"][f"pyrometer.{folder}"] == ["py.typed"]


def test_folders_are_importable_only_below_pyrometer(tmp_path):
    code = (
        "from importlib.util import find_spec\n"
        f"assert not [f for f in {FOLDERS} if find_spec(f)], 'importable bare'\n"
        f"assert all(find_spec('pyrometer.' + f) for f in {FOLDERS}), 'not installed'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [("inference", ("pyrometer.models", "pyrometer.benchmarks")), ("models", ("pyrometer.benchmarks",))],
)
def test_imports_go_one_way(folder, forbidden):
    assert offenders(folder, forbidden) == []


def test_the_scan_sees_relative_and_package_imports(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "inference" / "engines").mkdir(parents=True)
    (tmp_path / "inference" / "engines" / "bad.py").write_text(
        "def f():\n    from ...models import vae\n    from pyrometer import benchmarks\nfrom ..problem import Problem\n"
    )
    found = offenders("inference", ("pyrometer.models", "pyrometer.benchmarks"))
    assert {line.split()[-1] for line in found} == {
        "pyrometer.models",
        "pyrometer.models.vae",
        "pyrometer.benchmarks",
    }


def test_only_interop_imports_arviz_and_xarray():
    allowed = ROOT / "inference" / "interop.py"
    users = {path for path in sources(*FOLDERS) if any(m.split(".")[0] in ("arviz", "xarray") for m in imports(path))}
    assert users <= {allowed}


EXTRAS = {  # folder or file -> the extra that installs what it needs beside the dependencies
    "benchmarks/speed": "peers",
    "benchmarks/page": "report",
    "benchmarks/doubt.py": "report",
    "benchmarks/calibrate_report.py": "report",
    "inference/flows.py": "flows",
}


def test_everything_imported_is_declared():
    """By the project, or by an extra in the files that measure other tools, draw pictures, or the like."""
    project = PYPROJECT["project"]
    for path in sources(*FOLDERS):
        declared = list(project["dependencies"])
        for place, extra in EXTRAS.items():
            if path == ROOT / place or ROOT / place in path.parents:
                declared += project["optional-dependencies"][extra]
        outside = {module.split(".")[0] for module in imports(path)} - set(sys.stdlib_module_names) - {"pyrometer"}
        names = {re.split("[<>=]", requirement)[0] for requirement in declared}
        assert {DISTRIBUTIONS.get(module, module) for module in outside} <= names, path


def test_every_public_name_says_what_it_is():
    inference = importlib.import_module("pyrometer.inference")
    assert inference.__all__
    for name in inference.__all__:
        words = (getattr(inference, name).__doc__ or "").strip()
        # A dataclass without a docstring is given its signature as one.
        assert words, f"{name} has no docstring"
        assert not words.startswith(f"{name}("), f"{name} has no docstring of its own"
