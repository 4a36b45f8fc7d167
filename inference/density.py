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
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import pyro
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .compile import Compiled, check_backend, compiled
from .marginal import enumerated_trace, sum_out
from .parameters import Lent, kept_frozen, modules_in_reach
from .preflight import BATCHED, batches_over_draws, couples_data, refuse_randomness
from .problem import Problem, ProblemError
from .program import SOMETIMES, Plate, Reading, Scribe, Site, Unobserved, batched_randomness, over_draws
from .survey import survey_guide, survey_model

Values = Mapping[str, Tensor]

TERMS = frozenset({"terms"})  # what `Density.read` writes down
_CHUNK = 2**23  # numbers that a vmapped run holds at once, roughly: bounds memory, not results
_COMPILE_FROM = 2**26  # from this many numbers on, a run over draws is compiled and takes them
_BLOCK = 2**18  # so many at a time: they stay in the processor's cache


class HasParameters(Protocol):
    """A `Fit`: theta and phi by name."""

    @property
    def parameters(self) -> Values: ...

    @property
    def guide_parameters(self) -> Values: ...


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
    backend     how compiled densities run: 'auto', or one of `compile.BACKENDS`
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
        backend: str = "auto",
    ) -> None:
        self.problem = problem
        self.learning = learning
        self.device = torch.device(device) if device is not None else None
        self.notes: list[str] = []
        self.counts = {"evaluations": 0.0, "gradients": 0.0}
        self.vectorised = True
        self.args, self.kwargs = problem.args, dict(problem.kwargs)
        self._store: Any = pyro.get_param_store().get_state()  # what plain Pyro trained is where a run starts
        self._exit = ExitStack()
        self._depth = 0
        check_backend(backend)
        self._backend, self._compiled = backend, dict[tuple[Any, ...], tuple[Compiled, Tensor | None]]()
        self.kept: dict[Any, Any] = {}  # what engines made for this density and want again: compiled kernels
        self.backend, self.compile_seconds = "eager", 0.0
        self._phi_given = False
        self._minibatch: tuple[Plate, Tensor, float] | None = None
        with pyro.get_param_store().scope(self._store), torch.random.fork_rng(devices=[]):
            reach = [*modules_in_reach(problem.model), *modules_in_reach(problem.guide)]
            self._buffers = Lent([buffer for module in reach for buffer in module.buffers()])
            with self._buffers.lend(), kept_frozen(reach) as frozen:
                model = survey_model(problem, frozen)
                guide = survey_guide(problem, model, frozen)
        self.sites, self.theta, self.improper = model.sites, model.theta, model.improper
        self.simulated = [n for n, s in self.sites.items() if s.simulated]  # what has no density: for ABC
        self.batch_plates, self.data_plate = model.batch_plates, model.data_plate
        self.guide_sites, self.phi, self._guide_fault = guide.sites, guide.phi, guide.fault
        self._layout()
        own = self.theta.dtype or self.phi.dtype or self._data_dtype()
        self._settle(dtype or (own if learning else torch.float64), own, parameters)

    def _settle(self, dtype: torch.dtype, own: torch.dtype, parameters: Values | None) -> None:
        """Choose the dtype, set the parameters, and see that the program does there what its first run promised."""
        for attempt in dict.fromkeys((dtype, own)):
            self._cast(attempt)
            try:
                with self, torch.no_grad(), torch.random.fork_rng(devices=[]):
                    if parameters:
                        self.set_parameters(parameters)
                    self._preflight()
                return
            except RuntimeError as error:
                if attempt == own:
                    raise ProblemError(f"the model failed when run again: {error}") from error
                self.notes.append(f"the program cannot run in {_name(dtype)}; figures are in {_name(own)}")

    def _preflight(self) -> None:
        if not self.latents:
            refuse_randomness(self, {})
        elif not (self.improper and self.unlisted):
            values = self.some_values(3)
            plain = refuse_randomness(self, values)
            self.vectorised = batches_over_draws(self, values, plain)
            if not self.vectorised:
                self.notes.append(BATCHED)
            if self.batch_plates and couples_data(self, values):
                self.notes.append(
                    f"plate {self.batch_plates[0].name!r} couples its data: moving one datum's latent moves another's "
                    "density, so all are treated as one"
                )
                self.batch_plates = []
                self._layout()
        self.counts = {"evaluations": 0.0, "gradients": 0.0}

    # -- running inside: parameters lent, defaults set -----------------------------------------------------------

    def __enter__(self) -> Density:
        self._depth += 1
        if self._depth == 1:
            with ExitStack() as stack:
                stack.enter_context(pyro.get_param_store().scope(self._store))
                stack.enter_context(self._buffers.lend())
                stack.enter_context(self.theta.lend())
                stack.enter_context(self.phi.lend())
                stack.enter_context(_defaults(self.dtype, self.device))
                self._exit = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._exit.close()

    def _layout(self) -> None:
        """Fix what follows from the sites and the batch plates."""
        dims = tuple(p.dim for p in self.batch_plates)
        self.sites = {
            name: replace(site, batch=dims) if all(p in site.plates for p in self.batch_plates) else site
            for name, site in self.sites.items()
        }
        self.guide_sites = {name: replace(site, batch=dims) for name, site in self.guide_sites.items()}
        self.latents = {n: s for n, s in self.sites.items() if s.role == "latent"}
        self.guide_latents = {n: s for n, s in self.guide_sites.items() if s.role == "latent"}
        self.discrete = [n for n, s in self.latents.items() if s.discrete]
        self.continuous = [n for n, s in self.latents.items() if not s.discrete]
        self.unlisted = [n for n in self.discrete if self.latents[n].support is None]  # cannot be summed out
        self._sizes = [
            math.prod(s.own_shape(s.unconstrained_shape, s.unconstrained_event_dim)[len(dims) :])
            for s in (self.latents[n] for n in self.continuous)
        ]
        self.dim = sum(self._sizes)
        self._max_plate_nesting = max((-p.dim for s in self.sites.values() for p in s.plates), default=0)
        self._numel = sum(math.prod(s.shape) for s in self.sites.values()) + 1

    def _data_dtype(self) -> torch.dtype:
        for value in (*self.args, *self.kwargs.values()):
            if isinstance(value, Tensor) and value.is_floating_point():
                return value.dtype
        return torch.get_default_dtype()

    def _cast(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._buffers.cast(dtype, self.device)
        self.theta.cast(dtype, self.device)
        self.phi.cast(dtype, self.device)
        self.args = tuple(_convert(v, dtype, self.device) for v in self.problem.args)
        self.kwargs = {k: _convert(v, dtype, self.device) for k, v in self.problem.kwargs.items()}
        self._whole = self.args, self.kwargs

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
            elif not hasattr(values, "guide_parameters"):
                kind = type(values).__name__
                raise ProblemError(f"parameters: expected a mapping from names to values, or a Fit; got {kind}.")
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
        self.args = tuple(v[index] if _is_data(v, plate.size) else v for v in self._whole[0])
        self.kwargs = {k: v[index] if _is_data(v, plate.size) else v for k, v in self._whole[1].items()}
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

    @property
    def row_numbers(self) -> Tensor | None:
        """Which rows of the data a minibatch is of; None outside of one."""
        return None if self._minibatch is None else self._minibatch[1]

    @property
    def batch_share(self) -> float:
        """The share of all data that the program sees now."""
        return 1.0 if self._minibatch is None else len(self._minibatch[1]) / self._minibatch[0].size

    def rows(self, tensor: Tensor) -> Tensor:
        """The rows of a (*batch, ...) tensor that the program sees now."""
        if self._minibatch is None or not self.batch_plates:
            return tensor
        return tensor[self._minibatch[1]]

    def sliceable(self) -> Plate:
        """The plate that minibatches run over. Raises `ProblemError` where no plate or no argument serves."""
        plate = self.data_plate
        if plate is None:
            raise ProblemError(
                "minibatches need a plate that holds all observations (`with pyro.plate('data', len(x)):`); "
                "this model has none. Use batch_size=None."
            )
        if len(self.batch_shape) > 1:
            raise ProblemError("minibatches over several batch plates are not defined; use batch_size=None.")
        if not any(_is_data(v, plate.size) for v in (*self._whole[0], *self._whole[1].values())):
            raise ProblemError(
                f"minibatches slice the data arguments, but no argument has plate {plate.name!r}'s size {plate.size} "
                "as its first dimension; pass the data in args."
            )
        return plate

    # -- draws ---------------------------------------------------------------------------------------------------

    def some_values(self, count: int) -> dict[str, Tensor]:
        """Values of the latents to try things on: draws of the prior, or the image of zero where it is improper."""
        if not self.latents:
            return {}
        if not self.improper:
            return self.prior(count).values
        u = torch.zeros((count, *self.batch_shape, self.dim), dtype=self.dtype, device=self.device)
        return self.constrain(u)

    @property
    def prior_fault(self) -> str:
        """Why draws of the prior do not have the prior's density, in words; '' where they have."""
        if self.improper:
            return f"site {self.improper[0]!r} has an improper prior, which cannot be drawn from"
        if weighed := [n for n in self.latents if self.sites[n].reweighted]:
            return f"site {weighed[0]!r} is masked or scaled, so draws of its prior do not have its density"
        return ""

    def prior(self, count: int) -> PriorDraws:
        """Draws of the latents from the prior, before any mask or scale. Raises `ProblemError` where a site has no
        proper prior."""
        if self.improper:
            raise ProblemError(f"site {self.improper[0]!r} has an improper prior: it cannot be drawn from.")

        def one(_: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
            reading = self._run({}, want=_VALUES)
            values = {n: reading.values[n] for n in self.latents}
            return values, self._filled(reading.log_prior), self._filled(reading.log_likelihood)

        return PriorDraws(*self._map(one, torch.zeros(count), count, random=True))

    def simulate(self, count: int, given: Tensor | None = None) -> dict[str, Tensor]:
        """Latents and data drawn from the model at theta, site -> (count, *batch, *event); data alone where continuous
        latents are `given` as u (count, *batch, D). Raises `ProblemError` where the prior's density is not that of its
        draws, or where `pyro.factor` takes part, which cannot be drawn from."""
        factors = [n for n, s in self.sites.items() if s.role == "factor"]
        if self.prior_fault:
            raise ProblemError(f"{self.prior_fault}: data cannot be drawn from the model.")
        if factors:
            raise ProblemError(f"site {factors[0]!r} cannot be drawn from, so data cannot be.")

        def one(u: Tensor) -> dict[str, Tensor]:
            held = {} if given is None else self._given(u)
            scribe = Scribe(self.sites, held, transformed=bool(held), minibatch=self._minibatch, want=_DRAWN)
            with scribe, Unobserved():
                self.problem.model(*self.args, **self.kwargs)
            return {n: v for n, v in scribe.reading.values.items() if self.sites[n].role in ("latent", "observed")}

        return self._map(one, torch.zeros(count) if given is None else given, count, random=True)

    def predict(self, values: Values) -> dict[str, Tensor]:
        """Data drawn from the model given its latents, site -> (*sample, *batch, *other plates, *event)."""

        def one(v: Any) -> dict[str, Tensor]:
            given = self._given(v)
            with Scribe(self.sites, given, minibatch=self._minibatch, want=_DRAWN) as scribe, Unobserved():
                self.problem.model(*self.args, **self.kwargs)
            return {n: v for n, v in scribe.reading.values.items() if self.sites[n].role == "observed"}

        return self._over_samples(one, values, random=True)

    def together(self, function: Callable[[Tensor], Any], count: int) -> Any:
        """A function of a lane's number, in which the program runs once and draws, for all lanes in one vmap: they may
        look at each other. Counted as so many evaluations."""
        self.counts["evaluations"] += count * self.batch_share
        with self, pyro.validation_enabled(False), batched_randomness():
            return torch.func.vmap(function, randomness="different")(torch.arange(count, device=self.device))

    @contextmanager
    def once(self) -> Iterator[None]:
        """Inside, the program is run once, as it is: one evaluation."""
        self.counts["evaluations"] += self.batch_share
        with self, pyro.validation_enabled(False):
            yield

    @contextmanager
    def substituted(self, data: Mapping[int | str, Tensor]) -> Iterator[None]:
        """Inside, the program's arguments at these positions or names are others."""
        args, kwargs = self.args, self.kwargs
        self.args = tuple(data.get(i, v) for i, v in enumerate(args))
        self.kwargs = {k: data.get(k, v) for k, v in kwargs.items()}
        try:
            yield
        finally:
            self.args, self.kwargs = args, kwargs

    def guide(self, count: int, auxiliary: bool = False) -> GuideDraws:
        """Draws from the guide, reparameterised where it can; `auxiliary`: its auxiliary sites are among the values.
        Raises `ProblemError` where there is no usable guide."""
        self.require_guide()
        names = self.guide_latents if auxiliary else self.latents

        def one(_: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
            scribe = Scribe(self.guide_sites, {}, minibatch=self._minibatch, want=_VALUES)
            with scribe:
                self.problem.guide(*self.args, **self.kwargs)  # type: ignore[misc]
            values = {n: v for n, v in scribe.reading.values.items() if n in names}
            return values, self._filled(scribe.reading.log_prior), self._filled(scribe.reading.log_score)

        return GuideDraws(*self._map(one, torch.zeros(count), count, random=True, counted=False))

    def require_guide(self) -> None:
        if self._guide_fault is not None:
            raise self._guide_fault

    # -- densities -----------------------------------------------------------------------------------------------

    def log_joint(self, z: Tensor | Values, jacobian: bool = True) -> Tensor:
        """log p(x, z), (*sample, *batch), in nats; of u with the log-Jacobian unless `jacobian=False`.
        Discrete latents that z does not give are summed out."""
        marginal = self._sums_out(z)

        def one(v: Any) -> Tensor:
            if marginal:
                total, log_jacobian = self._run_marginal(v)
            else:
                reading = self._run(v)
                total, log_jacobian = reading.log_prior + reading.log_likelihood, reading.log_jacobian
            return self._filled(total + log_jacobian if jacobian else total)

        return self._over_samples(one, z)

    def log_prior(self, z: Tensor | Values) -> Tensor:
        """log p(z), (*sample, *batch); of u with the log-Jacobian. Discrete latents that z does not give are summed
        out, which is not the same as left out where a continuous latent depends on them."""
        marginal = self._sums_out(z)

        def one(v: Any) -> Tensor:
            if marginal:
                return self._filled(sum(self._run_marginal(v, observed=False)))
            reading = self._run(v)
            return self._filled(reading.log_prior + reading.log_jacobian)

        return self._over_samples(one, z)

    def _sums_out(self, z: Tensor | Values) -> bool:
        return bool(self.discrete) if isinstance(z, Tensor) else any(n not in z for n in self.discrete)

    def log_likelihood(self, z: Tensor | Values) -> Tensor:
        """log p(x | z), (*sample, *batch)."""
        return self._over_samples(lambda v: self._filled(self._run(v).log_likelihood), z)

    def log_guide(self, z: Tensor | Values) -> Tensor:
        """log q(z | x) of given values, (*sample, *batch), in nats. Of u it is the density in the unconstrained space,
        log q(T(u)) + log |det dT/du|, with the model's map T. Its gradient in z is at fixed phi, its gradient in phi at
        fixed z. Raises `ProblemError` where the guide samples a site that z does not give."""
        self.require_guide()
        names = self.continuous if isinstance(z, Tensor) else z
        missing = [n for n in self.guide_latents if n not in names]
        if missing:
            raise ProblemError(f"site {missing[0]!r} of the guide has no value, so its density cannot be told.")

        def one(v: Any) -> Tensor:
            log_jacobian: Any = 0.0
            if isinstance(v, Tensor):
                reading = self._run(v, want=_VALUES)
                v, log_jacobian = reading.values, reading.log_jacobian
            given = {n: s.to_pyro(v[n], s.event_dim) for n, s in self.guide_latents.items()}
            scribe = Scribe(self.guide_sites, given, minibatch=self._minibatch)
            with scribe:
                self.problem.guide(*self.args, **self.kwargs)  # type: ignore[misc]
            return self._filled(scribe.reading.log_prior + log_jacobian)

        transformed = isinstance(z, Tensor)
        return self._over_samples(one, z, random=transformed, sites=None if transformed else self.guide_latents)

    def pointwise(self, values: Values) -> dict[str, Tensor]:
        """Observed site -> log likelihood of each observation, (*sample, *batch, *other plates)."""
        return self._over_samples(lambda v: self._run(v, want=_POINTWISE).pointwise, values)

    @property
    def observed(self) -> dict[str, Tensor]:
        """Observed site -> its data, (*batch, *other plates, *event)."""
        with self:
            values = {n: v[0] for n, v in self.some_values(1).items()}
            recorded = self._run(values, want=_VALUES).values
        return {n: recorded[n].detach().cpu() for n, s in self.sites.items() if s.role == "observed"}

    def constrain(self, u: Tensor) -> dict[str, Tensor]:
        """u (*sample, *batch, D) -> continuous site -> (*sample, *batch, *event)."""
        return self._recorded(u, self.continuous)

    def complete(self, z: Tensor | Values) -> dict[str, Tensor]:
        """Every site that z tells, constrained, (*sample, *batch, *event): the latents that it gives, and, where it
        gives all of them, the `pyro.deterministic` ones that can be told per batch element."""
        given = self.continuous if isinstance(z, Tensor) else [n for n in self.latents if n in z]
        follow = [
            name
            for name, site in self.sites.items()
            if site.role == "deterministic" and bool(site.batch) == bool(self.batch_plates)
        ]
        names = given + follow if len(given) == len(self.latents) else given
        if isinstance(z, Tensor):
            return self._recorded(z, names)
        return {**{n: z[n] for n in given}, **(self._recorded(z, follow) if follow and names != given else {})}

    def _recorded(self, z: Tensor | Values, names: list[str]) -> dict[str, Tensor]:
        def one(v: Any) -> dict[str, Tensor]:
            values = self._run(v, want=_DRAWN).values
            return {n: values[n] for n in names}

        return self._over_samples(one, z, random=True)

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

    def compiled(self, u: Tensor) -> Compiled:
        """`value_and_grad` for many calls at the shape of u, (*sample, *batch, D), by the fastest back end that
        agrees with it. Calls through it are not counted: who makes them does (`counts`)."""
        rows = None if self._minibatch is None else self._minibatch[1]
        key = (tuple(u.shape), None if rows is None else len(rows))
        if key not in self._compiled:
            index = None if rows is None else rows.clone()  # read where it lives, so that other rows can follow

            def function(v: Tensor) -> tuple[Tensor, Tensor]:
                with self.minibatch(index) if index is not None else nullcontext():
                    return self.value_and_grad(v)

            with torch.no_grad():
                examples: list[tuple[Tensor, ...]] = [(u.clone(),), (u + 0.1 * torch.randn_like(u),)]
            made = self.compile(function, examples, [] if index is None else [index])
            self._compiled[key] = made, index
        made, index = self._compiled[key]
        if index is not None and rows is not None:
            index.copy_(rows)
        self.backend = made.backend
        return made

    def compile(
        self, function: Callable[..., tuple[Tensor, ...]], examples: list[tuple[Tensor, ...]], moving: list[Tensor],
        native: bool = True,
    ) -> Compiled:  # fmt: skip
        """A function made of this density's, compiled, not counted; theta, phi and what else moves are read where
        they live. `native=False`: machine code would not pay for itself."""
        tensors = list({id(t): t for t in [*moving, *self.theta.tensors, *self.phi.tensors]}.values())
        backend = "graph" if self._backend == "auto" and not native else self._backend
        with self.uncounted():
            made = compiled(function, examples, tensors, backend=backend)
        self.backend = made.backend
        self.compile_seconds += made.seconds
        return made

    def compiled_value_and_grad(self, u: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """`value_and_grad` for many calls at the shape of u, counted."""
        run = self.compiled(u)
        if run.backend == "eager":
            return self.value_and_grad
        count = math.prod(u.shape[: u.dim() - len(self.batch_shape) - 1]) * self.batch_share

        def counted(v: Tensor) -> tuple[Tensor, Tensor]:
            self.counts["gradients"] += count
            value, gradient = run(v)
            return value, gradient

        return counted

    def _compile_map(
        self, function: Callable[..., tuple[Tensor, ...]], examples: list[tuple[Tensor, ...]]
    ) -> Callable[..., tuple[Tensor, ...]]:
        return self.compile(function, examples, [])

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """What is evaluated inside, to trace and compare, is not counted."""
        before = dict(self.counts)
        try:
            yield
        finally:
            self.counts.update(before)

    # -- running -------------------------------------------------------------------------------------------------

    def read(self, given: Values, free: Collection[str] = (), want: frozenset[str] = TERMS) -> Reading:
        """One plain run at values of all latents as Pyro lays them out, those of `free` unconstrained. Not counted."""
        scribe = Scribe(self.sites, given, transformed=free, minibatch=self._minibatch, want=want)
        with scribe, pyro.validation_enabled(False):
            self.problem.model(*self.args, **self.kwargs)
        return scribe.reading

    def batched(self, function: Callable[[Any], Any], inputs: Values, count: int) -> Any:
        """A function of one draw, which calls `read`, over the first dimension of its inputs. Not counted."""
        return self._map(function, dict(inputs), count, counted=False)

    def _run(self, z: Any, want: frozenset[str] = frozenset()) -> Reading:
        """One plain run of the model at z: a flat u (*batch, D), or values site -> (*batch, *event)."""
        transformed = isinstance(z, Tensor)
        scribe = Scribe(self.sites, self._given(z), transformed=transformed, minibatch=self._minibatch, want=want)
        with scribe:
            self.problem.model(*self.args, **self.kwargs)
        if len(scribe.seen) < len(self.sites):
            raise ProblemError(SOMETIMES.format(next(n for n in self.sites if n not in scribe.seen)))
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

    def _run_marginal(self, z: Any, observed: bool = True) -> tuple[Tensor, Any]:
        """The log joint (the log prior where not `observed`) and the log-Jacobian, with the discrete latents that z
        lacks summed out."""
        # scaling comes after the sums, or it is wrong
        local = self._minibatch and (*self._minibatch[:2], 1.0)
        scribe = Scribe(self.sites, self._given(z), transformed=isinstance(z, Tensor), minibatch=local, want=_TRACE)
        with scribe:
            trace = enumerated_trace(self.problem.model, self.args, self.kwargs, self._max_plate_nesting)
        for name, site in self.sites.items():
            if not observed and site.role != "latent" and name in trace.nodes:
                trace.remove_node(name)
        scaled = (self._minibatch[0].name, self._minibatch[2]) if self._minibatch else None
        return sum_out(trace, [p.name for p in self.batch_plates], scaled), scribe.reading.log_jacobian

    def _filled(self, value: Any) -> Tensor:
        """A per-element figure, as a tensor of the batch's shape even where no site added to it."""
        shape = self.batch_shape
        return value if isinstance(value, Tensor) and value.shape == shape else torch.as_tensor(value).expand(shape)

    def _over_samples(
        self, function: Callable[[Any], Any], z: Tensor | Values, random: bool = False,
        sites: Mapping[str, Site] | None = None,
    ) -> Any:  # fmt: skip
        """Apply a function of one draw to z with any sample dimensions in front. z may hold values of other sites than
        these; None: the latents, whose densities are counted, which the guide's own are not."""
        counted, sites = sites is None, self.latents if sites is None else sites
        batch_dim = len(self.batch_shape)
        if isinstance(z, Tensor):
            sample = z.shape[: z.dim() - batch_dim - 1]
            flat: Any = _convert(z, self.dtype, self.device).reshape((-1, *z.shape[len(sample) :]))
        else:
            name = next((n for n in z if n in sites), "")
            first, site = (z[name], sites[name]) if name else (torch.zeros(()), None)
            own = len(site.own_shape(site.shape, site.event_dim)) if site else 0
            sample = first.shape[: first.dim() - own]
            flat = {
                n: _convert(v, self.dtype, self.device).reshape((-1, *v.shape[len(sample) :]))
                for n, v in z.items()
                if n in sites
            }
            if not flat:  # nothing to give: one run tells all
                return self._map(lambda _: function({}), torch.zeros(1), 1, counted=counted)[0]
        count = math.prod(sample)
        result = self._map(function, flat, count, random=random, counted=counted)
        return tree_map(lambda t: t.reshape((*sample, *t.shape[1:])), result)

    def _map(
        self, function: Callable[[Any], Any], inputs: Any, count: int, random: bool = False, counted: bool = True
    ) -> Any:
        """vmap a function of one draw over the first dimension of its inputs, in chunks; a loop where it cannot."""
        if counted:
            tensors = [inputs] if isinstance(inputs, Tensor) else list(inputs.values())
            grad = torch.is_grad_enabled() and (self.learning or any(t.requires_grad for t in tensors))
            self.counts["gradients" if grad else "evaluations"] += count * self.batch_share
        with self, pyro.validation_enabled(False):
            many = count * self._numel >= _COMPILE_FROM
            return over_draws(
                function, inputs, count, vectorised=self.vectorised, random=random or bool(self.simulated),
                chunk=max(1, (_BLOCK if many else _CHUNK) // self._numel),
                compile=self._compile_map if many and not torch.is_grad_enabled() else None,
            )  # fmt: skip


_VALUES = frozenset({"values"})
_DRAWN = frozenset({"drawn", "values"})
_POINTWISE = frozenset({"pointwise"})
_UNCONSTRAINED = frozenset({"unconstrained"})
_TRACE = frozenset({"trace"})


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


def _is_data(value: Any, size: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == size


def _convert(value: Any, dtype: torch.dtype, device: torch.device | None) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.to(dtype=dtype if value.is_floating_point() else value.dtype, device=device)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
