"""Words of a grid's commands, and the names in braces that stand for other words."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from selftrain_d2.errors import InputError

#: Names that no axis, constant or step may have: they stand for the grid's folder, a cell's output folder, and a
#: cell's step.
DIR, OUTPUT, STEP = "DIR", "output", "step"

_PLACE = re.compile(r"\{(\w+)\}")
_NAME = re.compile(r"\w+")


class Names:
    """What names in braces stand for: the words of each, and its text inside a longer word."""

    def __init__(self, where: str):
        self.where = where
        self.words: dict[str, list[str]] = {}
        self.text: dict[str, str | None] = {}
        self.taken = {DIR, OUTPUT, STEP}

    def reserve(self, name: Any) -> None:
        if not _NAME.fullmatch(str(name)):
            raise InputError(f"{self.where}: the name {name!r} may have letters, digits and _ only.")
        if str(name) in self.taken:
            raise InputError(f"{self.where}: the name {name!r} is used twice, or reserved: choose another.")
        self.taken.add(str(name))

    def add(self, name: Any, words: list[str], text: str | None) -> None:
        self.reserve(name)
        self.words[str(name)], self.text[str(name)] = words, text

    def with_values(self, values: Mapping[str, tuple[list[str], str]]) -> Names:
        """These names and more."""
        names = Names(self.where)
        names.words = {**self.words, **{name: words for name, (words, _) in values.items()}}
        names.text = {**self.text, **{name: text for name, (_, text) in values.items()}}
        return names

    def fill(self, words: Sequence[str], where: str) -> list[str]:
        """Words with every name in braces replaced."""
        filled: list[str] = []
        for word in words:
            alone = _PLACE.fullmatch(word)
            if alone:
                check_known(alone[1], self.words, "name", f"{where}: {word}")
                filled += self.words[alone[1]]
            else:
                filled.append(_PLACE.sub(lambda place, word=word: self._inside(place[1], word, where), word))
        return filled

    def _inside(self, name: str, word: str, where: str) -> str:
        check_known(name, self.text, "name", f"{where}: {word}")
        text = self.text[name]
        if text is None:
            raise InputError(
                f"{where}: {{{name}}} stands for several words, so it cannot be inside {word!r}."
            )
        return text


def words_of(value: Any, where: str) -> list[str]:
    """A list of words, from a list or from a line as a shell reads it."""
    if isinstance(value, str):
        try:
            return shlex.split(value)
        except ValueError as error:
            raise InputError(f"{where}: {error} in {value!r}.") from error
    if isinstance(value, list):
        return [scalar_text(word, where) for word in value]
    raise InputError(f"{where} must be a line of words or a list of words.")


def scalar_text(value: Any, where: str) -> str:
    if not isinstance(value, (str, int, float)):  # bool is an int
        raise InputError(f"{where}: {value!r} is not a word or a number.")
    return str(value)


def check_mapping(value: Any, where: str) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"{where} must be a mapping (name: value).")
    return value


def check_keys(mapping: Mapping[Any, Any], known: Sequence[str], where: str) -> None:
    for key in mapping:
        check_known(key, known, "key", where)


def check_known(name: Any, known: Iterable[Any], kind: str, where: str) -> None:
    known = list(known)
    if name not in known:
        raise InputError(
            f"{where}: there is no {kind} {name!r}; known: {', '.join(map(str, known)) or 'none'}."
        )
