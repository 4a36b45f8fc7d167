"""From C text to loaded code, kept on disk by content.

An entry's name is the hash of all that decides what the code does: the text (which holds no data: constants and
parameters are read through pointers), the flags, the compiler, the processor. The name also ends in the hash of the
file, so that a damaged entry is seen and built again. The folder belongs to the user alone, or is not used.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

SIZE_LIMIT = 256 * 2**20  # bytes on disk; the entries used longest ago go first
COMPILE_LIMIT = 30.0  # seconds
FLAGS = [
    "-fwrapv",  # whole numbers wrap around, as torch's do
    *("-std=gnu11", "-O3", "-march=native", "-fPIC", "-shared", "-w", "-fno-math-errno", "-fno-trapping-math"),
    *("-fno-signed-zeros", "-fassociative-math", "-freciprocal-math", "-ffp-contract=fast"),
    *("-fno-tree-pre", "-fno-tree-loop-distribution"),  # these take minutes on a loop of 200 statements
    "-fno-tree-sink",  # it makes reads conditional, which GCC 12 then vectorises wrongly
]
WIDE = ["-mprefer-vector-width=512"]
VECTOR = ["-DVECTOR_MATH", "-Wl,--no-undefined", "-Wl,--no-as-needed", "-lmvec"]


class CompileError(Exception):
    """There is no compiler, or it failed; the message says which in one line."""


@dataclass(frozen=True)
class Compiler:
    path: str
    version: str


@functools.lru_cache(maxsize=8)
def _compiler(command: str, path: str | None) -> Compiler | None:
    found = shutil.which(command, path=path) if command else None
    for name in ("gcc", "cc", "clang") if not command else ():
        found = found or shutil.which(name, path=path)
    if not found:
        return None
    try:
        answer = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return Compiler(found, answer.stdout.splitlines()[0] if answer.stdout else "")


def compiler() -> Compiler | None:
    """The C compiler: $CC, or the first of gcc, cc, clang on the path; None where there is none."""
    return _compiler(os.environ.get("CC", ""), os.environ.get("PATH"))


@functools.lru_cache(maxsize=1)
def processor() -> str:
    """What `-march=native` depends on."""
    flags = ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features", "model name")):
                flags += line
            if line.startswith(("flags", "Features")):
                break
    return f"{platform.machine()} {platform.processor()} {flags}"


def cache_folder() -> Path | None:
    """Where compiled code is kept, made if need be; None where no folder is the user's alone.

    $PYROMETER_CACHE, else pyrometer/ in $XDG_CACHE_HOME or ~/.cache.
    """
    base = os.environ.get("PYROMETER_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "pyrometer"
    try:
        folder = Path(base).expanduser() / "native"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return folder if _own(folder.stat()) and os.access(folder, os.W_OK) else None
    except (OSError, RuntimeError):  # RuntimeError: this user has no home
        return None


def _own(status: os.stat_result) -> bool:
    """Whether nobody but this user (or root) could have written it."""
    mine = not hasattr(os, "getuid") or status.st_uid in (os.getuid(), 0)
    return mine and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


_loaded: dict[str, ctypes.CDLL] = {}


def load(text: str) -> tuple[ctypes.CDLL, bool]:
    """The code of a C text, and whether it was there already. Raises `CompileError`."""
    found = compiler()
    if found is None:
        raise CompileError("no C compiler was found (set CC, or install gcc)")
    decides = (text, *FLAGS, *WIDE, *VECTOR, found.path, found.version, processor())
    key = hashlib.sha256("\0".join(decides).encode()).hexdigest()
    if key in _loaded:
        return _loaded[key], True
    folder = cache_folder()
    library = _cached(folder, key) if folder else None
    hit = library is not None
    if library is None:
        try:
            with tempfile.TemporaryDirectory(dir=folder, prefix=".build-") as scratch:
                built = _build(found, text, Path(scratch))
                library = ctypes.CDLL(str(built))  # before others can delete it
                if folder:
                    _keep(built, folder / f"{key}-{_digest(built)}.so")
        except OSError as problem:
            raise CompileError(f"compiled code could not be written or loaded: {problem}") from None
    _loaded[key] = library
    return library, hit


def _keep(built: Path, path: Path) -> None:
    """Put a file among the entries, in one step; where that fails, it is built again next time."""
    with contextlib.suppress(OSError):
        built.chmod(0o700)  # whatever the umask
        os.replace(built, path)
        _trim(path.parent, keep=path)


def _cached(folder: Path, key: str) -> ctypes.CDLL | None:
    for path in folder.glob(f"{key}-*.so"):
        try:
            if _own(path.stat()) and path.name == f"{key}-{_digest(path)}.so":
                library = ctypes.CDLL(str(path))
                os.utime(path)  # used now
                return library
        except OSError:
            pass
        with contextlib.suppress(OSError):  # damaged, or not ours
            path.unlink()
    return None


def _build(found: Compiler, text: str, scratch: Path) -> Path:
    (scratch / "density.c").write_text(text)
    output = scratch / "density.so"
    wide = WIDE if platform.machine() in ("x86_64", "AMD64") else []
    error = ""
    for flags in ([*FLAGS, *wide, *VECTOR, "-lm"], [*FLAGS, "-lm"]):
        command = [found.path, "density.c", "-o", "density.so", *flags]
        try:
            answer = _run(command, scratch)
        except subprocess.TimeoutExpired:
            raise CompileError(f"the C compiler took more than {COMPILE_LIMIT:.0f} s") from None
        except OSError as problem:
            raise CompileError(f"the C compiler could not be run: {problem}") from None
        if answer.returncode == 0 and output.exists():
            return output
        error = error or next((line for line in answer.stderr.splitlines() if "error" in line), answer.stderr[:200])
    raise CompileError(f"the C compiler failed: {error}")


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command, ended with all its children where it takes too long."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=folder, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as process:
        try:
            output, errors = process.communicate(timeout=COMPILE_LIMIT)
        except BaseException:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            raise
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:32]


@dataclass(frozen=True)
class Entry:
    """One compiled density on disk: bytes, and when it was last used (seconds since the epoch)."""

    path: Path
    size: int
    used: float


def entries() -> list[Entry]:
    """What is kept, used longest ago first."""
    folder = cache_folder()
    found = []
    for path in folder.glob("*.so") if folder else ():
        with contextlib.suppress(OSError):
            status = path.stat()
            found.append(Entry(path, status.st_size, status.st_mtime))
    return sorted(found, key=lambda entry: entry.used)


def clear() -> tuple[int, int]:
    """Delete all that is kept; how many entries, how many bytes."""
    count = size = 0
    for entry in entries():
        with contextlib.suppress(OSError):
            entry.path.unlink()
            count, size = count + 1, size + entry.size
    return count, size


def _trim(folder: Path, keep: Path) -> None:
    """Delete what was used longest ago, down to the size allowed, and what killed processes left."""
    for scratch in folder.glob(".build-*"):
        with contextlib.suppress(OSError):
            if time.time() - scratch.stat().st_mtime > 10 * COMPILE_LIMIT:
                shutil.rmtree(scratch)
    kept = entries()
    total = sum(entry.size for entry in kept)
    for entry in kept:
        if total <= SIZE_LIMIT:
            break
        if entry.path != keep:
            with contextlib.suppress(OSError):
                entry.path.unlink()
                total -= entry.size


@functools.lru_cache(maxsize=64)
def routine(name: str) -> int:
    """The address of a BLAS or LAPACK routine of the Fortran interface with 32-bit integers: torch's own library
    where it exports them (MKL), else SciPy's."""
    import torch

    with contextlib.suppress(OSError, AttributeError):
        folder = Path(torch.__file__).parent / "lib"
        library = ctypes.CDLL(str(next(folder.glob("libtorch_cpu.*"))))
        return ctypes.cast(getattr(library, f"{name}_"), ctypes.c_void_p).value or 0
    from scipy.linalg import cython_blas, cython_lapack

    for module in (cython_blas, cython_lapack):
        if name in module.__pyx_capi__:
            capsule = module.__pyx_capi__[name]
            api = ctypes.pythonapi
            api.PyCapsule_GetName.restype, api.PyCapsule_GetName.argtypes = ctypes.c_char_p, [ctypes.py_object]
            api.PyCapsule_GetPointer.restype = ctypes.c_void_p
            api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
            return api.PyCapsule_GetPointer(capsule, api.PyCapsule_GetName(capsule)) or 0
    raise CompileError(f"no BLAS or LAPACK routine {name!r} was found")
