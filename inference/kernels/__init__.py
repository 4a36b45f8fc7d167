"""Transition kernels for many chains at once: pure functions of lanes, which engines call in turn."""
