"""The runtimes a network can run with on a device: one module each, see ``secateur.device_profiles.runtime``."""
