"""Looking for plans: the protocol that search methods speak, what they share, and the methods themselves."""

from __future__ import annotations

from device_profiles.shelf import Shelf

METHODS = Shelf("pruning.search.methods", "search method", ("Options", "search"), "secateur.methods")
"""Every search method, named as its module, which has ``Options`` and ``search(problem, options)``."""
