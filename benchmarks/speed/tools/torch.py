"""Torch alone: the loss of the VAE, weights of eight schools and of latents, and the products in them, by hand."""

from __future__ import annotations

import math
from functools import partial
from types import ModuleType
from typing import Any

from ..record import LogWeights, Plan, Products, Steps, Weights
from . import Prepared, Tool
from ._products import amount


def svi(compiled: bool, case: ModuleType, plan: Plan) -> Prepared:
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

    from pyrometer.models import vae

    from ..cases._vae import BATCH_SIZE, LEARNING_RATE, rows

    size = case.SIZE
    data = torch.from_numpy(size.data())
    encoder = vae.Encoder(size.data_dim, size.hidden, size.latent_dim)
    decoder = vae.Decoder(size.latent_dim, size.hidden, size.data_dim)
    start = {name: torch.from_numpy(value.T.copy()) for name, value in size.start().items()}

    def negative_elbo(x: Any) -> Any:
        loc, sd = encoder(x)
        noise = torch.randn_like(sd)
        z = loc + sd * noise
        # log p(z) - log q(z | x), the constants of both normals cancelling
        log_ratio = (0.5 * noise.square() + sd.log() - 0.5 * z.square()).sum()
        return cross_entropy(decoder(z), x, reduction="sum") - log_ratio

    loss_of = torch.compile(negative_elbo) if compiled else negative_elbo

    def called(seed: int) -> Steps:
        torch.manual_seed(seed)
        for name, network in (("encoder", encoder), ("decoder", decoder)):
            network.load_state_dict({key: start[f"{name}.{key}"] for key in network.state_dict()})
        optimizer = torch.optim.Adam([*decoder.parameters(), *encoder.parameters()], lr=LEARNING_RATE, fused=True)
        losses = []
        for batch in torch.from_numpy(rows(seed, size, size.num_steps)):
            loss = loss_of(data[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise RuntimeError(f"the loss became {losses[-1]} at step {len(losses)}.")
        return Steps(size.num_steps, sum(losses[-100:]) / len(losses[-100:]) / BATCH_SIZE)

    return Prepared(called, called)


def importance(case: ModuleType, plan: Plan) -> Prepared:
    import torch

    from ._weights import evidence

    y, sigma = (torch.from_numpy(case.data()[name]) for name in ("y", "sigma"))
    constant = -(sigma.log() + 0.5 * math.log(2 * math.pi)).sum()

    def called(seed: int) -> Weights:
        draw = torch.Generator().manual_seed(seed)
        options: dict[str, Any] = {"generator": draw, "dtype": torch.float64}
        mu = 5 * torch.randn(case.NUM_DRAWS, 1, **options)
        tau = 5 * torch.tan(0.5 * math.pi * torch.rand(case.NUM_DRAWS, 1, **options))
        eta = torch.randn(case.NUM_DRAWS, 8, **options)
        log_weights = constant - 0.5 * ((y - mu - tau * eta) / sigma).square().sum(1)
        return Weights(case.NUM_DRAWS, *evidence(log_weights.numpy()))

    return Prepared(called, called)


def latents_importance(precision: str, case: ModuleType, plan: Plan) -> Prepared:
    """A draw of all data at a time, as what is between the products then stays in the cache."""
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

    data = {name: torch.from_numpy(value).to(getattr(torch, precision)) for name, value in case.data().items()}
    x, a, b, loc, scale = (data[name] for name in ("x", "a", "b", "loc", "scale"))
    constant = scale.log().sum(1)  # the others of both normals cancel

    def log_weight(noise: Any) -> Any:
        z = torch.addcmul(loc, scale, noise)
        log_ratio = 0.5 * (noise.square() - z.square()).sum(1) + constant
        return log_ratio - cross_entropy((z @ a).tanh_() @ b, x, reduction="none").sum(1)

    def called(seed: int) -> LogWeights:
        draw = torch.Generator().manual_seed(seed)
        with torch.inference_mode():
            found = torch.empty(case.NUM_DRAWS, len(x), dtype=x.dtype)
            for row in found:
                row.copy_(log_weight(torch.randn(loc.shape, generator=draw, dtype=x.dtype)))
        return LogWeights(found.numpy())

    return Prepared(called, called)


def products(precision: str, case: ModuleType, plan: Plan) -> Prepared:
    """In blocks of as many rows as stay in a core's cache, into memory that is there."""
    import torch

    data = {name: torch.from_numpy(value).to(getattr(torch, precision)) for name, value in case.data().items()}
    a, b = data["a"], data["b"]
    turned_a, turned_b = a.T.contiguous(), b.T.contiguous()
    rows, steps, backwards = amount(case, plan, len(data["x"]))
    z = torch.ones(ROWS, len(a), dtype=a.dtype)
    hidden, logits = z @ a, z @ a @ b

    def called(seed: int) -> Products:
        blocks = rows * steps // ROWS
        for _ in range(blocks):
            torch.mm(z, a, out=hidden)
            torch.mm(hidden, b, out=logits)
            if backwards:
                torch.mm(logits, turned_b, out=hidden)
                torch.mm(hidden, turned_a, out=z)
                z.fill_(1.0)  # or it would grow
        return Products(blocks * ROWS)

    return Prepared(called, called)


REQUIRES = {"torch": "torch"}
ROWS = 1000

TOOLS = [
    Tool("torch-eager", "svi", REQUIRES, "float32", partial(svi, False), compiles=False),
    Tool("torch-compiled", "svi", REQUIRES, "float32", partial(svi, True)),
    Tool("torch-eager", "importance", REQUIRES, "float64", importance, compiles=False),
]
for suffix, precision in (("", "float32"), ("-x64", "float64")):
    by_hand, alone = partial(latents_importance, precision), partial(products, precision)
    TOOLS += [Tool(f"torch-eager{suffix}", "latents-importance", REQUIRES, precision, by_hand, compiles=False)]
    TOOLS += [
        Tool(f"products-torch{suffix}", kind, REQUIRES, precision, alone, compiles=False)
        for kind in ("hmc", "latents-importance")
    ]
