"""Which human boxes a detector can be taught, in numbers and in words.

Letters in shapes: C classes, S image sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

#: A class of which a larger share is out of reach is warned of.
MOST_MISSED = 0.2
_NAMES = 3  # classes named before "and N more"


@dataclass(frozen=True)
class BoxReach:
    """How many boxes of each class nothing of the detector reaches.

    Attributes:
        boxes: (C,) int.
        missed: (C,) share of them that is out of reach at ``image_size``; NaN for a class without boxes.
        image_size: INPUT.AUGMENTATION.IMAGE_SIZE.
        rule: what those boxes are without.
        advice: what would do, where a class is warned of.
        image_sizes: (S,), others to compare with, and ``missed_by_size`` (S, C) there, of a sample of the boxes.
    """

    class_names: list[str]
    boxes: np.ndarray
    missed: np.ndarray
    image_size: int
    rule: str
    advice: str = ""
    image_sizes: tuple[int, ...] = ()
    missed_by_size: np.ndarray | None = None

    @property
    def worst(self) -> list[int]:
        """Ids of the classes that have boxes, those with the largest share out of reach first."""
        order = np.argsort(-np.nan_to_num(self.missed, nan=-1.0), kind="stable")
        return [int(i) for i in order if self.boxes[i]]

    @property
    def warned(self) -> list[int]:
        """Ids of the classes that are warned of, the worst first."""
        return [i for i in self.worst if self.missed[i] > MOST_MISSED]

    def line(self) -> str:
        """One line on all boxes and the worst classes."""
        total = int(self.boxes.sum())
        share = np.nansum(self.boxes * self.missed) / max(total, 1)
        return (
            f"{share:.1%} of {total:,} human boxes are without {self.rule} at IMAGE_SIZE {self.image_size}: "
            f"{self._named(self.worst)}."
        )

    def warning(self) -> str:
        """What is lost and what would do; empty where all is well."""
        if not self.warned:
            return ""
        return (
            f"Out of the detector's reach, so hardly learned: {self._named(self.warned)} are without {self.rule} at "
            f"INPUT.AUGMENTATION.IMAGE_SIZE {self.image_size}; {self.advice}."
        )

    def numbers(self) -> dict[str, Any]:
        """For JSON. Shares are in [0, 1]; None for a class without boxes."""
        return {
            "image_size": self.image_size,
            "rule": self.rule,
            "classes": [
                {"name": name, "boxes": int(boxes), "out_of_reach": _plain(missed)}
                for name, boxes, missed in zip(self.class_names, self.boxes, self.missed)
            ],
            "out_of_reach_by_image_size": {
                str(size): dict(zip(self.class_names, map(_plain, row)))
                for size, row in zip(
                    self.image_sizes, () if self.missed_by_size is None else self.missed_by_size
                )
            },
        }

    def _named(self, classes: list[int]) -> str:
        shown = [f"{self.class_names[i]} {self.missed[i]:.1%} of {self.boxes[i]:,}" for i in classes[:_NAMES]]
        more = f" and {len(classes) - _NAMES} more" if len(classes) > _NAMES else ""
        return ", ".join(shown) + more


def _plain(share: float) -> float | None:
    return None if np.isnan(share) else round(float(share), 4)
