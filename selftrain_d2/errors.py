"""The one exception for a user's mistake."""

from __future__ import annotations

import re


class InputError(ValueError):
    """Input that the user can correct: a missing file, a wrong class list, an unknown policy name.

    The message is one sentence that says what is wrong, where (file, image id, key), and what to do.
    The command line prints it on standard error and exits with status 2.
    """


def message_in(traceback: str, kind: type[Exception]) -> str | None:
    """The message of the last exception of a kind in a traceback's text, which is its cause; None without one.

    Worker processes, of loaders and of training, hand on their exceptions as text.
    """
    found = re.findall(rf"^{kind.__module__}\.{kind.__name__}: (.*)", traceback, re.MULTILINE)
    return found[-1] if found else None
