"""The one exception, and the one warning, that mean: the input, not the program, is at fault."""


class KVzipError(ValueError):
    """Bad input. The message names the cause, the value seen and the remedy."""


class KVzipWarning(UserWarning):
    """Input that works, but hardly as it was meant."""
