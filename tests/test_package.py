import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from detectron2.config import get_cfg
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY

import selftrain_d2
from selftrain_d2.cli.common import find_config, shipped_configs
from selftrain_d2.experiments import cost

PACKAGE = Path(selftrain_d2.__file__).parent

# Which parts of the package each part may import. What is not named here may import everything.
ALLOWED = {
    "config": set(),
    "errors": set(),
    "environment": set(),
    "storage": {"errors"},
    "files": {"errors", "storage"},
    "folder_lock": {"errors"},
    "object_storage": {"files"},
    "processes": {"errors"},
    "data": {"errors", "storage", "files", "folder_lock"},
    "modeling": {"errors", "storage", "files", "config"},
    "labeling": {"errors", "storage", "files", "processes", "data", "modeling"},
    "inspection": {"errors", "storage", "files", "data", "labeling"},
    "deployment": {"errors", "storage", "files", "config", "data", "modeling", "labeling"},
    "engine": {
        "errors",
        "storage",
        "files",
        "folder_lock",
        "processes",
        "config",
        "data",
        "modeling",
        "labeling",
        "inspection",
    },
    "experiments": {
        "errors",
        "storage",
        "files",
        "config",
        "data",
        "modeling",
        "labeling",
        "inspection",
        "engine",
        "deployment",
    },
}


def _imported_parts(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name.startswith("selftrain_d2."):
                yield name.split(".")[1]


def test_parts_import_only_what_they_may():
    found = 0
    for file in PACKAGE.rglob("*.py"):
        part = file.relative_to(PACKAGE).with_suffix("").parts[0]
        for imported in _imported_parts(file):
            found += 1
            if part in ALLOWED:
                assert imported == part or imported in ALLOWED[part], f"{file} imports {imported}"
    assert found > 20


def test_training_knows_nothing_of_the_loop():
    """The loop uses the rest of the engine, and only what lies above the engine uses the loop."""
    engine = PACKAGE / "engine"
    files = [file for file in engine.rglob("*.py") if file.relative_to(engine).parts[0] != "loop"]
    assert len(files) > 20
    for file in files:
        assert "selftrain_d2.engine.loop" not in file.read_text(encoding="utf-8"), file


def test_import_fills_the_registries():
    for name in (
        "build_efficientnet_backbone",
        "build_efficientnet_fpn_backbone",
        "build_retinanet_efficientnet_fpn_backbone",
    ):
        assert name in BACKBONE_REGISTRY
    assert "SelfTrainingRetinaNet" in META_ARCH_REGISTRY
    for name in ("S1", "S2", "S3", "S4"):
        assert name in selftrain_d2.AUGMENTATION_REGISTRY


def test_public_names_are_there():
    for name in selftrain_d2.__all__:
        assert getattr(selftrain_d2, name) is not None


def test_config_only_adds_keys():
    plain, ours = get_cfg(), get_cfg()
    selftrain_d2.add_selftrain_config(ours)

    def flat(cfg, prefix=""):
        for key, value in cfg.items():
            if isinstance(value, type(cfg)):
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    ours, plain = dict(flat(ours)), dict(flat(plain))
    assert plain.items() <= ours.items()
    assert ours["SELFTRAIN.EMA_DECAY"] == 0.9997 and ours["DATASETS.PSEUDO_TRAIN"] == ()


def test_every_added_key_has_a_comment():
    lines = (PACKAGE / "config.py").read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        is_key = line.startswith("    cfg.") and "CfgNode()" not in line
        if is_key:
            above = lines[number - 1].strip()
            assert above.startswith("#") or above.startswith("cfg."), f"config.py:{number + 1} has no comment"


@pytest.mark.parametrize("name", shipped_configs())
def test_every_config_loads_safely(name):
    cfg = get_cfg()
    selftrain_d2.add_selftrain_config(cfg)
    cfg.merge_from_file(str(find_config(name)), allow_unsafe=False)
    selftrain_d2.build_augmentations(cfg, is_train=True)


def test_configs_were_found():
    assert len(shipped_configs()) >= 2


def test_without_detectron2_one_clear_sentence():
    code = "import sys; sys.modules['detectron2'] = None; import selftrain_d2"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    last = result.stderr.strip().splitlines()[-1]
    assert (
        last.startswith("ImportError: selftrain_d2 is a plugin for detectron2") and "INSTALL" in last.upper()
    )


def test_every_command_explains_itself(capsys):
    from selftrain_d2.cli import COMMANDS, main

    for name in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0
        assert f"selftrain-d2 {name}" in capsys.readouterr().out
    assert main(["no-such-command"]) == 2
    assert "unknown command 'no-such-command'" in capsys.readouterr().err


def test_the_overview_has_a_line_for_each_command_and_fits_a_terminal(capsys):
    from selftrain_d2.cli import COMMANDS, GROUPS, main

    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(f"{title}:" in lines for title in GROUPS)
    for name in COMMANDS:
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        assert len(line.split()) > 4 and line.endswith(".") and len(line) <= 140
    assert main([]) == 2 and capsys.readouterr().out.splitlines() == lines


def test_as_a_module_it_tells_its_version():
    command = [sys.executable, "-m", "selftrain_d2", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"selftrain_d2 {selftrain_d2.__version__} (detectron2 ")
    assert "torch 2" in done.stdout


def test_an_installed_package_has_its_configs(tmp_path):
    """What a wheel holds, away from the clone: every config, and the experiments that read them."""
    root = PACKAGE.parent
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path)],
        cwd=root,
        check=True,
    )
    shipped = {path.relative_to(root) for path in (root / "configs").rglob("*.yaml")}
    assert {path.relative_to(tmp_path / "selftrain_d2") for path in tmp_path.rglob("*.yaml")} == shipped
    code = (
        "from selftrain_d2.experiments import cost, model_table; "
        "print(cost.__file__, len(cost.paper_trainings()), cost.grid_table(lambda *_: 1.0).count('coco_table'), "
        "model_table.results_table('coco/resnet50').count('../configs/'), sep='\\n')"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    file, *counts = result.stdout.split()
    assert file.startswith(str(tmp_path))
    paper = [f for family in cost.PAPER_FAMILIES for f in (root / "configs" / family).glob("*.yaml")]
    tables = list((root / "configs" / "grids").glob("coco_table_*.yaml"))
    resnets = list((root / "configs" / "coco" / "resnet50").glob("*.yaml"))
    assert list(map(int, counts)) == [len(paper), len(tables), len(resnets)] and min(map(int, counts)) > 0
