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

import re

EXIT_OK, EXIT_BUG, EXIT_USER, EXIT_GATE, EXIT_SURROUNDINGS, EXIT_INTERRUPTED, EXIT_TERMINATED = 0, 1, 2, 3, 4, 130, 143


class Terminated(KeyboardInterrupt):
    """SIGTERM: the process is to end, in order, as at Ctrl-C."""


class UserError(ValueError):
    """The user's input cannot work as it stands; the message names the fix."""


class SurroundingsError(RuntimeError):
    """Something outside the program failed; nothing is lost and the run can be resumed."""


class JournalError(SurroundingsError):
    """The journal cannot be written, or is not the journal of this run."""


class TrackingError(SurroundingsError):
    """The tracking server could not be reached or refused a request.

    Args:
        away: it was not reached, or failed; otherwise what it gave cannot be trusted.
    """

    def __init__(self, message: str, away: bool = False) -> None:
        super().__init__(message)
        self.away = away


def masked(text: str) -> str:
    """A text without the passwords of addresses in it: libraries put whole addresses into their errors."""
    return _PARAMETERS.sub(r"\1***", _CREDENTIALS.sub(r"\1***@", text))


_CREDENTIALS = re.compile(r"(://[^/\s:@]*:)[^\s]+@")
_PARAMETERS = re.compile(r"((?:^|(?<=[?&\s]))[\w-]*(?:passw|secret|token)[\w-]*=)[^&\s'\"]+", re.IGNORECASE)
