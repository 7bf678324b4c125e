"""The benchmarks run from one command and print a row for each thing they compare; nobody judges their figures here."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LINUX, error_of, words
from PIL import Image
from test_export import model_of, run_of, typed
from torchvision import datasets

import dcgan
from benchmarks import gpu, inference, quality, training

SMALL = words("--img_size 16 --nc 3 --ngf 4 --batch_size 8")

def rows(capsys, program, *argv):
    """The tables that a benchmark prints: a list of cells for each line."""
    capsys.readouterr()
    typed(program, *argv)
    lines = capsys.readouterr().out.splitlines()
    return [[c.strip() for c in line.split("|")[1:-1]] for line in lines if line.startswith("|")]

def first_number(cell):
    return float(cell.split()[0])

@LINUX
def test_training(capsys, folder):
    argv = [*words("--runs gan --steps 10 --warmup 10 --rounds 1 --dataset", folder), *SMALL]
    table = rows(capsys, training, *argv, "--variants", "--precision auto")
    assert [row[0] for row in table[2:]] == ["gan.py --precision auto", "plain baseline"]
    assert all(first_number(row[1]) > 0 and first_number(row[3]) > 0 and float(row[4]) > 10 for row in table[2:])
    assert first_number(table[2][2]) > 0

@pytest.mark.parametrize("argv", ["--runs gan --seconds 1", "--runs acgan --steps 3 --seed 1"])
def test_pictures_of_the_baseline(folder, argv):
    typed(training, *words(argv, "--train_baseline plain.npz --dataset", folder), *SMALL)
    z = np.load("plain.npz")
    assert (z["arr_0"].shape, z["arr_0"].dtype) == ((10000, 16, 16, 3), np.uint8)
    assert z["arr_0"].std() > 0
    assert ("labels" in z) == ("acgan" in argv)

@pytest.mark.parametrize("nc", [1, 3])
def test_the_baseline_trains_on_our_pictures(folder, nc):
    """Else its losses and pictures could not be compared with ours."""
    args = dcgan.get_args(words("--img_size 32 --nc", nc, "--dataset", folder))
    images, labels, classes = dcgan.load_data(args)
    theirs = datasets.ImageFolder(folder, training.plain_transform(nc, 32, grey=False))
    assert classes == theirs.classes
    assert labels.tolist() == theirs.targets
    ours = quality.to_float(np.array(images)).cpu()
    torch.testing.assert_close(ours, torch.stack([picture for picture, _ in theirs]))

@pytest.mark.slow
def test_memory_and_startup(capsys, data_dir):
    table = rows(capsys, training, *words("--runs gan --made_up 200"))
    assert [row[0] for row in table[2:]] == ["100 images", "200 images"]
    assert float(table[3][1]) >= 200 * 64 * 64 * 3 / 1e6 // 1
    assert all(float(row[3]) > 10 for row in table[2:])
    table = rows(capsys, training, *words("--runs gan --startup --rounds 1 --data_dir", data_dir))
    assert len(table) == 2 + 5 + 2
    assert all(first_number(row[1]) > 0 for row in table[2:])

@LINUX
def test_inference(capsys, cpp):
    argv = words("--rounds 1 --seconds 0.01 --n_samples 5", *["--cpp", cpp] * bool(cpp))
    table = rows(capsys, inference, run_of("dcgan"), *argv)
    names = [row[0] for row in table]
    for name in ("A PyTorch eager fp32", "B plain ONNX export", "export.py fp32", "export.py int8"):
        assert all(first_number(cell) > 0 for cell in table[names.index(name)][2:5])
    for name in ["infer_ort.py", "infer_ort.cpp"][:1 + bool(cpp)]:
        assert all(first_number(cell) > 0 for cell in table[names.index(name)][2:6])

class Profiler:
    """What torch.profiler writes of two steps on a GPU: kernels of two streams overlap, other events do not count."""

    @staticmethod
    def export_chrome_trace(path):
        def event(kind, name, begin, length):
            return {"cat": kind, "name": name, "ts": begin, "dur": length}

        events = [event("kernel", "a", 0, 1000), event("kernel", "b", 500, 1000), event("gpu_memset", "c", 3000, 500),
                  event("gpu_user_annotation", "d", 0, 9000), event("cuda_runtime", "cudaLaunchKernel", 0, 5),
                  event("cuda_driver", "cuLaunchKernelEx", 0, 5), event("cuda_runtime", "cudaMemsetAsync", 0, 5)]
        Path(path).write_text(json.dumps({"traceEvents": events}))

def test_gpu():
    """Its sums and its tables; tests/test_gpu.py runs all of it."""
    assert gpu.read_trace(Profiler, 2) == (1, 1)
    row = gpu.named(64, 32)
    told = gpu.markdown({"training": {row: {"images/s": "7,000"}}}, ["compile: stopped"])
    assert f"| {row} | 7,000 | - | - | - |" in told
    assert gpu.named(128, 512) in told
    assert "- compile: stopped" in told

@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("program", [gpu, inference])
def test_without_a_gpu(capfd, program):
    argv = ["none", "--gpu_only"] if program is inference else []
    assert "GPU" in error_of(capfd, typed, program, *argv).replace("CUDA device", "GPU")

@pytest.fixture
def digits():
    """A folder `data` of 1,200 coloured digits in class folders, and 400 others as an array."""
    rng, others = np.random.default_rng(0), []
    for i in range(1600):
        image = np.asarray(dcgan.draw_digit(i, 16).resize((16, 16)))[..., None] * rng.uniform(0.3, 1, 3)
        if i < 1200:
            Path("data", str(i % 10)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.astype(np.uint8)).save(f"data/{i % 10}/{i}.png")
        else:
            others.append(image.astype(np.uint8))
    return np.stack(others)

def test_quality(capsys, digits):
    """Real pictures score better than noise; one digit again and again, ten pictures again and again, copies and dull
    colours are seen for what they are; a checkpoint scores what its ONNX file does."""
    grey = digits.mean(3, keepdims=True).astype(np.uint8).repeat(3, 3)
    order = np.random.default_rng(0).permutation(1200)[120:]  # of files as sorted: without those held out
    files = sorted(Path("data").rglob("*.png"))
    copies = np.stack([np.asarray(Image.open(files[i])) for i in order[:400]])
    np.savez("real.npz", digits, labels=np.arange(400) % 10)
    np.savez("wrong.npz", digits, labels=(np.arange(400) + 1) % 10)
    made = {"threes": digits[np.arange(400) // 10 * 10 + 3], "typical": digits[np.arange(400) % 10], "copies": copies,
            "half": digits // 2 + grey // 2, "grey": grey, "noise": np.random.default_rng(0).integers(0, 256, digits.shape, np.uint8)}
    for name, images in made.items():
        np.savez(f"{name}.npz", images)
    sources = [f"{name}.npz" for name in ("real", "wrong", *made)] + [run_of("acgan"), model_of("acgan")]
    argv = words("--dataset data --n_samples 400 --epochs 20 --cache . --json s.json --neighbours n.png")
    table = rows(capsys, quality, *sources, *argv)
    told = json.loads(Path("s.json").read_text())
    assert min(told["accuracy"]) > 0.9
    scores = told["scores"]
    assert [row[0] for row in table[2:]] == list(scores) == ["real training images", *sources]
    real, wrong, threes, typical, copied, half, dull, noise, run, model = (scores[source] for source in sources)
    assert real["asked"] > 0.9
    assert wrong["asked"] < 0.1
    assert real["FID"] < threes["FID"]
    assert real["FID"] < noise["FID"] / 10
    assert real["FID 2"] < noise["FID 2"] / 10
    assert real["FID 3"] < noise["FID 3"] / 10
    assert max(typical["spread"], typical["spread 2"], typical["spread 3"]) < 0.1
    assert min(real["spread"], real["spread 2"], real["spread 3"]) > 0.5
    assert real["confidence"] > 0.8
    assert real["classes"] > 9.8
    assert threes["classes"] < 1.5
    assert threes["recall"] < real["recall"]
    assert noise["precision"] < 0.1 < real["precision"]
    assert copied["copying"] == pytest.approx(0, abs=1e-2)
    assert 0.5 < real["copying"] < 2
    assert real["colour"] == pytest.approx(1, abs=0.1)
    assert half["colour"] == pytest.approx(0.5, abs=0.1)
    assert dull["colour"] == 0
    assert run["FID"] == pytest.approx(model["FID"], rel=1e-2)
    assert run["asked"] == model["asked"]
    assert Image.open("n.png").size[0] > 9 * 16

@pytest.mark.slow
def test_each_checkpoint_of_a_run(capsys):
    """And other digits than those trained on are the test images."""
    shutil.copytree(run_of("dcgan"), "run")
    shutil.copy("run/checkpoint.pt", "run/checkpoint_epoch_0001.pt")
    typed(quality, "run", *words("--each --dataset digits --n_samples 200 --epochs 1 --cache ."))
    said = capsys.readouterr().out
    assert said.count("| run/checkpoint") == 2
    assert "best: run/checkpoint" in said

def test_quality_refuses(capfd):
    for name, images in (("bad", np.zeros((200, 16, 16, 1))), ("ok", np.zeros((200, 16, 16, 1), np.uint8)),
                         ("other", np.zeros((200, 32, 32, 1), np.uint8))):
        np.savez(f"{name}.npz", images)
    before = sorted(os.listdir("."))
    for argv in ("none.npz", "bad.npz", "none.pt", "ok.npz other.npz", "ok.npz --n_samples 3", "ok.npz --dataset void"):
        said = error_of(capfd, typed, quality, *words("--dataset digits", argv))  # the last one counts
        assert argv.split()[-1] in said
    assert sorted(os.listdir(".")) == before
