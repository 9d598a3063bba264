"""An MLflow server, asked over HTTP: who we are there, what it has under a name, and what it answers instead."""

from __future__ import annotations

import base64
import configparser
import http.client
import json
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from email.message import Message
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, unquote, urlencode, urlsplit, urlunsplit

from secateur.device_profiles.wording import cut, printable
from secateur.pipeline.errors import masked
from secateur.pipeline.surroundings import variable
from secateur.pipeline.tracking.ownership import (
    DEFAULT_DEVICE,
    MADE_TAG,
    PROMPT_TAG,
    RUN_TAG,
    RUN_TAGS,
    is_alias_of_ours,
)
from secateur.pipeline.tracking.place import equals
from secateur.pipeline.tracking.stores import Experiment, Model, Store, StoreRefusedError, StoreUnreachableError

ANSWER_S = 5.0
MOST_BYTES = 16 << 20
OLDEST = 3
"""Major version of the oldest server that takes what is registered (logged models)."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Name and password go to nobody but the address that was given."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        return None


class RestStore(Store):
    """A server.

    Args:
        uri: its address, perhaps with a name and a password in it.

    Raises:
        StoreRefusedError: it is no MLflow server, or too old a one.
        StoreUnreachableError: it does not answer.
    """

    def __init__(self, uri: str) -> None:
        try:
            parts = urlsplit(uri)
            known = bool(parts.hostname) and parts.port != 0
        except ValueError:  # no such port, or a bracket that is not closed
            known = False
        if not known:
            raise StoreRefusedError("this is no address of a server: it is written http://HOST:PORT")
        self._base = urlunsplit((*parts[:1], parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))
        self._headers = _credentials(parts.username, parts.password)
        handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
        if parts.scheme == "https":
            handlers.append(urllib.request.HTTPSHandler(context=_trusted()))
        self._opener = urllib.request.build_opener(*handlers)
        self._check_version()

    def experiment(self, name: str) -> Experiment | None:
        answer = self._api("experiments/get-by-name", {"experiment_name": name})
        if answer is None:
            return None
        experiment = answer.get("experiment")
        if not isinstance(experiment, Mapping) or "experiment_id" not in experiment:
            raise StoreRefusedError(_NO_MLFLOW)
        number, tags = str(experiment["experiment_id"]), _tags(experiment)
        ours = MADE_TAG in tags or any(self._has_runs(number, tag) for tag in RUN_TAGS)
        return Experiment(number, experiment.get("lifecycle_stage") == "deleted", tags, runs_of_ours=ours)

    def model(self, name: str) -> Model | None:
        answer = self._api("registered-models/get", {"name": name})
        if answer is None:
            query = f"{equals('name', name)} AND tags.`{PROMPT_TAG}` = 'true'"
            prompts = self._api("registered-models/search", {"filter": query}) or {}
            known = any(isinstance(m, Mapping) and m.get("name") == name for m in prompts.get("registered_models", ()))
            return Model({PROMPT_TAG: "true"}, {}) if known else None
        model = answer.get("registered_model")
        if not isinstance(model, Mapping):
            raise StoreRefusedError(_NO_MLFLOW)
        aliases = {str(a["alias"]): str(a["version"]) for a in model.get("aliases", ())}
        tags, ours = _tags(model), []
        for number in sorted({v for alias, v in aliases.items() if is_alias_of_ours(alias) and DEFAULT_DEVICE in tags}):
            got = self._api("model-versions/get", {"name": name, "version": number}) or {}
            if RUN_TAG in _tags(got.get("model_version", {})):
                ours.append(number)
        return Model(tags, aliases, tuple(ours))

    def _has_runs(self, experiment_id: str, tag: str) -> bool:
        wanted = {"experiment_ids": [experiment_id], "filter": f"tags.`{tag}` LIKE '%'", "run_view_type": "ALL"}
        return bool((self._api("runs/search", body={**wanted, "max_results": 1}) or {}).get("runs"))

    def _check_version(self) -> None:
        status, content, _ = self._get(f"{self._base}/version")
        match = re.fullmatch(r"(\d+)\.\d+[\w.+-]*", content.decode("utf-8", "replace").strip())
        if status != 200 or match is None:
            return  # behind a proxy it may not be there; the other questions tell
        if int(match[1]) < OLDEST:
            raise StoreRefusedError(f"the server is MLflow {match[0]}; Secateur needs {OLDEST}.0 or newer there")
        own = version("mlflow")
        if int(match[1]) > int(own.partition(".")[0]):
            self.notes = (f"the tracking server is MLflow {match[0]}, newer than the {own} here",)

    def _api(
        self, path: str, query: Mapping[str, str] | None = None, body: Mapping[str, Any] | None = None
    ) -> dict[str, Any] | None:
        """What the server answers; None = there is no such thing."""
        address = f"{self._base}/api/2.0/mlflow/{path}" + (f"?{urlencode(query, quote_via=quote)}" if query else "")
        status, content, headers = self._get(address, None if body is None else json.dumps(body).encode())
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            answer = None
        said = answer if isinstance(answer, dict) else {}
        if status == 200 and isinstance(answer, dict):
            return answer
        if status == 404 and said.get("error_code") == "RESOURCE_DOES_NOT_EXIST":
            return None
        text = str(said.get("message", "")) or ("" if _is_page(content) else content[:300].decode("utf-8", "replace"))
        raise self._refusal(status, cut(printable(masked(" ".join(text.split())))), headers)

    def _refusal(self, status: int, text: str, headers: Message) -> StoreRefusedError | StoreUnreachableError:
        """What an answer that is none means."""
        said = f" ({text})" if text else ""
        if 300 <= status < 400:
            to = printable(masked(headers.get("Location", "elsewhere")))
            return StoreRefusedError(
                f"it sends us on to {to}: if that is the server and no page to log in, make it tracking.uri"
            )
        if status == 401:
            known = "the name or password that was given is not known there" if self._headers else "it asks who we are"
            return StoreRefusedError(
                f"{known}{said}: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            )
        if status == 403:
            return StoreRefusedError(f"it does not let us in{said}: ask its administrator for the right to write there")
        if status == 407:
            return StoreRefusedError(f"a proxy on the way asks who we are{said}: correct HTTP_PROXY, or set NO_PROXY")
        if status == 429 or status >= 500:
            return StoreUnreachableError(f"it answers with status {status}{said}")
        if status in (200, 404):
            return StoreRefusedError(_NO_MLFLOW + said)
        return StoreRefusedError(f"it answers with status {status}{said}")

    def _get(self, address: str, body: bytes | None = None) -> tuple[int, bytes, Message]:
        headers = {**self._headers, "Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        try:
            request = urllib.request.Request(address, body, headers)  # noqa: S310 - http or https
            try:
                answer = self._opener.open(request, timeout=ANSWER_S)
            except urllib.error.HTTPError as error:
                answer = error
            with answer:
                content = answer.read(MOST_BYTES + 1)
        except (http.client.InvalidURL, ValueError) as error:
            raise StoreRefusedError(f"this is no address of a server ({error})") from error
        except (OSError, http.client.HTTPException) as error:
            raise _unanswered(error) from error
        if len(content) > MOST_BYTES:
            raise StoreRefusedError(_NO_MLFLOW)
        return int(answer.status or 0), content, answer.headers


_NO_MLFLOW = "what answers there is no MLflow server: correct tracking.uri (host, port and path)"


def _unanswered(error: Exception) -> StoreRefusedError | StoreUnreachableError:
    """Why there is no answer at all."""
    reason: object = error.reason if isinstance(error, urllib.error.URLError) else error
    text = printable(masked(str(reason) or type(reason).__name__))
    if isinstance(reason, ssl.SSLCertVerificationError):
        return StoreRefusedError(
            f"its certificate is not trusted ({text}): set MLFLOW_TRACKING_SERVER_CERT_PATH to its authority"
        )
    if isinstance(reason, ssl.SSLError):
        return StoreRefusedError(f"it does not speak TLS ({text}): try http:// instead of https://")
    if isinstance(reason, http.client.HTTPException) and not isinstance(reason, ConnectionError):
        return StoreRefusedError(f"{_NO_MLFLOW} ({text})")
    return StoreUnreachableError(text)


def _credentials(name: str | None, password: str | None) -> dict[str, str]:
    """Who we are, as MLflow's own client says it: the environment, its file of credentials, or the address."""
    kept = configparser.ConfigParser(interpolation=None)
    try:
        kept.read(Path.home() / ".mlflow" / "credentials", encoding="utf-8")
    except (OSError, RuntimeError, configparser.Error, UnicodeDecodeError):
        kept.clear()
    own = dict(kept["mlflow"]) if kept.has_section("mlflow") else {}
    name_ = variable("MLFLOW_TRACKING_USERNAME") or own.get("mlflow_tracking_username") or unquote(name or "")
    password_ = variable("MLFLOW_TRACKING_PASSWORD") or own.get("mlflow_tracking_password") or unquote(password or "")
    token = variable("MLFLOW_TRACKING_TOKEN")
    if name_:
        return {"Authorization": "Basic " + base64.b64encode(f"{name_}:{password_}".encode()).decode()}
    return {"Authorization": f"Bearer {token}"} if token else {}


def _trusted() -> ssl.SSLContext:
    """Which certificates are believed, as MLflow's own client has it.

    Raises:
        StoreRefusedError: the file that a variable names cannot be read.
    """
    if (variable("MLFLOW_TRACKING_INSECURE_TLS") or "").lower() in ("true", "1"):
        return ssl._create_unverified_context()  # noqa: S323  as the user asks of MLflow's client, too
    names = ("MLFLOW_TRACKING_SERVER_CERT_PATH", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
    place = next((value for name in names if (value := variable(name))), None)
    client = variable("MLFLOW_TRACKING_CLIENT_CERT_PATH")
    try:
        if place is None:
            import certifi

            place = certifi.where()
        context = ssl.create_default_context(
            cafile=None if Path(place).is_dir() else place, capath=place if Path(place).is_dir() else None
        )
        if client:
            context.load_cert_chain(client)
    except (OSError, ssl.SSLError) as error:
        raise StoreRefusedError(f"the certificates of {place} cannot be read ({error}): correct {names[0]}") from error
    return context


def _is_page(content: bytes) -> bool:
    return content.lstrip()[:1] == b"<"


def _tags(entity: Any) -> dict[str, str]:
    """The tags of an answer."""
    if not isinstance(entity, Mapping):
        return {}
    return {str(tag["key"]): str(tag.get("value", "")) for tag in entity.get("tags", ()) if "key" in tag}
