"""Where log lines go: progress to the console, everything to a run's log file."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator

from selftrain_d2.files import writing


class _LogFile(logging.FileHandler):
    """Lines that a full disk does not take are left out, without a traceback for each; the console shows them."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what is left in its buffer
            super().close()


_LOGGERS = ("selftrain_d2", "detectron2", "fvcore")


def log_to_console() -> None:
    """Show this package's log, detectron2's training progress, and all warnings on standard output.

    detectron2's own set-up also prints environment, config and model; here those go to the log file.
    """
    # Comes from detectron2's anchors; a user can do nothing about it.
    warnings.filterwarnings("ignore", message="torch.meshgrid")
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s", "%H:%M:%S"))
    handler.addFilter(_is_progress)
    if int(os.environ.get("RANK", 0)):  # torchrun's other processes: their log files have the rest
        handler.setLevel(logging.ERROR)
    for logger in _configured():
        logger.handlers = [h for h in logger.handlers if isinstance(h, logging.FileHandler)]
        logger.addHandler(handler)


@contextlib.contextmanager
def log_to_file(path: str | os.PathLike) -> Iterator[None]:
    """Append every log line to a file, as long as the context lasts.

    Raises:
        InputError: the file cannot be written.
    """
    with writing(path):
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("[%(asctime)s] %(name)s %(levelname)s: %(message)s"))
    for logger in _configured():
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in _configured():
            logger.removeHandler(handler)
        handler.close()


def duration(seconds: float | None) -> str:
    """A time in words."""
    if seconds is None:
        return "an unknown time"
    return f"about {seconds / 3600:.1f} h" if seconds >= 3600 else f"about {seconds / 60:.0f} min"


def _configured() -> list[logging.Logger]:
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    for logger in loggers:
        logger.setLevel(logging.INFO)
        logger.propagate = False
    return loggers


def _is_progress(record: logging.LogRecord) -> bool:
    if record.name == "detectron2.engine.train_loop" and record.exc_info:
        return False  # the exception itself comes as well, a user's mistake as one sentence
    ours = record.name.startswith("selftrain_d2") or record.name == "detectron2.utils.events"
    return ours or record.levelno >= logging.WARNING
