"""The kinds of target: one module each, see ``device_profiles.target``."""
