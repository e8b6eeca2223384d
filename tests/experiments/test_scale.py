import re
from pathlib import Path

import pytest

from selftrain_d2.data.pseudo_labels.writer import SHARD_SIZE
from selftrain_d2.experiments.scale import RATES, Rate, Scale, figures, rates_table, scale_table

DOC = Path(__file__).parents[2] / "docs" / "scale.md"


def _value(what, scale, **changed):
    rates = {**RATES, **{name: Rate(value, "", "") for name, value in changed.items()}}
    return next(figure.value for figure in figures(scale, rates) if figure.what.startswith(what))


def test_figures_by_hand():
    """2,560,000 images on 4 GPUs, 2 a node, at 10 TFLOP/s and 100 GFLOPs an image: 100 images a second and GPU."""
    scale = Scale(256 * 10_000, 4, 2)
    gpu = {"gpu_tflops": 10, "gflops": 100}
    assert _value("the teacher", scale, **gpu) == "1.8 hours"  # 6,400 s
    assert _value("images a second", scale, **gpu) == "100; 400"
    assert _value("bytes read", scale, image_bytes=1e6, **gpu) == "2.6 TB; 200 MB"  # of 2 nodes
    assert _value("requests under way", scale, request_seconds=0.1, **gpu) == "40"
    assert _value("cores that decode", scale, decode=50, **gpu) == "2.0"
    assert _value("shards", scale, record_bytes=200) == "10,000, 512 MB"
    assert _value("names in memory", scale, name_bytes=1000) == "2.6 GB; 5.1 GB"
    assert _value("labels in memory", scale, label_bytes=100) == "256 MB; 512 MB"
    assert _value("one pass", scale, **gpu) == "10.7 hours"  # 6 x 6,400 s
    assert _value("redone", scale, **gpu) == f"{SHARD_SIZE / 100:.1f} s"
    assert _value("`self-train` asks", scale, request_seconds=0.1, requests=10) == "7.1 hours"


def test_figures_grow_with_images_and_shrink_with_gpus():
    hours = [float(_value("the teacher", Scale(n, g)).split()[0]) for n, g in ((10**9, 64), (10**9, 32))]
    assert hours[1] == pytest.approx(2 * hours[0], rel=0.01)
    assert _value("hash", Scale(10**9)) != _value("hash", Scale(10**8))


def test_every_rate_is_used_and_its_source_told():
    used = {name for figure in figures(Scale(), RATES) for name in figure.rates}
    assert used == set(RATES)
    for line in scale_table(Scale()).splitlines()[2:]:
        for name in used:
            if re.search(rf"\b{name}\b", line.split("|")[4]):
                assert (f"{name} (assumed)" in line) == (RATES[name].source == "assumed")


def test_the_page_has_these_tables():
    page = DOC.read_text(encoding="utf-8")
    assert scale_table(Scale()) in page and rates_table() in page
