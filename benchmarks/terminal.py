"""What the commands share: options, mistakes in one line, what is shown while they run, and what comes out of them."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.console import Console, RenderableType
from rich.status import Status
from rich.text import Text

if TYPE_CHECKING:
    from .speed.record import Begun, Measurement

T = TypeVar("T")

INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class Mistake(click.ClickException):
    """What the user can put right: one line on stderr, exit code 2."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class Commands(click.Group):
    """Mistakes end in one line and code 2, Ctrl-C and SIGTERM in code 130, none of them in a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with interruptible() as asked:
                try:
                    return super().invoke(ctx)
                except ImportError:  # what a library that is being imported makes of it
                    if asked.is_set():
                        raise KeyboardInterrupt from None
                    raise
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(INTERRUPTED)
        except ValueError as error:
            from pyrometer.inference import ProblemError

            if isinstance(error, ProblemError):
                raise Mistake(str(error)) from error
            raise


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """SIGTERM ends what runs as Ctrl-C does; yields whether either has come."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def interrupt(*_: object) -> None:
        asked.set()
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler in (signal.SIG_DFL, signal.default_int_handler):  # else it is ignored, or somebody else's
            signal.signal(number, interrupt)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# -- options ----------------------------------------------------------------------------------------------------------

json_option = click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write everything to this file too.",
)
seed_option = click.option("--seed", type=int, default=0, show_default=True, help="A whole number from 0.")


def listed(convert: Callable[[str], Any], expected: str) -> Callable[..., tuple[Any, ...]]:
    """Reads an option with commas between its values."""

    def read(ctx: click.Context, parameter: click.Parameter, text: str | None) -> tuple[Any, ...]:
        try:
            return tuple(convert(word.strip()) for word in (text or "").split(",") if word.strip())
        except ValueError:
            raise click.BadParameter(f"{text!r}: expected {expected} with commas between.") from None

    return read


def check_writable(path: Path | None, option: str = "--json") -> None:
    """Found out now, not after minutes of work. Raises Mistake."""
    if path is None:
        return
    folder = path.absolute().parent
    if not folder.is_dir():
        raise Mistake(f"{option} {path}: there is no folder {folder}; make it first.")
    if not os.access(path if path.exists() and not path.is_file() else folder, os.W_OK):
        raise Mistake(f"{option} {path}: {folder} cannot be written.")


# -- while a command runs, and what comes of it ------------------------------------------------------------------------


def console(stderr: bool = False) -> Console:
    """As wide as the terminal; 120 columns where the output goes to a file or a pipe, which has no width."""
    found = Console(stderr=stderr)
    return found if found.is_terminal else Console(stderr=stderr, width=120)


class Announcer:
    """Says on a terminal what is running now and how far it is; without a status line it says nothing."""

    def __init__(self, status: Status | None) -> None:
        self.status = status
        self.text = ""
        self.start = time.perf_counter()

    def __call__(self, text: str) -> None:
        self.text = text
        self._show("")

    def progress(self, stage: str, step: int, total: int) -> None:
        self._show(f": {stage} {step}/{total}")

    def _show(self, detail: str) -> None:
        if self.status is not None:
            self.status.update(Text(f"{time.perf_counter() - self.start:.0f} s  {self.text}{detail}"))


@contextmanager
def announcer() -> Iterator[Announcer]:
    where = console(stderr=True)
    if not where.is_terminal:
        yield Announcer(None)
        return
    with where.status("starting") as status:
        yield Announcer(status)


def watched(steps: Iterator[Begun | Measurement]) -> Iterator[Measurement]:
    """The measurements; on stderr a line for each, begun before it and ended with its state and seconds."""
    from .speed.record import Measurement

    where, start, open_line = console(stderr=True), time.perf_counter(), False
    try:
        for step in steps:
            if isinstance(step, Measurement):
                took = f": {step.state}, {time.perf_counter() - start:.1f} s"
                where.print(Text(took, style="dim" if step.state == "done" else "red"))
                open_line = False
                yield step
            else:
                where.print(Text(str(step), style="dim"), end="")
                open_line, start = True, time.perf_counter()
    finally:
        if open_line:
            where.print()


def collect(steps: Iterator[T]) -> tuple[list[T], BaseException | None]:
    """All that could be computed, and what ended it early: Ctrl-C or an error costs no row that was ready."""
    found: list[T] = []
    try:
        found.extend(steps)
    except (KeyboardInterrupt, Exception) as ended:
        return found, ended
    return found, None


def deliver(
    shown: RenderableType, to_json: Callable[[Path], Any], json_path: Path | None, ended: BaseException | None
) -> None:
    """Write and print what was found, and then end as the run did. The file comes first: a reader of the table may
    have gone by now. What cannot be written goes to the folder for temporary files: it may be hours of work."""
    failed = ""
    if json_path is not None:
        try:
            to_json(json_path)
        except OSError as error:
            failed = f"--json {json_path}: {error.strerror or error}{_rescued(to_json)}."
    show(shown)
    if failed:
        raise Mistake(failed)
    if ended is not None:
        raise ended


def _rescued(to_json: Callable[[Path], Any]) -> str:
    """Writes it elsewhere; in words where."""
    with suppress(OSError):
        path = Path(tempfile.mkdtemp(prefix="pyrometer-")) / "out.json"
        to_json(path)
        return f"; everything is in {path} instead"
    return ""


def show(*parts: RenderableType) -> None:
    """Print it; on standard error where standard output takes no more (a full disk). Raises Mistake then."""
    try:
        for part in parts:
            click.echo(part) if isinstance(part, str) else console().print(part)
    except BrokenPipeError:
        raise
    except OSError as error:
        for part in parts:
            click.echo(part, err=True) if isinstance(part, str) else console(stderr=True).print(part)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still in its buffer would fail again at the end
        raise Mistake(f"standard output: {error.strerror or error}.") from error
