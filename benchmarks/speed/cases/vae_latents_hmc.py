"""The same thousand posteriors by HMC: trajectories of 8 leapfrog steps, beside the matrix products in them alone.

A gradient of all data is four products, z a and tanh(z a) b forwards and the same two backwards; with their time alone
as the floor, one sees what the rest of a leapfrog step costs. Chains are tuned by each tool, each datum for itself.
"""

from __future__ import annotations

from .vae_latents import SHAPES as SHAPES
from .vae_latents import data as data
from .vae_latents import identified as identified
from .vae_latents import log_joint as log_joint
from .vae_latents import problem as problem

KIND = "hmc"
NUM_STEPS = 8  # leapfrog steps of a trajectory, ours on average
LONGEST = 200  # draws of a chain, and of its warm-up, at most: for a minute
