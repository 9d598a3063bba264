"""``secateur rescore``: what a run has found, ranked by another reward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from secateur.pipeline.cli import completers
from secateur.pipeline.cli.options import Json
from secateur.pipeline.terminal import one_line, out, table


def rescore_(
    run_dir: Annotated[
        Path,
        typer.Argument(help="The run directory printed by `secateur run`.", autocompletion=completers.run_directories),
    ],
    reward: Annotated[
        str,
        typer.Option(
            help="The reward to rank by: device, rewarded_v2, mnasnet, tunas_abs, amc ...",
            autocompletion=completers.rewards,
        ),
    ],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A parameter of the reward, e.g. alpha=1.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many candidates to show and keep.")] = 10,
    json_: Json = False,
) -> None:
    """Rank a run's candidates by another reward, from its journal: nothing is evaluated again.

    Example: secateur rescore .secateur/runs/digits-... --reward mnasnet --set target_ratio=0.7
    """
    from secateur.pipeline.config.reading import reward_options
    from secateur.pipeline.lifecycle.rescore import mixed, ranking_rows, rescore, write_ranking

    options = reward_options(reward, set_ or [])
    ranking = rescore(run_dir, reward, options)
    if json_:
        file = write_ranking(run_dir, reward, options, ranking, top)
        told = json.loads(file.read_text(encoding="utf-8"))
        out.data({**told, "file": str(file), "plan": str(file.with_suffix(".plan.json"))})
        return
    numbers = (ranking.metric, "MACs ratio", "latency ratio", "reward")
    rows = table("", "candidate", "weights", *numbers, "", title=f"{run_dir.name} by reward {reward}", right=numbers)
    for row in ranking_rows(ranking, top):
        rows.add_row(*row)
    out.print(rows)
    if mixed(ranking, top):
        out.print(
            "Note: candidates as cut stand beside fine-tuned ones, whose accuracy has had training since; compare each "
            "with its kind."
        )
    file = write_ranking(run_dir, reward, options, ranking, top)
    out.print(f"Written: {one_line(file)} and the winner's plan, {file.with_suffix('.plan.json').name}")
