"""Formats of the files that runtimes load: one module each, named as the ``FORMAT`` of a runtime says.

A module has ``SUFFIX`` and ``write(source, to)``, which makes a file of it from a checked ONNX file; where it can tell
that a file is damaged, ``verify(file)`` raises ``ExportError``.
"""

from secateur.device_profiles.shelf import Shelf

FORMATS = Shelf(__name__, "format", ("SUFFIX", "write"), "secateur.formats")
"""The formats, named as their modules."""
