"""Sequential models: the order in time of a program's sites, and particles carried along it.

    w_t <- W_{t-1} p(x_t | past) p(y_t | x_t, past) / q(x_t | past),   W_t = w_t / sum_s w_t,
    log Z = sum_t log sum_s w_t

then, after the observations of a step, resampling, datum by datum (Gordon, Salmond & Smith 1993,
doi:10.1049/ip-f-2.1993.0015; Doucet & Johansen 2011). The increment is right whether or not there was resampling, since
the weights W_{t-1} that are carried stand in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

from .batching import out_of_place
from .cloud import Cloud, CloudPlan
from .density import Density
from .engine import EngineError
from .lineage import Entry, Leaf, Lineage, across
from .posterior import gathered
from .program import SOMETIMES, Site, fill_padding, settle, support_of, unmasked


@dataclass(frozen=True)
class Time:
    """The order in time that a program's statements show: in each step its latents, then its observations.

    steps   the latent sites of each step
    step_of site -> its step, observations too
    last    the last observation of each step: there, particles are weighed
    """

    steps: tuple[tuple[str, ...], ...]
    step_of: Mapping[str, int]
    last: frozenset[str]


def time_of(density: Density) -> Time:
    """Read the order of the statements: a latent that comes after an observation begins a step."""
    steps: list[list[str]] = [[]]
    step_of: dict[str, int] = {}
    last: list[str] = [""]
    for name, site in density.sites.items():
        if site.role == "latent":
            if last[-1]:
                steps.append([])
                last.append("")
            steps[-1].append(name)
        elif site.role in ("observed", "factor"):
            last[-1] = name
        else:
            continue
        step_of[name] = len(steps) - 1
    return Time(tuple(map(tuple, steps)), step_of, frozenset(n for n in last if n))


def why_not_sequential(density: Density) -> str:
    """Why particles cannot be carried along the program, in words; '' where they can."""
    if density.improper:
        return f"site {density.improper[0]!r} has an improper prior: particles cannot be drawn from it"
    if len(time_of(density).steps) < 2:
        return (
            "the program draws all latents before its first observation, so it has no order in time: write a sample "
            "statement for each step (for t in pyro.markov(range(T)): z_t, then x_t), or take importance sampling, SMC"
        )
    if not density.vectorised:
        return "the program cannot be batched over draws, and particles run side by side"
    return ""


@dataclass
class Term:
    """A site's log probability, per batch element, that can be made again with other values of the sites before it."""

    name: str
    entry: Entry


class Filter(Messenger):
    """Stands outermost in a run of the program in which every lane is a particle: draws latents from their proposals,
    adds up weights, and has the cloud weigh its particles at the end of each step.

    given   site -> unconstrained values of this lane, own layout: not drawn, and not part of the weights
    """

    def __init__(
        self, density: Density, cloud: Cloud, time: Time, lineage: Lineage, lane: Tensor,
        given: Mapping[str, Tensor], proposals: Mapping[str, Any], terms: list[Term] | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.sites, self.cloud, self.time, self.lineage, self.lane = density.sites, cloud, time, lineage, lane
        self.given, self.proposals, self.terms = given, proposals, terms
        self.increment: Any = 0.0
        self.log_joint: Any = 0.0
        self.log_given: Any = 0.0
        self.left = len(time.steps)
        self.jacobian: Tensor | None = None

    def _process_message(self, msg: Message) -> None:
        if msg["type"] != "sample" or site_is_subsample(msg):
            return
        settle(msg)
        if msg["is_observed"]:
            return
        name: str = msg["name"]
        site = _site(self.sites, name)
        if name in self.given:
            fill_padding(msg, site)
            transform = biject_to(support_of(msg["fn"]))
            u = site.to_pyro(self.given[name], site.unconstrained_event_dim)
            msg["value"] = transform(u)
            own = site.to_own(msg["value"], site.event_dim)
            across(partial(self._fix, name), own, self.lane)
            self.jacobian = site.per_element(transform.log_abs_det_jacobian(u, msg["value"]))
            return
        fn = self.proposals.get(name, msg["fn"])
        msg["value"] = _drawn(fn, name, site, self.cloud, self.lineage, self.lane)
        if fn is not msg["fn"]:
            self.increment = self.increment - _of_draw(fn, site, msg)

    def _postprocess_message(self, msg: Message) -> None:
        if msg["type"] != "sample" or site_is_subsample(msg):
            return
        name: str = msg["name"]
        site, fn = _site(self.sites, name), msg["fn"]
        if site.role == "deterministic":
            return
        log_prob = scale_and_mask(fn.log_prob(msg["value"]), msg["scale"], msg["mask"])
        log_prob = log_prob.expand(torch.broadcast_shapes(log_prob.shape, fn.batch_shape))
        element = site.per_element(log_prob)
        if name in self.given:
            self.log_given = self.log_given + element + self.jacobian
            return
        self.log_joint = self.log_joint + element
        entry = self.lineage.entry(element) if self.terms is not None else None
        if self.terms is not None and entry is not None:
            self.terms.append(Term(name, entry))
        if site.role != "latent" or name in self.proposals:
            self.increment = self.increment + element
        elif site.reweighted:  # drawn from fn itself, which knows of no scale or mask
            self.increment = self.increment + element - _of_draw(fn, site, msg)
        if name in self.time.last:
            self.weigh()

    def _fix(self, name: str, own: Tensor, lanes: Tensor) -> Tensor:
        self.cloud.fixed[name] = self.cloud.spread(own)[0]
        return lanes

    def weigh(self) -> None:
        self.left -= 1
        before = len(self.cloud.ancestors)

        def weigh(increment: Tensor, log_joint: Tensor, lane: Tensor) -> Tensor:
            self.cloud.weigh(increment, log_joint, self.left == 0)
            return lane

        none = torch.zeros(self.cloud.batch)
        across(weigh, none + self.increment, none + self.log_joint, self.lane)
        self.increment = self.log_joint = 0.0
        if len(self.cloud.ancestors) > before:
            self.lineage.clock += 1


class Guided(Messenger):
    """Stands outermost in a run of the guide, and keeps the distributions of its sites. Their parameters are made
    again when the model's run draws from them, with the values that the earlier sites have then."""

    def __init__(self, density: Density, cloud: Cloud, lineage: Lineage, lane: Tensor) -> None:
        super().__init__()
        self.sites, self.cloud, self.lineage, self.lane = density.guide_latents, cloud, lineage, lane
        self.proposals: dict[str, Any] = {}

    def _process_message(self, msg: Message) -> None:
        if msg["type"] != "sample" or site_is_subsample(msg) or msg["is_observed"]:
            return
        settle(msg)
        name: str = msg["name"]
        msg["value"] = _drawn(msg["fn"], name, _site(self.sites, name), self.cloud, self.lineage, self.lane)
        self.proposals[name] = msg["fn"]


def _of_draw(fn: Any, site: Site, msg: Message) -> Tensor:
    """The log density that a value was drawn by. Of padding none is told, since the joint tells none."""
    value: Any = msg["value"]
    log_prob = scale_and_mask(fn.log_prob(value), 1.0, msg["mask"]) if site.padded else unmasked(fn).log_prob(value)
    return site.per_element(log_prob.expand(torch.broadcast_shapes(log_prob.shape, fn.batch_shape)))


def _site(sites: Mapping[str, Site], name: str) -> Site:
    if name not in sites:
        raise RuntimeError(SOMETIMES.format(name))
    return sites[name]


def _drawn(fn: Any, name: str, site: Site, cloud: Cloud, lineage: Lineage, lane: Tensor) -> Tensor:
    """A draw in each lane, kept in the cloud; the tensor that stands for it in the program."""
    lineage.drawing = True
    # a copy, so that no transform takes it for the one it made and answers with what it made it of
    value = out_of_place(fn).clone()
    lineage.drawing = False
    if value.is_floating_point():
        value = value.to(torch.get_default_dtype())

    def keep(own: Tensor) -> Tensor:
        cloud.draw(name, own)
        return own

    def read() -> Tensor:
        return site.to_pyro(across(lambda _: cloud.read(name), lane), site.event_dim)

    own = across(keep, site.to_own(value, site.event_dim) + torch.zeros_like(lane, dtype=value.dtype))
    value = site.to_pyro(own, site.event_dim)
    if name in lineage.sites:
        lineage.clock += 1  # what a guide drew before is exchanged
    leaf = lineage.sites.setdefault(name, Leaf(name, read))
    lineage.plant(value, leaf)
    return value


def carried(
    density: Density, plan: CloudPlan, given: Mapping[str, Tensor] | None = None, num_moves: int = 0
) -> tuple[Cloud, dict[str, Tensor], Tensor]:
    """Carry particles through one run of the program: the cloud; the lines of the particles of the end, site ->
    (S, R, *batch, *own), smoothed by so many moves at each step (0: by ancestry); and the log density of the given.

    given  site -> (R, *own), unconstrained, one for each filter; their log density, with the log-Jacobian, is (R,)
    """
    time, cloud = time_of(density), Cloud(density, plan)
    fixed = given or {}
    lines: dict[str, Tensor] = {}

    def one(lane: Tensor) -> Tensor:
        with Lineage() as lineage:
            proposals: dict[str, Any] = {}
            if plan.guided:
                with Guided(density, cloud, lineage, lane) as guided:
                    density.problem.guide(*density.args, **density.kwargs)  # type: ignore[misc]
                proposals = guided.proposals
            theirs = {n: v[lane % plan.runs] for n, v in fixed.items()}
            terms: list[Term] | None = [] if num_moves else None
            with Filter(density, cloud, time, lineage, lane, theirs, proposals, terms) as particles:
                density.problem.model(*density.args, **density.kwargs)
                if particles.left:  # latents after the last observation
                    particles.weigh()
        if terms is not None:
            lines.update(_smoothed(cloud, time, lineage, lane, terms, num_moves))
        return none_but(lane) + particles.log_given

    log_given = density.together(one, plan.count * plan.runs)
    return cloud, lines or cloud.paths(), log_given[: plan.runs]


def outside(function: Callable[[], Any], lane: Tensor) -> Any:
    """A function of whole tensors, called from inside vmap as from outside: its draws are not one for each lane."""
    answer: list[Any] = []

    def call(lanes: Tensor) -> Tensor:
        answer.append(function())
        return lanes

    across(call, lane)
    return answer[0]


def shared_latents(density: Density) -> tuple[str, ...]:
    """The latents before the first observation, up to the last on which some site of every later step depends."""
    time = time_of(density)
    terms: list[Term] = []

    def one(lane: Tensor) -> Tensor:
        cloud = Cloud(density, CloudPlan(2))
        with Lineage() as lineage, Filter(density, cloud, time, lineage, lane, {}, {}, terms):
            density.problem.model(*density.args, **density.kwargs)
        return lane

    with density.uncounted(), torch.random.fork_rng(devices=[]):
        density.together(one, 2)
    later = range(1, len(time.steps))
    reach = {n: {time.step_of[t.name] for t in terms if n in t.entry.leaves} for n in time.steps[0]}
    shared = [i for i, n in enumerate(time.steps[0]) if reach[n].issuperset(later)]
    return time.steps[0][: shared[-1] + 1] if shared else ()


def none_but(lane: Tensor) -> Tensor:
    """Zero, that differs between lanes as far as vmap can see."""
    return torch.zeros_like(lane, dtype=torch.float64)


def check_lines(density: Density, cloud: Cloud, lines: Mapping[str, Tensor]) -> None:
    """See that the log joint that was added up along some lines is the density's own: an operation that hides from the
    lineage would show here. Raises `EngineError`."""
    some = {name: value[:2, 0] for name, value in lines.items()}
    with density.uncounted():
        truth = density.log_joint(some)
    told = cloud.log_joint[:2, 0].to(truth)
    if not torch.allclose(told, truth, rtol=1e-4, atol=1e-4, equal_nan=True):
        worst = float((told - truth).abs().max())
        raise EngineError(
            f"the particles' log joint is off by {worst:.3g} from that of their lines: the program keeps values of its "
            "latents where resampling cannot reach them; compute from the last sample statements in plain torch"
        )


def _smoothed(
    cloud: Cloud, time: Time, lineage: Lineage, lane: Tensor, terms: list[Term], num_moves: int
) -> dict[str, Tensor]:
    """Lines whose ancestors were chosen anew, going back from the particles of the end (see `engines/particle_filter`).

    Raises `EngineError` where a site depends on more than the step before it.
    """
    after: dict[int, list[Entry]] = {}  # step -> terms of the next that depend on it
    for term in terms:
        step = time.step_of[term.name]
        for leaf in term.entry.leaves:
            if time.step_of[leaf] < step - 1:
                raise EngineError(
                    f"site {term.name!r} depends on {leaf!r}, more than a step before it, and smoothing backward needs "
                    "a Markov chain: use smoothing='ancestry'"
                )
        if any(time.step_of[leaf] == step - 1 for leaf in term.entry.leaves):
            after.setdefault(step - 1, []).append(term.entry)

    def stand(step: int, index: Tensor) -> None:
        for name in time.steps[step]:
            cloud.present[name] = gathered(cloud.values[name][0], index), len(cloud.ancestors)
        lineage.clock += 1

    def height(step: int, index: Tensor) -> Tensor:
        """log p of the next step's sites given these particles of the step, (S, R, *batch)."""
        stand(step, index)
        found: list[Tensor] = []

        def keep(value: Tensor) -> Tensor:
            found.append(cloud.spread(value))
            return value

        total: Any = sum(lineage.now(entry) for entry in after.get(step, ()))
        across(keep, none_but(lane) + torch.zeros(cloud.batch) + total)
        return found[0]

    def move(index: Tensor, here: Tensor, drawn: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        accepted = torch.rand_like(here).log() < there - here
        return torch.where(accepted, drawn, index), torch.where(accepted, there, here)

    def propose(weights: Tensor) -> Tensor:
        columns = weights.flatten(1).exp().T  # (R batch, S)
        return torch.multinomial(columns, cloud.plan.count, replacement=True).T.reshape(weights.shape)

    last = len(time.steps) - 1
    index = torch.arange(cloud.plan.count, device=lane.device)
    index = index.reshape(-1, *[1] * (cloud.even.dim() - 1)).expand(cloud.even.shape)
    chosen = {last: index}
    stand(last, index)
    for step in range(last - 1, -1, -1):
        weights, when = cloud.filtered[step]
        if cloud.filtered[step + 1][1] > when:
            index = cloud.ancestors[when].gather(0, index)
        here = height(step, index)
        for _ in range(num_moves):
            drawn = outside(partial(propose, weights), lane)
            there = height(step, drawn)
            index, here = outside(partial(move, index, here, drawn, there), lane)
        chosen[step] = index
        stand(step, index)
    return {
        name: gathered(cloud.values[name][0], chosen[step]) for step, names in enumerate(time.steps) for name in names
    }  # fmt: skip
