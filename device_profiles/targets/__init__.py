"""The kinds of target: one module each, see ``secateur.device_profiles.target``."""
