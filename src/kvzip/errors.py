"""The one exception that means: the input, not the program, is at fault."""


class KVzipError(ValueError):
    """Bad input. The message names the cause, the value seen and the remedy."""
