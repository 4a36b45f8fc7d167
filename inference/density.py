"""A Pyro program as a pure, batched density: the one floor that every engine stands on.

For a problem with model p_theta(x, z) the latents of each batch element form one flat unconstrained vector u, and

    log_joint(u) = log p_theta(x, T(u)) + log |det dT/du|          u: (*sample, *batch, D) -> (*sample, *batch).

The batch is the plate (or plates) that holds every latent and every observation of a datum; it is found from the
program. With a global latent outside it the batch is (). Samples are batched by vmap, so a program needs no extra
dimension in mind. Discrete latents that are not given are summed out exactly.

What a mask leaves out of a latent and moves nothing else, as padding does, is no part of the answer: sums over labels
count it once, u has the prior there, and values leave it out, as masks of the guide do.

Every density also takes constrained values, site -> (*sample, *batch, *event), and then leaves the Jacobian out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from .batching import batched_randomness, chunk_of, over_draws
from .compilations import Compilations
from .compile import Compiled, Function
from .layout import Layout
from .one_draw import GuideDraws, OneDraw, PriorDraws
from .parameters import HasParameters, Loan, divided, kept_frozen
from .preflight import Tried, preflight, some_values
from .problem import Problem, ProblemError
from .program import Plate, Reading, Site
from .rows import Rows, converted, data_dtype
from .survey import survey_guide, survey_model

Values = Mapping[str, Tensor]

TERMS = frozenset({"terms"})  # what `Density.read` writes down


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
        self.counts = {"evaluations": 0.0, "gradients": 0.0}  # over all data once each
        self.vectorised = True
        self.tried: Tried | None = None  # where the program was run beforehand, and its log joints there
        self.kept: dict[Any, Any] = {}  # what engines made for this density and want again: compiled kernels
        self._phi_given = False
        self._loan = Loan(problem)
        with self._loan, torch.random.fork_rng(devices=[]), kept_frozen(self._loan.modules) as frozen:
            model = survey_model(problem, frozen)
            guide = survey_guide(problem, model, frozen)
        self.theta, self.improper, self.data_plate = model.theta, model.improper, model.data_plate
        self.phi, self._guide_fault = guide.phi, guide.fault
        self._loan.add(self.theta, self.phi)
        self._compilations = Compilations([*self.theta.tensors, *self.phi.tensors], backend)
        self.layout = Layout.of(model.sites, guide.sites, model.batch_plates)
        own = self.theta.dtype or self.phi.dtype or data_dtype(problem)
        self._settle(dtype or (own if learning else torch.float64), own, parameters)

    def _settle(self, dtype: torch.dtype, own: torch.dtype, parameters: Values | None) -> None:
        """Choose the dtype, set the parameters, and see that the program does there what its first run promised."""
        for attempt in dict.fromkeys((dtype, own)):
            self.dtype = attempt
            self._loan.cast(attempt, self.device)
            self._lay_out(self.layout)
            try:
                with self, torch.no_grad(), torch.random.fork_rng(devices=[]):
                    if parameters:
                        self.set_parameters(parameters)
                    if preflight(self):
                        self._lay_out(Layout.of(self.sites, self.guide_sites, []))
                self.counts = {"evaluations": 0.0, "gradients": 0.0}
                return
            except RuntimeError as error:
                if attempt == own:
                    raise ProblemError(f"the model failed when run again: {error}") from error
                tried, kept = (str(d).removeprefix("torch.") for d in (dtype, own))
                self.notes.append(f"the program cannot run in {tried}; figures are in {kept}")

    def _lay_out(self, layout: Layout) -> None:
        """Take this layout, and all data in the dtype."""
        self.layout = layout
        self._rows = Rows(self.problem, self.data_plate, len(layout.batch_plates), self.dtype, self.device)
        self._one = OneDraw(self.problem, layout, self._rows)
        self.sites, self.latents, self.batch_plates = layout.sites, layout.latents, layout.batch_plates
        self.guide_sites, self.guide_latents = layout.guide_sites, layout.guide_latents
        self.continuous, self.discrete, self.unlisted = layout.continuous, layout.discrete, layout.unlisted
        self.simulated = [n for n, s in layout.sites.items() if s.simulated]  # what has no density: for ABC
        self.dim = layout.dim

    def leave_out(self, padded: Collection[str]) -> None:
        """From here on what the masks of these latents leave out is padding. A guide must mask it too."""
        if not padded:
            return
        self._lay_out(self.layout.leaving_out(padded))
        if (name := self.layout.guide_in_padding) and self._guide_fault is None:
            self._guide_fault = ProblemError(
                f"guide site {name!r} has a density where the model's is masked, as padding is: sample it under the "
                "same mask, or name an autoguide (SVI(guide='AutoNormal'))."
            )

    def log_idle(self) -> Tensor:
        """What a sum over the values of all discrete latents counts too much, (*batch): `OneDraw.log_idle`."""
        return self._one.log_idle(self.discrete)

    def __enter__(self) -> Density:
        self._loan.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._loan.__exit__(*exc)

    # -- parameters ----------------------------------------------------------------------------------------------

    def set_parameters(self, values: Values | HasParameters) -> None:
        """Write theta and phi: a mapping by name (constrained values), or a `Fit`, whose phi is taken where this
        problem's guide has it. Raises `ProblemError` on an unknown name."""
        theta, phi = divided(values, self.theta, self.phi)
        with self:
            self.theta.set(theta)
            self.phi.set(phi)
            self._phi_given = bool(phi)

    @property
    def guide_ready(self) -> bool:
        """Whether there is a guide that can be used as it stands: its phi was given, or it has none."""
        return self._guide_fault is None and (self._phi_given or not len(self.phi))

    def require_guide(self) -> None:
        """Raises `ProblemError` where there is no usable guide."""
        if self._guide_fault is not None:
            raise self._guide_fault

    @property
    def guide_flaw(self) -> str:
        """Why log q(z) of the guide's draws is no density of them, in words; '' where it is."""
        return self.layout.guide_flaw

    # -- data ----------------------------------------------------------------------------------------------------

    @property
    def args(self) -> tuple[Any, ...]:
        """The program's positional arguments, as it sees them now."""
        return self._rows.args

    @property
    def kwargs(self) -> dict[str, Any]:
        """The program's named arguments, as it sees them now."""
        return self._rows.kwargs

    @property
    def batch_shape(self) -> torch.Size:
        """The sizes of the batch plates; inside a minibatch, its number of rows."""
        return self._one.batch_shape

    def minibatch(self, index: Tensor) -> AbstractContextManager[None]:
        """Inside, the program sees these rows of the data. Per-datum densities are those of the rows; in a problem
        with global latents the sites of the data plate are scaled by N/B. Raises `ProblemError` where the data
        arguments cannot be sliced."""
        return self._rows.minibatch_of(index)

    def substituted(self, data: Mapping[int | str, Tensor]) -> AbstractContextManager[None]:
        """Inside, the program's arguments at these positions or names are others."""
        return self._rows.substituted(data)

    def sliceable(self) -> Plate:
        """The plate that minibatches run over. Raises `ProblemError` where no plate or no argument serves."""
        return self._rows.sliceable()

    @property
    def row_numbers(self) -> Tensor | None:
        """Which rows of the data a minibatch is of; None outside of one."""
        return self._rows.numbers

    @property
    def batch_share(self) -> float:
        """The share of all data that the program sees now."""
        return self._rows.share

    @property
    def data_scale(self) -> float:
        """What a sum over the rows of a minibatch is multiplied by to stand for all data: N/B; else 1."""
        return self._rows.scale

    def rows(self, tensor: Tensor) -> Tensor:
        """The rows of a (*batch, ...) tensor that the program sees now."""
        return tensor if self.row_numbers is None or not self.batch_plates else tensor[self.row_numbers]

    # -- draws ---------------------------------------------------------------------------------------------------

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
        return self._map(self._one.prior, torch.zeros(count), count, random=True)

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
            return self._one.simulate({} if given is None else u, ("latent", "observed"))

        return self._map(one, torch.zeros(count) if given is None else given, count, random=True)

    def predict(self, values: Values) -> dict[str, Tensor]:
        """Data drawn from the model given its latents, site -> (*sample, *batch, *other plates, *event)."""
        return self._over_samples(partial(self._one.simulate, roles=("observed",)), values, random=True)

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

    def guide(self, count: int, auxiliary: bool = False) -> GuideDraws:
        """Draws from the guide, reparameterised where it can; `auxiliary`: its auxiliary sites are among the values.
        Raises `ProblemError` where there is no usable guide."""
        self.require_guide()
        propose = partial(self._one.propose, names=self.guide_latents if auxiliary else self.latents)
        return self._map(propose, torch.zeros(count), count, random=True, counted=False)

    # -- densities -----------------------------------------------------------------------------------------------

    def log_joint(self, z: Tensor | Values, jacobian: bool = True) -> Tensor:
        """log p(x, z), (*sample, *batch), in nats; of u with the log-Jacobian unless `jacobian=False`.
        Discrete latents that z does not give are summed out."""
        return self._over_samples(partial(self._one.log_joint, jacobian=jacobian), z)

    def log_prior(self, z: Tensor | Values) -> Tensor:
        """log p(z), (*sample, *batch); of u with the log-Jacobian. Discrete latents that z does not give are summed
        out, which is not the same as left out where a continuous latent depends on them."""
        return self._over_samples(self._one.log_prior, z)

    def log_likelihood(self, z: Tensor | Values) -> Tensor:
        """log p(x | z), (*sample, *batch)."""
        return self._over_samples(self._one.log_likelihood, z)

    def log_guide(self, z: Tensor | Values) -> Tensor:
        """log q(z | x) of given values, (*sample, *batch), in nats. Of u it is the density in the unconstrained space,
        log q(T(u)) + log |det dT/du|, with the model's map T. Its gradient in z is at fixed phi, its gradient in phi at
        fixed z. Raises `ProblemError` where the guide samples a site that z does not give."""
        self.require_guide()
        transformed = isinstance(z, Tensor)
        return self._over_samples(
            self._one.log_guide, z, random=transformed, sites=None if transformed else self.guide_latents
        )

    def pointwise(self, values: Values) -> dict[str, Tensor]:
        """Observed site -> log likelihood of each observation, (*sample, *batch, *other plates)."""
        return self._over_samples(self._one.pointwise, values)

    @property
    def observed(self) -> dict[str, Tensor]:
        """Observed site -> its data, (*batch, *other plates, *event)."""
        with self:
            values = {n: v[0] for n, v in some_values(self, 1).items()}
            return {n: v.detach().cpu() for n, v in self._one.observed(values).items()}

    def constrain(self, u: Tensor) -> dict[str, Tensor]:
        """u (*sample, *batch, D) -> continuous site -> (*sample, *batch, *event)."""
        return self._recorded(u, self.continuous)

    def complete(self, z: Tensor | Values) -> dict[str, Tensor]:
        """Every site that z tells, constrained, (*sample, *batch, *event): the latents that it gives, and, where it
        gives all of them, the `pyro.deterministic` ones that can be told per batch element."""
        given = self.continuous if isinstance(z, Tensor) else [n for n in self.latents if n in z]
        follow = self.layout.followers if len(given) == len(self.latents) else []
        if isinstance(z, Tensor):
            return self._recorded(z, given + follow)
        return {**{n: z[n] for n in given}, **(self._recorded(z, follow) if follow else {})}

    def _recorded(self, z: Tensor | Values, names: list[str]) -> dict[str, Tensor]:
        if isinstance(z, Tensor) and self.layout.is_direct(names):
            return self.layout.constrained(converted(z, self.dtype, self.device), names)
        return self._over_samples(partial(self._one.values, names=names), z, random=True)

    def unconstrain(self, values: Values) -> Tensor:
        """site -> (*sample, *batch, *event) to u (*sample, *batch, D)."""
        if self.layout.is_direct(self.continuous):
            given = {n: converted(values[n], self.dtype, self.device) for n in self.continuous}
            return self.layout.unconstrained(given)
        return self._over_samples(self._one.unconstrained, values, random=True)

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

        def function(v: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor]:
            with nullcontext() if rows is None else self.minibatch(rows):
                return self.value_and_grad(v)

        with self.uncounted():
            return self._compilations.at(function, u, self.row_numbers)

    def compile(
        self, function: Function, examples: list[tuple[Tensor, ...]], moving: list[Tensor], native: bool = True
    ) -> Compiled:
        """A function made of this density's, compiled, not counted; theta, phi and what else moves are read where
        they live. `native=False`: machine code would not pay for itself."""
        with self.uncounted():
            return self._compilations.compile(function, examples, moving, native)

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

    @property
    def backend(self) -> str:
        """The back end of what was compiled last; 'eager' before."""
        return self._compilations.backend

    @property
    def compile_seconds(self) -> float:
        """What all tracing and compiling took."""
        return self._compilations.seconds

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
        with pyro.validation_enabled(False):
            return self._one.model(given, transformed=free, want=want).reading

    def batched(self, function: Callable[[Any], Any], inputs: Values, count: int) -> Any:
        """A function of one draw, which calls `read`, over the first dimension of its inputs. Not counted."""
        return self._map(function, dict(inputs), count, counted=False)

    def _over_samples(
        self, function: Callable[[Any], Any], z: Tensor | Values, random: bool = False,
        sites: Mapping[str, Site] | None = None,
    ) -> Any:  # fmt: skip
        """Apply a function of one draw to z with any sample dimensions in front. z may hold values of other sites than
        these; None: the latents, whose densities are counted, which the guide's own are not."""
        counted, sites = sites is None, self.latents if sites is None else sites
        z = z if isinstance(z, Tensor) else {n: v for n, v in z.items() if n in sites}
        if not isinstance(z, Tensor) and not z:  # nothing to give: one run tells all
            return self._map(lambda _: function({}), torch.zeros(1), 1, counted=counted)[0]
        sample = self.layout.sample_shape(z, sites)

        def flat(v: Tensor) -> Tensor:
            return converted(v, self.dtype, self.device).reshape((-1, *v.shape[len(sample) :]))

        count = math.prod(sample)
        inputs = flat(z) if isinstance(z, Tensor) else {n: flat(v) for n, v in z.items()}
        result = self._map(function, inputs, count, random=random, counted=counted)
        return tree_map(lambda t: t.reshape((*sample, *t.shape[1:])), result)

    def _map(
        self, function: Callable[[Any], Any], inputs: Any, count: int, random: bool = False, counted: bool = True
    ) -> Any:
        """vmap a function of one draw over the first dimension of its inputs, in chunks; a loop where it cannot."""
        if counted:
            tensors = [inputs] if isinstance(inputs, Tensor) else list(inputs.values())
            grad = torch.is_grad_enabled() and (self.learning or any(t.requires_grad for t in tensors))
            self.counts["gradients" if grad else "evaluations"] += count * self.batch_share
        chunk, compiles = chunk_of(count, self.layout.numel)
        with self, pyro.validation_enabled(False):
            return over_draws(
                function, inputs, count, vectorised=self.vectorised, random=random or bool(self.simulated),
                anywhere=bool(self.simulated), chunk=chunk,
                compile=partial(self.compile, moving=[]) if compiles else None,
            )  # fmt: skip
