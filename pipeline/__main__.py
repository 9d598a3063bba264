"""``python -m pipeline`` is ``secateur``."""

from pipeline.cli.program import run_program

run_program()
