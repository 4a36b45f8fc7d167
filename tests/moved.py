"""A learner of which the answer is known."""

from __future__ import annotations

from typing import ClassVar

import torch

from pyrometer.inference.engine import EngineError
from pyrometer.inference.learning import Learned, TrailWriter
from pyrometer.inference.settings import settings


@settings
class Moved:
    """A learner that sets theta and claims an objective, or fails."""

    name: ClassVar[str] = "moved"
    theta: float = 3.0
    objective: float = -5.0
    fail: str = ""

    def supports(self, density):
        return ""

    def fit(self, density, run):
        if self.fail:
            raise EngineError(self.fail)
        density.set_parameters({"theta": torch.tensor(self.theta)})
        writer = TrailWriter("estimate", 2)
        writer.add(0, self.objective - 2.0)
        writer.add(1, self.objective)
        return Learned(writer.trail())
