"""The benchmarks run from one command and print a row for each thing they compare; their figures are not judged here."""

import subprocess
import sys

from conftest import ROOT, train

import dcgan


def rows(*argv):
    """The tables that a benchmark prints: a list of cells for each line."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / argv[0]), *map(str, argv[1:])],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [[c.strip() for c in line.split("|")[1:-1]] for line in done.stdout.splitlines() if line.startswith("|")]


def first_number(cell):
    return float(cell.split()[0])


def test_training(folder):
    argv = ["--dataset", folder, "--img_size", 16, "--nc", 3, "--ngf", 4, "--batch_size", 8]
    table = rows("training.py", "--runs", "gan", *argv, "--steps", 20, "--warmup", 10, "--rounds", 1)
    assert [row[0] for row in table[2:]] == ["gan.py --precision auto", "gan.py --precision fp32", "plain baseline"]
    for row in table[2:]:
        assert first_number(row[1]) > 0
        assert first_number(row[3]) > 0
        assert float(row[4]) > 10
    assert all(first_number(row[2]) > 0 for row in table[2:4])


def test_inference():
    train(dcgan, "--max_steps", 1, "--nc", 3)
    table = rows("inference.py", "run", "--rounds", 1, "--seconds", 0.02, "--n_samples", 20)
    names = [row[0] for row in table]
    for name in ("A PyTorch eager fp32", "B plain ONNX export", "export.py fp32", "export.py int8"):
        assert all(first_number(cell) > 0 for cell in table[names.index(name)][2:5])
    program = table[names.index("infer_ort.py")]
    assert all(first_number(cell) > 0 for cell in program[2:6])
