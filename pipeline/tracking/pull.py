"""Pulls a version to where it is used: verified, with a loader and a card, from a cache when MLflow is unreachable."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from secateur.device_profiles.wording import number_of
from secateur.pipeline.errors import SurroundingsError, TrackingError, UserError, VersionError
from secateur.pipeline.files import sha256_of, write_whole
from secateur.pipeline.tracking.fetched import check_onnx, facts_of, text_of
from secateur.pipeline.tracking.manifest import FOLDER, MODEL, Manifest
from secateur.pipeline.tracking.registry import CHAMPION, MODEL_TAG, Registry, Version
from secateur.pipeline.tracking.schemas import CachedVersion, GateFacts, Provenance, Usage, checked, read_json
from secateur.pipeline.tracking.store import redacted
from secateur.pipeline.workloads.data import decode

PULLED = "pulled.json"
CACHE = "models"
CARD = "CARD.md"
WRITTEN = ("loader.py", "decode.py", "provenance.json", PULLED)
"""What a pull writes itself; the card too, which it takes from the version where that has one."""


@dataclass(frozen=True)
class Pulled:
    """What was pulled.

    Args:
        notice: what a user should know (it came from the cache); empty otherwise.
    """

    version: Version
    manifest: Manifest
    folder: Path
    notice: str = ""


def pull(
    registry: Registry,
    name: str,
    folder: Path,
    *,
    which: str = CHAMPION,
    device: str | None = None,
    offline: bool = False,
) -> Pulled:
    """Write a version's model, loader, card and provenance into a folder, which appears whole or not at all.

    Args:
        folder: a new or an empty one, or one of an earlier pull, which is replaced.
        which: an alias, or a number.
        device: whose alias is meant.
        offline: do not ask MLflow; what was pulled last under this reference is used.

    Raises:
        UserError: there is no such version, or the folder holds something else.
        TrackingError: MLflow is unreachable and nothing was pulled before; or a file is not what was registered.
        VersionError: the version holds what none of ours can.
    """
    _refuse_foreign(folder)
    cache = Cache(registry.home / CACHE)
    reference, notice = f"{redacted(registry.uri)} {name} {which} {device or ''}", ""
    cached = None
    if not offline:
        try:
            version = registry.version(name, which, device)
            cached = version, cache.keep(registry, version, reference)
        except TrackingError as error:
            if not (cache.knows(reference) and error.unreachable):
                raise
            notice = f"{error}. Using what was pulled last"
    if cached is None:
        cached = cache.last(reference)
        notice = f"{notice or 'Offline: using what was pulled last'}: version {cached[0].version}"
    version, manifest = cached
    with _replacing(folder) as part:
        for path, own in _chosen(manifest, version.uri).items():
            cache.copy(manifest, path, part / own, version.uri)
        (part / "provenance.json").write_bytes(manifest.raw)
        check_onnx(part / MODEL)
        for source in (Path(__file__).with_name("loader.py"), Path(decode.__file__)):
            shutil.copyfile(source, part / source.name)
        (part / CARD).write_text(card(version, manifest, part), encoding="utf-8")
        names = sorted(file.name for file in part.iterdir())
        (part / PULLED).write_text(json.dumps({"version": version.uri, "files": names}) + "\n", encoding="utf-8")
    return Pulled(version, manifest, folder, notice)


class Cache:
    """Files by their sha256, and the version that every reference meant when it was pulled last.

    Args:
        folder: made when first needed.
    """

    def __init__(self, folder: Path) -> None:
        self.blobs, self.references = folder / "sha256", folder / "references"

    def keep(self, registry: Registry, version: Version, reference: str) -> Manifest:
        """Bring every file of a version that is not here yet, or not as it should be; returns the list of them.

        Raises:
            VersionError: what it says of itself is of another version.
        """
        manifest = registry.files(version)
        if manifest.data.get("name") != version.name or manifest.files[MODEL]["sha256"] != version.tags.get(MODEL_TAG):
            raise VersionError(f"the provenance of {version.uri} is that of another version; register it again")
        for path, entry in manifest.files.items():
            if not self._holds(entry["sha256"]):
                registry.fetch_file(version, manifest, path, self.blobs / entry["sha256"])
        write_whole(self.blobs / manifest.sha256, manifest.raw)
        known = {"name": version.name, "version": version.version, "tags": dict(version.tags)}
        known |= {"aliases": list(version.aliases), "manifest": manifest.sha256, "reference": reference}
        write_whole(self._reference(reference), json.dumps(known).encode())
        return manifest

    def knows(self, reference: str) -> bool:
        return self._reference(reference).is_file()

    def last(self, reference: str) -> tuple[Version, Manifest]:
        """The version a reference meant when it was pulled last.

        Raises:
            TrackingError: it never was, or the cache is damaged.
        """
        try:
            known = checked(CachedVersion, read_json(self._reference(reference).read_bytes()))
            raw = (self.blobs / known.manifest).read_bytes()
        except FileNotFoundError as error:
            raise TrackingError(
                f"{reference.strip()} was never pulled to {self.references.parent}: pull it once while MLflow answers"
            ) from error
        except (OSError, ValueError) as error:
            raise TrackingError(f"the cache in {self.references.parent} is damaged ({error}): remove it") from error
        version = Version(known.name, known.version, known.tags, tuple(known.aliases))
        return version, Manifest.read(raw, known.manifest, f"{version.uri} in the cache")

    def copy(self, manifest: Manifest, path: str, to: Path, what: str) -> None:
        """A file out of the cache, verified as it leaves.

        Raises:
            TrackingError: it is not there any more, or another one.
        """
        blob = self.blobs / manifest.files[path]["sha256"]
        if not blob.is_file():
            raise TrackingError(f"{path} of {what} is not in the cache any more: pull it while MLflow answers")
        shutil.copyfile(blob, to)
        manifest.verify(path, to, f"{what} in the cache")

    def _holds(self, digest: str) -> bool:
        blob = self.blobs / digest
        return blob.is_file() and sha256_of(blob) == digest

    def _reference(self, reference: str) -> Path:
        return self.references / f"{hashlib.sha256(reference.encode()).hexdigest()}.json"


def _chosen(manifest: Manifest, what: str) -> dict[str, str]:
    """The files that a user needs, and what they are called in the folder.

    Raises:
        VersionError: one would take another's place.
    """
    chosen = {MODEL: MODEL, **{p: p.removeprefix(f"{FOLDER}/") for p in manifest.files if p.startswith(f"{FOLDER}/")}}
    taken = {MODEL, *WRITTEN} | ({CARD} if f"{FOLDER}/{CARD}" not in manifest.files else set())
    for path, own in chosen.items():
        if path != MODEL and ("/" in own or own.casefold() in {name.casefold() for name in taken}):
            raise VersionError(f"{what} has a file {path}, which no version of ours has: refused")
    return chosen


def _refuse_foreign(folder: Path) -> None:
    """Refuse a folder that holds anything but an earlier pull.

    Raises:
        UserError: it does.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"{folder} is not a folder; give another one with -o")
    if not folder.is_dir():
        return
    names = {file.name for file in folder.iterdir()}
    known: set[str] = set()
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        known = {PULLED, *json.loads((folder / PULLED).read_text(encoding="utf-8"))["files"]}
    if others := sorted(names - known):
        raise UserError(f"{folder} holds files that no pull wrote ({', '.join(others[:3])}); give another one with -o")


@contextlib.contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A folder to fill that takes the place of ``folder`` at the end, or leaves nothing."""
    folder = folder.absolute()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise SurroundingsError(f"cannot write to {folder.parent}: {error.strerror}") from error
    try:
        filled = part / "new"
        filled.mkdir()
        yield filled
        if folder.exists():
            folder.rename(part / "old")
        try:
            filled.rename(folder)
        except OSError:
            if (part / "old").exists():
                (part / "old").rename(folder)
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def card(version: Version, manifest: Manifest, folder: Path) -> str:
    """The model card, in Markdown: the version's own, with what was pulled; or one made of its facts, where an earlier
    Secateur registered it.

    Raises:
        VersionError: ``usage.json`` or ``gate.json`` is not what that of a version can be, or its card is no text.
    """
    told, tags = checked(Provenance, manifest.data), version.tags
    own = text_of(folder / CARD)
    if own is not None:
        copied = {"version": version.uri, "sha256 of provenance.json": manifest.sha256}
        rows = "\n".join(f"| {key} | `{value}` |" for key, value in copied.items())
        return _printable(f"{own.rstrip()}\n\n## This copy\n\n| | |\n|---|---|\n{rows}")
    usage, gates = facts_of(folder / "usage.json", Usage), facts_of(folder / "gate.json", GateFacts)
    lines = [f"# {version.name}, version {version.version}", ""]
    lines += [f"A pruned vision model, made and measured by Secateur for device `{told.device.name}`.", ""]
    if gates is not None and (compact := gates.models.get("compact")):
        baseline = gates.models.get("baseline", {})
        lines += ["| | baseline | this model |", "|---|---|---|"]
        lines += [f"| {k} | {_number(baseline.get(k))} | {_number(v)} |" for k, v in compact.items()]
        lines += ["", f"`{gates.metric}` is on the test split; latencies are of {told.device.name}.", ""]
    if gates is not None:
        lines += [f"## Gate: {'passed' if gates.passed else 'not passed'}", ""]
        lines += [
            f"- {check.name}: {_number(check.value)} (must be {check.relation} {_number(check.bound)})"
            for check in gates.checks
        ]
    prepared = {} if usage is None else usage.model_dump(exclude={"classes"}, exclude_none=True)
    what, how = "uint8, any size", f"as `usage.json` says: {json.dumps(prepared)}"
    how = f"Images are prepared by `loader.py` and `decode.py` {how}"
    if not {"image_size", "mean", "std"} <= prepared.keys():
        what, how = (
            "float, (n, channels, height, width)",
            "Inputs are prepared by the model's task, not by `loader.py`.",
        )
    call = f"Model().predict(images)  # {what}"
    lines += ["", "## Use", "", "```", "from loader import Model", "", call, "```", "", how, ""]
    if usage is not None and (names := usage.classes):
        more = f", and {len(names) - 50} more in `usage.json`" if len(names) > 50 else ""
        listed = ", ".join(f"{index} {name}" for index, name in enumerate(names[:50]))
        lines += ["## Classes", "", f"{number_of(len(names), 'class(es)')}: {listed}{more}", ""]
    lines += ["## Provenance", "", "| | |", "|---|---|"]
    facts = {"run": told.run, "data": told.data, "code": told.code}
    facts |= {f"weights, {k}": v for k, v in told.weights.items()}
    facts |= {"plan": told.plan, "device fingerprint": told.device.fingerprint}
    facts |= {"sha256 of model.onnx": tags.get(MODEL_TAG), "sha256 of provenance.json": manifest.sha256}
    lines += [f"| {key} | `{value}` |" for key, value in facts.items() if value]
    return _printable("\n".join(lines))


def _printable(text: str) -> str:
    """Without characters that control a terminal."""
    return "\n".join("".join(c for c in line if c.isprintable()) for line in text.splitlines()) + "\n"


def _number(value: float | str | None) -> str:
    return "unknown" if value is None else f"{value:.6g}" if isinstance(value, int | float) else str(value)
