"""The benchmarks run, and say what is wrong with what they are given."""

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, error_of, fill, main, run, train

import acgan

QUALITY = "--dataset digits --n_samples 150 --epochs 1"

@pytest.fixture
def few_digits(monkeypatch):
    """300 digits to train the classifier on, and 200 to judge by."""
    from benchmarks import quality

    load, arange = quality.gan.load_data, np.arange
    monkeypatch.setattr(quality.gan, "load_data", lambda args: [x[:300] for x in load(args)])
    monkeypatch.setattr(quality.np, "arange", lambda *n: arange(*n)[:200] if len(n) == 2 and n[0] == 10**6 else arange(*n))
    monkeypatch.setitem(sys.modules, "quality", quality)

def table(text):
    return {cells[1].strip(): [c.strip() for c in cells[2:-1]] for cells in (line.split("|") for line in text.splitlines() if line.startswith("|"))}

def test_quality_reads_runs_onnx_arrays_and_folders(few_digits, capfd):
    """The same pictures have the same scores; noise has worse ones, and no classes that were asked for."""
    train(acgan, "--max_steps 2 --img_size 16")
    main("export", "run -o net.onnx")
    main("infer_ort", "net.onnx --provider cpu --n_samples 150 --out net.npy")
    main("infer_ort", "net.onnx --provider cpu --n_samples 120 --out pictures/")
    np.save("noise.npy", np.random.default_rng(0).integers(0, 256, (150, 16, 16, 1), dtype=np.uint8))
    capfd.readouterr()
    main("quality", "run net.onnx net.npy pictures noise.npy", QUALITY)
    found = table(capfd.readouterr().out)
    assert found[""] == ["pictures", "FID", "KID x 1000", "precision", "recall", "classes", "confidence", "asked"]
    assert [found[name][0] for name in ("real training images", "run", "pictures")] == ["150", "150", "120"]
    for name in ("net.onnx", "net.npy"):
        np.testing.assert_allclose([float(x) for x in found[name]], [float(x) for x in found["run"]], atol=0.2)
    assert found["noise.npy"][-1] == ""
    assert float(found["noise.npy"][1]) > 5 * float(found["real training images"][1])
    assert found["real training images"][-1] != ""

@pytest.mark.parametrize(("flags", "said"), [
    ("nothing", "nothing"), ("empty", "empty"), ("damaged.pt", "damaged.pt"), ("text.onnx", "text.onnx"), ("few.npy", "100 or more"),
    ("float.npy", "uint8"), ("a.npy b.npy", "different sizes"), ("a.npy --dataset flat", "--inception")])
def test_mistakes(flags, said, few_digits, capfd):
    os.mkdir("empty")
    fill("flat", 150)
    for name in ("damaged.pt", "text.onnx"):
        Path(name).write_text("hello")
    for name, n, size, dtype in (("few", 20, 16, np.uint8), ("float", 150, 16, float), ("a", 150, 16, np.uint8), ("b", 150, 32, np.uint8)):
        np.save(f"{name}.npy", np.zeros((n, size, size, 3), dtype))
    assert said in error_of(capfd, "quality", flags, "" if "--dataset" in flags else QUALITY)

def test_compare_takes_turns():
    python = shutil.which("python") or sys.executable
    Path("sleep.py").write_text("import sys, time; time.sleep(float(sys.argv[1])); open('order', 'a').write(sys.argv[1] + ' ')")
    argv = [python, ROOT / "benchmarks/compare.py", "--images", "100,200", "--rounds", "2"]
    import subprocess

    done = subprocess.run([*argv, f"{python} sleep.py 0", f"{python} sleep.py 1"], capture_output=True, text=True, check=True)
    assert Path("order").read_text() == "0 1 0 1 "
    rows = table(done.stdout)
    assert float(rows[f"`{python} sleep.py 1`"][1].split()[0]) < 1.9
    done = subprocess.run([*argv, f"{python} sleep.py 0", f"{python} nothing.py"], capture_output=True, text=True, check=False)
    assert (done.returncode, "nothing.py" in done.stderr, "Traceback" in done.stderr) == (1, True, False)

@pytest.mark.slow
def test_gpu_runs_on_a_cpu():
    """All of its tables, of figures that mean nothing."""
    done = run(sys.executable, ROOT / "benchmarks/gpu.py --quick --device cpu --out gpu.md")
    assert done.returncode == 0, done.stderr
    assert Path("gpu.md").read_text() == done.stdout
    assert torch.__version__ in done.stdout
    for text in ("| `--ngf 64` |", "p95 ms", "real training images"):
        assert text in done.stdout
