"""The size and the data of a VAE whose fit is timed: `pyrometer.models.vae` with a minibatch of 128."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

BATCH_SIZE = 128
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Size:
    """Pixels, hidden units of both networks, latent dimension, data to learn from and steps of one run."""

    data_dim: int
    hidden: int
    latent_dim: int
    num_data: int
    num_steps: int

    def data(self) -> np.ndarray:
        """Binary pixels around a curved surface, (num_data, data_dim) of float32."""
        rng = np.random.default_rng(9)
        z = rng.normal(size=(self.num_data, 8))
        logits = np.tanh(z @ rng.normal(size=(8, 32))) @ rng.normal(size=(32, self.data_dim)) / 2
        return (rng.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(np.float32)

    def problem(self, data: np.ndarray) -> Any:
        """The VAE as a `Problem`; its networks start from the same weights each time."""
        import torch

        from pyrometer.models import vae

        return vae.problem(
            data=torch.from_numpy(data), num_test=0, latent_dim=self.latent_dim, hidden=self.hidden, seed=0
        )

    def start(self) -> dict[str, np.ndarray]:
        """The weights that the problem starts from, by name, as (inputs, outputs) and (outputs,)."""
        import torch

        from pyrometer.models import vae

        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            decoder = vae.Decoder(self.latent_dim, self.hidden, self.data_dim)
            encoder = vae.Encoder(self.data_dim, self.hidden, self.latent_dim)
        named = [("decoder." + n, p) for n, p in decoder.named_parameters()]
        named += [("encoder." + n, p) for n, p in encoder.named_parameters()]
        return {name: parameter.detach().numpy().T for name, parameter in named}


def rows(seed: int, size: Size, count: int) -> np.ndarray:
    """Which data the steps see, (count, 128): each epoch in an order of its own, its incomplete batch left out."""
    rng = np.random.default_rng(seed)
    per_epoch = size.num_data // BATCH_SIZE
    epochs = [
        rng.permutation(size.num_data)[: per_epoch * BATCH_SIZE].reshape(per_epoch, BATCH_SIZE)
        for _ in range(-(-count // per_epoch))
    ]
    return np.concatenate(epochs)[:count]
