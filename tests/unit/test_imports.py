"""Imports point one way, and help is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Each package and the ones of this project that it may import.
ALLOWED = {
    "alignrec": {"alignrec"},
    "data_prep": {"data_prep", "alignrec"},
    "cluster": {"cluster", "data_prep", "alignrec"},
    "launch": {"launch", "cluster", "data_prep", "alignrec"},
}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the direction"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_one_way(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        wrong = (imported(path) & ALLOWED.keys()) - ALLOWED[package]
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


@pytest.mark.parametrize("module", ["launch", "cluster"])
def test_help_loads_no_engine(module: str) -> None:
    code = (
        f"import runpy, sys; sys.argv = ['{module}', '--help']\n"
        f"try: runpy.run_module('{module}', run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code\n"
        "loaded = {'torch', 'ray', 'deepspeed', 'pyarrow'} & sys.modules.keys()\n"
        "assert not loaded, loaded"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert "usage" in result.stdout


def test_importing_the_package_seeds_nothing() -> None:
    code = (
        "import torch; before = torch.get_rng_state().tolist()\n"
        "import alignrec.align.training, alignrec.pretrain.training, alignrec.graph.building\n"
        "import alignrec.evaluation.evaluating, alignrec.export.bundle\n"
        "assert torch.get_rng_state().tolist() == before\n"
        "assert not torch.distributed.is_initialized()"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
