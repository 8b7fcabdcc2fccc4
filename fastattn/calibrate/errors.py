"""What the command reports without a traceback."""


class CalibrationError(ValueError):
    """A file is not what the command expects, or nothing keeps the bound."""
