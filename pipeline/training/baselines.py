"""Trained baselines, kept under SECATEUR_HOME by the content of what they come from, for all runs of one recipe.

A kept one counts only while it is what its digest beside it says. Runs that want the same one train it once: the others
wait, and a run that was killed over it leaves its checkpoint to the next.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from secateur.pipeline.files import write_whole
from secateur.pipeline.locks import held
from secateur.pipeline.training.checkpoints import save_weights

WAIT_S = 48 * 3600.0
"""How long a run waits for another one that trains the same baseline."""


@dataclass(frozen=True)
class BaselineCache:
    """Baselines that are kept in a folder.

    Args:
        folder: of the files.
        say: told for which process is waited.
    """

    folder: Path
    say: Callable[[str], None]

    def get(self, key: str, train: Callable[[Path], Mapping[str, Tensor]]) -> tuple[bytes, bool]:
        """The weights of a baseline as the content of a safetensors file, and whether they were trained just now.

        Args:
            key: hash of everything the weights follow from.
            train: trains it; given the file for its checkpoint.

        Raises:
            SurroundingsError: the disk is full, or another run has been training it for ``WAIT_S``.
        """
        kept = self._read(key)
        if kept is not None:
            return kept, False
        with held(self.folder / f"{key}.lock", f"baseline {key}, which another run trains", WAIT_S, self.say):
            kept = self._read(key)  # trained meanwhile
            if kept is not None:
                return kept, False
            file = self._file(key)
            digest = save_weights(file, dict(train(file.with_suffix(".ckpt"))))
            write_whole(file.with_suffix(".sha256"), digest + "\n")
            return file.read_bytes(), True

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _read(self, key: str) -> bytes | None:
        """A kept baseline; None where there is none, or it is not what was written."""
        file = self._file(key)
        try:
            content, digest = file.read_bytes(), file.with_suffix(".sha256").read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            return None
        return content if hashlib.sha256(content).hexdigest() == digest else None
