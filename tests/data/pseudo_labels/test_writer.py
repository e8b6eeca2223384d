import json

import pytest
from numbered_images import IDENTITY, NAMES, numbered_row, write_numbered

from selftrain_d2 import InputError, load_pseudo_labels
from selftrain_d2.data.pseudo_labels import writer as pseudo_label_writer
from selftrain_d2.data.pseudo_labels.manifest import read_manifest
from selftrain_d2.data.pseudo_labels.writer import PseudoLabelWriter


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(pseudo_label_writer, "SHARD_SIZE", 4)


def test_stopped_writing_goes_on_at_the_missing_shards(tmp_path):
    write_numbered(tmp_path / "undisturbed").finish()
    write_numbered(tmp_path / "stopped", shards=[0, 2])
    with pytest.raises(InputError, match="not finished"):
        load_pseudo_labels(tmp_path / "stopped")
    with PseudoLabelWriter(tmp_path / "stopped", IDENTITY, NAMES) as writer:
        assert writer.missing_shards() == [1] and not writer.finished
    write_numbered(tmp_path / "stopped").finish()
    assert load_pseudo_labels(tmp_path / "stopped", 0.05) == load_pseudo_labels(
        tmp_path / "undisturbed", 0.05
    )


def test_rows_of_another_shard_are_refused(tmp_path):
    writer = PseudoLabelWriter(tmp_path, IDENTITY, NAMES)
    with pytest.raises(ValueError, match="shard 1"):
        writer.write_shard(1, [numbered_row(NAMES[i]) for i in writer.shard_range(0)])
    assert writer.missing_shards() == [0, 1, 2]


def test_other_teacher_or_images_are_refused(tmp_path):
    write_numbered(tmp_path).finish()
    # Both hashes, whole.
    with pytest.raises(InputError, match=r"another teacher_weights_sha256: a{64} there, b{64} now"):
        PseudoLabelWriter(tmp_path, {**IDENTITY, "teacher_weights_sha256": "b" * 64}, NAMES)
    with pytest.raises(InputError, match="another listed: 10 there, 9 now"):
        PseudoLabelWriter(tmp_path, IDENTITY, NAMES[:-1])
    with pytest.raises(InputError, match=r"another file_list_sha256: [0-9a-f]{64} there, [0-9a-f]{64} now"):
        PseudoLabelWriter(tmp_path, IDENTITY, NAMES[::-1])
    PseudoLabelWriter(tmp_path, IDENTITY, NAMES)  # a refused writer does not hold the folder


def test_images_may_be_moved(tmp_path):
    """Another root is another set of images of the same names, unless the root of before is gone."""
    folder, roots = tmp_path / "labels", [tmp_path / "photos", tmp_path / "moved"]
    roots[0].mkdir()
    before, after = ({**IDENTITY, "image_root": str(root)} for root in roots)
    write_numbered(folder, identity=before).finish()
    with pytest.raises(InputError, match="another image_root"):
        PseudoLabelWriter(folder, after, NAMES)
    roots[0].rename(roots[1])
    PseudoLabelWriter(folder, after, NAMES).close()
    assert read_manifest(folder)["image_root"] == str(roots[1])
    with pytest.raises(InputError, match="another score_floor"):
        PseudoLabelWriter(folder, {**before, "score_floor": 0.5}, NAMES)


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="not empty"):
        PseudoLabelWriter(tmp_path, IDENTITY, NAMES)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_nothing_is_left_half_written(tmp_path):
    write_numbered(tmp_path).finish()
    assert json.loads((tmp_path / "manifest.json").read_text())["finished"]
    names = sorted(p.name[:13] for p in tmp_path.rglob("*") if p.is_file())
    assert names == [".lock", "manifest.json", "shard-000000-", "shard-000001-", "shard-000002-"]
