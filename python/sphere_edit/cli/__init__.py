"""The command ``sphere-edit``."""
