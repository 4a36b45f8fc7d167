"""A step of a VAE's fit at 784 pixels: 400 hidden units, 20 latents, batch of 128, Adam."""

from ._vae import Size

KIND = "svi"
SIZE = Size(data_dim=784, hidden=400, latent_dim=20, num_data=2000, num_steps=200)
