"""The one error that a person can mend."""


class CaftuneError(ValueError):
    """A value, file, model or server that cannot be used. The message names the place, the value and the remedy.

    The command line shows it as one sentence. Every other exception is a fault of the program or of a library, and keeps its
    traceback.
    """
