"""``python -m pipeline`` is ``secateur``."""

from pipeline.program import run_program

run_program()
