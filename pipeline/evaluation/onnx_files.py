"""ONNX files of candidates, cut from the one template that a run exports: what devices measure."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path

from secateur.device_profiles.layers import LayerTable
from secateur.export.errors import TemplateError
from secateur.export.layers import layer_table
from secateur.export.onnx_export import write_atomically
from secateur.export.quantize import file_word
from secateur.export.slicing import OnnxTemplate, candidate_onnx
from secateur.pipeline.evaluation.baseline import Baseline
from secateur.pipeline.evaluation.precisions import FLOAT, Precisions
from secateur.pipeline.progress import ProgressView
from secateur.pruning.plan import PruningPlan
from secateur.pruning.weights import inherit

CANDIDATES, TEMPLATE = "candidates", "template.onnx"
"""Folder of a run's files, and the template's file in it."""


class OnnxFiles:
    """The ONNX files of one baseline's plans; devices ask for them in threads of their own.

    Args:
        baseline: the network they are of.
        folder: for the files.
    """

    def __init__(self, baseline: Baseline, folder: Path, progress: ProgressView) -> None:
        self.baseline, self.folder, self.progress, self.precision = baseline, folder, progress, FLOAT
        self._lock = threading.RLock()
        self._shared = SharedFiles(self._write)
        self._template: OnnxTemplate | None = None
        self._template_tried = False

    def of(self, plan: PruningPlan) -> AbstractContextManager[Path]:
        """A plan's file, while the context lasts."""
        return self._shared.of(plan)

    @property
    def dense(self) -> Path:
        """The file of the unpruned network, written once."""
        with self._lock:
            return self._dense

    def template(self) -> OnnxTemplate | None:
        """What plans are cut from, opened when first needed; None where the network's cannot be cut."""
        with self._lock:
            if not self._template_tried:
                self._template_tried = True
                self._template = self._open_template()
            return self._template

    def layers(self) -> LayerTable | None:
        """The network's layers, read once; None where there is no template to read them from."""
        with self._lock:
            return self._layers

    @cached_property
    def _dense(self) -> Path:
        return self._write(self.baseline.full, "baseline.onnx")

    @cached_property
    def _layers(self) -> LayerTable | None:
        template = self.template()
        return None if template is None else layer_table(template)

    def _open_template(self) -> OnnxTemplate | None:
        """Exported once, and kept as a file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / TEMPLATE
        if file.exists():
            with contextlib.suppress(TemplateError):
                return OnnxTemplate.load(file, self.baseline.graph)
        with self.progress.stage("Export the template") as report:
            dense = inherit(self.baseline.model, self.baseline.graph, self.baseline.full).cpu()
            try:
                return OnnxTemplate.export(dense, self.baseline.workload.example_input(), self.baseline.graph, file)
            except TemplateError as error:
                report(1, 1, f"every candidate is exported afresh: {error}")
                return None

    def _write(self, plan: PruningPlan, name: str) -> Path:
        """A plan's file: cut from the template, or exported afresh where it cannot be."""
        with self._lock:
            example, template = self.baseline.workload.example_input(), self.template()
            pruned = inherit(self.baseline.model, self.baseline.graph, plan).cpu()
            candidate_onnx(template, pruned, example, plan, self.folder / name)
        return self.folder / name


class PreciseFiles:
    """The same baseline's plans in another precision; the unpruned network that they are compared with stays in fp32.

    Args:
        files: in fp32.
        precisions: makes those in the precision.
        name: of the precision.
    """

    def __init__(self, files: OnnxFiles, precisions: Precisions, name: str) -> None:
        self.baseline, self.precision = files.baseline, name
        self._files, self._precisions = files, precisions
        self._shared = SharedFiles(self._write)

    def of(self, plan: PruningPlan) -> AbstractContextManager[Path]:
        """A plan's file, while the context lasts."""
        return self._shared.of(plan)

    @property
    def dense(self) -> Path:
        """The file of the unpruned network in fp32."""
        return self._files.dense

    def layers(self) -> LayerTable | None:
        """The network's layers, which are the same in every precision."""
        return self._files.layers()

    def _write(self, plan: PruningPlan, name: str) -> Path:
        path = self._files.folder / f"{file_word(self.precision)}-{self._precisions.scheme}-{name}"
        write_atomically(path, self._precisions.network(self.precision, plan, None, lambda: self.baseline.cut(plan)))
        return path


class SharedFiles:
    """Files that several threads use at a time: made by the first that asks, removed after the last.

    Args:
        make: ``make(plan, name)`` writes a file of that name and returns where; called by one thread at a time.
    """

    def __init__(self, make: Callable[[PruningPlan, str], Path]) -> None:
        self._make, self._lock = make, threading.Lock()
        self._used: dict[str, tuple[str, Path, int]] = {}

    @contextmanager
    def of(self, plan: PruningPlan) -> Iterator[Path]:
        """The file of a plan, while the context lasts."""
        with self._lock:
            name, path, users = self._used.get(plan.digest) or (self._free(), Path(), 0)
            if not users:
                path = self._make(plan, name)
            self._used[plan.digest] = (name, path, users + 1)
        try:
            yield path
        finally:
            with self._lock:
                name, path, users = self._used.pop(plan.digest)
                if users > 1:
                    self._used[plan.digest] = (name, path, users - 1)
                else:
                    path.unlink(missing_ok=True)

    def _free(self) -> str:
        """A name nobody uses; the same few come again, so that killed runs do not fill a disk."""
        taken = {name for name, _, _ in self._used.values()}
        names = ["candidate.onnx", *(f"candidate-{i}.onnx" for i in range(1, len(taken) + 1))]
        return next(name for name in names if name not in taken)
