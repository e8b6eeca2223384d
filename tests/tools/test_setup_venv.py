"""Our set-up, with an interpreter whose pip writes down what it was told."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Makes an environment without pip; that environment's python records `-m pip`, and can import what PRESENT names.
FAKE = """#!{python}
import os, subprocess, sys
arguments = sys.argv[1:]
if arguments[:2] == ["-m", "venv"]:
    os.makedirs(arguments[2] + "/bin")
    os.makedirs(arguments[2] + "/site")
    os.symlink(__file__, arguments[2] + "/bin/python")
elif arguments[:2] == ["-m", "pip"]:
    with open({log!r}, "a") as log:
        print(*arguments[2:], file=log)
elif arguments[0] == "-c" and "sysconfig" in arguments[1]:
    print({folder!r} + ("/venv/site" if "/venv/" in sys.argv[0] else "/user/site"))
elif arguments[0] == "-c":
    names = arguments[1].replace("import", "").replace(",", " ").split()
    sys.exit(not set(names) <= set({present!r}))
else:
    print("torch==2.2.2")  # the versions that are there
"""


@pytest.fixture
def set_up(tmp_path):
    """``run(present, detectron2)``: pip's commands, with these modules there already."""

    def run(present, detectron2=""):
        log = tmp_path / "pip.log"
        fake = tmp_path / "python"
        fake.write_text(
            FAKE.format(python=sys.executable, log=str(log), folder=str(tmp_path), present=list(present))
        )
        fake.chmod(0o755)
        script = ["bash", "tools/setup_venv.sh", str(fake), str(tmp_path / "venv"), detectron2]
        subprocess.run(script, cwd=ROOT, check=True, env={**os.environ, "TMPDIR": str(tmp_path)})
        return log.read_text().splitlines()

    return run


USERS = ("torch", "torchvision", "detectron2")


def test_a_detectron2_of_source_finds_what_builds_it(set_up):
    """Without isolation, pip brings nothing of its own; a fresh environment has no wheel, later ones no setuptools."""
    commands = set_up(["torch", "torchvision"], "git+https://example.org/detectron2.git")
    build = next(i for i, command in enumerate(commands) if "--no-build-isolation" in command)
    assert commands[build].endswith("git+https://example.org/detectron2.git")
    before = " ".join(commands[:build]).split()
    assert {"setuptools", "wheel"} <= set(before)


def test_torch_and_opencv_that_are_there_stay(set_up):
    commands = set_up([*USERS, "cv2"])
    assert len(commands) == 1 and commands[0].endswith("--editable .[dev,lite]")
    assert "--constraint" in commands[0]


def test_what_is_missing_is_installed(set_up):
    commands = set_up([])
    assert commands[0].endswith("-r tools/requirements/tried.txt")
    assert any("sal-detectron2" in command or "--require-hashes" in command for command in commands)
    assert commands[-1].endswith("--editable .[dev,lite,opencv]")


def test_the_clone_comes_before_a_copy_of_the_user(set_up, tmp_path):
    """The interpreter that has detectron2 may have selftrain_d2 too."""
    copy = tmp_path / "user" / "site" / "selftrain_d2"
    copy.mkdir(parents=True)
    (copy / "__init__.py").touch()
    set_up([*USERS, "cv2"])
    code = (
        f"import site, importlib.util; site.addsitedir({str(tmp_path / 'venv' / 'site')!r}); "
        "print(importlib.util.find_spec('selftrain_d2').origin)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    # Without the packages of the tests' own environment, in which selftrain_d2 may be installed.
    found = subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == str(ROOT / "selftrain_d2" / "__init__.py")


def test_a_torch_for_every_python():
    """The lines of the set-up's torch that hold for a CPython from 3.9 on are one of each, whichever it is."""
    from packaging.requirements import Requirement

    lines = (ROOT / "tools" / "requirements" / "tried.txt").read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if not line.startswith("#")]
    last = {"3.9": "2.8.0"}  # torch 2.9 wants CPython 3.10
    for version in ("3.9", "3.10", "3.11", "3.12", "3.13"):
        chosen = [
            r for r in requirements if r.marker is None or r.marker.evaluate({"python_version": version})
        ]
        assert sorted(r.name for r in chosen) == ["torch", "torchvision"]
        torch = next(r for r in chosen if r.name == "torch")
        assert version not in last or torch.specifier.contains(last[version])
