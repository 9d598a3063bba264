"""The files of one network's plans in every precision that may ship; what can be made once is made once.

A precision of integers is calibrated on training images, and its template kept by content. Where a network's template
cannot be quantised and cut, each plan is quantised from the beginning, which takes seconds, and said aloud.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from secateur.device_profiles.wording import number_of
from secateur.export.errors import ExportError, TemplateError
from secateur.export.onnx_export import export_proto
from secateur.export.qdq import Calibration
from secateur.export.quantised import LayerSteps, QuantisedTemplate
from secateur.export.quantize import PRECISIONS, layers_in_float, precision
from secateur.export.sensitivity import sensitivity
from secateur.export.slicing import OnnxTemplate
from secateur.pipeline.workloads import Workload, calibration_images, own_calibration_images
from secateur.pruning.plan import PruningPlan

FLOAT = "fp32"
CALIBRATION_IMAGES = 200
"""Training images that the ranges of activations are taken from."""
LEAST_IMAGES = 16
"""Fewer say nothing of the ranges that other images have."""
SENSITIVITY_IMAGES = 8
"""Of these, by how many each layer is tried in 8 bits alone."""
log = logging.getLogger(__name__)


class Precisions:
    """Makes files of one network in a precision.

    Args:
        workload: has the training images that calibrate.
        template: gives the network's ONNX template, or None where it cannot be cut.
        folder: where quantised templates are kept.
        scheme: a name of ``secateur.export.qdq.SCHEMES``.
        ready: precision -> its quantised template, as another process made it.
    """

    def __init__(
        self,
        workload: Workload,
        template: Callable[[], OnnxTemplate | None],
        folder: Path,
        scheme: str = "U8S8",
        ready: Mapping[str, Path] | None = None,
    ) -> None:
        self.workload, self.folder, self.scheme, self.ready = workload, folder, scheme, dict(ready or {})
        self._float, self._lock = template, threading.RLock()
        self._calibration: Calibration | None = None
        self._templates: dict[str, QuantisedTemplate | None] = {}

    def network(
        self, name: str, plan: PruningPlan, state: Mapping[str, Tensor] | None, cut: Callable[[], nn.Module]
    ) -> bytes:
        """The ONNX file of a plan.

        Args:
            name: of the precision.
            state: weights, dense or cut; None = the unpruned network's.
            cut: gives the pruned network with those weights, where no template can be cut.

        Raises:
            ExportError: the training images cannot calibrate it, or ONNX Runtime cannot make it.
        """
        made, template = precision(name), self._float()
        if template is not None and not made.calibrated:
            content = template.slice(plan, state)
            return content if name == FLOAT else _in(name, content)
        if made.calibrated and (quantised := self.template(name)) is not None:
            try:
                return quantised.slice(plan, state)
            except TemplateError as error:
                log.warning("cannot cut the %s template for plan %s, quantising it anew: %s", name, plan.digest, error)
        whole = export_proto(cut().cpu(), self.workload.example_input(), optimize=False)
        return bytes(made.make(whole, self.calibration(name) if made.calibrated else None).SerializeToString())

    def prepare(self, name: str) -> None:
        """Make what is made once for a precision.

        Raises:
            ExportError: as ``template``.
        """
        if precision(name).calibrated:
            self.template(name)

    def template(self, name: str) -> QuantisedTemplate | None:
        """What files of a calibrated precision are cut from; None, said aloud once, where they cannot be.

        Raises:
            ExportError: the training images cannot calibrate it, or ONNX Runtime cannot quantise the network.
        """
        with self._lock:
            if name not in self._templates:
                self._templates[name] = self._open(name)
            return self._templates[name]

    def kept(self, name: str) -> Path | None:
        """The file of a calibrated precision's template, for other processes; None where there is none.

        Raises:
            ExportError: as ``template``.
        """
        template = self.template(name)
        return None if template is None else template.file

    def calibration(self, name: str) -> Calibration:
        """The first training images as the network sees them, in no order of classes, and what stays in float.

        Raises:
            ExportError: they are too few, of another shape than the network takes, not finite, or empty.
        """
        with self._lock:
            if self._calibration is None:
                self._calibration = self._read()
            floats = {weight for layer in layers_in_float(name) for weight in (layer, f"{layer}.weight")}
            return replace(self._calibration, floats=frozenset(floats))

    def _read(self) -> Calibration:
        """The images that calibrate: a task's own, or training images with their places where the data has some.

        Raises:
            ExportError: as ``calibration``.
        """
        own = own_calibration_images(self.workload)
        count = min(CALIBRATION_IMAGES, len(self.workload.train)) if own is None else len(own)
        if count < LEAST_IMAGES:
            more = "give the run more training images" if own is None else "let the task's calibration() give more"
            raise ExportError(
                f"int8: {number_of(count, 'image(s) is|are')} too few to take ranges of activations from; it takes "
                f"{LEAST_IMAGES} at least: {more}, or leave int8 out of precision"
            )
        images = calibration_images(self.workload, count) if own is None else own
        wanted = tuple(self.workload.example_input().shape[1:])
        if tuple(images.shape[1:]) != wanted:
            fix = "let the task's batch give images as its example_input does"
            raise ExportError(
                f"int8: calibration images have the shape {tuple(images.shape[1:])}, the network takes {wanted}: {fix}"
            )
        members = self.workload.record.members if own is None and self.workload.record.files else ()
        places = tuple(member.place for member in members if member.split == "train")[:count]
        return Calibration(images.float().contiguous().numpy(), self.scheme, names=places)

    def sensitivity(self, name: str) -> dict[str, float]:
        """How much the outputs change where one layer alone is in a calibrated precision; empty where nothing can tell.

        Returns:
            Layer -> relative error, in the order of the network (``secateur.export.sensitivity``).

        Raises:
            ExportError: as ``template``.
        """
        template = self.template(name)
        return {} if template is None else sensitivity(template, self.calibration(name).images[:SENSITIVITY_IMAGES])

    def steps(self, name: str) -> Sequence[LayerSteps]:
        """How layers compute in a calibrated precision; none where the network's template cannot be cut in it.

        Raises:
            ExportError: as ``template``.
        """
        template = self.template(name)
        return () if template is None else template.steps

    def _open(self, name: str) -> QuantisedTemplate | None:
        template = self._float()
        if template is None:
            return None
        try:
            if name in self.ready:
                return QuantisedTemplate.load(template, self.ready[name], self.scheme)
            return QuantisedTemplate.make(template, self.calibration(name), self.folder)
        except TemplateError as error:
            log.warning("every candidate is quantised from the beginning, which takes seconds: %s", error)
            return None


def _in(name: str, content: bytes) -> bytes:
    """A float file in a precision that needs no images."""
    import onnx

    made: bytes = PRECISIONS[name].make(onnx.load_model_from_string(content), None).SerializeToString()
    return made
