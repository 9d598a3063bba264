"""Prune a PyTorch vision model until it fits a device, with measured latency and proof."""
