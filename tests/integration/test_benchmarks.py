"""The benchmarks that build a trainer by hand still run, on sizes that say nothing about speed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]


def test_the_step_and_the_reference_reach_the_same_loss(tmp_path: Path) -> None:
    output = tmp_path / "reference.json"
    sizes = "--size tiny --layers 1 --image-size 32 --items 32 --batch 8 --vocabulary 400"
    amount = "--steps 1 --rounds 1 --threads 1 --text-words 5"
    command = [*sizes.split(), *amount.split(), "--output", str(output)]
    found = subprocess.run(
        [sys.executable, "benchmarks/bench_pretrain.py", "reference", *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    loss = json.loads(output.read_text())["last_loss"]
    assert loss["ours"] == pytest.approx(loss["reference"], rel=1e-3)
