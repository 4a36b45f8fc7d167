"""A Pyro program as a pure, batched density: the one floor that every engine stands on.

For a problem with model p_theta(x, z) the latents of each batch element form one flat unconstrained vector u, and

    log_joint(u) = log p_theta(x, T(u)) + log |det dT/du|          u: (*sample, *batch, D) -> (*sample, *batch).

The batch is the plate (or plates) that holds every latent and every observation of a datum; it is found from the
program. With a global latent outside it the batch is (). Samples are batched by vmap, so a program needs no extra
dimension in mind. Discrete latents that are not given are summed out exactly.

Every density also takes constrained values, site -> (*sample, *batch, *event), and then leaves the Jacobian out.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import pyro
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.ops.contract import contract_to_tensor
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .compile import traced
from .parameters import Parameters, find_parameters
from .problem import Problem, ProblemError
from .program import Plate, Reading, Scribe, Site, Survey, batched_randomness, is_improper

Values = Mapping[str, Tensor]

_CHUNK = 2**23  # numbers that a vmapped run holds at once, roughly: bounds memory, not results


class HasParameters(Protocol):
    """A `Fit`: theta and phi by name."""

    parameters: Values
    guide_parameters: Values


class PriorDraws(NamedTuple):
    """Draws of all latents from the prior, (n, *batch, *event), with their log densities (n, *batch)."""

    values: dict[str, Tensor]
    log_prior: Tensor
    log_likelihood: Tensor


class GuideDraws(NamedTuple):
    """Draws from the guide, (n, *batch, *event), with log q and its part without reparameterised gradient."""

    values: dict[str, Tensor]
    log_q: Tensor
    log_score: Tensor


class Density:
    """The density of a problem at one theta. A context manager: inside, the program's parameters are this run's.

    parameters  theta and phi to start from, by name; the others stay as the program has them
    dtype       None: float64, or the program's own where it cannot run in float64 (then said in `notes`)
    learning    theta and phi receive gradients, and the program's own dtype is the default
    Raises `ProblemError` where the program cannot be used, saying which site and what to change.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        parameters: Values | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        learning: bool = False,
    ) -> None:
        self.problem = problem
        self.learning = learning
        self.device = torch.device(device) if device is not None else None
        self.notes: list[str] = []
        self.counts = {"evaluations": 0.0, "gradients": 0.0}
        self.vectorised = True
        self.args, self.kwargs = problem.args, dict(problem.kwargs)
        self._store: dict[str, Any] = {"params": {}, "constraints": {}}
        self._exit = ExitStack()
        self._depth = 0
        self._graphs: dict[tuple[int, ...], tuple[Callable[..., Any], str]] = {}
        self.backend = "eager"
        self._phi_given = False
        self._minibatch: tuple[Plate, Tensor, float] | None = None
        self.theta = self.phi = Parameters({})
        with pyro.get_param_store().scope(self._store), torch.random.fork_rng(devices=[]):
            self._survey_model()
            self._survey_guide()
        own = self.theta.dtype or self.phi.dtype or self._data_dtype()
        self._settle(dtype or (own if learning else torch.float64), own, parameters)

    # -- running inside: parameters lent, defaults set -----------------------------------------------------------

    def __enter__(self) -> Density:
        self._depth += 1
        if self._depth == 1:
            with ExitStack() as stack:
                stack.enter_context(pyro.get_param_store().scope(self._store))
                stack.enter_context(self.theta.lend(self.learning))
                stack.enter_context(self.phi.lend(self.learning))
                stack.enter_context(_defaults(self.dtype, self.device))
                self._exit = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._exit.close()

    # -- what the program is -------------------------------------------------------------------------------------

    def _survey_model(self) -> None:
        for where, value in [*enumerate(self.args), *self.kwargs.items()]:
            if isinstance(value, Tensor) and value.requires_grad:
                raise ProblemError(f"argument {where}: data must not require gradients; pass it detached.")
        messages, outputs = self._run_survey(self.problem.model, "model", None)
        self.sites = messages.sites()
        inputs = [v for v in (*self.args, *self.kwargs.values()) if isinstance(v, Tensor)]
        self.theta = find_parameters(outputs, self.problem.model, inputs)
        sites = list(self.sites.values())
        relevant = [s for s in sites if s.role != "deterministic"]
        if not any(s.role in ("observed", "factor") for s in sites):
            raise ProblemError("the model observes nothing: give data by obs=..., pyro.condition or pyro.factor.")
        observed = [s for s in sites if s.role in ("observed", "factor")]
        self.batch_plates = _common_plates(relevant)
        shared = self.batch_plates or _common_plates(observed)
        self.data_plate = max(shared, key=lambda p: p.size) if shared else None
        self._layout()
        self.improper = [n for n, m in messages.messages.items() if n in self.latents and is_improper(m["fn"])]

    def _layout(self) -> None:
        """Fix what follows from the sites and the batch plates."""
        dims = tuple(p.dim for p in self.batch_plates)
        self.sites = {
            name: replace(site, batch=dims) if all(p in site.plates for p in self.batch_plates) else site
            for name, site in self.sites.items()
        }
        self.latents = {n: s for n, s in self.sites.items() if s.role == "latent"}
        self.discrete = [n for n, s in self.latents.items() if s.discrete]
        self.continuous = [n for n, s in self.latents.items() if not s.discrete]
        self._sizes = [
            math.prod(s.own_shape(s.unconstrained_shape, s.unconstrained_event_dim)[len(dims) :])
            for s in (self.latents[n] for n in self.continuous)
        ]
        self.dim = sum(self._sizes)
        self._max_plate_nesting = max((-p.dim for s in self.sites.values() for p in s.plates), default=0)
        self._numel = sum(math.prod(s.shape) for s in self.sites.values()) + 1

    def _survey_guide(self) -> None:
        """Sites and parameters of the guide; a fault is kept until an engine asks for the guide."""
        self._guide_fault: ProblemError | None = None
        if self.problem.guide is None:
            self._guide_fault = ProblemError(
                f"problem {self.problem.name!r} has no guide: pass guide=... to Problem, or name an autoguide."
            )
            return
        try:
            messages, outputs = self._run_survey(self.problem.guide, "guide", self.latents)
            sites = messages.sites()
            for name, site in sites.items():
                if site.role == "latent" and name not in self.latents and not site.auxiliary:
                    raise ProblemError(
                        f"guide site {name!r} is not a latent site of the model ({_list(self.latents)})."
                    )
                if site.role == "latent":
                    missing = [p.name for p in self.batch_plates if p not in site.plates]
                    if missing:
                        raise ProblemError(
                            f"guide site {name!r} is not inside plate {missing[0]!r} as in the model, so its density "
                            "cannot be told apart by datum; put it inside the same plate, or name the autoguide "
                            "(SVI(guide='AutoMultivariateNormal')) to get one per datum."
                        )
            missing = [n for n in self.latents if n not in sites and self.latents[n].support is None]
            if missing:
                raise ProblemError(f"the guide lacks site {missing[0]!r} of the model; sample it there too.")
            inputs = [v for v in (*self.args, *self.kwargs.values()) if isinstance(v, Tensor)]
            self.phi = find_parameters(outputs, self.problem.guide, inputs + self.theta.tensors)
            self.guide_sites = {
                name: replace(site, batch=tuple(p.dim for p in self.batch_plates)) for name, site in sites.items()
            }
        except ProblemError as error:
            self._guide_fault = error

    def _run_survey(self, program: Callable[..., Any], what: str, latents: Mapping[str, Site] | None) -> Any:
        survey = Survey()
        try:
            with torch.enable_grad(), pyro.validation_enabled(True), survey:
                program(*self.args, **self.kwargs)
        except ProblemError:
            raise
        except Exception as error:
            shapes = _list(tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__ for v in self.args)
            raise ProblemError(
                f"the {what} failed when run with arguments of shape {shapes}: {type(error).__name__}: {error}"
            ) from error
        outputs: list[Tensor] = []
        for name, msg in survey.messages.items():
            value: Any = msg["value"]
            if isinstance(value, Tensor) and value.is_floating_point() and bool(value.isnan().any()):
                where = "observed value" if msg["is_observed"] else "draw"
                raise ProblemError(
                    f"site {name!r}: the {where} contains NaN ({int(value.isnan().sum())} of {value.numel()}). "
                    "Replace missing entries by any finite number and exclude them with poutine.mask."
                )
            try:
                with (
                    torch.enable_grad(),
                    pyro.validation_enabled(bool(msg["is_observed"]) and msg["mask"] is not False),
                ):
                    log_prob = msg["fn"].log_prob(value)
            except Exception as error:
                raise ProblemError(
                    f"site {name!r}: the value of shape {tuple(value.shape)} cannot be scored by "
                    f"{type(msg['fn']).__name__}: {error}"
                ) from error
            if msg["is_observed"] and not site_is_subsample(msg):
                _check_observed(name, msg, log_prob)
            outputs.append(log_prob)
            if latents is not None and not msg["is_observed"]:
                outputs.append(value)
        if latents is not None:  # a guide that only proposes points (Delta) shows its parameters in its values
            outputs = [o for o in outputs if isinstance(o, Tensor)]
        return survey, outputs

    def _data_dtype(self) -> torch.dtype:
        for value in (*self.args, *self.kwargs.values()):
            if isinstance(value, Tensor) and value.is_floating_point():
                return value.dtype
        return torch.get_default_dtype()

    def _settle(self, dtype: torch.dtype, own: torch.dtype, parameters: Values | None) -> None:
        """Choose the dtype, set the parameters, and see that the batched program equals the plain one."""
        for attempt in dict.fromkeys((dtype, own)):
            self._cast(attempt)
            try:
                with self, torch.random.fork_rng(devices=[]):
                    if parameters:
                        self.set_parameters(parameters)
                    self._check()
                break
            except RuntimeError as error:
                if attempt == own or "dtype" not in str(error):
                    raise ProblemError(f"the model failed when run again: {error}") from error
                self.notes.append(f"the program cannot run in {_name(dtype)}; figures are in {_name(own)}")

    def _cast(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.theta.cast(dtype, self.device)
        self.phi.cast(dtype, self.device)
        self.args = tuple(_convert(v, dtype, self.device) for v in self.problem.args)
        self.kwargs = {k: _convert(v, dtype, self.device) for k, v in self.problem.kwargs.items()}

    def _check(self) -> None:
        """The batched program must equal the plain one, and one datum's latents must not move another's density."""
        if not self.latents:
            return
        with torch.no_grad():
            self.vectorised = False
            values = self.prior(3).values if not self.improper else self.constrain(self._zeros(3))
            plain = self._check_density(values)
            self.vectorised = True
            try:
                batched = self._check_density(values)
                self.vectorised = bool(torch.allclose(plain, batched, rtol=1e-3, atol=1e-3, equal_nan=True))
            except RuntimeError:
                self.vectorised = False
            if not self.vectorised:
                self.notes.append("the program cannot be batched over draws (its control flow depends on them): slower")
            if self.batch_plates and self.batch_shape.numel() > 1:
                moved = {n: v.clone() for n, v in values.items()}
                flat = len(self.batch_shape)
                for v in moved.values():  # draw 0 of the first datum takes the value of draw 1
                    v.flatten(1, flat)[0, 0] = v.flatten(1, flat)[1, 0]
                before, after = plain[0].flatten()[1:], self._check_density(moved)[0].flatten()[1:]
                if not torch.allclose(before, after, rtol=1e-4, atol=1e-4, equal_nan=True):
                    self.notes.append(
                        f"plate {self.batch_plates[0].name!r} couples its data (one datum's latent moves another's "
                        "density), so it is treated as one"
                    )
                    self.batch_plates = []
                    self._layout()
        self.counts = {"evaluations": 0.0, "gradients": 0.0}

    def _check_density(self, values: Values) -> Tensor:
        return self._map(lambda v: self._run(v).log_likelihood, dict(values), 3)

    def _zeros(self, count: int) -> Tensor:
        return torch.zeros(count, *self.batch_shape, self.dim)

    @property
    def batch_shape(self) -> torch.Size:
        """The sizes of the batch plates; inside a minibatch, its number of rows."""
        if self._minibatch is not None and self.batch_plates:
            return torch.Size((len(self._minibatch[1]),))
        return torch.Size(p.size for p in self.batch_plates)

    # -- parameters and data -------------------------------------------------------------------------------------

    def set_parameters(self, values: Values | HasParameters) -> None:
        """Write theta and phi: a mapping by name (constrained values), or a `Fit`, whose phi is taken where this
        problem's guide has it. Raises `ProblemError` on an unknown name."""
        with self:
            if isinstance(values, Mapping):
                phi = {n: v for n, v in values.items() if n in self.phi and n not in self.theta}
                self.theta.set({n: v for n, v in values.items() if n not in phi})
            else:
                phi = {n: v for n, v in values.guide_parameters.items() if n in self.phi}
                self.theta.set(values.parameters)
            self.phi.set(phi)
            self._phi_given = bool(phi)

    @property
    def guide_ready(self) -> bool:
        """Whether there is a guide that can be used as it stands: its phi was given, or it has none."""
        return self._guide_fault is None and (self._phi_given or not len(self.phi))

    @contextmanager
    def minibatch(self, index: Tensor) -> Iterator[None]:
        """Inside, the program sees these rows of the data. Per-datum densities are those of the rows; in a problem
        with global latents the sites of the data plate are scaled by N/B. Raises `ProblemError` where the data
        arguments cannot be sliced."""
        plate = self.sliceable()
        args, kwargs, minibatch = self.args, self.kwargs, self._minibatch
        take = lambda v: v[index] if _is_data(v, plate.size) else v  # noqa: E731
        self.args, self.kwargs = tuple(take(v) for v in args), {k: take(v) for k, v in kwargs.items()}
        self._minibatch = (plate, index, 1.0 if self.batch_plates else plate.size / len(index))
        try:
            yield
        finally:
            self.args, self.kwargs, self._minibatch = args, kwargs, minibatch

    @property
    def data_scale(self) -> float:
        """What a sum over the rows of a minibatch is multiplied by to stand for all data: N/B; else 1."""
        if self._minibatch is None or not self.batch_plates:
            return 1.0
        return self._minibatch[0].size / len(self._minibatch[1])

    def rows(self, tensor: Tensor) -> Tensor:
        """The rows of a (*batch, ...) tensor that the program sees now."""
        if self._minibatch is None or not self.batch_plates:
            return tensor
        return tensor[self._minibatch[1]]

    def sliceable(self) -> Plate:
        """The plate that minibatches run over. Raises `ProblemError` where there is none or no argument has its size."""
        plate = self.data_plate
        if plate is None:
            raise ProblemError(
                "minibatches need a plate that holds all observations (`with pyro.plate('data', len(x)):`); "
                "this model has none. Use batch_size=None."
            )
        if len(self.batch_shape) > 1:
            raise ProblemError("minibatches over several batch plates are not defined; use batch_size=None.")
        if not any(_is_data(v, plate.size) for v in (*self.args, *self.kwargs.values())):
            raise ProblemError(
                f"minibatches slice the data arguments, but no argument has plate {plate.name!r}'s size {plate.size} "
                "as its first dimension; pass the data in args."
            )
        return plate

    def check_minibatch(self) -> None:
        """See that rows of the data give the rows' own densities. Raises `ProblemError` where they do not."""
        plate = self.sliceable()
        index = torch.arange(plate.size - 1, -1, -2)[: max(1, plate.size // 2)].to(self.device or "cpu")
        with self, torch.no_grad(), torch.random.fork_rng(devices=[]):
            values = {n: v[:1] for n, v in self.prior(1).values.items()} if self.latents else {}
            full = self._per_datum(values, plate)
            rows = {n: v[:, index] if self.batch_plates else v for n, v in values.items()}
            try:
                with self.minibatch(index):
                    part = self._per_datum(rows, plate)
                fits = part.shape == full[index].shape and torch.allclose(part, full[index], rtol=1e-3, atol=1e-3)
            except (RuntimeError, ValueError, IndexError) as error:
                raise ProblemError(
                    f"the model fails on {len(index)} of {plate.size} rows of its data: {error}"
                ) from error
        if not fits:
            raise ProblemError(
                f"the model gives other densities on {len(index)} rows of plate {plate.name!r} than on all "
                f"{plate.size}: an argument whose first dimension is {plate.size} is no data, or data are closed over."
            )

    def _per_datum(self, values: Values, plate: Plate) -> Tensor:
        """The likelihood of each row of the data plate, (N,)."""
        inputs = {n: self.latents[n].to_pyro(v[0], self.latents[n].event_dim) for n, v in values.items()}
        scribe = Scribe(self.sites, inputs, minibatch=self._minibatch and (*self._minibatch[:2], 1.0), want=_POINTWISE)
        with scribe:
            self.problem.model(*self.args, **self.kwargs)
        total: Any = 0.0
        for name, log_prob in scribe.reading.pointwise.items():
            log_prob = self.sites[name].to_pyro(log_prob, 0)
            others = [d for d in range(-log_prob.dim(), 0) if d != plate.dim]
            total = total + (log_prob.sum(others) if others else log_prob)
        return total

    # -- draws ---------------------------------------------------------------------------------------------------

    def prior(self, count: int) -> PriorDraws:
        """Draws of the latents from the prior. Raises `ProblemError` where a site has no proper prior."""
        if self.improper:
            raise ProblemError(f"site {self.improper[0]!r} has an improper prior: it cannot be drawn from.")

        def one(_: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
            reading = self._run({}, want=_VALUES)
            values = {n: reading.values[n] for n in self.latents}
            return values, self._filled(reading.log_prior), self._filled(reading.log_likelihood)

        return PriorDraws(*self._map(one, torch.zeros(count), count, random=True))

    def guide(self, count: int) -> GuideDraws:
        """Draws from the guide, reparameterised where it can. Raises `ProblemError` where there is no usable guide."""
        self.require_guide()

        def one(_: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
            scribe = Scribe(self.guide_sites, {}, minibatch=self._minibatch, want=_VALUES)
            with scribe:
                self.problem.guide(*self.args, **self.kwargs)  # type: ignore[misc]
            values = {n: v for n, v in scribe.reading.values.items() if n in self.latents}
            return values, self._filled(scribe.reading.log_prior), self._filled(scribe.reading.log_score)

        return GuideDraws(*self._map(one, torch.zeros(count), count, random=True, counted=False))

    def require_guide(self) -> None:
        if self._guide_fault is not None:
            raise self._guide_fault

    # -- densities -----------------------------------------------------------------------------------------------

    def log_joint(self, z: Tensor | Values, jacobian: bool = True) -> Tensor:
        """log p(x, z), (*sample, *batch), in nats; of u with the log-Jacobian unless `jacobian=False`.
        Discrete latents that z does not give are summed out."""
        marginal = any(n not in z for n in self.discrete) if not isinstance(z, Tensor) else bool(self.discrete)

        def one(v: Any) -> Tensor:
            if marginal:
                total, log_jacobian = self._run_marginal(v)
            else:
                reading = self._run(v)
                total, log_jacobian = reading.log_prior + reading.log_likelihood, reading.log_jacobian
            return self._filled(total + log_jacobian if jacobian else total)

        return self._over_samples(one, z)

    def log_prior(self, z: Tensor | Values) -> Tensor:
        """log p(z), (*sample, *batch); of u with the log-Jacobian."""
        return self._over_samples(lambda v: self._filled((r := self._run(v)).log_prior + r.log_jacobian), z)

    def log_likelihood(self, z: Tensor | Values) -> Tensor:
        """log p(x | z), (*sample, *batch)."""
        return self._over_samples(lambda v: self._filled(self._run(v).log_likelihood), z)

    def pointwise(self, values: Values) -> dict[str, Tensor]:
        """Observed site -> log likelihood of each observation, (*sample, *batch, *other plates)."""
        return self._over_samples(lambda v: self._run(v, want=_POINTWISE).pointwise, values)

    def constrain(self, u: Tensor, deterministic: bool = False) -> dict[str, Tensor]:
        """u (*sample, *batch, D) -> site -> (*sample, *batch, *event), with `pyro.deterministic` sites if asked."""
        names = self.continuous + (self._deterministic() if deterministic else [])

        def one(v: Tensor) -> dict[str, Tensor]:
            values = self._run(v, want=_VALUES).values
            return {n: values[n] for n in names}

        return self._over_samples(one, u, random=True)

    def deterministic(self, values: Values) -> dict[str, Tensor]:
        """The `pyro.deterministic` sites at these values of the latents."""
        names = self._deterministic()
        if not names:
            return {}

        def one(v: dict[str, Tensor]) -> dict[str, Tensor]:
            recorded = self._run(v, want=_VALUES).values
            return {n: recorded[n] for n in names}

        return self._over_samples(one, values, random=True)

    def _deterministic(self) -> list[str]:
        """Deterministic sites that can be told per batch element."""
        return [
            n for n, s in self.sites.items() if s.role == "deterministic" and bool(s.batch) == bool(self.batch_plates)
        ]

    def unconstrain(self, values: Values) -> Tensor:
        """site -> (*sample, *batch, *event) to u (*sample, *batch, D)."""

        def one(v: dict[str, Tensor]) -> Tensor:
            parts = self._run(v, want=_UNCONSTRAINED).unconstrained
            flat = len(self.batch_shape)
            return torch.cat([parts[n].reshape((*parts[n].shape[:flat], -1)) for n in self.continuous], -1)

        return self._over_samples(one, values, random=True)

    def value_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """log_joint(u) and its gradient in u."""
        u = u.detach().requires_grad_(True)
        with torch.enable_grad():
            value = self.log_joint(u)
            (gradient,) = torch.autograd.grad(value.sum(), u)
        return value.detach(), gradient

    def traced_value_and_grad(self, u: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """`value_and_grad` for many calls at the shape of u: as a graph where the program can be traced."""
        if self._minibatch is not None:
            return self.value_and_grad
        key = tuple(u.shape)
        if key not in self._graphs:
            with self.uncounted():
                run, why_not = traced(
                    self.value_and_grad,
                    [(u,), (u + 0.1 * torch.randn_like(u),)],
                    self.theta.tensors + self.phi.tensors,
                )
            self._graphs[key] = (run, "eager" if why_not else "graph")
        run, self.backend = self._graphs[key]
        if self.backend == "eager":
            return self.value_and_grad
        count = math.prod(u.shape[: u.dim() - len(self.batch_shape) - 1])

        def counted(v: Tensor) -> tuple[Tensor, Tensor]:
            self.counts["gradients"] += count
            value, gradient = run(v)
            return value, gradient

        return counted

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """What is evaluated inside, to trace and compare, is not counted."""
        before = dict(self.counts)
        try:
            yield
        finally:
            self.counts.update(before)

    # -- running -------------------------------------------------------------------------------------------------

    def _run(self, z: Any, want: frozenset[str] = frozenset()) -> Reading:
        """One plain run of the model at z: a flat u (*batch, D), or values site -> (*batch, *event)."""
        transformed = isinstance(z, Tensor)
        scribe = Scribe(self.sites, self._given(z), transformed=transformed, minibatch=self._minibatch, want=want)
        with scribe:
            self.problem.model(*self.args, **self.kwargs)
        return scribe.reading

    def _given(self, z: Any) -> dict[str, Tensor]:
        if not isinstance(z, Tensor):
            return {n: self.latents[n].to_pyro(v, self.latents[n].event_dim) for n, v in z.items()}
        parts = torch.split(z, self._sizes, -1) if self._sizes else ()
        given = {}
        for name, part in zip(self.continuous, parts, strict=True):
            site = self.latents[name]
            shape = site.own_shape(site.unconstrained_shape, site.unconstrained_event_dim)[len(self.batch_shape) :]
            given[name] = site.to_pyro(part.reshape((*part.shape[:-1], *shape)), site.unconstrained_event_dim)
        return given

    def _run_marginal(self, z: Any) -> tuple[Tensor, Any]:
        """The log joint with the discrete latents that z lacks summed out, by Pyro's tensor variable elimination."""
        local = self._minibatch and (*self._minibatch[:2], 1.0)  # scaling comes after the sums, or it is wrong
        scribe = Scribe(
            self.sites, self._given(z), transformed=isinstance(z, Tensor), minibatch=local, want=frozenset({"trace"})
        )
        program = poutine.enum(
            config_enumerate(self.problem.model, "parallel"), first_available_dim=-1 - self._max_plate_nesting
        )
        with scribe:
            trace = poutine.trace(program).get_trace(*self.args, **self.kwargs)
        trace.compute_log_prob()
        trace.pack_tensors()
        symbols = trace.plate_to_symbol
        factors: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
        for site in trace.nodes.values():
            if site["type"] == "sample" and not site_is_subsample(site):
                ordinal = frozenset(symbols[f.name] for f in site["cond_indep_stack"] if f.vectorized)
                factors.setdefault(ordinal, []).append(site["packed"]["log_prob"])
        sum_dims = set(trace.symbol_to_dim) - set(symbols.values())
        scale = self._minibatch[2] if self._minibatch else 1.0
        if scale != 1.0:
            plate = symbols[self._minibatch[0].name]  # type: ignore[index]
            inside = OrderedDict((o, t) for o, t in factors.items() if plate in o)
            outside = OrderedDict((o, t) for o, t in factors.items() if plate not in o)
            total = scale * contract_to_tensor(inside, sum_dims, frozenset())
            if outside:
                total = total + contract_to_tensor(outside, sum_dims, frozenset())
            return total, scribe.reading.log_jacobian
        wanted = [symbols[p.name] for p in self.batch_plates]
        total = contract_to_tensor(factors, sum_dims, frozenset(wanted))
        order = [total._pyro_dims.index(symbol) for symbol in wanted]
        return total.permute(order), scribe.reading.log_jacobian

    def _filled(self, value: Any) -> Tensor:
        """A per-element figure, as a tensor of the batch's shape even where no site added to it."""
        shape = self.batch_shape
        return value if isinstance(value, Tensor) and value.shape == shape else torch.as_tensor(value).expand(shape)

    def _over_samples(self, function: Callable[[Any], Any], z: Tensor | Values, random: bool = False) -> Any:
        """Apply a function of one draw to z with any sample dimensions in front."""
        batch_dim = len(self.batch_shape)
        if isinstance(z, Tensor):
            sample = z.shape[: z.dim() - batch_dim - 1]
            flat: Any = _convert(z, self.dtype, self.device).reshape((-1, *z.shape[len(sample) :]))
        else:
            name, first = next(iter(z.items())) if z else ("", torch.zeros(()))
            site = self.latents[name] if z else None
            own = len(site.own_shape(site.shape, site.event_dim)) if site else 0
            sample = first.shape[: first.dim() - own]
            flat = {
                n: _convert(v, self.dtype, self.device).reshape((-1, *v.shape[len(sample) :]))
                for n, v in z.items()
                if n in self.latents
            }
            if not flat:
                flat = torch.zeros(1)
                return self._map(lambda _: function({}), flat, 1)[0]
        count = math.prod(sample)
        result = self._map(function, flat, count, random=random)
        reshape = lambda t: t.reshape((*sample, *t.shape[1:]))  # noqa: E731
        return {n: reshape(t) for n, t in result.items()} if isinstance(result, dict) else reshape(result)

    def _map(
        self, function: Callable[[Any], Any], inputs: Any, count: int, random: bool = False, counted: bool = True
    ) -> Any:
        """vmap a function of one draw over the first dimension of its inputs, in chunks; a loop where it cannot."""
        if counted:
            share = 1.0
            if self._minibatch is not None:
                share = len(self._minibatch[1]) / self._minibatch[0].size
            tensors = [inputs] if isinstance(inputs, Tensor) else list(inputs.values())
            grad = torch.is_grad_enabled() and (self.learning or any(t.requires_grad for t in tensors))
            self.counts["gradients" if grad else "evaluations"] += count * share
        with self, pyro.validation_enabled(False):
            if count == 1:
                one = inputs[0] if isinstance(inputs, Tensor) else {n: v[0] for n, v in inputs.items()}
                return _tree(lambda t: t[None], function(one))
            if self.vectorised:
                chunk = max(1, _CHUNK // self._numel)
                with ExitStack() as stack:
                    if random:
                        stack.enter_context(batched_randomness())
                    try:
                        return torch.func.vmap(
                            function,
                            chunk_size=chunk if chunk < count else None,
                            randomness="different" if random else "error",
                        )(inputs)
                    except RuntimeError as error:
                        if "vmap" not in str(error) and "functorch" not in str(error):
                            raise
            rows = [
                function(inputs[i] if isinstance(inputs, Tensor) else {n: v[i] for n, v in inputs.items()})
                for i in range(count)
            ]
            return _stack(rows)


_VALUES = frozenset({"values"})
_POINTWISE = frozenset({"pointwise"})
_UNCONSTRAINED = frozenset({"unconstrained"})


@contextmanager
def _defaults(dtype: torch.dtype, device: torch.device | None) -> Iterator[None]:
    """Inside, literals that the program makes have this dtype and device."""
    old = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device if device is not None and device.type != "cpu" else ExitStack():
            yield
    finally:
        torch.set_default_dtype(old)


def _common_plates(sites: list[Site]) -> list[Plate]:
    """The plates that every one of these sites is in, left to right."""
    if not sites:
        return []
    return [p for p in sites[0].plates if all(p in s.plates for s in sites)]


def _check_observed(name: str, msg: Any, log_prob: Tensor) -> None:
    if bool(log_prob.isnan().any()):
        raise ProblemError(f"site {name!r}: the log probability of the observed value is NaN; check its distribution.")


def _is_data(value: Any, size: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == size


def _convert(value: Any, dtype: torch.dtype, device: torch.device | None) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(dtype=dtype if value.is_floating_point() else value.dtype, device=device)


def _tree(function: Callable[[Tensor], Tensor], result: Any) -> Any:
    if isinstance(result, Tensor):
        return function(result)
    if isinstance(result, dict):
        return {n: _tree(function, v) for n, v in result.items()}
    return tuple(_tree(function, v) for v in result)


def _stack(rows: list[Any]) -> Any:
    if isinstance(rows[0], Tensor):
        return torch.stack(rows)
    if isinstance(rows[0], dict):
        return {n: torch.stack([r[n] for r in rows]) for n in rows[0]}
    return tuple(_stack([r[i] for r in rows]) for i in range(len(rows[0])))


def _list(items: Any) -> str:
    return ", ".join(str(i) for i in items) or "none"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
