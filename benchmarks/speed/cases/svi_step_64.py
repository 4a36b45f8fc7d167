"""A step of a VAE's fit at 64 pixels: 64 hidden units, 2 latents, batch of 128, Adam."""

from ._vae import Size

KIND = "svi"
SIZE = Size(data_dim=64, hidden=64, latent_dim=2, num_data=1437, num_steps=400)
