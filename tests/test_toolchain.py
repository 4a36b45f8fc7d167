"""The cache of compiled code: what is kept, when it is believed, and that nothing is left behind or let in."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pyrometer.inference.native import toolchain
from pyrometer.inference.native.toolchain import CompileError, cache_folder, clear, compiler, entries, load

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C compiler")


def text(number: int) -> str:
    return f"int answer(void) {{ return {number}; }}\n"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The cache of this test alone, and a process that has loaded nothing."""
    monkeypatch.setenv("PYROMETER_CACHE", str(tmp_path / "cache"))
    forget(monkeypatch)
    return tmp_path / "cache" / "native"


def forget(monkeypatch) -> None:
    """As in a new process."""
    monkeypatch.setattr(toolchain, "_loaded", {})


def answer(number: int) -> tuple[int, bool]:
    library, hit = load(text(number))
    return library.answer(), hit


def kept(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.so"))


def left_behind(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.suffix != ".so"]


def script(tmp_path: Path, body: str) -> str:
    """A compiler of our own."""
    path = tmp_path / "compiler"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o700)
    return str(path)


RUN = """
import sys
from pyrometer.inference.native.toolchain import load
for number in map(int, sys.argv[1:]):
    library, hit = load(f"int answer(void) {{ return {number}; }}\\n")
    print(library.answer(), hit)
"""


def process(*numbers: int, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN, *map(str, numbers)]
    return subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def printed(running: subprocess.Popen[str]) -> str:
    output, errors = running.communicate(timeout=300)
    assert running.returncode == 0, errors
    return output


# -- hits and misses -------------------------------------------------------------------------------------------------


def test_code_is_built_once_and_found_by_the_next_process(folder):
    assert answer(7) == (7, False)
    assert answer(7) == (7, True)
    assert printed(process(7, 8)) == "7 True\n8 False\n"
    assert len(kept(folder)) == 2
    assert left_behind(folder) == []


def test_another_text_is_other_code(folder, monkeypatch):
    assert answer(1) == (1, False)
    forget(monkeypatch)
    assert answer(2) == (2, False)
    forget(monkeypatch)
    assert answer(1) == (1, True)


@pytest.mark.parametrize("what", ["flags", "version", "path", "processor"])
def test_what_decides_the_code_is_part_of_its_name(what, folder, monkeypatch):
    answer(3)
    found = compiler()
    forget(monkeypatch)
    if what == "flags":
        monkeypatch.setattr(toolchain, "FLAGS", [*toolchain.FLAGS, "-fno-builtin"])
    elif what == "processor":
        monkeypatch.setattr(toolchain, "processor", lambda: "another")
    else:
        link = folder.parent / "gcc-link"
        link.symlink_to(found.path)
        other = {"version": (found.path, "another 1.0"), "path": (str(link), found.version)}[what]
        monkeypatch.setattr(toolchain, "compiler", lambda: toolchain.Compiler(*other))
    assert answer(3) == (3, False)
    assert len(kept(folder)) == 2


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_the_umask_of_the_user_does_not_matter(mask, folder, monkeypatch):
    """Many systems let the group write by default: what is kept must be found again all the same."""
    before = os.umask(mask)
    try:
        answer(4)
        forget(monkeypatch)
        assert answer(4) == (4, True)
    finally:
        os.umask(before)
    assert all(not p.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH) for p in [folder, *kept(folder)])


# -- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other code", "empty, named right", "text, named right"])
def test_a_damaged_entry_is_seen_and_built_again(damage, folder, monkeypatch):
    answer(5)
    (path,) = kept(folder)
    data = path.read_bytes()
    if damage == "other code":
        forget(monkeypatch)
        answer(6)
        other = next(p for p in kept(folder) if p != path)
        data = other.read_bytes()
        other.unlink()
    elif damage == "flip":
        middle = len(data) // 2
        data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    elif damage == "cut":
        data = data[: len(data) // 2]
    else:
        data = b"not code" if damage.startswith("text") else b""
    path.unlink()  # a new file: this process has the old one mapped
    path.write_bytes(data)
    path.chmod(0o700)
    if damage.endswith("named right"):
        path = path.rename(path.with_name(f"{path.name.split('-')[0]}-{toolchain._digest(path)}.so"))
    forget(monkeypatch)
    assert answer(5) == (5, False)
    (now,) = kept(folder)
    assert now.read_bytes() != data
    forget(monkeypatch)
    assert answer(5) == (5, True)


# -- who else could have written it ------------------------------------------------------------------------------------

needs_root = pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="only root can give files away")


@pytest.mark.parametrize("change", ["group", "others", pytest.param("owner", marks=needs_root)])
@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_another_user_could_have_written_is_not_used(what, change, folder, monkeypatch):
    answer(9)
    (entry,) = kept(folder)
    target = folder if what == "folder" else entry
    if change == "owner":
        os.chown(target, 12345, -1)
    else:
        target.chmod(0o720 if change == "group" else 0o702)
    forget(monkeypatch)
    assert answer(9) == (9, False)
    if what == "folder":
        assert cache_folder() is None
        assert kept(folder) == [entry]  # nothing new went there
    else:
        forget(monkeypatch)
        assert answer(9) == (9, True)  # the entry was replaced by our own


@pytest.mark.parametrize("where", ["a file", "no such place", "read-only", "no home"])
def test_without_a_folder_all_runs_and_nothing_is_kept(where, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PYROMETER_CACHE", str(tmp_path / "file") if where == "a file" else "/proc/nowhere")
    if where == "read-only":
        monkeypatch.setenv("PYROMETER_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may write anywhere
    elif where == "no home":
        monkeypatch.delenv("PYROMETER_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.delenv("HOME", raising=False)

        def homeless(path):
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "expanduser", homeless)
    assert cache_folder() is None
    assert answer(11) == (11, False)
    assert entries() == []
    assert clear() == (0, 0)


@pytest.mark.parametrize("failing", ["tempfile.TemporaryDirectory", "os.replace"])
def test_a_full_disk_costs_a_message_not_a_traceback(failing, monkeypatch):
    """Code that cannot be kept is used all the same; where it cannot be built, the error says why."""

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(failing, full)
    if failing == "os.replace":
        assert answer(12) == (12, False)
    else:
        with pytest.raises(CompileError, match=r"^compiled code could not be .*No space left on device$"):
            load(text(12))


def test_an_entry_that_is_deleted_while_it_is_put_there_does_no_harm(folder, monkeypatch):
    """Another process may clear the cache at any moment."""
    replace = os.replace

    def gone(source, target):
        replace(source, target)
        os.unlink(target)

    monkeypatch.setattr(os, "replace", gone)
    assert answer(13) == (13, False)


# -- room --------------------------------------------------------------------------------------------------------------


def test_the_cache_keeps_what_was_used_last_within_its_size(folder, monkeypatch):
    for number in (1, 2, 3):
        answer(number)
        for path in kept(folder):  # an hour passes
            status = path.stat()
            os.utime(path, (status.st_atime, status.st_mtime - 3600))
    first, second, third = (entry.path for entry in entries())
    size = first.stat().st_size
    forget(monkeypatch)
    answer(1)  # used again: now the second is the oldest
    monkeypatch.setattr(toolchain, "SIZE_LIMIT", 3 * size + size // 2)
    answer(4)
    assert first.exists()
    assert not second.exists()
    assert third.exists()
    assert len(kept(folder)) == 3
    monkeypatch.setattr(toolchain, "SIZE_LIMIT", 1)
    assert answer(5) == (5, False)
    assert len(kept(folder)) == 1  # the newest stays, however small the room
    forget(monkeypatch)
    assert answer(5) == (5, True)


def test_clear_deletes_all_and_says_how_much(folder, monkeypatch):
    for number in (1, 2):
        answer(number)
    size = sum(p.stat().st_size for p in kept(folder))
    assert sum(entry.size for entry in entries()) == size
    assert clear() == (2, size)
    assert kept(folder) == []
    forget(monkeypatch)
    assert answer(1) == (1, False)


# -- compilers ---------------------------------------------------------------------------------------------------------


def test_without_a_compiler_it_says_so(monkeypatch):
    for command, path in (("/nonexistent/cc", os.environ["PATH"]), ("", "/nonexistent")):
        monkeypatch.setenv("CC", command)
        monkeypatch.setenv("PATH", path)
        assert compiler() is None
        with pytest.raises(CompileError, match=r"^no C compiler was found"):
            load(text(1))


def test_the_compiler_of_the_environment_is_used(tmp_path, monkeypatch):
    found = compiler()
    monkeypatch.setenv("CC", script(tmp_path, f'echo used >> {tmp_path}/log; exec {found.path} "$@"'))
    assert answer(21) == (21, False)
    assert (tmp_path / "log").read_text().startswith("used")


def test_an_old_compiler_without_the_newer_flags_serves(tmp_path, monkeypatch):
    """Where the vector functions of the C library cannot be linked, the plain ones are."""
    found = compiler()
    refuse = 'for a in "$@"; do case "$a" in -lmvec|-mprefer*) echo "error: unknown $a" >&2; exit 1;; esac; done'
    monkeypatch.setenv("CC", script(tmp_path, f'{refuse}\nexec {found.path} "$@"'))
    assert answer(22) == (22, False)


@pytest.mark.parametrize("body", ["echo 'density.c:1: error: no' >&2; echo more >&2; exit 1", "kill -9 $$", "exit 3"])
def test_a_failing_compiler_gives_one_line(body, tmp_path, folder, monkeypatch):
    monkeypatch.setenv("CC", script(tmp_path, f'[ "$1" = --version ] && echo fake && exit 0\n{body}'))
    with pytest.raises(CompileError, match=r"^the C compiler failed") as caught:
        load(text(1))
    assert "\n" not in str(caught.value).strip()
    assert kept(folder) == left_behind(folder) == []


def test_wrong_c_gives_the_first_error(folder):
    with pytest.raises(CompileError, match=r"^the C compiler failed: .*error.*undeclared") as caught:
        load("int answer(void) { return nowhere; }\n")
    assert "\n" not in str(caught.value)
    assert kept(folder) == left_behind(folder) == []


def test_a_compiler_that_makes_nothing_is_an_error_of_one_line(tmp_path, folder, monkeypatch):
    monkeypatch.setenv("CC", script(tmp_path, "exit 0"))
    with pytest.raises(CompileError) as caught:
        load(text(1))
    assert "\n" not in str(caught.value)
    assert kept(folder) == left_behind(folder) == []


def test_a_hung_compiler_is_ended_with_its_children(tmp_path, folder, monkeypatch):
    """The compiler proper is a child of the command: were it left, it would go on for as long as it likes."""
    body = f'[ "$1" = --version ] && echo fake && exit 0\nsleep 1000 & echo $! > {tmp_path}/child; wait'
    monkeypatch.setenv("CC", script(tmp_path, body))
    monkeypatch.setattr(toolchain, "COMPILE_LIMIT", 1.0)
    with pytest.raises(CompileError, match=r"took more than 1 s$"):
        load(text(1))
    assert ended(int((tmp_path / "child").read_text()))
    assert kept(folder) == left_behind(folder) == []


def ended(process: int) -> bool:
    """Whether a process is no more, soon."""
    for _ in range(200):
        try:
            state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


# -- several processes -------------------------------------------------------------------------------------------------


def test_processes_that_build_the_same_and_other_code_at_once_do_not_disturb_each_other(folder):
    running = [process(1, 2, 3, 4 + i, PYROMETER_CACHE=str(folder.parent)) for i in range(3)]
    for i, one in enumerate(running):
        assert [line.split()[0] for line in printed(one).splitlines()] == ["1", "2", "3", str(4 + i)]
    assert len({p.name.split("-")[0] for p in kept(folder)}) == 6
    assert left_behind(folder) == []
    assert printed(process(1, 2, 3, 4, 5, 6)) == "".join(f"{i} True\n" for i in range(1, 7))


def test_what_a_killed_process_leaves_is_swept_away_later(tmp_path, folder, monkeypatch):
    found = compiler()
    version = '[ "$1" = --version ] && echo fake && exit 0'
    slow = f'{version}\ntouch {tmp_path}/started; sleep 60 & wait; exec {found.path} "$@"'
    running = process(1, CC=script(tmp_path, slow))
    while not (tmp_path / "started").exists():
        assert running.poll() is None, running.stderr.read()
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.communicate(timeout=60)
    assert kept(folder) == []  # no half-built entry
    for path in folder.iterdir():  # what it left is not taken for an entry, and goes once it is old
        os.utime(path, (0, 0))
    assert answer(2) == (2, False)
    assert left_behind(folder) == []
    assert len(kept(folder)) == 1
