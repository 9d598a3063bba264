"""What an MLflow server answers, held against what it can be: a page or an empty object is no answer.

Whatever answers with status 200 has answered, says HTTP. A page to log in, a list, or an object without the id of what
was asked for come from something else in the server's place. That is neither a delivery nor an unreachable server.
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any, TypeVar

from google.protobuf.json_format import ParseError
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from secateur.pipeline.errors import masked

NO_MLFLOW = "what answers there is no MLflow server, or none that is well: correct tracking.uri (host, port and path)"
NAMED: Mapping[str, str] = {
    "create_experiment": "",
    "create_logged_model": "model_id",
    "create_model_version": "version",
    "create_registered_model": "name",
    "create_run": "info.run_id",
    "get_experiment": "experiment_id",
    "get_experiment_by_name": "experiment_id",
    "get_logged_model": "model_id",
    "get_model_version": "version",
    "get_registered_model": "name",
    "get_run": "info.run_id",
}
"""Questions -> by what every true answer is named; empty = the answer is the name itself."""
READERS = ("mlflow", "google", "json")
"""Packages that read answers, and fail on those that have another form."""
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
Asked = TypeVar("Asked", bound=Callable[..., Any])


class AnswerError(OSError):
    """A server answered, but with nothing that MLflow answers."""


def is_refusal(error: BaseException) -> bool:
    """Whether a server took what it was sent for wrong: it would do so again."""
    return isinstance(error, MlflowException) and error.error_code in REFUSALS


def _checked(name: str, ask: Asked) -> Asked:
    """A client's method that refuses what is no answer to it."""

    @functools.wraps(ask)
    def checked(*args: Any, **kwargs: Any) -> Any:
        try:
            answer = ask(*args, **kwargs)
        except MlflowException as error:
            if "not in a valid JSON format" in str(error):  # MLflow calls it an internal error of the server
                raise AnswerError(NO_MLFLOW) from error
            raise
        except (ParseError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            if _is_of_a_reader(error):
                raise AnswerError(f"{NO_MLFLOW} ({type(error).__name__}: {masked(str(error))[:200]})") from error
            raise
        if name in NAMED and answer is not None and not (attrgetter(NAMED[name])(answer) if NAMED[name] else answer):
            raise AnswerError(NO_MLFLOW)
        return answer

    return checked  # type: ignore[return-value]


def _is_of_a_reader(error: BaseException) -> bool:
    innermost = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)][-1:]
    return any(str(name).partition(".")[0] in READERS for name in innermost)


class CheckedClient(MlflowClient):  # type: ignore[misc]  # MLflow's names are loaded late, without types
    """MLflow's client of a server, whose methods raise ``AnswerError`` where no MLflow server has answered."""


for _name in (name for name in dir(MlflowClient) if not name.startswith("_") and callable(getattr(MlflowClient, name))):
    setattr(CheckedClient, _name, _checked(_name, getattr(MlflowClient, _name)))
