"""Eight schools, non-centred: 10 latents, 8 data.

    mu ~ N(0, 5),  tau ~ HalfCauchy(5),  eta_j ~ N(0, 1),  y_j ~ N(mu + tau eta_j, sigma_j)

Rubin 1981, doi:10.3102/10769986006004377.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..record import Estimate
from . import _maths as maths

KIND = "posterior"
SHAPES = {"mu": (), "tau": (), "eta": (8,)}


def data() -> dict[str, np.ndarray]:
    return {
        "y": np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]),
        "sigma": np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]),
    }


def problem(data: dict[str, np.ndarray]) -> Any:
    from pyrometer.models import eight_schools

    return eight_schools.problem(y=data["y"].tolist(), sigma=data["sigma"].tolist())


def numpyro_model(data: dict[str, np.ndarray]) -> Any:
    import numpyro
    import numpyro.distributions as dist

    def model() -> None:
        mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
        with numpyro.plate("schools", 8):
            eta = numpyro.sample("eta", dist.Normal(0.0, 1.0))
            numpyro.sample("y", dist.Normal(mu + tau * eta, data["sigma"]), obs=data["y"])

    return model


def pymc_model(data: dict[str, np.ndarray]) -> Any:
    import pymc as pm

    with pm.Model() as model:
        mu = pm.Normal("mu", 0.0, 5.0)
        tau = pm.HalfCauchy("tau", 5.0)
        eta = pm.Normal("eta", 0.0, 1.0, shape=8)
        pm.Normal("y", mu + tau * eta, data["sigma"], observed=data["y"])
    return model


def constrain(u: dict[str, Any], xp: Any) -> tuple[dict[str, Any], Any]:
    return maths.positive(u, ["tau"], xp)


def log_joint(z: dict[str, Any], data: dict[str, Any], xp: Any) -> Any:
    theta = z["mu"] + z["tau"] * z["eta"]
    return (
        maths.normal(z["mu"], 0.0, 5.0, xp)
        + maths.half_cauchy(z["tau"], 5.0, xp)
        + maths.normal(z["eta"], 0.0, 1.0, xp).sum()
        + maths.normal(data["y"], theta, data["sigma"], xp).sum()
    )


def identified(z: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    theta = z["mu"][..., None] + z["tau"][..., None] * z["eta"]
    return {"mu": z["mu"], "tau": z["tau"], "theta": theta}


def truth() -> dict[str, Estimate]:
    reference = problem(data()).reference_at({})
    found: dict[str, Estimate] = {}
    for site in ("mu", "tau", "theta"):
        mean, sd = reference.mean[site], reference.sd[site]
        for suffix, values in (("", mean), ("^2", mean.square() + sd.square())):
            names = [f"{site}[{k}]" for k in range(values.numel())] if values.dim() else [site]
            found |= {n + suffix: Estimate(v, 0.0) for n, v in zip(names, values.reshape(-1).tolist(), strict=True)}
    return found
