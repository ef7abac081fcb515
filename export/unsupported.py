"""What an export says of a model that it cannot take."""


class UnsupportedModel(ValueError):
    """A model that cannot be exported, and why."""
