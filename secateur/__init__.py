"""Prune a PyTorch vision model until it fits a device, with measured latency and proof."""

__version__ = "0.2.0"
