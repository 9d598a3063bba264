"""The model card: what a model is, what it was measured to be, and what nobody knows of it. One page of Markdown.

Its front matter is what model hubs read; it is made with their own library, read back, and held against a schema that
needs no network.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from secateur import __version__
from secateur.device_profiles import DeviceProfile
from secateur.device_profiles.wording import number_of, printable_lines
from secateur.pipeline.config.schema import LicenceSection, RunFile
from secateur.pipeline.report import figures as say
from secateur.pipeline.report import final_table
from secateur.pipeline.run.facts import Check, Facts

CARD = "CARD.md"
UNKNOWN = "unknown"
TASKS: Mapping[str, str] = {"classification": "image-classification", "detection": "object-detection"}
"""Workloads -> tasks as model hubs call them; one's own tasks have no such name."""
HUB_METRICS: Mapping[str, str] = {"top1": "accuracy", "top5": "accuracy", "map50": "mAP", "map": "mAP"}
IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]*")
"""Of a licence, as model hubs know it."""
MOST_CLASSES = 50


@dataclass(frozen=True)
class About:
    """What a card says besides what the stages found.

    Args:
        profile: of the run's own device.
        data: what the data is called.
        images: how many the test split has.
        commit: of the run file's folder, when the run began; empty where there is none.
    """

    config: RunFile
    run_id: str
    profile: DeviceProfile
    data: str
    images: int
    commit: str = ""

    @property
    def model(self) -> str:
        """The name under which the model is registered."""
        return self.config.tracking.registered_model or self.config.name

    @property
    def network(self) -> str:
        """The network's name, without folders of this machine."""
        workload = self.config.workload
        named = workload.get("model", {}).get("name") or workload.get("task") or UNKNOWN
        return Path(named).name if ".py:" in named else str(named)


def card(about: About, facts: Facts) -> str:
    """The card, front matter first."""
    return f"---\n{front_matter(about, facts)}---\n\n{body(about, facts)}"


def front_matter(about: About, facts: Facts) -> str:
    """What model hubs read, as YAML.

    Raises:
        ValueError: it is not what the schema says, or is read back as something else; a bug.
    """
    from huggingface_hub import ModelCard, ModelCardData

    licence = about.config.card.licence
    data = ModelCardData(
        model_name=about.model,
        library_name="onnx",
        pipeline_tag=TASKS.get(about.config.workload["name"]),
        tags=["onnx", "pruning", "edge", "secateur"],
        datasets=[slug(about.data)],
        metrics=[metric_type(facts.gate.metric)],
        eval_results=list(_results(about, facts)),
        **_hub_licence(licence),
    )
    text = str(data.to_yaml()).rstrip() + "\n"
    read = ModelCard(f"---\n{text}---\n", ignore_metadata_errors=False).data
    if read.to_dict() != data.to_dict():
        raise ValueError("the front matter of the model card is read back as something else")
    check(read.to_dict())
    return text


def _results(about: About, facts: Facts) -> Iterator[Any]:
    """The test metrics of the compact network, in the form of model hubs."""
    from huggingface_hub import EvalResult

    task = TASKS.get(about.config.workload["name"], "other")
    for name, value in facts.gate.models.compact.metrics.items():
        if value is not None and math.isfinite(value):
            yield EvalResult(
                task_type=task,
                dataset_type=slug(about.data),
                dataset_name=about.data,
                dataset_split="test",
                metric_type=metric_type(name),
                metric_name=f"{name} (test split, n = {about.images})",
                metric_value=round(float(value), 6),
            )


def check(data: Mapping[str, Any]) -> None:
    """See that front matter is what the committed schema says.

    Raises:
        ValueError: it is not; says where first.
    """
    from jsonschema import Draft202012Validator

    faults = sorted(Draft202012Validator(_schema()).iter_errors(data), key=lambda fault: list(map(str, fault.path)))
    if faults:
        place = ".".join(map(str, faults[0].absolute_path)) or "it"
        raise ValueError(f"the front matter of the model card is wrong: {place}: {faults[0].message}")


@cache
def _schema() -> Any:
    return json.loads(Path(__file__).with_name("card.schema.json").read_text(encoding="utf-8"))


def _hub_licence(licence: LicenceSection) -> dict[str, str]:
    """The licences of the parts as the one that hubs ask for: theirs where they agree, else each by its name."""
    named = {part: getattr(licence, part) for part in LicenceSection.model_fields}
    every = set(named.values())
    if UNKNOWN in every:
        return {"license": UNKNOWN}
    if len(every) == 1 and IDENTIFIER.fullmatch(only := every.pop()):
        return {"license": only}
    return {"license": "other", "license_name": ", ".join(f"{part}: {name}" for part, name in named.items())}


def metric_type(name: str) -> str:
    """A metric as model hubs call it."""
    return HUB_METRICS.get(name, name)


def slug(name: str) -> str:
    """A name of letters, digits, ``.``, ``_`` and ``-``."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-") or "data"


# -- the page ----------------------------------------------------------------------------------------------------------


def body(about: About, facts: Facts) -> str:
    """The card without its front matter, the most important first: a description may be cut at its end."""
    parts = [
        (about.model, _what(about, facts)),
        ("Figures", _figures(about, facts)),
        ("Gate: passed" if facts.gate.passed else "Gate: not passed", _gate(facts)),
        ("Intended use", _intended_use(about)),
        ("Limits", _limits(about, facts)),
        ("Licences", _licences(about.config.card.licence)),
        ("Input and output", _ports(facts)),
        ("How to load it", _loading(about, facts)),
        ("Device", _device(about, facts)),
        ("Origin", _origin(about, facts)),
        ("Classes", _classes(facts)),
    ]
    written = [f"{'##' if i else '#'} {title}\n\n{text}\n" for i, (title, text) in enumerate(parts) if text]
    return printable_lines("\n".join(written))


def cut(text: str, most: int) -> str:
    """As many whole sections of a card as a description has room for."""
    if len(text) <= most:
        return text
    said = "\n_The rest is in CARD.md, among the files._\n"
    head = text[: most - len(said)]
    return head[: max(head.rfind("\n## "), 0) or len(head)] + said


def _what(about: About, facts: Facts) -> str:
    compact, base = facts.gate.models.compact, facts.gate.models.baseline
    task = TASKS.get(about.config.workload["name"], "a task of its own").replace("-", " ")
    share = f"{compact.macs / base.macs:.0%} of the MACs"
    return (
        f"`{about.network}` for {task}, with channels removed (`{about.config.search.method}`) down to {share} of the "
        f"unpruned network, fine-tuned, and exported to ONNX in {facts.export.compact.artifact.precision}. Made and "
        f"measured by Secateur for the device `{about.profile.name}`."
    )


def _figures(about: About, facts: Facts) -> str:
    lines = ["| | unpruned | this model | change |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in final_table(facts)]
    statistic = "CPU time" if facts.benchmark.statistic == "cpu" else "wall time"
    profile, accuracy = about.profile, facts.gate.accuracy
    lines += ["", f"Accuracy is on the test split of `{about.data}`, {about.images} images, which nothing else saw."]
    if accuracy is not None and accuracy.change.low is not None and accuracy.change.high is not None:
        low, high = (f"{100 * end:+.2f}" for end in (accuracy.change.low, accuracy.change.high))
        lines[-1] += f" Its change: 95 % {low} to {high} pp (paired bootstrap over these images)."
    lines += [
        f"The speed-up is the ratio of {statistic} of one call, both networks timed in turn on `{profile.name}`: "
        f"{profile.runtime}, {profile.provider}, {number_of(profile.threads, 'thread(s)')}, batch "
        f"{profile.batch}; its interval is "
        "of 95 % over processes.",
        "",
        _flags(facts),
    ]
    return "\n".join(lines)


def _flags(facts: Facts) -> str:
    flags = facts.benchmark.flags
    if not flags:
        return "Flags of the timing: none."
    return "Flags of the timing: " + "; ".join(f"`{flag}` ({say.FLAGS.get(flag, 'see the report')})" for flag in flags)


def _gate(facts: Facts) -> str:
    return "\n".join(f"- {_check(one)}" for one in facts.gate.checks) or "Nothing was asked of it."


def _check(one: Check) -> str:
    value = UNKNOWN if one.value is None else f"{one.value:.4g}"
    return f"{one.name}: {value}, asked for {one.relation} {one.bound:.4g}: {'holds' if one.ok else 'DOES NOT HOLD'}"


def _intended_use(about: About) -> str:
    made = (
        f"Images like those of `{about.data}`, prepared as below, on `{about.profile.name}` or a device that was "
        "measured like it."
    )
    return f"{about.config.card.intended_use}\n\n{made}" if about.config.card.intended_use else made


def _limits(about: About, facts: Facts) -> str:
    told = [about.config.card.limits] if about.config.card.limits else []
    told.append("Its accuracy is known on these test images only; on images of another kind nobody has measured it.")
    told.append("Its latency is known on this device, runtime and number of threads only.")
    if facts.benchmark.flags:
        told.append("The timing was disturbed (see the flags); time it again before relying on it.")
    if facts.search.split is not None and facts.search.split.memorised:
        told.append("The weights were trained on the images that the search went by.")
    if facts.export.compact.artifact.precision != "fp32":
        told.append("Its answers differ from those of the float network by what the figures show.")
    if not facts.gate.passed:
        told.append("It did not pass its gate: do not ship it.")
    if parts := [part for part in LicenceSection.model_fields if getattr(about.config.card.licence, part) == UNKNOWN]:
        told.append(f"Nobody has said under which licence these are: {', '.join(parts)}.")
    told.append("Fairness, robustness against attacks and calibration of its scores were not measured.")
    return "\n".join(f"- {line}" for line in told)


def _licences(licence: LicenceSection) -> str:
    rows = [f"| {part} | {getattr(licence, part)} |" for part in LicenceSection.model_fields]
    return "\n".join(["| of the | licence |", "|---|---|", *rows])


def _ports(facts: Facts) -> str:
    network = facts.export.compact
    artifact = network.whole or network.artifact
    lines = ["| | name | shape | type |", "|---|---|---|---|"]
    for title, ports in (("input", artifact.inputs), ("output", artifact.outputs)):
        lines += [f"| {title} | `{name}` | {list(port.shape)} | {port.dtype} |" for name, port in ports.items()]
    usage = {key: value for key, value in facts.export.usage.items() if key != "classes"}
    if {"image_size", "mean", "std"} <= usage.keys():
        lines += ["", f"Images are prepared by `loader.py` as `usage.json` says: `{json.dumps(usage)}`."]
    else:
        lines += ["", "Inputs are prepared by the model's task, not by `loader.py`."]
    return "\n".join(lines)


LOADING = """```sh
{pull}  # the champion there is; NAME@VERSION for another one
```

```python
import sys

sys.path.insert(0, "model")
from loader import Model  # numpy, pillow, onnxruntime; nothing of Secateur

Model("model").predict(images)  # {what}
```"""


def _loading(about: About, facts: Facts) -> str:
    pull = shlex.join(["secateur", "pull", about.model, "--device", about.profile.name, "-o", "model"])
    prepared = {"image_size", "mean", "std"} <= facts.export.usage.keys()
    what = "uint8 (height, width, channels), of any size" if prepared else "float (n, channels, height, width)"
    return LOADING.format(pull=pull, what=what)


def _device(about: About, facts: Facts) -> str:
    known = facts.search.device.facts
    rows = {"profile": about.profile.name, "processor": known.get("cpu"), "architecture": known.get("machine")}
    rows |= {"cores": known.get("cpus"), "runtime": f"{about.profile.runtime} {known.get(about.profile.runtime, '')}"}
    others = [name for name in facts.benchmark.of_devices if name != about.profile.name]
    rows |= {"also measured on": ", ".join(others)}
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items() if value)])


def _origin(about: About, facts: Facts) -> str:
    artifact = facts.export.compact.whole or facts.export.compact.artifact
    rows = {"run": about.run_id, "made by": f"Secateur {__version__}", "data": about.data, "seed": about.config.seed}
    rows |= {"commit": about.commit or None}
    rows |= {"plan": facts.finetune.best.candidate.plan.digest, "sha256 of model.onnx": artifact.sha256}
    table = "\n".join(["| | |", "|---|---|", *(f"| {k} | `{v}` |" for k, v in rows.items() if v is not None)])
    return f"{table}\n\nThe whole account is in [{facts.report.html}]({facts.report.html})."


def _classes(facts: Facts) -> str:
    names = list(facts.export.usage.get("classes", ()))
    if not names:
        return ""
    more = f", and {len(names) - MOST_CLASSES} more in `usage.json`" if len(names) > MOST_CLASSES else ""
    return f"{len(names)}: {', '.join(f'{i} {name}' for i, name in enumerate(names[:MOST_CLASSES]))}{more}"
