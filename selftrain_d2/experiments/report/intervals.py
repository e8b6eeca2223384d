"""The intervals of :mod:`selftrain_d2.engine.intervals`, by the name that reports knew them by."""

from __future__ import annotations

from selftrain_d2.engine.intervals import CONFIDENCE, Interval, PairedTest, mean_interval, paired_test

__all__ = ["CONFIDENCE", "Interval", "PairedTest", "mean_interval", "paired_test"]
