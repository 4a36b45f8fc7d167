"""theta (or phi): the leaf tensors that a program's log density depends on, with names and constraints.

Pyro lets parameters live in `nn.Module`s, `PyroModule`s, `PyroParam`s, `pyro.param` and closures. All of them end
in leaf tensors of the autograd graph, so that is where they are found: nothing has to be registered with us. A run
borrows the leaves (`lend`): it may change their values, dtype and device, and gives them back as they were. A `Loan`
is all that one run borrows.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import pyro
import torch
from torch import Tensor, nn
from torch.distributions import constraints, transform_to

from .problem import Problem, ProblemError
from .shapes import shapes_without_symbols


@dataclass(frozen=True, eq=False)
class Leaf:
    """One parameter: its unconstrained tensor and the constraint that its value obeys."""

    name: str
    tensor: Tensor
    constraint: Any

    def value(self) -> Tensor:
        """The constrained value, connected to the leaf."""
        return self.tensor if self.constraint is constraints.real else transform_to(self.constraint)(self.tensor)

    def set(self, value: Tensor) -> None:
        """Write a constrained value into the leaf. Raises `ProblemError` on a wrong shape or a value outside."""
        try:
            value = torch.as_tensor(value, dtype=self.tensor.dtype, device=self.tensor.device).detach()
        except (TypeError, ValueError, RuntimeError) as error:
            raise ProblemError(f"parameter {self.name!r}: expected a tensor or number, got {value!r}.") from error
        if value.shape != self.value().shape:
            raise ProblemError(
                f"parameter {self.name!r}: expected shape {tuple(self.value().shape)}, got {tuple(value.shape)}."
            )
        if not bool(self.constraint.check(value).all()):
            raise ProblemError(f"parameter {self.name!r}: a value lies outside {self.constraint}.")
        if not bool(value.isfinite().all()):
            raise ProblemError(f"parameter {self.name!r}: not all of its values are finite.")
        if self.constraint is not constraints.real:
            value = transform_to(self.constraint).inv(value)
        self.tensor.data = value.clone()


class Lent:
    """Tensors of the user's that a run borrows: inside `lend` they hold the run's values, afterwards their owner's."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        self._kept = [t.data.clone() for t in tensors]

    def cast(self, dtype: torch.dtype, device: torch.device | None) -> None:
        """Change what the next `lend` puts into the tensors; whole numbers keep their type."""
        self._kept = [v.to(dtype=dtype if v.is_floating_point() else v.dtype, device=device) for v in self._kept]

    @contextmanager
    def lend(self) -> Iterator[None]:
        owner = [(t.data, t.grad) for t in self.tensors]
        for tensor, value in zip(self.tensors, self._kept, strict=True):
            tensor.grad = None
            tensor.data = value
        try:
            yield
        finally:
            self._kept = [t.data for t in self.tensors]
            for tensor, (value, grad) in zip(self.tensors, owner, strict=True):
                tensor.grad = None
                tensor.data = value
                tensor.grad = grad


class Parameters:
    """The named leaves of one program, in a fixed order."""

    def __init__(self, leaves: Mapping[str, Leaf]) -> None:
        self.by_name = dict(leaves)
        self.tensors = [leaf.tensor for leaf in leaves.values()]
        self._lent = Lent(self.tensors)
        self.cast, self.lend = self._lent.cast, self._lent.lend

    def __len__(self) -> int:
        return len(self.tensors)

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_name)

    @property
    def dtype(self) -> torch.dtype | None:
        """The widest dtype among the leaves; None without leaves."""
        widest = None
        for tensor in self.tensors:
            widest = tensor.dtype if widest is None else torch.promote_types(widest, tensor.dtype)
        return widest

    def values(self) -> dict[str, Tensor]:
        """name -> constrained value: detached, copied, on the CPU."""
        with torch.no_grad():
            return {name: leaf.value().detach().cpu().clone() for name, leaf in self.by_name.items()}

    def set(self, values: Mapping[str, Tensor]) -> None:
        """Write constrained values by name. Raises `ProblemError` on an unknown name, with the nearest one."""
        for name, value in values.items():
            if name not in self.by_name:
                near = difflib.get_close_matches(str(name), self.by_name, 1)
                hint = f" Did you mean {near[0]!r}?" if near else f" There are: {', '.join(self.by_name) or 'none'}."
                raise ProblemError(f"no parameter {name!r} in the model.{hint}")
            self.by_name[name].set(value)


class HasParameters(Protocol):
    """A `Fit`: theta and phi by name."""

    @property
    def parameters(self) -> Mapping[str, Tensor]: ...

    @property
    def guide_parameters(self) -> Mapping[str, Tensor]: ...


def divided(
    values: Mapping[str, Tensor] | HasParameters, theta: Parameters, phi: Parameters
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """What to set theta and phi to: by name, or by a `Fit`, whose phi is taken where this guide has it too. Raises
    `ProblemError` where it is neither."""
    if isinstance(values, Mapping):
        of_phi = {n: v for n, v in values.items() if n in phi and n not in theta}
        return {n: v for n, v in values.items() if n not in of_phi}, of_phi
    if not hasattr(values, "guide_parameters"):
        kind = type(values).__name__
        raise ProblemError(f"parameters: expected a mapping from names to values, or a Fit; got {kind}.")
    return values.parameters, {n: v for n, v in values.guide_parameters.items() if n in phi}


class Loan:
    """What a run borrows of a problem's programs: Pyro's store, the buffers of modules, theta and phi.

    A context manager, which may be entered again inside: there they are the run's, and literals that the program makes
    have its dtype and device. The store is at first as plain Pyro left it.
    """

    def __init__(self, problem: Problem) -> None:
        self.modules = [*modules_in_reach(problem.model), *modules_in_reach(problem.guide)]
        self._store: Any = pyro.get_param_store().get_state()
        self._lent: list[Lent | Parameters] = [Lent([b for module in self.modules for b in module.buffers()])]
        self._defaults: tuple[torch.dtype, torch.device | None] | None = None
        self._exit = ExitStack()
        self._depth = 0

    def add(self, *parameters: Parameters) -> None:
        """Borrow these too, from the next time on."""
        self._lent += parameters

    def cast(self, dtype: torch.dtype, device: torch.device | None) -> None:
        """Change what the run has from the next time on."""
        self._defaults = dtype, device
        for lent in self._lent:
            lent.cast(dtype, device)

    def __enter__(self) -> None:
        self._depth += 1
        if self._depth == 1:
            with ExitStack() as stack:
                stack.enter_context(pyro.get_param_store().scope(self._store))
                stack.enter_context(shapes_without_symbols())
                for lent in self._lent:
                    stack.enter_context(lent.lend())
                if self._defaults is not None:
                    stack.enter_context(_defaults(*self._defaults))
                self._exit = stack.pop_all()

    def __exit__(self, *exc: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._exit.close()


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


def find_parameters(outputs: list[Tensor], program: Callable[..., Any], exclude: list[Tensor]) -> Parameters:
    """The leaves that `outputs` depend on, with names as the user knows them."""
    excluded = {id(t) for t in exclude}
    found = {id(t): t for t in _graph_leaves(outputs) if id(t) not in excluded}
    state = pyro.get_param_store().get_state()
    known: dict[int, tuple[str, Any]] = {
        id(t): (name.replace("$$$", "."), state["constraints"][name]) for name, t in state["params"].items()
    }
    for key, named in _in_reach(program).items():
        known.setdefault(key, named)
    leaves: dict[str, Leaf] = {}
    for key in [*(k for k in known if k in found), *(k for k in found if k not in known)]:
        name, constraint = known.get(key, (f"parameter_{len(leaves)}", constraints.real))
        if type(constraint) is type(constraints.real):
            constraint = constraints.real  # Pyro makes copies of the same constraint
        if name in leaves:
            name = next(n for n in (f"{name}_{i}" for i in itertools.count(2)) if n not in leaves)
        leaves[name] = Leaf(name, found[key], constraint)
    return Parameters(leaves)


def _graph_leaves(outputs: list[Tensor]) -> list[Tensor]:
    seen: set[Any] = set()
    found: dict[int, Tensor] = {}
    stack = [t.grad_fn for t in outputs if t.grad_fn is not None]
    for t in outputs:
        if t.grad_fn is None and t.requires_grad:
            found[id(t)] = t
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None:
            found[id(variable)] = variable
        stack += [parent for parent, _ in node.next_functions if parent is not None and parent not in seen]
    return list(found.values())


def _in_reach(program: Any, prefix: str = "", depth: int = 3) -> dict[int, tuple[str, Any]]:
    """id -> (name, constraint) of the parameters of modules that a program is, is bound to, or holds: as a method's
    owner, an argument of a partial (what Pyro's handlers return), or a variable that a function closes over."""
    if isinstance(program, Tensor):
        return {id(program): (prefix.rstrip("."), constraints.real)} if program.requires_grad else {}
    if isinstance(program, nn.Module):
        return _of_module(program, prefix)
    names: dict[int, tuple[str, Any]] = {}
    for name, value in _inside(program) if depth else ():
        for key, named in _in_reach(value, f"{prefix}{name}." if name else prefix, depth - 1).items():
            names.setdefault(key, named)
    return names


def _inside(program: Any) -> list[tuple[str, Any]]:
    """What a program holds, by name ('' where the name says nothing): modules, tensors and further programs."""
    held: list[tuple[str, Any]] = []
    if isinstance(program, functools.partial):
        held = [("", program.func), *(("", a) for a in program.args), *program.keywords.items()]
    elif inspect.ismethod(program):
        owner = program.__self__
        held = [("", owner)] if isinstance(owner, nn.Module) else list(vars(owner).items())
        held.append(("", program.__func__))
    elif inspect.isfunction(program):
        scope = inspect.getclosurevars(inspect.unwrap(program))
        held = [*scope.nonlocals.items(), *scope.globals.items()]
    kinds = (nn.Module, Tensor, functools.partial)
    return [(n, v) for n, v in held if isinstance(v, kinds) or inspect.ismethod(v) or inspect.isfunction(v)]


def modules_in_reach(program: Any, depth: int = 3) -> list[nn.Module]:
    """The modules that a program is, is bound to, or holds."""
    if isinstance(program, nn.Module):
        return [program]
    return [m for _, value in _inside(program) if depth for m in modules_in_reach(value, depth - 1)]


@contextmanager
def kept_frozen(modules: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Gives the frozen parameters of the modules, and freezes them again: a `PyroModule` thaws what it reads first."""
    frozen: list[Tensor] = [p for module in modules for p in module.parameters() if not p.requires_grad]
    try:
        yield frozen
    finally:
        for tensor in frozen:
            tensor.requires_grad_(False)


def _of_module(module: nn.Module, prefix: str) -> dict[int, tuple[str, Any]]:
    """Parameters by attribute path; a `PyroParam` under its own name, with its constraint."""
    names: dict[int, tuple[str, Any]] = {}
    for path, part in module.named_modules():
        place = f"{prefix}{path}." if path else prefix
        constrained = getattr(part, "_pyro_params", {})
        for name, tensor in part.named_parameters(recurse=False):
            own = name.removesuffix("_unconstrained")
            known = own in constrained
            constraint = constrained[own][0] if known else constraints.real
            names.setdefault(id(tensor), (f"{place}{own if known else name}", constraint))
    return names
