"""``secateur devices``: which devices there are, whether one is ready, and how fast a model is on it."""

from __future__ import annotations

import typer

from secateur.pipeline.cli.devices import add, benchmark, check, listing, probe

app = typer.Typer(
    name="devices",
    help="The devices a model can be timed on: list, add and check them, probe their steps, time a model.",
    epilog="A new board: 'secateur devices add kitchen --from raspberry-pi-5 --host pi@192.168.1.20', "
    "then 'secateur devices probe kitchen', then device: {profile: kitchen} in the run file.",
    no_args_is_help=True,
)
app.command(name="list")(listing.list_)
app.command()(listing.show)
app.command()(check.check)
app.command(cls=add.AddCommand)(add.add)
for command in (add.remove, benchmark.benchmark, probe.probe):
    app.command()(command)
