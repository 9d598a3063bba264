"""nn.Module -> verified ONNX."""

from export.artifact import ExportedModel, TensorSpec, describe
from export.errors import ExportError, TemplateError
from export.onnx_export import export_onnx
from export.verify import Parity, open_session, predict, verify_parity

__all__ = [
    "ExportError",
    "ExportedModel",
    "Parity",
    "TemplateError",
    "TensorSpec",
    "describe",
    "export_onnx",
    "open_session",
    "predict",
    "verify_parity",
]
