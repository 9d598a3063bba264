"""What the documentation's commands find in their folder: data, a device, a network, as a reader would have them."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from tests.pipeline.helpers import QUICK_DEVICE, merged

ROOT = Path(__file__).parents[2]
SIDE = 16
WORDS = ("daisy", "rose", "tulip")
EACH = 60
SHORT: dict[str, Any] = {
    "threads": 1,
    "device": {"profile": "kitchen", "probe": False},
    "baseline": {"epochs": 1, "batch_size": 16},
    "finetune": {"epochs": 1, "batch_size": 16, "top": 1},
    "search": {"images": 2, "recalibrate_images": 8},
    "gate": {"max_drop": 1.0, "min_speedup": None, "require_stable": False},
}
"""With these a run takes seconds; what it goes through is the same."""


def prepare(folder: Path, page: str) -> None:
    """Put there what a page speaks of, and links to the checkout's folders."""
    for name in ("docs", "docker", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    left_out = shutil.ignore_patterns("reproduce", "*.py", "__pycache__")
    shutil.copytree(ROOT / "pipeline" / "runs", folder / "pipeline" / "runs", ignore=left_out)
    shutil.copy(ROOT / ".env.example", folder)
    emulator = folder / "emulated-python"
    emulator.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n', encoding="utf-8")
    emulator.chmod(0o755)
    for name, make in PREPARED.items():
        if name in page and not (make is flowers_file and "secateur init flowers" in page):
            make(folder)


def shorten(folder: Path) -> None:
    """Let every run file of a folder take seconds."""
    for file in (*folder.glob("*.yaml"), *folder.glob("pipeline/runs/*.yaml")):
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        if "workload" in content:
            device(folder)
            file.write_text(yaml.safe_dump(merged(content, SHORT)), encoding="utf-8")


def flowers(folder: Path) -> None:
    """Three class folders of small images, and a run file."""
    digits = load_digits()
    for label, word in enumerate(WORDS):
        (folder / "flowers" / word).mkdir(parents=True)
        for number, pixels in enumerate(digits.images[digits.target == label][:EACH]):
            image = Image.fromarray(np.uint8(255 * pixels / 16)).resize((SIDE, SIDE)).convert("RGB")
            image.save(folder / "flowers" / word / f"{number:04}.png")


def flowers_file(folder: Path) -> None:
    """A run file for them."""
    workload = {"name": "classification", "model": {"name": "cifar/resnet8"}, "data": {"path": "flowers"}}
    search = {"method": "global", "target": {"macs_ratio": 0.6}}
    content = {"name": "flowers", "workload": workload, "search": search}
    (folder / "flowers.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")


def boxes(folder: Path) -> None:
    """Scenes with one box each, as YOLO has them."""
    digits = load_digits()
    for split, count in (("train", 24), ("val", 8)):
        (folder / "boxes" / "images" / split).mkdir(parents=True)
        (folder / "boxes" / "labels" / split).mkdir(parents=True)
        for number in range(count):
            canvas = np.zeros((96, 96), np.uint8)
            canvas[20:52, 30:62] = np.kron(np.uint8(255 * digits.images[number] / 16), np.ones((4, 4), np.uint8))
            Image.fromarray(canvas).convert("RGB").save(folder / "boxes" / "images" / split / f"{number}.png")
            label = folder / "boxes" / "labels" / split / f"{number}.txt"
            label.write_text("0 0.479 0.375 0.333 0.333\n", encoding="utf-8")
    content = {"path": ".", "train": "images/train", "val": "images/val", "names": ["box"]}
    (folder / "boxes" / "data.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")


def device(folder: Path) -> None:
    """This machine as a device called kitchen, timed briefly."""
    for home in (".secateur", "secateur-home"):  # the second is what how-to/ci.md sets
        file = folder / home / "devices" / "kitchen.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(QUICK_DEVICE), encoding="utf-8")


def network(folder: Path) -> None:
    """A network of one's own."""
    shutil.copy(ROOT / "examples" / "classifier" / "mynet.py", folder)


def photograph(folder: Path) -> None:
    """A picture to look for things in."""
    Image.fromarray(np.zeros((80, 120, 3), np.uint8)).save(folder / "scene.jpg")


def onnx_files(folder: Path) -> None:
    """Two networks in ONNX, one smaller than the other."""
    import onnx
    from onnx import TensorProto, helper

    for name, width in (("baseline", 64), ("compact", 32)):
        weights = helper.make_tensor("w", TensorProto.FLOAT, [8, width], np.ones(8 * width, np.float32))
        node = helper.make_node("MatMul", ["input", "w"], ["logits"])
        value = helper.make_tensor_value_info
        graph = helper.make_graph(
            [node],
            name,
            [value("input", TensorProto.FLOAT, [1, 8])],
            [value("logits", TensorProto.FLOAT, [1, width])],
            [weights],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.save(model, str(folder / f"{name}.onnx"))


PREPARED: dict[str, Callable[[Path], None]] = {
    "flowers": flowers,
    "secateur run flowers.yaml": flowers_file,
    ".secateur/runs/flowers-*": flowers_file,
    "boxes": boxes,
    "kitchen": device,
    "mynet.py": network,
    "compact.onnx": onnx_files,
    "scene.jpg": photograph,
}
"""Word of a page -> what makes it."""
