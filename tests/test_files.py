import errno
import os

import pytest

from selftrain_d2 import InputError
from selftrain_d2.files import is_empty, read_json, whole_file, write_json, writing


def test_a_file_is_whole_or_as_it_was(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, {"old": 1})
    with pytest.raises(KeyboardInterrupt), whole_file(file) as temporary:
        temporary.write_text("half")
        assert read_json(file) == {"old": 1}
        raise KeyboardInterrupt
    assert read_json(file) == {"old": 1}
    write_json(file, {"new": 2})
    assert read_json(file) == {"new": 2}
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize(
    "code, advice", [(errno.ENOSPC, "make room"), (errno.EDQUOT, "make room"), (errno.EROFS, "permissions")]
)
def test_a_disk_that_cannot_be_written_is_told(tmp_path, code, advice):
    told = pytest.raises(InputError, match=f"a.txt cannot be written .*{advice}.*same command")
    with told, whole_file(tmp_path / "a.txt") as temporary:
        temporary.write_text("begun")
        raise OSError(code, os.strerror(code))
    assert os.listdir(tmp_path) == []


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(TimeoutError), writing(tmp_path):
        raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))


@pytest.mark.parametrize("path", ["file/a.json", "nowhere/a.json", "folder"])
def test_a_path_that_cannot_be_written_is_told(tmp_path, path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=f"{path} cannot be written .*correct the path"):
        write_json(tmp_path / path, {})
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_what_a_killed_process_leaves_is_nothing(tmp_path):
    assert is_empty(tmp_path / "nowhere", "a.json") and is_empty(tmp_path, "a.json")
    for name in (".lock", ".a.json.4711"):
        (tmp_path / name).write_text("")
    assert is_empty(tmp_path, "a.json") and not is_empty(tmp_path, "b.json")
    (tmp_path / "thesis.tex").write_text("")
    assert not is_empty(tmp_path, "a.json")
