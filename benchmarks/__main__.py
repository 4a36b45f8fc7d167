"""`python -m pyrometer.benchmarks` is `pyrometer`."""

from .cli import main

main(prog_name="pyrometer")
