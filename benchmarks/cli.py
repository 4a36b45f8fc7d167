"""The command line. Torch and Pyro are imported inside the commands, so that help and mistakes come at once."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from .terminal import (
    Commands,
    Mistake,
    announcer,
    check_writable,
    collect,
    deliver,
    json_option,
    listed,
    seed_option,
    show,
    watched,
)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="pyrometer")
def main() -> None:
    """Which inference method should I trust on my model? Pyro models, fit by many engines, compared with the truth."""


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

    Each engine is judged against the truth, where it is known, at the same theta. What cannot run says why. The file of
    --json has every measure there is, the table those for which it has room.
    """
    check_writable(json_path)
    from pyrometer.inference.registry import engines as all_engines

    from .comparison import gather, judge
    from .settings import configure

    named = ",".join(all_engines()) if engines is None else engines
    problem, chosen, learners = configure(model, named, learn, assignments)
    words: list[Any] = ["pyrometer", "compare", model]
    for option, value in (("--engines", engines), ("--learn", learn), ("--seed", seed), ("--device", device)):
        words += [option, value] if value is not None else []
    words += [word for assignment in assignments for word in ("--set", assignment)]
    with announcer() as announce:
        steps = judge(
            problem, chosen, learn=learners, seed=seed, device=device, announce=announce, progress=announce.progress,
            every=json_path is not None,
        )  # fmt: skip
        found, ended = collect(steps)
    comparison = gather(problem, found, seed=seed, command=shlex.join(map(str, words)), complete=ended is None)
    deliver(comparison, comparison.to_json, json_path, ended)


@main.command()
@click.argument("model")
@click.option("--learn", required=True, help="Learners with commas between, as in svi,wake_sleep,em:nuts.")
@click.option(
    "--evaluate",
    default="auto",
    show_default=True,
    help="Who judges: reference (the truth), auto (that, or what comes nearest), or engines that give evidence.",
)
@click.option("--training", is_flag=True, help="Judge on the training data instead of the held-out ones.")
@click.option("--gaps", "with_gaps", is_flag=True, help="Split each learner's loss: learning, family, amortisation.")
@click.option("--family", default="AutoNormal", show_default=True, help="Of --gaps, or AutoMultivariateNormal.")
@click.option(
    "--worst",
    "worst_path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Draw the data that the best learner's guide misses most, by k-hat, to this PNG.",
)
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="A setting, as for compare.")
@seed_option
@json_option
@click.option("--device", help="Where to compute, as torch names it: cpu, cuda.")
def square(
    model: str,
    learn: str,
    evaluate: str,
    training: bool,
    with_gaps: bool,
    family: str,
    worst_path: Path | None,
    assignments: tuple[str, ...],
    seed: int,
    json_path: Path | None,
    device: str | None,
) -> None:
    """Train MODEL with each learner, judge each with every evaluator, on data not seen.

    With --gaps a second table says where each learner's guide loses its nats.
    """
    check_writable(json_path)
    check_writable(worst_path, "--worst")
    from .crossing import Plan, run

    plan = Plan(model, learn, evaluate, training, with_gaps, family, worst_path, assignments, seed, device)
    with announcer() as announce:
        results = run(plan, announce, announce.progress, collect)
    deliver(results, results.to_json, json_path, results.ended)


@main.command()
@click.argument("runs", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default="report.html", show_default=True)
@click.option("--compare", "against", type=click.Path(path_type=Path), help="Other runs: say what changed since them.")
@click.option("--open", "opened", is_flag=True, help="Open the page in the browser.")
def report(runs: Path, out: Path, against: Path | None, opened: bool) -> None:
    """Write one page on the folder RUNS: which engine to trust on which model, at which cost.

    The page needs nothing but itself; its numbers are written beside it as CSV and JSON.
    """
    from .page import report as write

    words: list[Any] = ["pyrometer", "report", runs, "--out", out, *(["--compare", against] if against else [])]
    try:
        written = write(runs, out, against=against, command=shlex.join(map(str, words)))
    except OSError as error:
        raise Mistake(f"--out {out}: {error.strerror or error}.") from error
    if written.unreadable:
        click.echo(f"{len(written.unreadable)} runs could not be read; the page says which.", err=True)
    show(f"{written.page}: {written.cells} runs, {written.page.stat().st_size / 2**20:.1f} MB")
    if opened:
        click.launch(str(written.page))


@main.command()
@click.argument("model")
@click.argument("engine")
@click.option("--replicates", type=int, default=200, show_default=True, help="Data sets, or data, to simulate.")
@click.option("--draws", type=int, default=99, show_default=True, help="That each truth is ranked among, at most.")
@click.option("--rounds", type=int, default=3, show_default=True, help="Four times as many each, while in doubt.")
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="A setting, as for compare.")
@seed_option
@json_option
@click.option(
    "--picture",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Draw the rank ECDFs with their bands to this PNG.",
)
@click.pass_context
def calibrate(
    ctx: click.Context,
    model: str,
    engine: str,
    replicates: int,
    draws: int,
    rounds: int,
    assignments: tuple[str, ...],
    seed: int,
    json_path: Path | None,
    picture: Path | None,
) -> None:
    """Is ENGINE right on MODEL? Simulation-based calibration, at the model's own theta.

    Latents and data are drawn from the model, the latents inferred from the data, and the true ones ranked among the
    draws: ranks are uniform if the answer is the posterior. Exit code 1 where it is not, or cannot be told.
    """
    check_writable(json_path)
    check_writable(picture, "--picture")
    from .calibrate import calibrate as run
    from .calibrate_report import check_pictures
    from .calibrate_report import picture as draw
    from .settings import configure

    if picture is not None:
        check_pictures()

    problem, chosen, _ = configure(model, engine, None, assignments)
    if len(chosen) != 1:
        raise Mistake(f"calibrate takes one engine, got {len(chosen)}: {', '.join(chosen)}.")
    words: list[Any] = ["pyrometer", "calibrate", model, engine, "--replicates", replicates, "--draws", draws]
    words += ["--rounds", rounds, "--seed", seed]
    words += [word for assignment in assignments for word in ("--set", assignment)]
    (method,) = chosen.values()
    with announcer() as announce:
        announce(f"calibrating {engine} on {model}")
        found = run(
            problem, method, replicates=replicates, draws=draws, rounds=rounds, seed=seed, progress=announce.progress,
            command=shlex.join(map(str, words)),
        )  # fmt: skip
    ended: BaseException | None = None if found.complete else KeyboardInterrupt()
    if picture is not None:
        try:
            draw(found, picture)
        except OSError as error:
            ended = ended or Mistake(f"--picture {picture}: {error.strerror or error}.")
    deliver(found, found.to_json, json_path, ended)
    ctx.exit(0 if found.passed else 1)


@main.command(name="list")
@click.option("--serves", "matrix", is_flag=True, help="Which engine runs on which model, and why not, as markdown.")
def list_(matrix: bool) -> None:
    """List the models, engines and learners that can be named."""
    if matrix:
        from .serves import as_markdown, serves

        show(as_markdown(serves()))
        return
    from pyrometer.inference.registry import engines, learners
    from pyrometer.models import families

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
        show(Text(title, style="bold underline"), table, Text(""))


@main.command()
def doctor() -> None:
    """Show versions, compiler and device, and check a known answer in a few seconds."""
    from .doctor import examined

    facts, passed = examined()
    table = Table.grid(padding=(0, 2))
    for name, fact in facts.items():
        table.add_row(Text(name, style="bold"), Text(str(fact)))
    show(table)
    if not passed:
        raise click.ClickException("the self-test failed: numbers from this installation cannot be trusted.")


@main.command()
@click.option("--clear", is_flag=True, help="Delete what is kept.")
def cache(clear: bool) -> None:
    """Show, or delete, the compiled densities kept on disk; a deleted one is compiled again when next used."""
    if clear:
        from pyrometer.inference.native.toolchain import clear as delete

        count, size = delete()
        show(f"deleted {count} compiled densities, {size / 2**20:.1f} MB")
    from .doctor import kept

    show(kept())


@main.command()
@seed_option
@json_option
def demo(seed: int, json_path: Path | None) -> None:
    """A variational autoencoder on handwritten digits, learned in three ways, judged by several engines."""
    check_writable(json_path)
    import torch

    from .comparison import gather
    from .demo import bracketed, in_words, steps

    # The networks are small: a second thread gains a few seconds, and loses minutes where others use the cores.
    torch.set_num_threads(1)
    with announcer() as announce:
        fits: dict[str, Any] = {}
        problem, results = steps(seed, announce, announce.progress, fits)
        found, ended = collect(results)
        bracket = None
        if ended is None:
            announce("bracketing the evidence")
            bracket = bracketed(problem, fits, seed)
    comparison = gather(problem, found, seed=seed, command=f"pyrometer demo --seed {seed}", complete=ended is None)
    deliver(comparison, comparison.to_json, json_path, ended)
    if bracket is not None:
        show("\n" + in_words(bracket))


@main.command()
@click.argument("cases", nargs=-1, metavar="[CASE ...]")
@click.option("--tools", help="Names or beginnings, with commas between: pyrometer,numpyro. [default: all there are]")
@click.option("--chains", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--draws", type=click.IntRange(min=4), default=1000, show_default=True, help="Of each chain.")
@click.option("--warmup", type=click.IntRange(min=0), help="Of each chain. [default: each sampler's own]")
@click.option("--rounds", type=click.IntRange(min=1), default=4, show_default=True, help="Processes for each tool.")
@click.option(
    "--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Runs in each process, at least."
)
@click.option("--limit", type=click.IntRange(min=1), default=600, show_default=True, help="Seconds for a process.")
@click.option("--cores", type=click.IntRange(min=1), default=2, show_default=True, help="That a process may use.")
@seed_option
@json_option
def speed(cases: tuple[str, ...], tools: str | None, seed: int, json_path: Path | None, **settings: int | None) -> None:
    """Time Pyrometer and its peers on the same models: NUTS, HMC, steps of a VAE's fit, importance weights, SMC.

    CASE is a name or the beginning of several, as in svi-step; without one all are run. Every measurement has a
    process of its own, and tools take turns. Peers that are not installed are listed: pip install pyrometer[peers].
    """
    check_writable(json_path)
    from .speed.cases import chosen
    from .speed.record import Plan
    from .speed.results import Benchmark
    from .speed.run import steps
    from .speed.table import render

    if seed < 0:
        raise Mistake(f"--seed {seed}: expected a whole number from 0.")
    plan = Plan(seed=seed, **settings)  # type: ignore[arg-type]
    names, wanted = chosen(cases), tools.split(",") if tools else []
    words = ["pyrometer", "speed", *cases, *(["--tools", tools] if tools else []), "--seed", str(seed)]
    words += [word for key, value in settings.items() if value is not None for word in (f"--{key}", str(value))]
    measurements, ended = collect(watched(steps(names, wanted, plan)))
    benchmark = Benchmark(plan, tuple(measurements), command=shlex.join(words), complete=ended is None)
    deliver(render(benchmark), benchmark.to_json, json_path, ended)


@main.command()
@click.argument("grid", metavar="smoke|standard|dlvm|FILE.toml")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default="runs", show_default=True,
              help="The folder of results; what is finished there is not run again.")  # fmt: skip
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Cells at a time.")
@click.option("--models", callback=listed(str, "names"), help="Only these, with commas between; likewise:")
@click.option("--engines", callback=listed(str, "names"), help="Only these engines.")
@click.option("--budgets", callback=listed(float, "numbers"), help="These calls for each cell, not the grid's.")
@click.option("--seeds", callback=listed(int, "whole numbers"), help="These seeds, not the grid's.")
@click.option("--rerun", callback=listed(str, "states"), help="Run what ended so again: failed,'timed out',done.")
@click.option("--limit", type=click.FloatRange(min=0, min_open=True), default=600, show_default=True,
              help="Seconds for a cell.")  # fmt: skip
@click.option("--memory", type=click.FloatRange(min=0, min_open=True), default=4096, show_default=True,
              help="MB for a cell.")  # fmt: skip
@click.option("--backend", default="process", show_default=True, help="process, in-process, loky, dask or ray.")
@click.option("--address", help="Of a running cluster, for dask and ray.")
def bench(grid: str, out: Path, **options: Any) -> None:
    """Run a grid of problems, engines, budgets and seeds into a folder.

    A run that was ended, by Ctrl-C or worse, goes on where it was; a cell that crashes, hangs or takes too much memory
    is a row that says so.
    """
    from .bench import Going
    from .bench import bench as run
    from .grid import named, selected
    from .store import StoreError
    from .worker import WorkerError

    chosen = selected(named(grid), **{key: options.pop(key) for key in ("models", "engines", "budgets", "seeds")})
    with announcer() as announce:

        def tell(going: Going) -> None:
            wrong = ", ".join(f"{count} {state}" for state, count in going.states.items() if state != "done")
            left = "" if going.left is None else f", {max(1, round(going.left / 60))} min left"
            announce(f"{going.done} of {going.total} cells{f', {wrong}' if wrong else ''}{left}  {going.last}")

        try:
            done = run(chosen, out, progress=tell, **options)
        except StoreError as error:
            raise Mistake(str(error)) from error
        except WorkerError as error:
            raise click.ClickException(str(error)) from error
    show(
        done.table(),
        f"{len(done.states)} cells in {out}; the page: pyrometer report {shlex.quote(str(out))} --out report.html",
    )
