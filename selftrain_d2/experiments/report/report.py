"""The report of one or more grids: one HTML page, the same in Markdown, figures, and a small file of metrics."""

from __future__ import annotations

import base64
import html
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from selftrain_d2.engine.intervals import Interval, PairedTest
from selftrain_d2.experiments.grid.cell_record import FAILED
from selftrain_d2.experiments.report.contrasts import Answer, answer, contrasts_of
from selftrain_d2.experiments.report.figure_spec import Figure, figures_of
from selftrain_d2.experiments.report.figures import draw_figure
from selftrain_d2.experiments.report.paper_tables import PAPER_TABLES
from selftrain_d2.experiments.report.results import Experiment, to_json
from selftrain_d2.experiments.report.series import Comparison, Line, Point, comparisons_of, lines_of
from selftrain_d2.files import write_json, write_text

PAGE, MARKDOWN, METRICS, FIGURES = "report.html", "report.md", "metrics.json", "figures"
NO_VALUE, CROSS, PLUS_MINUS, MINUS = "", "\u00d7", "\u00b1", "\u2212"
_MAX_ERROR = 300  # characters of a failed cell's last line

# The parts of a page, which each format writes in its own way.


@dataclass(frozen=True)
class Heading:
    """A heading of level 1 to 3."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; the first column names the row."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    #: Numbers stand right, text left.
    is_text: bool = False


@dataclass(frozen=True)
class Picture:
    """A figure, as SVG for the page and as PNG for Markdown."""

    svg: Path
    png: Path
    text: str


@dataclass(frozen=True)
class Details:
    """Text of many lines that is folded away."""

    summary: str
    text: str


def write_report(experiments: Sequence[Experiment], output: Path) -> Path:
    """Write ``report.html`` (self-contained), ``report.md``, ``figures/*.png``, ``figures/*.svg``, ``metrics.json``.

    The same experiments give the same bytes.

    Args:
        experiments: one a section.
        output: folder to write to.

    Returns:
        The HTML page.

    Raises:
        InputError: a grid's report section has a fault. Nothing is written then.
    """
    planned = [_plan(experiment) for experiment in experiments]
    answers = [[answer(contrast, e) for contrast in contrasts_of(e.grid)] for e in experiments]
    parts = []
    for number, experiment in enumerate(experiments):
        folder = output / FIGURES / (str(number + 1) if len(experiments) > 1 else "")
        parts += _section(experiment, answers[number], planned[number], folder)
    write_json(output / METRICS, [to_json(experiment) for experiment in experiments])
    write_text(output / MARKDOWN, to_markdown(parts, output))
    title = experiments[0].grid.title if len(experiments) == 1 else "Experiments"
    write_text(output / PAGE, to_html(parts, title))
    return output / PAGE


_Planned = tuple[Figure, list[Line], list[Comparison]]


def _plan(experiment: Experiment) -> list[_Planned]:
    planned = []
    for figure in figures_of(experiment.grid):
        lines = lines_of(figure, experiment)
        planned.append((figure, lines, comparisons_of(figure, lines)))
    return planned


def _section(
    experiment: Experiment, answers: Sequence[Answer], figures: Sequence[_Planned], folder: Path
) -> list[object]:
    parts: list[object] = [Heading(experiment.grid.title, 1), Paragraph(_facts(experiment))]
    if answers:
        parts += [Heading("Questions"), answer_table(answers)]
    for figure, lines, comparisons in figures:
        files = draw_figure(figure, lines, folder)
        parts += [
            Heading(figure.title),
            Picture(files["svg"], files["png"], figure.title),
            value_table(figure, lines),
        ]
        if comparisons:
            parts.append(difference_table(figure, comparisons))
        for name in figure.paper:
            paper = PAPER_TABLES[name]
            parts.append(
                Table(
                    ["", *paper.columns], paper.text_rows(), f"The paper (arXiv:2006.06882v2), {paper.title}."
                )
            )
    failed = [cell for cell in experiment.cells if cell.status == FAILED]
    if failed:
        rows = [[cell.id, (cell.error or "no output")[:_MAX_ERROR]] for cell in failed]
        parts += [Heading("Failed cells"), Table(["cell", "last line of its log"], rows, is_text=True)]
    parts.append(Details("The grid", yaml.safe_dump(dict(experiment.grid.source), sort_keys=False)))
    return parts


def _facts(experiment: Experiment) -> str:
    counts = Counter(cell.status for cell in experiment.cells)
    text = f"{len(experiment.cells)} cells: " + ", ".join(
        f"{number} {status}" for status, number in counts.items()
    )
    hours = sum(cell.seconds or 0.0 for cell in experiment.cells) / 3600
    text += f"; {hours:.1f} hours of running."
    revisions = dict.fromkeys(
        f"{cell.git_revision[:10]}{' with changes' if cell.git_dirty else ''}"
        for cell in experiment.cells
        if cell.git_revision
    )
    return text + (f" Code: {', '.join(revisions)}." if revisions else "")


def value_table(figure: Figure, lines: Sequence[Line]) -> Table:
    """Means with intervals: lines down, the x axis across."""
    xs = list(dict.fromkeys(x for line in lines for x in line.points))
    rows = [
        [line.label, *(_point_text(line.points[x]) if x in line.points else NO_VALUE for x in xs)]
        for line in lines
    ]
    numbers = {len(point.values) for line in lines for point in line.points.values()}
    runs = f"{min(numbers)} to {max(numbers)}" if len(numbers) > 1 else f"{max(numbers)}"
    return Table(
        [figure.label(figure.x), *map(figure.label, xs)],
        rows,
        f"{figure.label(figure.metric)}: mean {PLUS_MINUS} half of the 95 % interval (Student's t) over {runs} runs. "
        f"{CROSS}: runs that failed or have no finite value, which the mean leaves out.",
    )


def difference_table(figure: Figure, comparisons: Sequence[Comparison]) -> Table:
    """Differences to baselines, with intervals and p values."""
    xs = list(dict.fromkeys(x for comparison in comparisons for x in comparison.tests))
    header = [figure.label(figure.x), *map(figure.label, xs)]
    rows = []
    for comparison in comparisons:
        row = [f"{comparison.line.label} {MINUS} {comparison.baseline.label}"]
        rows.append(row + [_test_text(comparison.tests.get(x)) for x in xs])
    if any(comparison.overall for comparison in comparisons):
        header.append("mean over the row")
        for row, comparison in zip(rows, comparisons):
            partly = len(comparison.together) < len(comparison.tests)
            where = f" (at {', '.join(map(figure.label, comparison.together))})" if partly else ""
            row.append(_test_text(comparison.overall) + (where if comparison.overall else ""))
    return Table(
        header,
        rows,
        f"Differences in {figure.label(figure.metric)} between runs that share all else "
        f"({', '.join(figure.repeats) or 'single runs'}): mean {PLUS_MINUS} half of the 95 % interval, and p of the "
        "two-sided paired t test, not corrected for the number of tests.",
    )


def answer_table(answers: Sequence[Answer]) -> Table:
    """Contrasts with intervals and p values."""
    rows = []
    for found in answers:
        runs = f"{found.runs}" if found.runs == found.planned else f"{found.runs} of {found.planned}"
        metric = found.contrast.metric.rpartition("/")[2]
        rows.append([found.contrast.name, found.contrast.title, metric, _test_text(found.test), runs])
    return Table(
        ["", "if above 0", "metric", "difference", "runs"],
        rows,
        f"Differences of runs that share a seed: mean {PLUS_MINUS} half of the 95 % interval (Student's t), and p of "
        "the two-sided paired t test, not corrected for the number of tests.",
        is_text=True,
    )


def _point_text(point: Point) -> str:
    notes = [f"{CROSS} {point.failed}"] if point.failed else []
    notes += [f"{point.missing} to come"] if point.missing else []
    text = _interval_text(point.interval) if point.interval else ""
    return text + (f" ({', '.join(notes)})" if text and notes else ", ".join(notes))


def _interval_text(interval: Interval, sign: str = "") -> str:
    text = f"{interval.mean:{sign}.1f}".replace("-", MINUS)
    return text if interval.half_width is None else f"{text} {PLUS_MINUS} {interval.half_width:.1f}"


def _test_text(test: PairedTest | None) -> str:
    if test is None:
        return NO_VALUE
    text = _interval_text(test.difference, "+")
    if test.p is None:
        return text
    return f"{text}, p < 0.001" if test.p < 0.001 else f"{text}, p = {test.p:.{2 if test.p >= 0.1 else 3}f}"


# ---- formats ----------------------------------------------------------------------------------------


def to_markdown(parts: Sequence[object], folder: Path) -> str:
    """A page in Markdown; pictures are linked relative to ``folder``."""
    lines: list[str] = []
    for part in parts:
        if isinstance(part, Heading):
            lines.append(f"{'#' * part.level} {part.text}")
        elif isinstance(part, Paragraph):
            lines.append(part.text)
        elif isinstance(part, Table):
            rows = [
                part.header,
                ["---"] + ["---" if part.is_text else "---:"] * (len(part.header) - 1),
                *part.rows,
            ]
            lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
            lines += ["", part.caption] if part.caption else []
        elif isinstance(part, Picture):
            lines.append(f"![{part.text}]({part.png.relative_to(folder).as_posix()})")
        elif isinstance(part, Details):
            lines += [f"{part.summary}:", "", "```yaml", part.text.rstrip(), "```"]
        lines.append("")
    return "\n".join(lines)


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1.5rem 0; font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; text-align: left; color: #555; font-size: 0.85rem; padding-top: 0.4rem; }
th, td { padding: 0.25rem 0.8rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child, .text th, .text td { text-align: left; }
thead th { border-bottom: 2px solid #222; }
img { max-width: 100%; } pre { background: #f5f5f5; padding: 1rem; overflow-x: auto; font-size: 0.8rem; }
.wide { overflow-x: auto; }
"""


def to_html(parts: Sequence[object], title: str) -> str:
    """A page in HTML that needs no other file and no network."""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n<title>{html.escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(map(_html_part, parts))
        + "\n</body>\n</html>\n"
    )


def _html_part(part: object) -> str:
    if isinstance(part, Heading):
        return f"<h{part.level}>{html.escape(part.text)}</h{part.level}>"
    if isinstance(part, Paragraph):
        return f"<p>{html.escape(part.text)}</p>"
    if isinstance(part, Table):
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in part.header)
        body = "\n".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in part.rows
        )
        caption = f"<caption>{html.escape(part.caption)}</caption>" if part.caption else ""
        kind = ' class="text"' if part.is_text else ""
        table = f"<table{kind}>{caption}\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"
        return f'<div class="wide">{table}</div>'
    if isinstance(part, Picture):
        data = base64.b64encode(part.svg.read_bytes()).decode()
        return f'<p><img alt="{html.escape(part.text)}" src="data:image/svg+xml;base64,{data}"></p>'
    if isinstance(part, Details):
        return f"<details><summary>{html.escape(part.summary)}</summary><pre>{html.escape(part.text)}</pre></details>"
    raise TypeError(f"A page has no part {type(part).__name__}.")
