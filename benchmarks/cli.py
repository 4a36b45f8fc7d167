"""The command line. Torch and Pyro are imported inside the commands, so that help and mistakes come at once."""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.status import Status
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from .comparison import Comparison, Row, Theta

INTERRUPTED = 130  # 128 + SIGINT, as shells report it


class Mistake(click.ClickException):
    """What the user can put right: one line on stderr, exit code 2."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class Commands(click.Group):
    """Mistakes end in one line and code 2, Ctrl-C in code 130, neither in a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(INTERRUPTED)
        except ValueError as error:
            from pyrometer.inference import ProblemError

            if isinstance(error, ProblemError):
                raise Mistake(str(error)) from error
            raise


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="pyrometer")
def main() -> None:
    """Which inference method should I trust on my model? Pyro models, fit by many engines, compared with the truth."""


json_option = click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write everything to this file too.",
)
seed_option = click.option("--seed", type=int, default=0, show_default=True, help="A whole number from 0.")


@main.command()
@click.argument("model")
@click.option("--engines", help="Names with commas between, as in svi,nuts,importance. [default: all there are]")
@click.option("--learn", help="Learners of theta, likewise: svi,em or em:nuts for EM with a NUTS E-step.")
@click.option(
    "--set",
    "assignments",
    multiple=True,
    metavar="KEY=VALUE",
    help="A setting: of the model (latent_dim=2), an engine or learner (svi.num_steps=500), an E-step "
    "(em.e_step.num_samples=50). May be repeated.",
)
@seed_option
@json_option
@click.option("--device", help="Where to compute, as torch names it: cpu, cuda.")
def compare(
    model: str,
    engines: str | None,
    learn: str | None,
    assignments: tuple[str, ...],
    seed: int,
    json_path: Path | None,
    device: str | None,
) -> None:
    """Compare engines on MODEL, at its own theta or at those that learners find.

    Each engine is judged against the truth, where it is known, at the same theta. What cannot run says why.
    """
    _check_writable(json_path)
    from pyrometer.inference.registry import engines as all_engines

    from .comparison import gather, judge
    from .settings import configure

    problem, chosen, learners = configure(model, engines or ",".join(all_engines()), learn, assignments)
    words: list[Any] = ["pyrometer", "compare", model]
    for option, value in (("--engines", engines), ("--learn", learn), ("--seed", seed), ("--device", device)):
        words += [option, value] if value is not None else []
    words += [word for assignment in assignments for word in ("--set", assignment)]
    with _announcer() as announce:
        steps = judge(
            problem, chosen, learn=learners, seed=seed, device=device, announce=announce, progress=announce.progress
        )
        found, ended = _collect(steps)
    comparison = gather(problem, found, seed=seed, command=shlex.join(map(str, words)), complete=ended is None)
    _deliver(comparison, json_path, ended)


@main.command(name="list")
def list_() -> None:
    """List the models, engines and learners that can be named."""
    from pyrometer.inference.registry import engines, learners
    from pyrometer.models import families

    console = _console()
    for title, found in (("models", families()), ("engines", engines()), ("learners", learners())):
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name in found:
            try:
                words = (found[name].__doc__ or "").strip().split("\n\n")[0]
            except ValueError as error:  # a plug-in that cannot be imported must not hide the others
                words = str(error)
            table.add_row(Text("  " + name, style="bold"), Text(" ".join(words.split())))
        console.print(Text(title, style="bold underline"), table, Text(""), sep="\n")


@main.command()
def doctor() -> None:
    """Show versions, compiler and device, and check a known answer in a few seconds."""
    from pyrometer.inference import ImportanceSampling, infer
    from pyrometer.models import conjugate_gaussian

    from .facts import machine, versions

    compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), "none found")
    problem = conjugate_gaussian.problem(num_data=20)
    start = time.perf_counter()
    posterior = infer(problem, ImportanceSampling(proposal="prior", num_samples=2000), seed=0)
    seconds = time.perf_counter() - start
    truth = problem.reference_at(posterior.parameters).log_evidence
    if posterior.log_evidence is None or truth is None:
        raise click.ClickException(f"self-test: no evidence to compare; {posterior.status}.")
    value, error = posterior.log_evidence.total()
    exact = truth.total()[0]
    # |z| > 4.9 happens by chance once in a million; the error bar must be small as well, or anything passes.
    passed = abs(value - exact) < 4.9 * error and error < 0.5
    facts = {**versions(), **machine(), "compiler": compiler}
    facts["self-test"] = (
        f"{'passed' if passed else 'FAILED'}: log evidence {value:.3f} +- {error:.3f} by importance sampling, "
        f"{exact:.3f} exactly ({seconds:.1f} s)"
    )
    table = Table.grid(padding=(0, 2))
    for name, fact in facts.items():
        table.add_row(Text(name, style="bold"), Text(str(fact)))
    _console().print(table)
    if not passed:
        raise click.ClickException("the self-test failed: numbers from this installation cannot be trusted.")


@main.command()
@seed_option
@json_option
def demo(seed: int, json_path: Path | None) -> None:
    """A variational autoencoder on handwritten digits, learned in three ways, judged by several engines."""
    _check_writable(json_path)
    import torch

    from .comparison import gather
    from .demo import steps

    # The networks are small: a second thread gains a few seconds, and loses minutes where others use the cores.
    torch.set_num_threads(1)
    with _announcer() as announce:
        problem, results = steps(seed, announce, announce.progress)
        found, ended = _collect(results)
    comparison = gather(problem, found, seed=seed, command=f"pyrometer demo --seed {seed}", complete=ended is None)
    _deliver(comparison, json_path, ended)


@main.command()
@click.option("--rounds", type=click.IntRange(min=3), default=15, show_default=True, help="Timed rounds of each case.")
def speed(rounds: int) -> None:
    """Time an SVI step against the same loss written by hand, and prior-weighted draws."""
    from .speed import report

    _console().print(report(rounds))


# -- helpers ---------------------------------------------------------------------------------------------------------


def _console(stderr: bool = False) -> Console:
    """As wide as the terminal; 120 columns where the output goes to a file or a pipe, which has no width."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=120)


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
def _announcer() -> Iterator[Announcer]:
    console = _console(stderr=True)
    if not console.is_terminal:
        yield Announcer(None)
        return
    with console.status("starting") as status:
        yield Announcer(status)


def _collect(steps: Iterator[Theta | Row]) -> tuple[list[Theta | Row], BaseException | None]:
    """All that could be computed, and what ended it early: Ctrl-C or an error costs no row that was ready."""
    found: list[Theta | Row] = []
    try:
        found.extend(steps)
    except (KeyboardInterrupt, Exception) as ended:
        return found, ended
    return found, None


def _deliver(comparison: Comparison, json_path: Path | None, ended: BaseException | None) -> None:
    """Print and write the comparison, and then end as the run did."""
    _console().print(comparison)
    if json_path is not None:
        try:
            comparison.to_json(json_path)
        except OSError as error:
            raise Mistake(f"--json {json_path}: {error.strerror or error}.") from error
    if ended is not None:
        raise ended


def _check_writable(path: Path | None) -> None:
    """Found out now, not after minutes of work. Raises Mistake."""
    if path is not None and not path.absolute().parent.is_dir():
        raise Mistake(f"--json {path}: there is no folder {path.absolute().parent}; make it first.")
