"""The scripts of benchmarks/ that no machine here can run in full still work: on few images, by their own options."""

import json
import os
import subprocess
from pathlib import Path

import pytest

import warm

ROOT = Path(__file__).resolve().parent.parent


def run(script: str, *arguments: str, folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [warm.python(), str(ROOT / "benchmarks" / script), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_gpu_tables_on_a_processor(tmp_path: Path) -> None:
    parts = ("step", "objectives", "scoring")
    tiny = ("--device", "cpu", "--tiny", "--precision", "fp32")  # processors without bf16 take minutes to mimic it
    said = run("gpu.py", *tiny, "--write", "gpu.md", "--parts", *parts, folder=tmp_path)
    assert (tmp_path / "gpu.md").read_text() == said
    assert all(f"## {part}" in said for part in parts)
    rows = [line.split(" | ") for line in said.splitlines() if line.startswith(("| 2 |", "| 4 |"))]
    assert len(rows) == 2 and all(float(row[2].replace(",", "")) > 0 for row in rows)
    assert all(f"| {name} |" in said for name in ("cross_entropy", "pskd", "cskd", "dlb"))


def test_scaling_counts_and_adds_up(tmp_path: Path) -> None:
    said = run("scaling.py", "--images-per-second", "1000", "--gpus", "1", "4", "--between", "10", folder=tmp_path)
    assert "25,557,032" in said  # the parameters of ResNet-50 with 1,000 classes
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in said.splitlines()
        if line[:3] in ("| 1", "| 4")
    ]
    assert [row[:3] for row in rows] == [["1", "256", "256"], ["4", "256", "64"], ["4", "1,024", "256"]]
    assert float(rows[0][3]) == 341.3  # 256 images, 1,000 a second, four passes instead of three
    assert rows[0][4] == "0.0" and float(rows[0][6].split()[0]) == 42.7  # 450,360 steps
    assert float(rows[1][3]) == 85.3


def test_the_table_of_evidence_pairs_seeds_and_corrects(tmp_path: Path) -> None:
    """Two folders are one table; of two runs of a seed the later counts; against numbers worked out by hand."""
    top1 = {"random erk": [0.90, 0.91, 0.92], "epsd": [0.92, 0.94, 0.93], "snip": [0.91, 0.91, 0.92]}
    for number, (method, values) in enumerate(top1.items()):
        cells = tmp_path / f"part-{number % 2}" / "cells"
        cells.mkdir(parents=True, exist_ok=True)
        for seed, value in [(0, 0.1), *enumerate(values)]:
            result = {
                "params": {
                    "prune.sparsity": "0.98",
                    "objective.name": "cskd",
                    "prune.score.name": method,
                    "seed": seed,
                },
                "tags": {"variant": method if " " in method else ""},
                "metrics": {"test/top1": value, "cost/image_passes": 1234.0},
                "began": value,
            }
            path = cells / f"{method}-{seed}-{value}.json"
            path.write_text(json.dumps({"format": "epsd-cell-1", "result": result}))
    said = run("evidence.py", "part-0", "part-1", "--write", "t.md", folder=tmp_path)
    assert (tmp_path / "t.md").read_text() == said
    rows = [line.split(" | ") for line in said.splitlines() if line.startswith(("| epsd", "| snip", "| random"))]
    assert [row[0] for row in rows] == ["| epsd", "| snip", "| random erk"], "the best first"
    assert rows[0][1:3] == ["3", "0.9300 ± 0.0100"]
    # by 0.02, 0.03, 0.01: t = √12, p = 1 − t / √(t² + 2) = 0.0742; by 0.01, 0, 0: t = 1, p = 0.4226; Holm: × 2, × 1
    assert rows[0][3] == "+0.0200 (p 0.148)" and rows[1][3] == "+0.0033 (p 0.423)" and rows[2][3] == ""
    assert rows[0][4].startswith("1,234") and "9 models" in said and "all 2 comparisons" in said
    both = run("evidence.py", "part-0", "part-1", "--against", "random erk", "epsd", folder=tmp_path)
    assert "all 3 comparisons" in both, "epsd and random erk are one pair"
    kept = run("evidence.py", "part-0", "part-1", "--keep", "models.csv", folder=tmp_path)
    assert run("evidence.py", "models.csv", folder=tmp_path) == kept == said, (
        "models that were kept make the same table"
    )
    assert run("evidence.py", "models.csv", "part-0", folder=tmp_path) == said, "and are not counted twice"
    assert both.count("0.0200 (p 0.223)") == 2 and "+0.0200 (p 0.223)" in both and "-0.0200 (p 0.223)" in both


def test_the_table_of_evidence_compares_objectives(tmp_path: Path) -> None:
    """Seed by seed against the one that is named, and their mean over methods, against numbers worked out by hand."""
    top1 = {
        ("epsd", "cross_entropy"): [0.90, 0.91, 0.92],
        ("epsd", "cskd"): [0.92, 0.94, 0.93],
        ("snip", "cross_entropy"): [0.80, 0.81, 0.82],
        ("snip", "cskd"): [0.81, 0.81, 0.82],
        ("grasp", "cskd"): [0.5, 0.5, 0.5],
    }
    lines = [
        f"{method},{objective},0.98,{seed},0,{value}"
        for (method, objective), values in top1.items()
        for seed, value in enumerate(values)
    ]
    (tmp_path / "m.csv").write_text("\n".join(["method,objective,sparsity,seed,began,test/top1", *lines]))
    said = run("evidence.py", "m.csv", "--across", "cross_entropy", folder=tmp_path)
    # epsd and snip as above; the mean gains 0.015, 0.015, 0.005: t = 3.5, p = 0.0728; Holm: × 3, × 2 (no less), × 1
    assert said.splitlines()[-5:] == [
        "| method | cross_entropy | cskd |",
        "|---|---:|---:|",
        "| epsd | 0.9100 | +0.0200 (p 0.218, 3) |",
        "| snip | 0.8100 | +0.0033 (p 0.423, 3) |",
        "| mean of 2 | 0.8600 | +0.0117 (p 0.218, 3) |",
    ]
    assert "grasp" not in said and "all 3 comparisons" in said
    with pytest.raises(AssertionError, match="under dlb and under another objective"):
        run("evidence.py", "m.csv", "--across", "dlb", folder=tmp_path)


def test_the_shell_script_is_a_script() -> None:
    subprocess.run(["bash", "-n", str(ROOT / "benchmarks" / "gpu.sh")], check=True)
