"""``secateur init``: a first run file for the data that somebody has."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from secateur.device_profiles.wording import number_of
from secateur.pipeline import errors
from secateur.pipeline.cli import completers
from secateur.pipeline.cli.devices import profiles
from secateur.pipeline.cli.options import Trust
from secateur.pipeline.cli.trust import asker
from secateur.pipeline.terminal import command, err, one_line, out

if TYPE_CHECKING:
    from secateur.pipeline.run.draft import Task
    from secateur.pipeline.run.estimate import Estimate
    from secateur.pipeline.run.preflight import Preflight


def init(
    data: Annotated[
        Path | None,
        typer.Argument(metavar="DATA", help="Folder or file of your data; without: scikit-learn's digits."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="cifar/NAME, torchvision/NAME, timm/NAME, or FILE.py[:FACTORY] of your own."),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            "--device", "-d", metavar="NAME", help="The device to prune for.", autocompletion=completers.devices
        ),
    ] = "local",
    trust: Trust = False,
) -> None:
    """Write a commented run file for your data into the current folder, and say what the run will take.

    Looks at the data: what it is, how many images, of which size. Asks only on a terminal, and only what it cannot see.
    Code of yours (--model FILE.py) runs only with your consent; without, the run file is written and no time is told.

    Example: secateur init flowers --model mynet.py
    """
    from secateur.pipeline.progress import RichProgress
    from secateur.pipeline.run import draft
    from secateur.pipeline.workloads.data.content import Reading

    profiles.usable(device)
    named = _model(model)
    if data is None and err.is_attended:
        answer = err.asked("Folder or file of your data (nothing: scikit-learn's digits):")
        data = Path(answer) if answer else None
    reading = Reading(RichProgress(err), "sample")
    task, said = _task(data)
    draft.check_name(task, named)
    seen = draft.look(data, task, said, reading)
    out.print(
        f"Seen: {seen.said}; {seen.train:,} of them for training; shorter sides of {number_of(seen.side, 'pixel(s)')}"
    )
    _note(seen.notes)
    name = draft.name_for(data)
    recipe = draft.recipe_for(seen.train)
    file = _free(name)
    text = draft.text_of(seen, name, named, device, recipe)
    needs_trust = not _consented(text, file, trust)
    preflight, taken = None, None
    if not needs_trust:
        recipe, preflight, taken = draft.in_time(text, recipe, name, Path.cwd(), reading)
        text = draft.text_of(seen, name, named, device, recipe)
        of_network = () if preflight.workload is None else preflight.workload.notes
        _note(note for note in of_network if note not in (seen.said, *seen.notes))
    file.write_text(text, encoding="utf-8")
    out.print(f"Written: {one_line(file)}")
    _tell(preflight, taken)
    words = ["secateur", "run", file, *(["--trust"] if needs_trust else [])]
    wrong = preflight is not None and bool(preflight.faults)
    out.print("Next, when that is put right:" if wrong else "Next:")
    out.print(f"  {command('secateur', 'validate', *words[2:])}")
    if not wrong:
        out.print(f"  {command(*words)}")
    if err.is_attended and preflight is not None and not preflight.faults and err.confirmed("Shall it run now?"):
        from secateur.pipeline.cli.run import run

        run(file)


def _note(notes: Iterable[str]) -> None:
    for note in notes:
        out.print(f"Note: {note}")


def _task(data: Path | None) -> tuple[Task, str]:
    """What the data is for, and what was seen of it; where both would do, a person is asked."""
    from secateur.pipeline.run.draft import tasks_of

    if data is None:
        return "classification", "scikit-learn's handwritten digits"
    tasks = tasks_of(data)
    if len(tasks) > 1 and err.is_attended and not err.confirmed("The images have boxes. Shall a detector be pruned?"):
        return "classification", tasks["classification"]
    task: Task = "detection" if "detection" in tasks else "classification"
    return task, tasks[task]


def _model(model: str | None) -> str | None:
    """``workload.model.name`` of what the command line says: of a file, its factory is found."""
    from secateur.pipeline.run.draft import factory_in

    if model is None or not model.endswith(".py"):
        return model
    factory, others = factory_in(Path(model))
    if others:
        out.print(
            f"Note: {model} has {factory}, {', '.join(others)}; the first is taken, --model {model}:NAME takes another"
        )
    return f"{model}:{factory}"


def _free(name: str) -> Path:
    """A run file's name in the current folder that nothing has."""
    names = [name, *(f"{name}-{number}" for number in range(2, 1000))]
    free = next((Path(f"{each}.yaml") for each in names if not Path(f"{each}.yaml").exists()), None)
    if free is None:
        raise errors.UserError(f"there are a thousand run files called {name} here; remove some")
    return free


def _consented(text: str, file: Path, trust: bool) -> bool:
    """Whether all that a run file names may run: it names no code, or there is consent for it."""
    from secateur.pipeline.config.reading import parse_run_file
    from secateur.pipeline.config.trust import code_in, require

    config = parse_run_file(text, str(file)).lying_in(Path.cwd())
    code = code_in(config, file.absolute())
    try:
        require(code, asker(trust))
    except errors.UserError:
        named = "; ".join(str(entry) for each in code for entry in each.entries)
        out.print(f"Note: no time is told, because nothing of yours runs without consent: {named}")
        return False
    return True


def _tell(preflight: Preflight | None, taken: Estimate | None) -> None:
    """What stands in the way of the run, or what it takes."""
    if taken is not None:
        least = "" if taken.counted.complete else "at least "
        out.print(f"On this machine the run takes about {least}{max(1, round(taken.seconds / 60))} min")
    for fault in preflight.faults if preflight is not None else ():
        out.print(f"To put right: {fault}")
