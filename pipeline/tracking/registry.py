"""The model registry: versions with everything that proves them, an alias per device, promotion and roll-back.

What a device runs is said by one alias, ``champion-DEVICE``; moving it is one call, so whoever asks finds the old
champion or the new one. Plain ``champion`` follows the alias of the model's default device, for tools that know of no
devices. What happened is written down before the alias moves; an entry whose move never came is told by the chain of
entries (each names the champion it found), so a crash between the two leaves nothing to clean up.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import mlflow
import numpy as np
from mlflow import MlflowClient
from mlflow.entities import LoggedModelOutput, Metric, ViewType
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

from secateur.pipeline.errors import SurroundingsError, TrackingError, UserError, placeless
from secateur.pipeline.files import sha256_of
from secateur.pipeline.locks import held, machine_lock
from secateur.pipeline.tracking.answers import AnswerError
from secateur.pipeline.tracking.history import (
    FOUND,
    Event,
    champions,
    deleted_champion,
    happened,
    is_known,
    next_key,
    read_events,
)
from secateur.pipeline.tracking.manifest import (
    FOLDER,
    MANIFEST,
    MAX_MANIFEST,
    MODEL,
    Manifest,
    check_name,
    code_facts,
    write_manifest,
)
from secateur.pipeline.tracking.ownership import CHALLENGER as CHALLENGER
from secateur.pipeline.tracking.ownership import CHAMPION as CHAMPION
from secateur.pipeline.tracking.ownership import DEFAULT_DEVICE, PROMPT_TAG, model_refused, prompt_refused
from secateur.pipeline.tracking.place import equals, sqlite_file
from secateur.pipeline.tracking.store import RUN_TAG as RUN_TAG
from secateur.pipeline.tracking.store import Unreachable, connect, experiment_of, first_line, redacted

DEVICE_TAG, MANIFEST_TAG, MODEL_TAG = "device", "secateur.provenance", "sha256"
DEVICE_NAMES = "secateur.device."
KEY_TAG = "secateur.decision"
PROMOTIONS = "-promotions"
"""What the experiment with an experiment's decisions is called besides its name."""
MAX_TAG = 5000
MODELS, VERSIONS_TAG = "models:/", "mlflow.modelVersions"
"""How the source of a version begins that was made of a logged model, and the tag of that model that leads back."""
MAX_DESCRIPTION = 5000
DESCRIPTION = "Pruned and measured by Secateur; each version has a card of its own. Aliases say what each device runs."
MODEL_PARAMS = ("precision", "plan_digest")
"""Tags of a version that are also parameters of its logged model, by which MLflow compares models."""
MOVE_WAIT_S = 300.0
"""How long a move of an alias waits for one that another process makes; they take seconds."""
RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
"""What a run can be called."""
JSON_BYTES_PER_NUMBER = 52
"""MLflow writes an input example twice, as text."""
MAX_EXAMPLE_JSON = 1_000_000
EXAMPLE, SHORT_DECIMALS, BYTES_PER_SHORT_NUMBER, MAX_SHORT_JSON = "input_example.json", 3, 7, 4_000_000
"""Of a larger example: a photograph of 430 pixels a side still fits."""


@dataclass(frozen=True)
class Version:
    """A version of a registered model.

    Args:
        source: where the store says its files are.
        run_id: MLflow's id of the run that made it; empty when it was made by none.
        created_ms: since 1970.
    """

    name: str
    version: str
    tags: Mapping[str, str] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    source: str = ""
    run_id: str = ""
    created_ms: int = 0

    @property
    def device(self) -> str:
        """The device it was made for; empty when it does not say."""
        return self.tags.get(DEVICE_TAG, "")

    @property
    def run(self) -> str:
        """Secateur's id of the run that made it, which names a folder; empty where it does not say, or names none."""
        told = self.tags.get(RUN_TAG, "")
        return told if RUN.fullmatch(told) else ""

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.version}"

    @property
    def model_id(self) -> str | None:
        """MLflow's id of the logged model that it was made of; None where it was made of something else."""
        place = self.source.removeprefix(MODELS).strip("/")
        return place if self.source.startswith(MODELS) and "/" not in place else None


STABLE = "stable timing"
"""The gate that no disturbed process counts; what fails nothing else is measured again."""


@dataclass(frozen=True)
class Gate:
    """One comparison of a promotion.

    Args:
        value: what was found; None = unknown, and then it does not hold.
        low: lower end of the 95 % interval; None where there is none.
        high: its upper end.
        bound: what it was compared with.
        reason: what was compared, and why it does not hold where it does not.
    """

    name: str
    value: float | None
    bound: float
    ok: bool
    reason: str = ""
    low: float | None = None
    high: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("name", "value", "low", "high", "bound", "ok", "reason")}


@dataclass(frozen=True)
class Decision:
    """Whether a version may become the champion of a device.

    Args:
        champion: the version it was compared with; None = the device has none.
        promoted: whether the alias was moved (False before, and when a gate did not hold).
        run_id: of the MLflow run that keeps the decision; empty before.
        reason: in words, where no gate says it.
    """

    name: str
    version: str
    device: str
    champion: str | None
    gates: tuple[Gate, ...]
    promoted: bool = False
    run_id: str = ""
    reason: str = ""

    @property
    def passed(self) -> bool:
        return all(gate.ok for gate in self.gates)

    @property
    def outcome(self) -> str:
        """``passed``, ``refused``, or ``disturbed``: nothing but the device's unrest speaks against it, so that it may
        be measured again."""
        failed = {gate.name for gate in self.gates if not gate.ok}
        return "passed" if not failed else "disturbed" if failed == {STABLE} else "refused"

    def to_dict(self) -> dict[str, Any]:
        names = ("name", "version", "device", "champion", "passed", "outcome", "promoted")
        own = {key: getattr(self, key) for key in names}
        return {**own, "run_id": self.run_id, "reason": self.reason, "gates": [gate.to_dict() for gate in self.gates]}


@dataclass(frozen=True)
class DeletedChampion:
    """A champion whose version was deleted, its alias with it.

    Args:
        earlier: the champion that a roll-back restores; None = there is none.
    """

    version: str
    earlier: str | None


class ChampionMovedError(SurroundingsError):
    """Another promotion took place since the comparison was made."""


def alias_of(role: str, device: str | None) -> str:
    """The alias of a role (``champion``, ``challenger``) on a device; MLflow allows letters, digits, ``_`` and ``-``.

    Names with anything else get a digest, so that no two devices share an alias.
    """
    return role if device is None else f"{role}-{_plain(device)}"


def _plain(device: str) -> str:
    plain = re.sub(r"[^A-Za-z0-9_-]", "-", device)
    return plain if plain == device else f"{plain}-{hashlib.sha256(device.encode()).hexdigest()[:6]}"


class Registry:
    """The registry of one MLflow.

    Args:
        uri: of MLflow's store and registry: ``sqlite:///...``, ``postgresql+psycopg2://...`` or ``http://...``.
        home: SECATEUR_HOME, for the cache, and for the files of a store that has no server.
        take_over: whether experiments, models and aliases that Secateur did not make may become its own.
        say: told for which process a move of an alias waits.

    Every method raises ``TrackingError`` when MLflow is unreachable or refuses.
    """

    def __init__(
        self, uri: str, home: Path, *, take_over: bool = False, say: Callable[[str], None] = lambda _: None
    ) -> None:
        self.uri, self.home, self.take_over, self.say = uri, home, take_over, say
        self._connected: MlflowClient | None = None

    # -- what is there -----------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Names of the registered models."""
        return sorted(model.name for model in self._models())

    def versions(self, name: str) -> list[Version]:
        """Every version of a model, the newest first.

        Raises:
            UserError: there is no such model.
        """
        aliases = _aliases(self._model(name))
        with self._talking() as client:
            query = equals("name", name)
            versions = list(_pages(lambda token: client.search_model_versions(query, page_token=token)))
        return sorted((_version_of(v, aliases) for v in versions if v.name == name), key=lambda v: -int(v.version))

    def version(self, name: str, which: str = CHAMPION, device: str | None = None) -> Version:
        """One version of a model.

        Args:
            which: its number, or an alias.
            device: whose ``champion`` or ``challenger`` is meant; None = the model's default device.

        Raises:
            UserError: there is no such model or version; names what there is.
            TrackingError: MLflow is unreachable, or fails.
        """
        model = self._model(name)
        alias = alias_of(which, device) if which in (CHAMPION, CHALLENGER) else which
        number = which if which.isdigit() else _aliases(model).get(alias)
        if number is None:
            known = ", ".join(f"{a} (version {v})" for a, v in sorted(_aliases(model).items())) or "none"
            raise UserError(f"model {name} has no alias {alias}; it has: {known}")
        if (version := self._version_if_any(model, number)) is not None:
            return version
        numbers = ", ".join(v.version for v in self.versions(name)) or "none"
        raise UserError(f"model {name} has no version {number}; it has: {numbers}")

    def _version_if_any(self, model: Any, number: str) -> Version | None:
        with self._talking() as client:
            try:
                return _version_of(client.get_model_version(model.name, number), _aliases(model))
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
        return None

    def champion(self, name: str, device: str) -> Version | None:
        """The champion of a device; None when it has none."""
        with self._talking():
            number = _aliases(self._model(name)).get(alias_of(CHAMPION, device))
        return None if number is None else self.version(name, number)

    def champions(self) -> list[tuple[str, str, Version]]:
        """(model, device, version) of every champion of every device."""
        champions = []
        for model in self._models():
            names = {_plain(n): n for key, n in model.tags.items() if key.startswith(DEVICE_NAMES)}
            for alias, number in sorted(_aliases(model).items()):
                role, separator, plain = alias.partition("-")
                if role == CHAMPION and separator:
                    champions.append((model.name, names.get(plain, plain), self.version(model.name, number)))
        return champions

    def history(self, name: str) -> list[Event]:
        """Every move of a champion, the oldest first.

        Raises:
            UserError: there is no such model.
        """
        model = self._model(name)
        events = read_events(model.tags)
        told = {device: iter(happened(*_reign(model, device))) for device in {event.device for event in events}}
        return [next(told[event.device]) for event in events]

    def deleted_champion(self, name: str, device: str) -> DeletedChampion | None:
        """The champion of a device, where it is gone with its version; None where it is not.

        Raises:
            UserError: there is no such model.
        """
        events, current = _reign(self._model(name), device)
        exist = {version.version for version in self.versions(name)}
        gone = deleted_champion(events, current, exist)
        if gone is None:
            return None
        earlier = [version for version in champions(events, current) if version in exist]
        return DeletedChampion(gone, earlier[-1] if earlier else None)

    def files(self, version: Version) -> Manifest:
        """The list of a version's files with their digests, as its tag vouches for it.

        Raises:
            TrackingError: it has none, or another one than its tag says.
            VersionError: it is no such list.
        """
        digest = version.tags.get(MANIFEST_TAG)
        if not digest:
            raise TrackingError(f"{version.uri} was not registered by Secateur: it has no provenance to verify")
        with tempfile.TemporaryDirectory(prefix="secateur-") as folder:
            file = self._download(version, MANIFEST, Path(folder), range(MAX_MANIFEST + 1))
            return Manifest.read(file.read_bytes(), digest, version.uri)

    def fetch(self, version: Version, folder: Path) -> Manifest:
        """Every file of a version into a folder, each of the sha256 that its provenance names.

        Raises:
            TrackingError: a file is missing, or is another one.
            VersionError: the version is larger than any should be, or holds no models where they should be.
        """
        from secateur.pipeline.tracking.fetched import check_files

        manifest = self.files(version)
        for path in manifest.files:
            self.fetch_file(version, manifest, path, folder / path)
        check_files(folder)
        (folder / MANIFEST).parent.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).write_bytes(manifest.raw)
        return manifest

    def fetch_file(self, version: Version, manifest: Manifest, path: str, to: Path) -> None:
        """One file of a version, verified; ``to`` appears whole or not at all."""
        to.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=to.parent) as part:
            size = int(manifest.files[path]["bytes"])
            file = self._download(version, path, Path(part), range(size, size + 1))
            manifest.verify(path, file, version.uri)
            file.replace(to)

    # -- what is added -----------------------------------------------------------------------------------------------

    def add(
        self,
        name: str,
        device: str,
        onnx_file: Path,
        *,
        run_key: str,
        example: np.ndarray,
        outputs: np.ndarray,
        experiment: str = "secateur",
        parent: str | None = None,
        tags: Mapping[str, Any] | None = None,
        files: Sequence[Path] = (),
        facts: Mapping[str, Any] | None = None,
        description: str = "",
    ) -> Version:
        """Log an ONNX file as a model and register it; once per run, however often it is called.

        The files are complete in the store before the version is made: a version is whole, or it is not there.

        Args:
            device: that it was made for; the first version's becomes the model's default device.
            run_key: Secateur's id of the run; a version of the same run is found again by it.
            example: input example, shape (1, ...).
            outputs: what the model answers to it.
            experiment: of MLflow, for the model's files.
            parent: MLflow's id of the run that made it.
            tags: of the version.
            files: what else belongs to it, kept under their names in ``secateur/``.
            facts: of the provenance (hashes, packages, device).
            description: of the version, as Markdown.

        Raises:
            TrackingError: MLflow is unreachable, refuses, or changed the model's bytes.
        """
        import onnx
        from mlflow.models import Model
        from mlflow.onnx import save_model

        known = self._added(name, run_key)
        if known is not None:
            self._link(known)
            return known
        self._is_ours(name)  # before megabytes are sent
        with self._talking() as client, tempfile.TemporaryDirectory(prefix="secateur-") as temporary:
            experiment_id = experiment_of(client, self.uri, experiment, self.home, self.take_over)
            folder, digest = Path(temporary) / "model", sha256_of(onnx_file)
            params = {
                "device": device,
                **{key: str(value) for key, value in (tags or {}).items() if key in MODEL_PARAMS},
            }
            logged = client.create_logged_model(experiment_id, name, parent, {RUN_TAG: run_key}, params)
            # As JSON, twice, MLflow would make megabytes of a photograph: it gets one with few digits, or an array.
            small = JSON_BYTES_PER_NUMBER * example.size <= MAX_EXAMPLE_JSON
            model, described = onnx.load(onnx_file), Model(artifact_path=name, run_id=parent, model_id=logged.model_id)
            save_model(
                model,
                folder,
                mlflow_model=described,
                signature=signature_of(model),
                input_example=example if small else None,
                save_as_external_data=False,
                onnx_execution_providers=["CPUExecutionProvider"],
                pip_requirements=[f"{package}=={_installed(package)}" for package in ("onnxruntime", "onnx")],
            )
            (folder / FOLDER).mkdir()
            if not small:
                _write_example(example, described, folder)
                np.savez_compressed(folder / FOLDER / "example.npz", input=example, output=outputs)
            for file in files:
                shutil.copyfile(file, folder / FOLDER / file.name)
            if sha256_of(folder / MODEL) != digest:
                raise TrackingError(f"MLflow changed the bytes of {onnx_file.name}; nothing was registered")
            manifest = write_manifest(folder, name, run_key, {**code_facts(), **(facts or {})})
            client.log_model_artifacts(logged.model_id, str(folder))
            client.finalize_logged_model(logged.model_id, "READY")
            if parent:
                client.log_outputs(parent, [LoggedModelOutput(logged.model_id, 0)])
            self._make(name, device)
            own = {RUN_TAG: run_key, DEVICE_TAG: device, MODEL_TAG: digest, MANIFEST_TAG: manifest}
            every = {**{k: str(v)[:MAX_TAG] for k, v in (tags or {}).items()}, **own}
            mlflow.set_tracking_uri(self.uri)  # an embedded store looks the logged model up in MLflow's global one
            made = client.create_model_version(
                name,
                f"{MODELS}{logged.model_id}",
                run_id=parent,
                tags=every,
                description=description[:MAX_DESCRIPTION] or None,
                model_id=logged.model_id,
            )
            version = _version_of(made, {})
        self._link(version)
        return version

    def _link(self, version: Version) -> None:
        """Let the logged model of a version lead to it; an MLflow server does so itself."""
        if version.model_id is None:
            return
        with self._talking() as client:
            entry = {"name": version.name, "version": version.version}
            known = json.loads(client.get_logged_model(version.model_id).tags.get(VERSIONS_TAG, "[]"))
            if not any(str(one["version"]) == version.version and one["name"] == version.name for one in known):
                client.set_logged_model_tags(version.model_id, {VERSIONS_TAG: json.dumps([*known, entry])})

    def _added(self, name: str, run_key: str) -> Version | None:
        """The version that a run has already made."""
        try:
            return next((v for v in self.versions(name) if v.tags.get(RUN_TAG) == run_key), None)
        except UserError:
            return None

    def _make(self, name: str, device: str) -> None:
        """The registered model, made where there is none yet, or taken over."""
        with self._talking() as client:
            try:
                client.create_registered_model(name, {DEFAULT_DEVICE: device}, DESCRIPTION)
                return
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            if not self._is_ours(name):
                client.set_registered_model_tag(name, DEFAULT_DEVICE, device)

    def _is_ours(self, name: str) -> bool:
        """Whether a registered model is Secateur's own; False = there is none, or it may be taken over.

        Raises:
            UserError: it is somebody else's, or a prompt.
        """
        with self._talking() as client:
            try:
                model = client.get_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                prompts = client.search_registered_models(f"{equals('name', name)} AND tags.`{PROMPT_TAG}` = 'true'")
                if any(prompt.name == name for prompt in prompts):
                    raise UserError(prompt_refused(name)) from None
                return False
            if DEFAULT_DEVICE in model.tags:
                return True
            if not self.take_over:
                raise UserError(model_refused(name))
            return False

    # -- aliases -----------------------------------------------------------------------------------------------------

    def challenge(self, name: str, version: str, device: str) -> None:
        """Make a version the challenger of a device, unless it is its champion or a newer one is its challenger."""
        with self._moving(name) as client:
            aliases = _aliases(self._model(name))
            newer = int(aliases.get(alias_of(CHALLENGER, device), 0)) > int(version)
            if not newer and aliases.get(alias_of(CHAMPION, device)) != version:
                self._name_device(name, device)
                client.set_registered_model_alias(name, alias_of(CHALLENGER, device), version)
            self._repair(name)

    def promote(self, name: str, version: str, device: str, decision: Decision) -> None:
        """Make a version the champion of a device, on a decision that let it.

        Raises:
            ChampionMovedError: another version became champion since the decision was made.
            UserError: the decision does not let it, or is about something else.
        """
        about = (decision.name, decision.version, decision.device)
        if about != (name, version, device) or not decision.passed:
            raise UserError(f"the decision is about {about} and {'passed' if decision.passed else 'did not pass'}")
        with self._moving(name):
            aliases = _aliases(self._model(name))
            current = aliases.get(alias_of(CHAMPION, device))
            if current == version:
                return self._repair(name)
            if current != decision.champion:
                raise ChampionMovedError(
                    f"the champion of {name} on {device} is version {current} by now; the decision was made against "
                    f"{decision.champion or 'none'}: compare again"
                )
            self._name_device(name, device)
            self._move("promote", name, version, device, decision.champion, decision.run_id)
            self._repair(name)

    def rollback(self, name: str, device: str | None = None) -> Version:
        """Restore the champion before the present one; called again, the one before that.

        Args:
            device: None = the model's default device.

        Raises:
            UserError: there is no earlier champion.
        """
        with self._moving(name):
            model = self._model(name)
            device = device or self.default_device(name)
            current = _aliases(model).get(alias_of(CHAMPION, device))
            reign = champions(*_reign(model, device))
            exist = {v.version for v in self.versions(name)} if reign else set()
            earlier = [v for v in reign if v in exist and v != current]
            if not earlier and current is None:
                raise UserError(f"model {name} has no champion on {device}; devices: {', '.join(self.devices(name))}")
            if not earlier:
                raise UserError(f"version {current} is the first champion of {name} on {device}: nothing to go back to")
            self._move("rollback", name, earlier[-1], device, current, "")
            self._repair(name)
        return self.version(name, earlier[-1])

    def repair(self, name: str) -> None:
        """Make plain ``champion`` and ``challenger`` follow the default device's, should a process have died there."""
        with self._moving(name):
            self._repair(name)

    def devices(self, name: str) -> list[str]:
        """The devices that a model has aliases for."""
        return sorted(value for key, value in self._model(name).tags.items() if key.startswith(DEVICE_NAMES))

    def default_device(self, name: str) -> str:
        """The device that plain ``champion`` and ``challenger`` are about.

        Raises:
            UserError: there is no such model, or nobody has named its device.
        """
        device = self._model(name).tags.get(DEFAULT_DEVICE)
        if device is None:
            raise UserError(f"model {name} has no default device; name one with --device")
        return str(device)

    def _move(self, kind: str, name: str, version: str, device: str, previous: str | None, run_id: str) -> None:
        """Write an entry, then move the device's alias: the one step that makes a champion. Then mark it as done."""
        event = Event(kind, device, version, previous, time.time(), False, run_id)
        key = self._enter(name, event)
        with self._talking() as client:
            client.set_registered_model_alias(name, alias_of(CHAMPION, device), version)
        self._enter(name, replace(event, done=True), key)

    def _enter(self, name: str, event: Event, key: str = "") -> str:
        """Write an entry, under its key where it has one; returns the key."""
        key = key or next_key(self._model(name).tags)
        with self._talking() as client:
            client.set_registered_model_tag(name, key, json.dumps(asdict(event)))
        return key

    def _repair(self, name: str) -> None:
        """Finish what a promotion does after its one step, should a process have died there.

        A champion challenges nobody, and the plain aliases follow those of the default device.
        """
        model = self._model(name)
        aliases, device = _aliases(model), model.tags.get(DEFAULT_DEVICE)
        with self._talking() as client:
            for alias in [alias for alias in aliases if alias.startswith(f"{CHALLENGER}-")]:
                if aliases[alias] == aliases.get(CHAMPION + alias.removeprefix(CHALLENGER)):
                    client.delete_registered_model_alias(name, alias)
                    del aliases[alias]
            for role in (CHAMPION, CHALLENGER) if device is not None else ():
                wanted, present = aliases.get(alias_of(role, device)), aliases.get(role)
                if wanted is not None and wanted != present:
                    if role == CHAMPION and present is not None:
                        self._keep(name, model, str(device), present)
                    client.set_registered_model_alias(name, role, wanted)
                elif wanted is None and present is not None and role == CHALLENGER:
                    client.delete_registered_model_alias(name, role)

    def _name_device(self, name: str, device: str) -> None:
        """Note what a device is called, for aliases cannot hold every name."""
        with self._talking() as client:
            client.set_registered_model_tag(name, DEVICE_NAMES + _plain(device), device)

    def _keep(self, name: str, model: Any, device: str, version: str) -> None:
        """Write down a plain ``champion`` that somebody else has set, so that a roll-back can reach it."""
        if not is_known(version, *_reign(model, device)):
            self._enter(name, Event(FOUND, device, version, None, time.time()))

    # -- decisions ---------------------------------------------------------------------------------------------------

    def log_decision(self, decision: Decision, key: str, files: Sequence[Path] = ()) -> str:
        """Keep a decision as an MLflow run of its own; one run per key, however often it is called.

        Args:
            key: names the decision.
            files: what it rests on (the measurement).

        Returns:
            the run's id.
        """
        version = self.version(decision.name, decision.version)
        with self._talking() as client:
            experiment = self._experiment(version) + PROMOTIONS
            experiment_id = experiment_of(client, self.uri, experiment, self.home, self.take_over)
            likely = client.search_runs([experiment_id], equals(f"tags.`{KEY_TAG}`", key), ViewType.ACTIVE_ONLY)
            known = [run for run in likely if run.data.tags[KEY_TAG] == key]
            outcome = decision.outcome
            tags = {
                KEY_TAG: key,
                "model": decision.name,
                "version": decision.version,
                "champion": decision.champion or "",
                "device": decision.device,
                "outcome": outcome,
            }
            title = f"{decision.name} {decision.version} on {decision.device}"
            run = known[0] if known else client.create_run(experiment_id, tags=tags, run_name=title)
            run_id: str = run.info.run_id
            now = int(time.time() * 1000)
            client.log_batch(run_id, metrics=[Metric(k, v, now, 0) for k, v in _gate_metrics(decision).items()])
            client.set_tag(run_id, "outcome", outcome)
            told = placeless(json.dumps({**decision.to_dict(), "run_id": run_id}, indent=1))
            client.log_text(run_id, told, "decision.json")
            for file in files:
                client.log_artifact(run_id, str(file))
            client.set_terminated(run_id)
            tag = f"{KEY_TAG}.{_plain(decision.device)}"
            refused_by = [gate.name for gate in decision.gates if not gate.ok]
            note = {"outcome": outcome, "champion": decision.champion, "run_id": run_id, "refused_by": refused_by}
            client.set_model_version_tag(decision.name, decision.version, tag, json.dumps(note)[:MAX_TAG])
        return run_id

    def _experiment(self, version: Version) -> str:
        """The experiment a version comes from."""
        with self._talking() as client:
            if not version.run_id:
                return "secateur"
            return str(client.get_experiment(client.get_run(version.run_id).info.experiment_id).name)

    # -- MLflow ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _talking(self) -> Iterator[MlflowClient]:
        """A client; what MLflow raises becomes a ``TrackingError`` without secrets."""
        try:
            if self._connected is None:
                self._connected = connect(self.uri, make=False)
            yield self._connected
        except (SurroundingsError, UserError):
            raise
        except Unreachable as error:
            text = f"tracking server {redacted(self.uri)}: {first_line(error)}"
            raise TrackingError(text, unreachable=_is_unreachable(error)) from error

    @contextlib.contextmanager
    def _moving(self, name: str) -> Iterator[MlflowClient]:
        """One process at a time moves the aliases of a store's models; the kernel frees the lock of a killed one.

        The lock belongs to the store, whichever SECATEUR_HOME its users have: it lies beside a SQLite file; that of a
        server is this machine's (what several machines do at once is found by reading back).

        Raises:
            SurroundingsError: another process has held it for ``MOVE_WAIT_S``.
        """
        lock = held(_lock_of(self.uri), f"the registry at {redacted(self.uri)}", MOVE_WAIT_S, self.say)
        with lock, self._talking() as client:
            yield client

    def _model(self, name: str) -> Any:
        with self._talking() as client:
            try:
                return client.get_registered_model(name)
            except MlflowException as error:
                if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise
        known = ", ".join(self.names()) or "none"
        raise UserError(f"there is no registered model {name!r} in {redacted(self.uri)}; it has: {known}")

    def _models(self) -> list[Any]:
        with self._talking() as client:
            return list(_pages(lambda token: client.search_registered_models(page_token=token)))

    def _download(self, version: Version, path: str, folder: Path, sizes: range) -> Path:
        """One file of a version, as the store gives it, in a folder of our own.

        Args:
            sizes: bytes it may have; the store is asked before anything is sent.
        """
        check_name(path)
        with self._talking() as client:
            place = client.get_model_version_download_uri(version.name, version.version)
            if place.startswith(MODELS):  # of a logged model
                place = client.get_logged_model(place.removeprefix(MODELS).strip("/")).artifact_location
            _check_folder(version, place)
            store = get_artifact_repository(place, tracking_uri=self.uri, registry_uri=self.uri)
            _check_size(version, path, store.list_artifacts(path.rpartition("/")[0] or None), sizes)
            file = Path(store.download_artifacts(path, dst_path=str(folder)))
        if not file.is_file():
            raise TrackingError(f"{version.uri} has no file {path}")
        return file


def _write_example(example: np.ndarray, model: Any, folder: Path) -> None:
    """An input of many numbers as MLflow's own reader takes it: once, with few digits; not at all where it is too many.

    Args:
        model: MLflow's description of the model in the folder, which is written anew.
    """
    if BYTES_PER_SHORT_NUMBER * example.size > MAX_SHORT_JSON or example.dtype.kind != "f":
        return
    numbers = np.round(example.astype(np.float64), SHORT_DECIMALS)
    (folder / EXAMPLE).write_text(json.dumps(numbers.tolist(), separators=(",", ":")), encoding="utf-8")
    model.saved_input_example_info = {"artifact_path": EXAMPLE, "type": "ndarray"}
    model.save(folder / "MLmodel")


def signature_of(model: Any) -> Any:
    """What an ONNX model takes and gives, as MLflow's signature: its own shapes, -1 where a dimension is open."""
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec
    from onnx.helper import tensor_dtype_to_np_dtype

    def schema(ports: Sequence[Any]) -> Any:
        specs = []
        for port in ports:
            kind = port.type.tensor_type
            shape = tuple(dim.dim_value or -1 for dim in kind.shape.dim)
            name = port.name if len(ports) > 1 else None  # a single one may be given as an array
            specs.append(TensorSpec(np.dtype(tensor_dtype_to_np_dtype(kind.elem_type)), shape, name))
        return Schema(specs)

    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [port for port in model.graph.input if port.name not in weights]
    return ModelSignature(inputs=schema(inputs), outputs=schema(model.graph.output))


def _lock_of(uri: str) -> Path:
    """The file of a store's lock."""
    database = sqlite_file(uri)
    if database is not None:
        file = database.resolve()
        return file.with_name(f"{file.name}.lock")
    return machine_lock("registry-" + hashlib.sha256(redacted(uri).rstrip("/").encode()).hexdigest()[:16])


def _check_folder(version: Version, place: str) -> None:
    """See that the files of a store without a server are where it says.

    Raises:
        TrackingError: the folder is not there.
    """
    parts = urlsplit(place)
    folder = Path(unquote(parts.path))
    if parts.scheme in ("", "file") and not folder.exists():
        raise TrackingError(
            f"the files of {version.uri} are in {folder}, says MLflow, and that is not there: was the SECATEUR_HOME "
            "that it was registered in moved? Bring it back, or let its old place lead to the new one (`ln -s NEW OLD`)"
        )


def _check_size(version: Version, path: str, listed: Sequence[Any], sizes: range) -> None:
    """See that a store holds a file of a size that it may have, before it is sent.

    Args:
        listed: what the store says is in the file's folder.

    Raises:
        TrackingError: it holds none, a folder of that name, or a file of another size.
    """
    file = next((entry for entry in listed if entry.path == path), None)
    if file is None or file.is_dir:
        raise TrackingError(f"{version.uri} has no file {path}")
    if file.file_size is not None and int(file.file_size) not in sizes:
        expected = str(sizes.start) if len(sizes) == 1 else f"at most {sizes.stop - 1}"
        raise TrackingError(f"{path} of {version.uri} was changed: {file.file_size} bytes, expected {expected}")


def _version_of(version: Any, aliases: Mapping[str, str]) -> Version:
    number = str(version.version)
    own = tuple(sorted(alias for alias, target in aliases.items() if target == number))
    return Version(
        version.name,
        number,
        dict(version.tags),
        own,
        version.source,
        version.run_id or "",
        int(version.creation_timestamp or 0),
    )


def _aliases(model: Any) -> dict[str, str]:
    """Alias -> version of a registered model; some stores give numbers."""
    return {alias: str(version) for alias, version in model.aliases.items()}


def _reign(model: Any, device: str) -> tuple[list[Event], str | None]:
    """A device's entries, and its present champion."""
    events = [event for event in read_events(model.tags) if event.device == device]
    return events, _aliases(model).get(alias_of(CHAMPION, device))


def _is_unreachable(error: BaseException) -> bool:
    """Whether a server did not answer, or failed; not when it refused, answered nonsense, or a file here fails."""
    if isinstance(error, AnswerError) or (isinstance(error, OSError) and error.filename is not None):
        return False
    if isinstance(error, MlflowException):
        return int(error.get_http_status_code()) >= 500
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status is None or int(status) >= 500


def _gate_metrics(decision: Decision) -> dict[str, float]:
    """A decision's numbers under the names MLflow allows."""
    metrics: dict[str, float] = {}
    for gate in decision.gates:
        name = re.sub(r"[^A-Za-z0-9_./ -]", "", gate.name)
        values = {"value": gate.value, "low": gate.low, "high": gate.high, "bound": gate.bound, "ok": float(gate.ok)}
        metrics |= {f"{name}.{k}": float(v) for k, v in values.items() if v is not None and np.isfinite(v)}
    return metrics


def _pages(ask: Any) -> Iterator[Any]:
    """Everything that a paged question finds."""
    token = None
    while True:
        page = ask(token)
        yield from page
        token = page.token
        if not token:
            return


def _installed(package: str) -> str:
    from importlib.metadata import version

    return version(package)
