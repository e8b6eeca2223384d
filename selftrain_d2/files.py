"""JSON files that are never seen half-written, and work that is not mixed up with other work."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from selftrain_d2.errors import InputError


def read_json(file: str | os.PathLike) -> Any:
    """The content of a JSON file.

    Raises:
        InputError: it is not JSON.
    """
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not valid JSON: {error}.") from error


def write_json(file: str | os.PathLike, content: Any) -> None:
    """Write a JSON file whole: beside, then renamed."""
    write_text(file, json.dumps(content, indent=2) + "\n")


def write_text(file: str | os.PathLike, content: str) -> None:
    """Write a text file whole: beside, then renamed."""
    file = Path(file)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(content, encoding="utf-8")
    os.replace(temporary, file)


def check_unchanged(folder: str | os.PathLike, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise InputError if work in a folder was begun with other settings than those of now.

    Args:
        before: what was written down when the work began; it may have more keys.
        now: the settings that the result depends on.
    """
    for key, value in now.items():
        if before.get(key) != value:
            raise InputError(
                f"{folder} was begun with another {key}: {_short(before.get(key))} there, {_short(value)} now; "
                "choose another output folder, or delete this one to start anew."
            )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 100 else text[:97] + "..."
