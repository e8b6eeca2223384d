"""Frames of a video file, and a video with what was found drawn in each; by OpenCV."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np

from selftrain_d2.errors import InputError

EXTENSIONS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")


class Video:
    """A video file.

    Attributes:
        number: of frames as the file states it, 0 where it does not; for progress alone.
        rate: frames a second.

    Raises:
        InputError: it cannot be opened, or has no frame.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        if not os.path.isfile(self.path):
            raise InputError(f"Video {self.path} does not exist.")
        with self._opened() as capture:
            if not capture.isOpened() or not capture.grab():
                raise InputError(
                    f"Video {self.path} cannot be read: OpenCV ({cv2.__version__}) opens no frame of it; convert it to "
                    "H.264 in .mp4."
                )
            self.number = max(int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), 0)
            self.rate = capture.get(cv2.CAP_PROP_FPS) or 25.0

    def frames(self) -> Iterator[np.ndarray]:
        """(H, W, 3) uint8 RGB, one at a time."""
        with self._opened() as capture:
            while (frame := capture.read()[1]) is not None:
                yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[cv2.VideoCapture]:
        capture = cv2.VideoCapture(self.path)
        try:
            yield capture
        finally:
            capture.release()


@contextlib.contextmanager
def written_video(path: str | os.PathLike, rate: float) -> Iterator:
    """A function that takes the frames, (H, W, 3) uint8 RGB of one size; the file (.mp4) is there when it ends.

    Raises:
        InputError: the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")  # OpenCV goes by the ending
    writer = None

    def add(frame: np.ndarray) -> None:
        nonlocal writer
        if writer is None:
            writer = cv2.VideoWriter(
                str(temporary), cv2.VideoWriter_fourcc(*"mp4v"), rate, frame.shape[1::-1]
            )
            if not writer.isOpened():
                raise InputError(f"Video {path} cannot be written: this OpenCV has no encoder for MPEG-4.")
        writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))

    try:
        yield add
        if writer is not None:
            writer.release()
            os.replace(temporary, path)
    finally:
        if writer is not None:
            writer.release()
        temporary.unlink(missing_ok=True)
