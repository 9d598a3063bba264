"""The command ``secateur trust``, and the question that the other commands ask."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from secateur.pipeline import errors
from secateur.pipeline.terminal import err, one_line, out

if TYPE_CHECKING:
    from secateur.pipeline.config.consents import Found
    from secateur.pipeline.config.schema import RunFile


def trust(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR", help="Folders of run files and device profiles.")],
    forget: Annotated[bool, typer.Option("--forget", help="Take the consent back.")] = False,
) -> None:
    """Consent to the code that the run files and device profiles in a folder name, after you have looked at it.

    A run file only chooses a run. Some entries name code, though, which runs with all your rights: a factory
    (workload.model.name: module:factory), a file of code (FILE.py:NAME as search.method, workload.name,
    workload.task, workload.model.name, or a device's target or runtime), a device's interpreter (connect.python), an
    SSH configuration of its own (connect.config, which can start commands). Those need your consent, once per folder
    and set of such entries: your module may change, a new or changed entry asks again. Folders that others can write
    get none. Shipped profiles, networks by name and builders of torchvision and timm need none.

    Example: secateur trust my-runs

    Example: secateur trust --forget my-runs
    """
    from secateur.pipeline.config import consents
    from secateur.pipeline.config.trust import require

    for folder in folders:
        if not folder.is_dir():
            raise errors.UserError(f"{folder} is no folder; name the one that the run file or device profile lies in")
        if forget:
            took = consents.forget(folder)
            out.print(f"{'Consent taken back' if took else 'There was no consent'}: {one_line(folder)}")
            continue
        naming_code = _code_below(folder)
        require(naming_code, asker(given=True))
        if not naming_code:
            out.print(f"Nothing in {one_line(folder)} names code; no consent is needed.")


def consented(load: Callable[[], RunFile], file: Path, given: bool) -> RunFile:
    """A run file, with consent for the code that it and its device profiles name; asks on a terminal.

    Args:
        load: reads it.
        given: whether the command line says so.
    """
    from secateur.pipeline.config import trust

    return trust.consented(load, file, asker(given))


def consent_to_profile(name: str, given: bool) -> None:
    """The same for a device profile."""
    from secateur.pipeline.config.trust import code_of_profile, require

    naming_code = code_of_profile(name)
    require([naming_code] if naming_code else [], asker(given))


def asker(given: bool) -> Callable[[Found], bool]:
    """How consent is asked for where none is kept: it is given, a person at a terminal is asked, or it is not there."""

    def ask(code: Found) -> bool:
        if not given and not err.is_attended:
            return False
        err.print(f"{one_line(code.file)} names code, which runs with all your rights:")
        for entry in code.entries:
            err.print(f"  {one_line(entry)}")
        if given:
            err.print(f"Consent is kept for {one_line(code.folder)}")
            return True
        return err.confirmed("Have you looked at it, and shall it run?")

    return ask


def _code_below(folder: Path) -> list[Found]:
    """What names code in the files of a folder; those that are neither run file nor profile are passed over."""
    from secateur.pipeline.config.reading import load_run_file
    from secateur.pipeline.config.trust import code_in, code_of_profile
    from secateur.pipeline.run.origin import ORIGIN
    from secateur.pipeline.run.run import open_run_directory

    naming_code: list[Found] = []
    for file in sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")]):
        try:
            begun = file.name == "run.yaml" and (folder / ORIGIN).is_file()
            config = open_run_directory(folder)[1] if begun else load_run_file(file)
        except errors.UserError as error:
            profile = code_of_profile(file)
            if profile is not None:
                naming_code.append(profile)
            elif "workload" in str(error):
                err.print(f"Passed over: {one_line(str(error).splitlines()[0])}")
            continue
        naming_code += code_in(config, file)
    return naming_code
