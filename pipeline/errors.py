"""The errors a user can meet, and the exit code of each.

=====  ==========================================================================
code   meaning
=====  ==========================================================================
0      done; the gate passed (or the command has no gate)
1      a bug in Secateur (re-run with ``--debug`` and report the traceback)
2      a mistake in the input: run file, data, weights, device profile, model
3      the run finished, but its model did not pass the gate (alias ``challenger``)
4      the surroundings failed: disk, device, tracking server; ``secateur resume`` continues
130    interrupted; ``secateur resume`` continues
143    ended by SIGTERM; ``secateur resume`` continues
=====  ==========================================================================
"""

from __future__ import annotations

import os
import re

EXIT_OK, EXIT_BUG, EXIT_USER, EXIT_GATE, EXIT_SURROUNDINGS, EXIT_INTERRUPTED, EXIT_TERMINATED = 0, 1, 2, 3, 4, 130, 143


class Terminated(KeyboardInterrupt):
    """SIGTERM: the process is to end, in order, as at Ctrl-C."""


class UserError(ValueError):
    """The user's input cannot work as it stands; the message names the fix."""


class OlderRunError(UserError):
    """Another version of Secateur began the run, and this one would go on with it in another way."""


class VersionError(UserError):
    """A registered version holds what none of ours can: it cannot be used, and asking again changes nothing."""


class SurroundingsError(RuntimeError):
    """Something outside the program failed; nothing is lost and the run can be resumed."""


class JournalError(SurroundingsError):
    """The journal cannot be written, or is not the journal of this run."""


class TrackingError(SurroundingsError):
    """The tracking server could not be reached or refused a request.

    Args:
        unreachable: it was not reached, or failed; otherwise what it gave cannot be trusted.
    """

    def __init__(self, message: str, unreachable: bool = False) -> None:
        super().__init__(message)
        self.unreachable = unreachable


def masked(text: str) -> str:
    """A text without passwords, tokens and keys: libraries put whole addresses, headers and requests into their errors.

    In addresses what is before the host (all but a user's name with a password), parameters and settings with a telling
    name (``is_secret``), the same in JSON and the like, and what stands in an Authorization header.
    """
    text = _CREDENTIALS.sub(r"\1***@", _USER_ALONE.sub(r"\1***@", text))
    text = _HEADERS.sub(r"\1***", _SCHEMES.sub(r"\1 ***", text))
    return _SETTINGS.sub(lambda found: f"{found[1]}***" if is_secret(found[2] or found[3]) else found[0], text)


def placeless(text: str) -> str:
    """A text with the last part of whole paths only: what stands before it names users and machines."""

    def last(found: re.Match[str]) -> str:
        top = found["top"]
        if top is not None and top not in _ROOTS and not os.path.lexists(f"/{top}"):
            return found[0]
        is_home = top in ("home", "Users") and not found["between"]
        return "~" if is_home else found["last"]

    return _PLACES.sub(last, text)


def is_secret(name: str) -> bool:
    """Whether a parameter's name says that its value is secret: ``password``, ``api_key``, ``X-Amz-Signature`` ..."""
    return _SECRET.search(name.lower()) is not None


_SECRET = re.compile(
    r"passw|passphrase|secret|token|credential|signature|authorization|apikey|(?:^|[-_.])(?:key|sig|pwd|pw|pass|auth)$"
)
_PLACES = re.compile(
    r"""(?:\b(?:file|sqlite):/{2}(?=/)|(?<![\w.:/~\\-]))(?P<root>~[\w.-]*/|/+(?P<top>[\w.-]+)/|[A-Za-z]:[\\/]+)"""
    r"""(?P<between>(?:[^\s/\\'",;:()\[\]{}<>|]+[/\\]+)*)(?P<last>[^\s/\\'",;:()\[\]{}<>|]+)"""
)
_ROOTS = frozenset("home Users root tmp var usr opt mnt media srv data private Volumes scratch work".split())
"""Folders that whole paths begin with on this or another machine; so do others that are there here. What begins
otherwise is no path: nodes of ONNX are called ``/layer1/conv1/Conv``."""
_USER_ALONE = re.compile(r"(https?://)[^/\s:@?#]+@", re.IGNORECASE)
"""A token in the place of a user's name."""
_CREDENTIALS = re.compile(r"(://[^/\s:@]*:)[^\s]+@")
_SCHEMES = re.compile(r"\b(Bearer|Basic|Digest)\s+(?!\*\*\*)(?=\S*[\d=_.~+/-])[^\s'\"]{6,}", re.IGNORECASE)
_HEADERS = re.compile(r"(\b(?:proxy-)?authorization['\"]?\s*[:=]\s*['\"]?)(?!\w+ \*\*\*)[^\r\n'\"]+", re.IGNORECASE)
_SETTINGS = re.compile(
    r"""((?:(?<![\w.-])([\w-]+)=|['"]([\w.-]+)\\?['"]\s*[:=]\s*)(?:\\?['"])?)(?:(?<=['"])(?:[^'"\\]|\\.)*|[^&\s'",;)}\]]+)"""
)
