"""``--set section.key=value``: one value of a run file, given on the command line."""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from secateur.device_profiles import plain_yaml
from secateur.device_profiles.plain_yaml import Content, Place, Plain
from secateur.device_profiles.wording import printable, shown
from secateur.pipeline.config.choices import DEFAULTS
from secateur.pipeline.errors import UserError

FORM = "section.key=value, for example --set search.method=random"


def in_order(overrides: Sequence[str]) -> list[str]:
    """Those first that choose whose options the others set."""
    return sorted(overrides, key=lambda text: text.partition("=")[0] not in DEFAULTS)


def apply(content: dict[str, Content], override: str, form: str = FORM) -> Place:
    """Set one value; another method or reward begins with default options.

    Args:
        form: how an override is written, for messages.

    Returns:
        The place of the value.

    Raises:
        UserError: it is not written so, there is no such place, or its value is no YAML.
    """
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise UserError(f"--set {shown(override)}: write it as {form}")
    section = _section(content, parts[:-1], override)
    chooser, before = ".".join(parts), section.get(parts[-1])
    section[parts[-1]] = _value(override, text)
    if chooser in DEFAULTS and (before or DEFAULTS[chooser]) != section[parts[-1]]:
        section.pop("options", None)  # they are the options of what was chosen before
    return tuple(parts)


def _section(content: dict[str, Content], parts: list[str], override: str) -> dict[str, Content]:
    """The section that ``parts`` lead to; one that is not there is made."""
    here = content
    for depth, part in enumerate(parts, start=1):
        if part not in here or (isinstance(here[part], Plain) and here[part].value is None):
            here[part] = {}
        below = here[part]
        if not isinstance(below, dict):
            what = "a list; set the whole list" if isinstance(below, list) else "a value, not a section"
            raise UserError(f"--set {shown(override)}: {printable('.'.join(parts[:depth]))!r} is {what}")
        here = below
    return here


def _value(override: str, text: str) -> Content:
    """The value of an override, as YAML."""
    quoted = f"a text with special characters needs quotes within the quotes: {override.partition('=')[0]}='\"...\"'"
    try:
        content = plain_yaml.read(text).content
    except yaml.YAMLError as error:
        why = printable(str(error).splitlines()[0])
        raise UserError(f"--set {shown(override)}: the value is not valid YAML ({why}); {quoted}") from error
    written, given = content.written if isinstance(content, Plain) else content, text.strip()
    if isinstance(written, str) and given[:1] not in ("'", '"', "|", ">", "&", "!"):
        lost = not written if isinstance(content, Plain) else written != given
        if given and lost:
            raise UserError(f"--set {shown(override)}: YAML reads {shown(written)}, the rest is a comment; {quoted}")
    return content
