"""Whether a model's outputs on a device are those of this machine."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from secateur.pipeline import errors
from secateur.pipeline.cli.devices import profiles
from secateur.pipeline.terminal import err, out, table

if TYPE_CHECKING:
    from secateur.device_profiles import DeviceProfile, Target
    from secateur.device_profiles.measure import FloatArray

PARITY_TOLERANCE = 1e-4
PARITY_TIMEOUT_S = 900.0
"""An emulator takes minutes where the device takes milliseconds."""


def check_parity(profile: DeviceProfile, model: Path) -> None:
    """Print how far the device's outputs are from this machine's; ends with 3 if that is more than rounding.

    Raises:
        DeviceError: one of the two cannot run the model.
        SurroundingsError: the agent on the device is too old to give outputs back.
        Exit: with 3.
    """
    from secateur.device_profiles import DeviceError, LocalTarget
    from secateur.device_profiles.runtime import DEFAULT
    from secateur.pipeline.progress import RichProgress

    local = profile.model_copy(update={"runtime": DEFAULT, "provider": "CPUExecutionProvider", "threads": 1})
    try:
        with RichProgress(err).stage(f"outputs of {model.name} on {profile.name}"):
            with profiles.opened(profile) as target:
                there = _outputs(target, profile, model)
            with closing(LocalTarget()) as this_machine:
                here = _outputs(this_machine, local, model)
    except DeviceError as error:
        if error.code != "bad-request":
            raise
        raise errors.SurroundingsError(f"the agent there cannot give outputs back: {error}") from error
    title = f"{model.name}: outputs on {profile.name} and here"
    rows = table("output", "shape", "largest difference", "same argmax", title=title)
    worst = 0.0
    for name, ours in here.items():
        difference, agreement = compare(there.get(name), ours)
        worst = max(worst, difference)
        rows.add_row(name, str(ours.shape), f"{difference:.1e} of the largest value", agreement)
    out.print(rows)
    if worst > PARITY_TOLERANCE:
        out.print(f"Not the same: {worst:.1e} is more than rounding ({PARITY_TOLERANCE:.0e}).")
        raise typer.Exit(errors.EXIT_GATE)
    out.print(f"The same, but for rounding (at most {PARITY_TOLERANCE:.0e}).")


def _outputs(target: Target, profile: DeviceProfile, model: Path) -> dict[str, Any]:
    """The outputs on the seeded input, name -> array."""
    import hashlib
    import tempfile

    import numpy as np

    from secateur.device_profiles.runtime import runtime_field
    from secateur.pipeline.archives import check_archive

    place = {"name": model.name, "path": target.put(model), "sha256": hashlib.sha256(model.read_bytes()).hexdigest()}
    request = {"op": "infer", "models": [place], "provider": profile.provider, "threads": profile.threads, "seed": 0}
    request |= runtime_field(profile)
    answer = target.run(request, timeout_s=PARITY_TIMEOUT_S)
    with tempfile.TemporaryDirectory(prefix="secateur-parity-") as folder:
        file = Path(folder) / "outputs.npz"
        target.fetch(answer["outputs"], file)
        check_archive(file, "the device sent no outputs of this model")
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}


def compare(there: FloatArray | None, here: FloatArray) -> tuple[float, str]:
    """Largest difference as a fraction of the largest finite value here, and where the largest entries agree.

    Args:
        there: an output of any shape, as the device computed it; None = it has none of that name.
        here: the same output, as this machine computed it.

    Returns:
        The difference is infinite where one side is not a number or infinite and the other is something else.
    """
    import numpy as np

    if there is None or there.shape != here.shape:
        return float("inf"), "no such output there" if there is None else f"shape there: {there.shape}"
    a, b = there.astype(np.float64), here.astype(np.float64)
    differ = ~((a == b) | (np.isnan(a) & np.isnan(b)))
    scale = float(np.abs(b[np.isfinite(b)]).max(initial=0.0)) or 1.0
    distance = np.abs(a[differ] - b[differ])
    worst = float(np.where(np.isnan(distance), np.inf, distance).max(initial=0.0)) / scale
    if b.ndim < 2:
        return worst, "-"
    same = float(np.mean(a.reshape(len(a), -1).argmax(1) == b.reshape(len(b), -1).argmax(1)))
    return worst, f"{same:.0%}"
