"""Which weights of a run's folder are used: those that its config says, as in the loop."""

import pytest

from selftrain_d2.deployment.run import run_config
from selftrain_d2.errors import InputError

FILES = ("model_final.pth", "weight_average/model_final.pth", "best/model_best.pth")


@pytest.mark.parametrize(
    ("options", "file"),
    [
        ([], FILES[0]),
        (["SELFTRAIN.WEIGHT_EMA_DECAY", 0.99], FILES[1]),
        (["SELFTRAIN.WEIGHT_EMA_DECAY", 0.99, "SELFTRAIN.TEACHER_CHECKPOINT", "best"], FILES[2]),
    ],
)
def test_weights_of_a_run(small_config, tmp_path, options, file):
    small_config.merge_from_list(options)
    (tmp_path / "config.yaml").write_text(small_config.dump())
    for name in FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    weights = run_config(tmp_path).MODEL.WEIGHTS
    assert weights == str(tmp_path / file)
    (tmp_path / file).unlink()  # the others are no substitute
    with pytest.raises(InputError, match=rf"has no {file}, .*: let its training end first\.$"):
        run_config(tmp_path)


def test_no_run(tmp_path):
    with pytest.raises(InputError, match=r"is no folder of a run: it has no config\.yaml"):
        run_config(tmp_path)
