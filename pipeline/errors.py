"""The one exception that stands for a mistake of the user's."""


class UserError(ValueError):
    """Bad input: a command prints it as one line and exits with 2, without a traceback."""
