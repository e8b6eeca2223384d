"""The paper's own results, to put beside those of a grid (Zoph et al., arXiv:2006.06882v2).

AP on COCO val. Each row may name the row it is compared with: reports show the difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class PaperTable:
    """One table of the paper, or a part of it."""

    #: What it shows, with its number.
    title: str
    columns: tuple[str, ...]
    #: Values by row; None where the paper has none.
    rows: Mapping[str, tuple[float | None, ...]]
    #: Row -> the row it is compared with.
    baselines: Mapping[str, str] = field(default_factory=dict)

    def text_rows(self) -> list[list[str]]:
        """The rows as text, with differences to their baselines: "40.9 (+1.7)"."""
        rows = []
        for name, values in self.rows.items():
            base = self.rows[self.baselines[name]] if name in self.baselines else (None,) * len(values)
            rows.append([name, *(_text(value, other) for value, other in zip(values, base))])
        return rows


def _text(value: float | None, base: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.1f}" + ("" if base is None else f" ({value - base:+.1f})")


_POLICIES = ("S1", "S2", "S3", "S4")

#: By the name that a grid's report section uses.
PAPER_TABLES = {
    "table_2": PaperTable(
        "Table 2: EfficientNet-B7, all of COCO",
        _POLICIES,
        {
            "Rand": (39.2, 41.5, 43.9, 44.3),
            "ImageNet": (39.5, 40.7, 43.2, 43.3),
            "Rand + self-training (ImageNet images)": (40.9, 43.0, 45.4, 45.6),
            "Rand + self-training (OpenImages)": (41.2, 43.6, 45.5, 46.0),
        },
        {
            "ImageNet": "Rand",
            "Rand + self-training (ImageNet images)": "Rand",
            "Rand + self-training (OpenImages)": "Rand",
        },
    ),
    "table_3": PaperTable(
        "Table 3: EfficientNet-B7, S4, a part of COCO's labels",
        ("20 %", "50 %", "100 %"),
        {
            "Rand": (30.7, 39.6, 44.3),
            "Rand + self-training": (34.1, 41.4, 45.6),
            "ImageNet": (33.3, 38.8, 43.3),
            "ImageNet + self-training": (36.0, 40.5, 44.6),
            "ImageNet++": (35.9, 39.9, 43.8),
            "ImageNet++ + self-training": (37.2, 41.5, 44.6),
        },
        {
            "Rand + self-training": "Rand",
            "ImageNet + self-training": "ImageNet",
            "ImageNet++ + self-training": "ImageNet++",
        },
    ),
    "table_4": PaperTable(
        "Table 4: ResNet-50, S4, all of COCO",
        ("AP",),
        {"Rand": (41.1,), "ImageNet": (40.4,), "SimCLR": (40.4,), "Rand + self-training": (41.9,)},
        {"ImageNet": "Rand", "SimCLR": "Rand", "Rand + self-training": "Rand"},
    ),
    "table_7": PaperTable(
        "Table 7: joint training with ImageNet classification, EfficientNet-B7, S4, 20 % of COCO's labels",
        ("supervised", "self-training", "joint training", "both"),
        {"Rand": (30.7, 34.1, 33.6, 35.1), "ImageNet": (33.3, 36.0, 34.0, 36.6)},
    ),
    "table_9": PaperTable(
        "Table 9: the best alpha, ResNet-101",
        ("S1", "S2", "S3"),
        {"90,000 steps": (3.0, 2.0, 0.5), "180,000 steps": (4.0, 3.0, 1.0)},
    ),
    "table_10": PaperTable(
        "Table 10: what the student starts from, EfficientNet-B7",
        _POLICIES,
        {"random weights": (41.0, 42.7, 45.0, 45.2), "the teacher": (40.9, 43.0, 45.4, 45.6)},
        {"the teacher": "random weights"},
    ),
    "table_12": PaperTable(
        "Table 12: ResNet-101, all of COCO",
        _POLICIES,
        {
            "supervised": (37.0, 39.5, 41.9, 42.6),
            "self-training (ImageNet images)": (39.0, 41.3, 42.8, 43.6),
            "self-training (OpenImages)": (39.5, 41.9, 43.4, 43.9),
        },
        {
            "self-training (ImageNet images)": "supervised",
            "self-training (OpenImages)": "supervised",
        },
    ),
    "figure_2": PaperTable(
        "Appendix B: normalized minus plain loss, ResNet-101; several plain runs with larger alpha became NaN, no "
        "normalized one",
        ("mean of all settings", "S4"),
        {"AP of normalized - AP of plain": (0.4, 1.3)},
    ),
}
