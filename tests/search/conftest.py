"""Property tests share the machine with other work: no deadline per example, and half of the usual number."""

from hypothesis import settings

settings.register_profile("secateur", deadline=None, max_examples=50)
settings.load_profile("secateur")
