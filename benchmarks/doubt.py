"""Which data a posterior cannot be trusted on: Pareto k-hat of each datum's weights, as a list and as a picture.

k-hat is the shape of the tail of w = p_theta(x, z) / q(z): below 0.5 the weights have a variance, above
min(1 - 1 / log10 S, 0.7) the figures from S draws are not reliable (Vehtari et al. 2024, arXiv:1507.02646).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyrometer.inference import ImportanceSampling, Posterior, Problem, ProblemError, infer
from pyrometer.inference.learn import Fit
from pyrometer.inference.statistics import k_hat_threshold, psis
from pyrometer.inference.storage import whole


@dataclass(frozen=True)
class Doubtful:
    """The data whose k-hat is above `threshold`: (index, k-hat), worst first; `share` of the `data` that were judged.

    An unknown k-hat (too few draws with weight) counts as above, and stands first.
    """

    threshold: float
    data: int
    worst: tuple[tuple[int, float], ...]

    @property
    def share(self) -> float:
        return len(self.worst) / max(self.data, 1)

    def words(self, most: int = 8) -> str:
        """'k-hat > 0.67 at 12 of 360 data (3.3 %): 17 (1.21), 33 (0.98) ...'; '' where there are none."""
        if not self.worst:
            return ""
        listed = ", ".join(f"{index} ({k_hat:.2f})" for index, k_hat in self.worst[:most])
        more = ", ..." if len(self.worst) > most else ""
        return (
            f"k-hat > {self.threshold:.2f} at {len(self.worst)} of {self.data} data ({self.share:.1%}): {listed}{more}"
        )

    @classmethod
    def read(cls, read: Mapping[str, Any]) -> Doubtful:
        """From plain values, as in JSON."""
        worst = tuple((int(index), float(k_hat)) for index, k_hat in read["worst"])
        return cls(float(read["threshold"]), int(read["data"]), worst)


def k_hat_known(posterior: Posterior) -> bool:
    """Whether `k_hats` can tell: the draws have a density, and their weights were drawn and not smoothed."""
    return not _why_not(posterior)


def k_hats(posterior: Posterior) -> Tensor:
    """Pareto k-hat of each datum, (*batch), from the weights of the draws or from log p(x, z) - log q(z) of a guide's.

    Raises ProblemError where there are no such weights.
    """
    if reason := _why_not(posterior):
        raise ProblemError(f"k-hat: {reason}.")
    return psis(_log_ratio(posterior))[1]


def _why_not(posterior: Posterior) -> str:
    if not posterior.draws:
        return f"the posterior has no draws; status: {posterior.status}"
    if posterior.kind == "weighted":
        if posterior.engine_options.get("pareto_smoothed"):
            return "these weights are smoothed, and their own k-hat is too small; use pareto_smoothed=False"
        if "ess" not in posterior.diagnostics:
            return f"the weights of {posterior.engine} are computed, not drawn: they have no tail to judge"
        return ""
    if posterior.kind == "iid" and {"lp", "log_q"} <= set(posterior.sample_stats):
        return ""
    return f"draws of {posterior.engine or posterior.kind} have no importance weights"


def _log_ratio(posterior: Posterior) -> Tensor:
    """(S, *batch)."""
    if posterior.kind == "weighted" and posterior.log_weights is not None:
        return posterior.log_weights.flatten(0, 1)
    return (posterior.sample_stats["lp"] - posterior.sample_stats["log_q"]).flatten(0, 1)


def worst_data(posterior: Posterior, threshold: float | None = None) -> Doubtful:
    """The data whose k-hat is above the threshold (None: min(1 - 1 / log10 S, 0.7)), by number in the flat batch.

    Raises ProblemError as `k_hats`.
    """
    found = k_hats(posterior).flatten().nan_to_num(nan=math.inf)
    if threshold is None:
        threshold = k_hat_threshold(posterior.num_chains * posterior.num_samples)
    order = found.argsort(descending=True, stable=True)
    worst = tuple((int(i), float(found[i])) for i in order if found[i] > threshold)
    return Doubtful(threshold, found.numel(), worst)


def guide_weights(problem: Problem, fit: Fit, seed: int = 0, num_samples: int = 1000) -> Posterior:
    """The problem's data weighted by the draws of the guide that `fit` trained.

    Raises ProblemError where it trained none, and where the guide cannot serve.
    """
    if not fit.guide_parameters:
        raise ProblemError(f"{fit.learner or 'the fit'} trained no guide: it has no k-hat.")
    posterior = infer(problem, ImportanceSampling(proposal="guide", num_samples=num_samples), seed=seed, parameters=fit)
    if not posterior.status.done:
        raise ProblemError(f"k-hat of the guide: {posterior.status}.")
    return posterior


def picture(
    path: str | Path, x: Tensor, doubtful: Doubtful, *, shape: tuple[int, int] | None = None, most: int = 25
) -> Path:
    """Write a PNG of the worst data, each with its index and k-hat; x (N, ...) of square images, or of this `shape`.

    Raises ProblemError where nothing is above the threshold, where a datum is no image, or without matplotlib.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ProblemError(f"{path}: expected a name that ends in .png.")
    if not doubtful.worst:
        raise ProblemError(f"no datum has a k-hat above {doubtful.threshold:.2f}: there is nothing to show.")
    images = as_images(x, shape)
    if len(images) != doubtful.data:
        raise ProblemError(f"{len(images)} images, but k-hats of {doubtful.data} data.")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ProblemError("the picture needs matplotlib: pip install matplotlib.") from error
    shown = doubtful.worst[:most]
    columns = min(5, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(1.6 * columns, 1.8 * rows), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for place, (index, k_hat) in enumerate(shown, 1):
        axes = figure.add_subplot(rows, columns, place)
        axes.imshow(images[index].numpy(), cmap="gray_r")
        axes.set_title(f"{index}: {k_hat:.2f}", fontsize=9)
        axes.set_axis_off()
    with whole(path) as file:
        canvas.print_png(file)
    return path


def as_images(x: Tensor, shape: tuple[int, int] | None = None) -> Tensor:
    """(N, H, W): data that are images already, flat ones of this shape, or flat ones of a square number of pixels.

    Raises ProblemError for data of any other form.
    """
    x = torch.as_tensor(x).detach().cpu().double()
    if shape is None and x.dim() == 4 and x.shape[1] == 1:
        return x[:, 0]
    if shape is None and x.dim() == 3:
        return x
    pixels = math.prod(x.shape[1:])
    if shape is None:
        side = math.isqrt(pixels)
        shape = (side, side)
    if x.dim() < 2 or pixels < 4 or shape[0] * shape[1] != pixels:
        raise ProblemError(f"data of shape {tuple(x.shape)} are no images; give shape=(height, width).")
    return x.reshape(len(x), *shape)
