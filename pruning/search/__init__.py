"""Looking for plans: the protocol that search methods speak, what they share, and the methods themselves."""

from __future__ import annotations

from secateur.device_profiles.shelf import Shelf

METHODS = Shelf("secateur.pruning.search.methods", "search method", ("Options", "search"), "secateur.methods")
"""Every search method, named as its module, which has ``Options`` and ``search(problem, options)``."""
