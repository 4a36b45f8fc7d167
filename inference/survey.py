"""The first run of a model and of its guide: sites, plates, parameters, and every fault that can be seen beforehand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pyro
import torch
from pyro.distributions import Delta
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from .parameters import Parameters, find_parameters
from .problem import Problem, ProblemError
from .program import Plate, Site, lift_mask, support_of


@dataclass(frozen=True)
class ModelFacts:
    """What the model's first run shows. `improper`: latent sites that cannot be drawn from their prior."""

    sites: dict[str, Site]
    theta: Parameters
    improper: list[str]
    batch_plates: list[Plate]
    data_plate: Plate | None


@dataclass(frozen=True)
class GuideFacts:
    """What the guide's first run shows, or the fault that keeps it from being used."""

    sites: dict[str, Site] = field(default_factory=dict)
    phi: Parameters = field(default_factory=lambda: Parameters({}))
    fault: ProblemError | None = None


def survey_model(problem: Problem, frozen: Sequence[Tensor] = ()) -> ModelFacts:
    """Run the model once; `frozen` are no parameters, whatever Pyro makes of them. Raises `ProblemError`, naming the
    site or argument, where the model cannot be used."""
    for where, value in [*enumerate(problem.args), *problem.kwargs.items()]:
        if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(value)):
            raise ProblemError(f"argument {where}: data must not require gradients; pass it detached.")
    survey = _run(problem, problem.model, "model")
    log_probs = _log_probs(survey)
    sites = survey.sites()
    observed = [s for s in sites.values() if s.role in ("observed", "factor")]
    if not observed:
        raise ProblemError("the model observes nothing: give data by obs=..., pyro.condition or pyro.factor.")
    latent = [s for s in sites.values() if s.role == "latent"]
    batch_plates = _common_plates(latent + observed)
    shared = batch_plates or _common_plates(observed)
    improper = [s.name for s in latent if _is_improper(survey.messages[s.name]["fn"])]
    theta = find_parameters(log_probs, problem.model, [*_data(problem), *frozen])
    lengths = {t.shape[0] for t in _data(problem) if t.dim()}
    data_plate = max(shared, key=lambda p: (p.size in lengths, p.size)) if shared else None
    return ModelFacts(sites, theta, improper, batch_plates, data_plate)


def survey_guide(problem: Problem, model: ModelFacts, frozen: Sequence[Tensor] = ()) -> GuideFacts:
    """Run the guide once. A fault is kept, for the engine that asks for the guide: the others do not need it."""
    if problem.guide is None:
        return GuideFacts(
            fault=ProblemError(
                f"problem {problem.name!r} has no guide: pass guide=... to Problem, or name an autoguide."
            )
        )
    try:
        survey = _run(problem, problem.guide, "guide")
        log_probs = _log_probs(survey)
        sites = survey.sites()
        _check_guide(sites, model)
    except ProblemError as error:
        return GuideFacts(fault=error)
    # a guide that proposes points (Delta) shows its parameters in its values only
    values: list[Tensor] = [m["value"] for m in survey.messages.values() if not m["is_observed"]]
    phi = find_parameters(log_probs + values, problem.guide, [*_data(problem), *frozen, *model.theta.tensors])
    return GuideFacts(sites, phi)


def _check_guide(sites: Mapping[str, Site], model: ModelFacts) -> None:
    latents = {n: s for n, s in model.sites.items() if s.role == "latent"}
    for name, site in sites.items():
        if site.role != "latent":
            continue
        if name not in latents and not site.auxiliary:
            raise ProblemError(f"guide site {name!r} is not a latent site of the model ({_list(latents)}).")
        outside = [p.name for p in model.batch_plates if p not in site.plates]
        if outside:
            raise ProblemError(
                f"guide site {name!r} is not inside plate {outside[0]!r} as in the model, so its density cannot be "
                "told apart by datum; put it inside the same plate, or name the autoguide "
                "(SVI(guide='AutoMultivariateNormal')) to get one per datum."
            )
        if name in latents and site.discrete != latents[name].discrete:
            kinds = ("discrete", "continuous") if site.discrete else ("continuous", "discrete")
            raise ProblemError(f"guide site {name!r} is {kinds[0]}, the model's {kinds[1]}: the supports must agree.")
        if name in latents and site.shape != latents[name].shape:
            raise ProblemError(
                f"guide site {name!r} has shape {site.shape}, the model's has {latents[name].shape}; they must agree."
            )
    missing = [n for n, site in latents.items() if n not in sites and site.support is None]
    if missing:
        raise ProblemError(f"the guide lacks site {missing[0]!r} of the model; sample it there too.")


def _run(problem: Problem, program: Callable[..., Any], what: str) -> Survey:
    survey = Survey()
    try:
        with torch.enable_grad(), pyro.validation_enabled(True), survey:
            program(*problem.args, **problem.kwargs)
    except ProblemError:
        raise
    except Exception as error:
        shapes = _list(tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__ for v in problem.args)
        raise ProblemError(
            f"the {what} failed when run with arguments of shape {shapes}: {type(error).__name__}: {error}"
            f"{_advice(problem)}"
        ) from error
    return survey


def _advice(problem: Problem) -> str:
    """What to do about data that are no tensors, where there are such."""
    values = [*problem.args, *problem.kwargs.values()]
    if any(isinstance(v, DataLoader) for v in values):
        return ". Pass all data as tensors, not a DataLoader: engines make the minibatches themselves (batch_size=...)."
    if any(hasattr(v, "__array__") and not isinstance(v, Tensor) for v in values):
        return ". Pass data as tensors: torch.as_tensor(x)."
    return ""


def _log_probs(survey: Survey) -> list[Tensor]:
    """The log probability of each site; an observed one that has none is noted. Raises `ProblemError` where a value
    cannot be scored."""
    log_probs = []
    for name, msg in survey.messages.items():
        value: Any = msg["value"]
        fn: Any = msg["fn"]
        observed = msg["is_observed"]
        if value.is_floating_point() and bool(value.isnan().any()):
            raise ProblemError(
                f"site {name!r}: the {'observed value' if observed else 'draw'} contains NaN "
                f"({int(value.isnan().sum())} of {value.numel()}). Replace missing entries by any finite number and "
                "exclude them with poutine.mask."
            )
        masked = msg["mask"] is not None and not (isinstance(msg["mask"], bool) and msg["mask"])
        try:
            with torch.enable_grad(), pyro.validation_enabled(observed and not masked):
                log_prob = fn.log_prob(value)
        except NotImplementedError as error:
            if not observed:
                raise ProblemError(f"site {name!r}: {type(fn).__name__} has no log_prob: {error}") from error
            survey.simulated.add(name)
            continue
        except Exception as error:
            raise ProblemError(
                f"site {name!r}: {type(fn).__name__} cannot score the value of shape {tuple(value.shape)}: {error}"
            ) from error
        if observed and not masked and value.is_floating_point() and bool(value.isinf().any()):
            raise ProblemError(f"site {name!r}: the observed value has infinite entries; take them out.")
        if observed and not masked and bool(log_prob.isnan().any()):
            raise ProblemError(
                f"site {name!r}: the log probability of the observed value is NaN; check its distribution."
            )
        log_probs.append(log_prob)
    return log_probs


def _common_plates(sites: list[Site]) -> list[Plate]:
    """The plates that every one of these sites is in, left to right."""
    return [p for p in sites[0].plates if all(p in s.plates for s in sites)] if sites else []


def _data(problem: Problem) -> list[Tensor]:
    return [v for v in (*problem.args, *problem.kwargs.values()) if isinstance(v, Tensor)]


def _list(items: Iterable[Any]) -> str:
    return ", ".join(str(i) for i in items) or "none"


class Survey(Messenger):
    """Notes every site. Draws where it can; an improper site takes the image of zero."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: dict[str, Message] = {}
        self.simulated: set[str] = set()

    def _process_message(self, msg: Message) -> None:
        if msg["type"] != "sample" or site_is_subsample(msg):
            return
        lift_mask(msg)
        if msg["is_observed"]:
            if not isinstance(msg["value"], Tensor):
                kind = type(msg["value"]).__name__
                raise ProblemError(f"site {msg['name']!r}: the observed value is a {kind}; make it a torch.Tensor.")
            return
        if msg["value"] is None and _is_improper(msg["fn"]):
            transform = biject_to(support_of(msg["fn"]))
            shape = transform.inverse_shape(msg["fn"].shape())
            msg["value"] = transform(torch.zeros(shape))

    def _postprocess_message(self, msg: Message) -> None:
        if msg["type"] != "sample":
            return
        name: str = msg["name"]
        if site_is_subsample(msg):
            size, rows = msg["fn"].size, len(msg["value"])
            if rows < size:
                raise ProblemError(
                    f"plate {name!r} subsamples {rows} of {size}: remove subsample_size from the "
                    "program; engines make the minibatches themselves (batch_size=...)."
                )
            return
        if name in self.messages:
            raise ProblemError(f"two sample sites are named {name!r}; every name must be used once.")
        self.messages[name] = msg.copy()

    def sites(self) -> dict[str, Site]:
        return {
            name: replace(
                _describe(name, msg), simulated=name in self.simulated, scaled=_is_scaled(msg), mask=_mask(msg)
            )
            for name, msg in self.messages.items()
        }


def _is_scaled(msg: Message) -> bool:
    return not bool(torch.as_tensor(msg["scale"] == 1).all())


def _mask(msg: Message) -> Tensor | None:
    """Where a site has its density, to be broadcast against its value; None where that is everywhere."""
    fn, mask = cast(Any, msg["fn"]), torch.tensor(True)
    if msg["mask"] is not None:
        mask = torch.as_tensor(msg["mask"])[(..., *[None] * fn.event_dim)]
    while hasattr(fn, "base_dist"):  # `Normal(0.0, 1.0).mask(seen).to_event(1)` has one inside of its event
        if isinstance(fn, MaskedDistribution):
            mask = mask & torch.as_tensor(fn._mask)[(..., *[None] * fn.event_dim)]
        fn = fn.base_dist
    return None if bool(mask.all()) else mask


def _is_point(fn: Any) -> bool:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, Delta)


def _is_improper(fn: Any) -> bool:
    while hasattr(fn, "base_dist") and type(fn).__name__ != "ImproperUniform":
        fn = fn.base_dist
    return type(fn).__name__ == "ImproperUniform"


def _describe(name: str, msg: Message) -> Site:
    fn: Any = msg["fn"]
    value: Any = msg["value"]
    infer = msg["infer"] or {}
    if infer.get("_deterministic"):
        role = "deterministic"
    elif site_is_factor(msg):
        role = "factor"
    else:
        role = "observed" if msg["is_observed"] else "latent"
    plates = tuple(
        sorted(
            (Plate(f.name, f.dim, int(f.full_size or f.size)) for f in msg["cond_indep_stack"] if f.vectorized),
            key=lambda p: p.dim,
        )
    )
    if role == "deterministic":
        event_dim = _deterministic_event_dim(value.shape, plates)
        return Site(name, role, event_dim, plates if event_dim < value.dim() else (), tuple(value.shape))
    if role != "latent":
        site = Site(name, role, fn.event_dim, plates, tuple(value.shape))
        return replace(site, shape=tuple(site.shape_of(fn, value)))
    try:
        discrete = bool(fn.support.is_discrete)
    except NotImplementedError:
        discrete = bool(fn.has_enumerate_support)
    shape = tuple(value.shape)
    described: dict[str, Any] = {}
    if not discrete:
        try:
            transform = biject_to(support_of(fn))
        except NotImplementedError:
            raise ProblemError(
                f"site {name!r}: torch knows no map onto the support of {type(fn).__name__}, {fn.support}; write it by "
                "latents whose support is known (a covariance by LKJCholesky and scales, a mixture as a discrete "
                "choice and what is drawn given it), or as a deterministic function of such."
            ) from None
        described["bounded"] = not _is_real(support_of(fn))
        described["domain"] = support_of(fn)
        described["unconstrained_shape"] = tuple(transform.inverse_shape(value.shape))
        described["unconstrained_event_dim"] = fn.event_dim - (
            transform.codomain.event_dim - transform.domain.event_dim
        )
    support = _support(fn) if discrete else None
    if discrete and support is None:
        described["bounded"] = True  # who steps from value to value may step outside
    return Site(
        name,
        role,
        fn.event_dim,
        plates,
        shape,
        discrete=discrete,
        support=support,
        auxiliary=bool(infer.get("is_auxiliary")),
        point=_is_point(fn),
        reparameterised=bool(fn.has_rsample),
        **described,
    )


def _is_real(support: Any) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real or support is constraints.real_vector


def _support(fn: Any) -> Tensor | None:
    """All values of one element of an enumerable site, (k, *event); None where they cannot be listed."""
    if not fn.has_enumerate_support:
        return None
    try:
        values = fn.enumerate_support(expand=False)
    except NotImplementedError:  # elements with supports of their own, say binomials of unlike totals
        return None
    return values.reshape((-1, *fn.event_shape))


def _deterministic_event_dim(shape: torch.Size, plates: tuple[Plate, ...]) -> int:
    """Pyro takes all of a deterministic value for event; here the plates are looked for among its dimensions."""
    for event_dim in range(len(shape)):
        rest = shape[: len(shape) - event_dim]
        if all(-p.dim <= len(rest) and rest[p.dim] == p.size for p in plates):
            return event_dim
    return len(shape)
