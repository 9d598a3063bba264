"""The errors of this package."""

from __future__ import annotations


class ExportError(RuntimeError):
    """A model cannot be exported, or an exported file is not what it should be."""


class TemplateError(ExportError):
    """A template cannot be cut to a plan; export the pruned model itself instead."""
