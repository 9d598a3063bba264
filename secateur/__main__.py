"""``python -m secateur`` is ``secateur``."""

from secateur.pipeline.cli.program import run_program

run_program()
