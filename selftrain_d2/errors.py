"""The one exception for a user's mistake."""


class InputError(ValueError):
    """Input that the user can correct: a missing file, a wrong class list, an unknown policy name.

    The message is one sentence that says what is wrong, where (file, image id, key), and what to do.
    The command line prints it on standard error and exits with status 2.
    """
