"""The way to the same result, and to the model."""

from __future__ import annotations

import shlex

from secateur.device_profiles import plain_yaml
from secateur.pipeline.report import figures as say
from secateur.pipeline.report.content import Code, Section, Table
from secateur.pipeline.report.material import Material

TITLE = "Reproduce and use"


def section(m: Material) -> Section:
    """Commands, the run file, digests, a loader, downloads."""
    text = [_usage(m), _code(m)]
    again = "secateur run run.yaml"
    report = shlex.join(["secateur", "report", m.run_id])  # not where it lies on this machine
    code = [
        Code(
            "Run it again",
            f"{again}        # the run file below\n{report}        # this page, made anew",
        )
    ]
    if m.register is not None:
        version = f"{m.register.name}@{m.register.version}"
        code.append(Code("Get the model", shlex.join(["secateur", "pull", version, "--output", m.register.name])))
    code += [Code("Load it with ONNX Runtime", _loader(m)), Code("Run file", run_file(m))]
    files = _files(m)
    said = (
        f"Run {m.run_id} began with seed {m.config.seed}; the same run file, code and data give the same plan "
        "wherever times do not decide."
    )
    missing = (
        []
        if m.code.get("git")
        else [
            "Reproduce and use: the commit of Secateur's code is not known (an installed package, or a run of an "
            "earlier version)."
        ]
    )
    return Section(
        TITLE,
        said,
        text=[line for line in text if line],
        code=code,
        tables=[files] if files.rows else [],
        downloads=True,
        missing=missing,
    )


def run_file(m: Material) -> str:
    """The run file without addresses and places of this machine."""
    told = m.config.model_dump(
        mode="json", exclude={"tracking": {"uri"}, "workers": {"address"}}, exclude_defaults=True
    )
    profile = told.get("device", {}).get("profile")
    if profile is not None and ("/" in profile or "\\" in profile):
        told["device"]["profile"] = profile.replace("\\", "/").rsplit("/", 1)[-1]
    return str(plain_yaml.dump(told))


def _usage(m: Material) -> str:
    if m.export is None:
        return ""
    usage = m.export.usage
    if "mean" not in usage:
        return ""
    mean, std = (", ".join(str(round(value, 4)) for value in usage[key]) for key in ("mean", "std"))
    said = (
        f"Input: RGB or grey images of {usage.get('image_size')} pixels a side, pixels / 255, minus {mean}, divided "
        f"by {std}; "
        "shape (1, channels, height, width), float32."
    )
    classes = usage.get("classes") or ()
    return said + (f" Classes from 0: {', '.join(map(str, classes))}." if classes else "")


def _code(m: Material) -> str:
    parts = []
    if m.code.get("secateur"):
        parts.append(f"Secateur {m.code['secateur']}")
    parts.append(f"git {m.code['git'][:12]}" if m.code.get("git") else "git commit not recorded")
    parts.append(f"lock sha256 {m.code['lock'][:12]}" if m.code.get("lock") else "lock not recorded")
    data = m.records[0].get("data") if m.records else None
    parts += [f"data {data}"] if data else []
    return (
        f"Code: {'; '.join(parts)}. Seeds: {m.config.seed} of search, training and fine-tuning; splits follow the "
        "images' content."
    )


def _loader(m: Material) -> str:
    usage = m.export.usage if m.export is not None else {}
    name = m.config.export.input_name
    side, mean, std = usage.get("image_size", "SIDE"), usage.get("mean", ["MEAN"]), usage.get("std", ["STD"])
    mode = "L" if len(mean) == 1 else "RGB"
    axes = "[None, None]" if mode == "L" else ".transpose(2, 0, 1)[None]"
    shaped = "(1, -1, 1, 1)"
    size = f"({side}, {side})" if not isinstance(side, list | tuple) else f"({side[-1]}, {side[0]})"
    return "\n".join(
        [
            "import numpy as np, onnxruntime",
            "from PIL import Image",
            f'pixels = np.asarray(Image.open("image.png").convert("{mode}").resize({size}), np.float32)',
            f"images = (pixels / 255){axes}",
            f"mean, std = (np.array(v, np.float32).reshape{shaped} for v in ({_round(mean)}, {_round(std)}))",
            'session = onnxruntime.InferenceSession("compact.onnx")',
            f'outputs = session.run(None, {{"{name}": (images - mean) / std}})[0]',
            "print(outputs.shape, outputs.argmax(-1))",
        ]
    )


def _round(values: list[float]) -> str:
    return str([round(value, 6) if isinstance(value, float) else value for value in values])


def _files(m: Material) -> Table:
    rows = []
    for stage in vars(m.facts).values():
        rows += [[name, digest] for name, digest in stage.files.items()] if stage is not None else []
    return Table(
        f"SHA-256 of {say.plural(len(rows), 'file')} of the run directory",
        ("file", "sha256"),
        list(dict.fromkeys(map(tuple, rows))),
    )
