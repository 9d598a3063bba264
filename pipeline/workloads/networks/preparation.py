"""How images are prepared for trained weights, as whoever trained them says."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from secateur.pipeline.workloads.data.decode import Fitting


@dataclass(frozen=True)
class Preparation:
    """What a zoo says of the images of one of its networks.

    Args:
        fitting: their size, and how they are brought to it.
        mean, std: per channel (RGB), of pixels in 0..1.
    """

    fitting: Fitting
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def facts(self) -> dict[str, Any]:
        """The same as JSON's types."""
        return asdict(self)
