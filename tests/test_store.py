"""The store: whole or not at all, believed only after its checksum, never led outside its folder."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from records import same_but_for_times

from pyrometer.benchmarks.cell import Budget, Cell, Record
from pyrometer.benchmarks.comparison import PerDatum, Row, Theta
from pyrometer.benchmarks.facts import plain
from pyrometer.benchmarks.metrics import Score
from pyrometer.benchmarks.store import DRAWS, RECORD, Store, StoreError
from pyrometer.inference import Cost, Posterior, ProblemError, Status

KEY = "0123456789abcdef" * 2
NAMES = ("<script>alert(1)</script>", "../../escape", "/etc/passwd", "naïve ünïcode", "a\nb\0c")


def record(key: str = KEY, problem: str = "toy", seconds: float = 1.0) -> Record:
    cell = Cell(problem=problem, model="toy", engine="smc", budget=Budget(calls=1000), seed=3, model_settings={"a": 1})
    row = Row(
        "",
        "smc",
        errors={"error of means": Score(0.1, float("inf"), "z[3]")},
        log_evidence=PerDatum(-1.5, 0.1, "estimate", 3, PerDatum(-1.4, 0.2, "estimate", 3)),
        notes=("one", "two"),
        cost=Cost(10.0, 20.0, seconds=seconds),
    )
    return Record(cell, key, Theta(), row, {"k_hat": float("nan"), "ess": 12.5}, versions={"torch": "2"})


def posterior() -> Posterior:
    draws = {"z": torch.arange(12, dtype=torch.float64).reshape(2, 6)}
    return Posterior(draws, status=Status("done"), cost=Cost(10.0, 20.0, seconds=1.0))


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "runs")


def files(store: Store) -> set[str]:
    return {path.name for path in store.folder.iterdir()} - {".claims"}


# -- there and back --------------------------------------------------------------------------------------------------


def test_a_record_comes_back_as_it_was(store):
    store.write(KEY, record(), posterior())
    found = store.record(KEY)
    assert plain(found) == {**plain(record()), "draws": found.draws}
    assert found.row.errors["error of means"].largest == float("inf")
    assert found.row.log_evidence.refined.value == -1.4
    assert found.cell == record().cell
    assert isinstance(found.row.notes, tuple)
    assert str(found.figures["k_hat"]) == "nan"
    assert torch.equal(store.draws(KEY).draws["z"], posterior().draws["z"])
    assert store.state(KEY) == "done"
    assert files(store) == {KEY}


def test_files_of_equal_answers_are_equal_but_for_times(store):
    other = "f" * 32
    store.write(KEY, record(), posterior())
    slower = Posterior(posterior().draws, status=Status("done"), cost=Cost(10.0, 20.0, seconds=99.0, peak_memory=7))
    store.write(other, record(other, seconds=99.0), slower)
    assert (store.folder / KEY / DRAWS).read_bytes() == (store.folder / other / DRAWS).read_bytes()
    left, right = store.read(KEY), {**store.read(other), "key": KEY}
    assert left != right
    assert same_but_for_times(left, right)
    assert not same_but_for_times(left, {**right, "figures": {"ess": 13}})


def test_the_key_depends_on_cell_and_context_and_on_nothing_else():
    cell = record().cell
    assert cell.key("a") == record().cell.key("a")
    assert len({cell.key(), cell.key("a"), cell.key("b"), Cell("toy", "toy", "nuts").key("a")}) == 4
    assert Cell("p", "m", "e", budget=Budget(1000)).key() == Cell("p", "m", "e", budget=Budget(1000.0)).key()
    with pytest.raises(ProblemError, match="positive"):
        Budget(calls=-1)
    with pytest.raises(ProblemError, match="not of both"):
        Budget(calls=1, seconds=1)


# -- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", [RECORD, DRAWS])
def test_every_flipped_bit_and_every_cut_is_seen(store, file):
    """The first hundred bytes, every 211th and the last: set aside, and told as missing."""
    store.write(KEY, record(), posterior())
    path = store.folder / KEY / file
    whole = path.read_bytes()
    places = sorted({*range(0, 100), *range(0, len(whole), 211), len(whole) - 1})
    for place in places:
        for damaged in (whole[:place], whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"cut or changed|record of"):
                store.read(KEY) and store.draws(KEY)
    path.write_bytes(whole + b" ")
    with pytest.raises(ValueError, match="cut or changed"):
        store.read(KEY) and store.draws(KEY)
    assert store.state(KEY) == ""
    assert files(store) == {f"{KEY}.damaged"}
    store.write(KEY, record(), posterior())
    assert store.state(KEY) == "done"
    (store.folder / KEY / file).write_bytes(b"")
    assert store.state(KEY) == ""
    assert files(store) == {f"{KEY}.damaged", f"{KEY}.damaged.2"}
    assert list(store.records()) == []


def test_a_missing_file_another_schema_and_a_swapped_folder_are_seen(store):
    store.write(KEY, record(), posterior())
    other = "f" * 32
    os.rename(store.folder / KEY, store.folder / other)
    assert store.state(other) == ""  # the record says that it is another cell's
    store.write(KEY, record(), posterior())
    (store.folder / KEY / DRAWS).unlink()
    assert store.state(KEY) == ""
    store.write(KEY, record(), None)
    assert store.state(KEY) == "done"
    (store.folder / KEY / RECORD).unlink()
    assert store.state(KEY) == ""


def test_a_record_of_another_schema_is_refused(store, monkeypatch):
    monkeypatch.setattr("pyrometer.benchmarks.store.SCHEMA", 99)
    store.write(KEY, record())
    monkeypatch.undo()
    with pytest.raises(ValueError, match="schema 99"):
        store.read(KEY)


# -- names, links ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_names_of_problems_are_data_and_never_paths(store, name, tmp_path):
    before = sorted(p.name for p in tmp_path.iterdir())
    store.write(KEY, record(problem=name), posterior())
    assert store.record(KEY).cell.problem == name
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    with pytest.raises(StoreError, match="not the name"):
        store.write(name, record())
    with pytest.raises(StoreError, match="not the name"), store.claim(name):
        pass


def test_links_are_not_followed(store, tmp_path):
    elsewhere = Store(tmp_path / "elsewhere")
    elsewhere.write(KEY, record(), posterior())
    (store.folder / KEY).symlink_to(elsewhere.folder / KEY)
    assert list(store.names()) == []
    store.set_aside(KEY)
    other = "f" * 32
    store.write(other, record(other), posterior())
    (store.folder / other / DRAWS).unlink()
    (store.folder / other / DRAWS).symlink_to(elsewhere.folder / KEY / DRAWS)
    assert store.state(other) == ""
    store.write(other, record(other))
    (store.folder / other / RECORD).rename(tmp_path / "moved")
    (store.folder / other / RECORD).symlink_to(tmp_path / "moved")
    assert store.state(other) == ""
    assert elsewhere.state(KEY) == "done"


def test_nothing_in_a_run_is_unpickled(store, tmp_path):
    canary = tmp_path / "canary"
    attack = b"cposix\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR."
    store.write(KEY, record(), posterior())
    for file in (RECORD, DRAWS):
        (store.folder / KEY / file).write_bytes(attack)
        with pytest.raises(ValueError, match=r"not a record|cut or changed"):
            store.draws(KEY)
    assert list(store.index()) == []
    assert store.state(KEY) == ""
    assert not canary.exists()


# -- a folder that cannot be written ---------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"file.*(Not a directory|exists)"):
        Store(tmp_path / "file" / "runs")
    with pytest.raises(StoreError, match="file"):
        Store(tmp_path / "file")


def too_large(folder: str, verdict) -> None:
    """In a process of its own: no file may be longer than 600 bytes, as on a disk with no more room."""
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    store = Store(folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
    try:
        store.write("f" * 32, record("f" * 32), posterior())
    except StoreError as error:
        verdict.put(str(error))
    else:
        verdict.put("")


def test_a_full_disk_is_an_error_and_harms_nothing(store):
    store.write(KEY, record(), posterior())
    context = multiprocessing.get_context("fork")
    verdict = context.SimpleQueue()
    process = context.Process(target=too_large, args=(str(store.folder), verdict))
    process.start()
    process.join(60)
    assert "too large" in verdict.get().lower()
    assert files(store) == {KEY}
    assert store.state(KEY) == "done"


def test_a_failed_sync_leaves_what_was_there(store, monkeypatch):
    store.write(KEY, record(), posterior())

    def broken(handle: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(StoreError, match="Input/output error"):
        store.write(KEY, record(seconds=2.0), posterior())
    monkeypatch.undo()
    assert store.record(KEY).row.cost.seconds == 1.0
    assert files(store) == {KEY}


# -- several processes -----------------------------------------------------------------------------------------------


def hold(folder: str, started, release) -> None:
    with Store(folder).claim(KEY) as mine:
        (Path(folder) / f".{KEY}.abcd.tmp").mkdir()
        started.put(mine)
        release.get()


def test_a_claim_is_one_process_s_and_ends_with_it(store):
    context = multiprocessing.get_context("fork")
    started, release = context.SimpleQueue(), context.SimpleQueue()
    process = context.Process(target=hold, args=(str(store.folder), started, release))
    process.start()
    assert started.get() is True
    with store.claim(KEY) as mine:
        assert not mine
    assert (store.folder / f".{KEY}.abcd.tmp").is_dir()  # at work there
    process.kill()
    process.join()
    with store.claim(KEY) as mine:
        assert mine
        assert files(store) == set()  # what the dead one left is cleared away
    assert list((store.folder / ".claims").iterdir()) == []


def write_often(folder: str) -> None:
    store = Store(folder)
    for _ in range(20):
        store.write(KEY, record(), posterior())


def test_two_processes_that_write_the_same_cell_leave_one_whole_result(store):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=write_often, args=(str(store.folder),)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert store.state(KEY) == "done"
    assert files(store) == {KEY}


# -- many ------------------------------------------------------------------------------------------------------------


def fill(store: Store, count: int) -> None:
    """As `write` does it, without syncing."""
    body = json.dumps({**plain(record()), "schema": 1})[1:] + "\n"
    import hashlib

    for number in range(count):
        key = f"{number:032x}"
        text = body.replace(KEY, key)
        folder = store.folder / key
        folder.mkdir()
        (folder / RECORD).write_text(f'{{"digest": "{hashlib.sha256(text.encode()).hexdigest()}",\n{text}')


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_an_index_is_quick_and_its_memory_flat(store, count):
    """Less than 3 s for 10,000 cells, in 1 MB: a record at a time."""
    fill(store, count)
    start = time.process_time()  # neighbours on the machine must not fail this
    lines = sum(1 for line in store.index() if line["state"] == "done" and line["budget"]["calls"] == 1000)
    seconds = time.process_time() - start
    assert lines == count
    assert seconds < 3 * max(1.0, count / 10_000)
    tracemalloc.start()
    for _ in store.index():
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20
