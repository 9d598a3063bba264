"""nn.Module -> verified ONNX. Names are imported on first use: its errors are known without ONNX."""

from __future__ import annotations

if __name__ != "secateur.export":  # found by its folder: it would be a second copy of every class
    raise ImportError("export is imported as secateur.export")

from typing import TYPE_CHECKING

from secateur.device_profiles.first_use import import_on_first_use

if TYPE_CHECKING:
    from secateur.export.artifact import ExportedModel as ExportedModel
    from secateur.export.artifact import TensorSpec as TensorSpec
    from secateur.export.artifact import describe as describe
    from secateur.export.errors import ExportError as ExportError
    from secateur.export.errors import TemplateError as TemplateError
    from secateur.export.onnx_export import export_onnx as export_onnx
    from secateur.export.verify import Parity as Parity
    from secateur.export.verify import open_session as open_session
    from secateur.export.verify import predict as predict
    from secateur.export.verify import verify_parity as verify_parity

__all__ = import_on_first_use(
    __name__,
    {
        "artifact": ("ExportedModel", "TensorSpec", "describe"),
        "errors": ("ExportError", "TemplateError"),
        "onnx_export": ("export_onnx",),
        "verify": ("Parity", "open_session", "predict", "verify_parity"),
    },
)
