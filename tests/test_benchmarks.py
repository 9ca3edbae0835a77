"""The scripts of benchmarks/ that no machine here can run in full still work: on few images, by their own options."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(script: str, *arguments: str, folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
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


def test_the_shell_script_is_a_script() -> None:
    subprocess.run(["bash", "-n", str(ROOT / "benchmarks" / "gpu.sh")], check=True)
