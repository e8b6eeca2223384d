"""KEY VALUE pairs of the command line."""

import pytest

from selftrain_d2.cli.common import merge_options
from selftrain_d2.errors import InputError


@pytest.mark.parametrize(
    ("text", "value"), [("1", 1.0), ("+2", 2.0), ("0.25", 0.25), ("1e-3", 0.001), ("-3", -3.0)]
)
def test_whole_numbers_fit_keys_with_a_fraction(small_config, text, value):
    merge_options(small_config, ["SELFTRAIN.ALPHA", text])
    alpha = small_config.SELFTRAIN.ALPHA
    assert isinstance(alpha, float) and alpha == value


def test_other_types_stay_strict(small_config):
    merge_options(small_config, ["SOLVER.MAX_ITER", "7", "MODEL.WEIGHTS", "7.pth"])
    assert small_config.SOLVER.MAX_ITER == 7 and small_config.MODEL.WEIGHTS == "7.pth"
    for key, text in (("SOLVER.MAX_ITER", "7.5"), ("SELFTRAIN.ALPHA", "much"), ("SELFTRAIN.ALPHA.MORE", "1")):
        with pytest.raises(InputError, match=key):
            merge_options(small_config, [key, text])
