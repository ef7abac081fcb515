"""The errors of fastgen that are no plain ValueError of a keyword."""


class ModelError(ValueError):
    """A model directory that cannot be used: what was found and what was expected."""


class UnsupportedModel(ValueError):
    """A model that cannot be exported, and why."""
