"""The benchmarks run from one command and print a row for each thing they compare; their figures are not judged here."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, command, train
from PIL import Image
from torchvision import datasets

import acgan
import dcgan
from benchmarks import training


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
    table = rows("training.py", "--runs", "gan", *argv, "--steps", 20, "--warmup", 10, "--rounds", 1, "--in_memory",
                 "--pytorch_gan")
    names = ["gan.py --precision auto", "gan.py --precision fp32", "plain baseline", "plain baseline, data in memory",
             "PyTorch-GAN's nets and loop"]
    assert [row[0] for row in table[2:]] == names
    for row in table[2:]:
        assert first_number(row[1]) > 0
        assert first_number(row[3]) > 0
        assert float(row[4]) > 10
    assert all(first_number(row[2]) > 0 for row in table[2:4])


def test_training_on_a_zip(folder):
    shutil.make_archive("images", "zip", folder.parent, folder.name)  # class folders below another
    argv = ["--dataset", "images.zip", "--img_size", 16, "--nc", 3, "--ngf", 4, "--batch_size", 8, "--steps", 10]
    table = rows("training.py", "--runs", "acgan", *argv, "--warmup", 10, "--rounds", 1, "--pytorch_gan", "--variants",
                 "--precision auto --ndf 2")
    assert [row[0] for row in table[2:]] == ["acgan.py --precision auto --ndf 2", "plain baseline",
                                            "PyTorch-GAN's nets and loop"]
    assert all(first_number(row[1]) > 0 for row in table[2:])


@pytest.mark.parametrize(("argv", "said"), [
    (["--dataset", "nowhere"], "--dataset nowhere: neither mnist"),
    (["--peer", "main.py"], "--peer: say with --peer_images"),
])
def test_training_refuses(argv, said):
    done = command("benchmarks/training", *argv)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("name", "stop"), [("gan", ["--seconds", 1]), ("acgan", ["--steps", 3, "--seed", 1])])
def test_pictures_of_the_baseline(folder, name, stop):
    argv = ["--dataset", folder, "--img_size", 16, "--nc", 3, "--ngf", 4, "--batch_size", 8, *stop]
    rows("training.py", "--runs", name, "--train_baseline", "plain.npz", *argv)
    z = np.load("plain.npz")
    assert z["arr_0"].shape == (10000, 16, 16, 3)
    assert z["arr_0"].dtype == np.uint8
    assert z["arr_0"].std() > 0
    assert ("labels" in z) == (name == "acgan")


@pytest.mark.parametrize("nc", [1, 3])
def test_the_baseline_trains_on_our_pictures(folder, nc):
    """Else its losses and pictures could not be compared with ours."""
    args = dcgan.get_args(["--dataset", str(folder), "--img_size", "32", "--nc", str(nc)])
    images, labels, classes = dcgan.load_data(args, quiet=True)
    theirs = datasets.ImageFolder(folder, training.plain_transform(nc, 32, grey=False))
    ours = dcgan.to_float(torch.from_numpy(images.copy()), torch.device("cpu"))
    assert classes == theirs.classes
    assert labels.tolist() == theirs.targets
    torch.testing.assert_close(ours, torch.stack([picture for picture, _ in theirs]))


def test_inference():
    train(dcgan, "--max_steps", 1, "--nc", 3)
    table = rows("inference.py", "run", "--rounds", 1, "--seconds", 0.02, "--n_samples", 20)
    names = [row[0] for row in table]
    for name in ("A PyTorch eager fp32", "B plain ONNX export", "export.py fp32", "export.py int8"):
        assert all(first_number(cell) > 0 for cell in table[names.index(name)][2:5])
    program = table[names.index("infer_ort.py")]
    assert all(first_number(cell) > 0 for cell in program[2:6])


def test_quality():
    """Real pictures score better than noise; one digit again and again, and copies, are seen for what they are."""
    source = dcgan.ImageSource(list(range(2 * 10**6, 2 * 10**6 + 500)), [], [], "")
    source.size, source.nc = 16, 1
    real = np.stack([source.decode(i) for i in range(500)])
    np.savez("real.npz", real, labels=np.arange(500) % 10)
    np.savez("wrong.npz", real, labels=(np.arange(500) + 1) % 10)
    np.savez("threes.npz", real[np.arange(500) // 10 * 10 + 3])
    np.savez("noise.npz", np.random.default_rng(0).integers(0, 256, real.shape, np.uint8))
    source.items = list(range(500))  # of the training set
    np.savez("copies.npz", np.stack([source.decode(i) for i in range(500)]))
    train(dcgan, "--max_steps", 1, "--nc", 1)
    files = [f"{name}.npz" for name in ("real", "wrong", "threes", "noise", "copies")]
    argv = ["--n_samples", 500, "--epochs", 1, "--cache", ".", "--json", "s.json", "--neighbours", "n.png"]
    table = rows("quality.py", *files, "run", "--dataset", "digits", *argv)
    told = json.loads(Path("s.json").read_text())
    assert told["accuracy"] > 0.95
    scores = told["scores"]
    assert [row[0] for row in table[2:]] == list(scores) == ["real training images", *files, "run"]
    assert scores["real.npz"]["asked"] > 0.95
    assert scores["wrong.npz"]["asked"] < 0.05
    assert scores["real.npz"]["FID"] < scores["threes.npz"]["FID"]
    assert scores["real.npz"]["FID"] < scores["noise.npz"]["FID"] / 10
    assert scores["real.npz"]["classes"] > 9.9
    assert scores["threes.npz"]["classes"] < 1.5
    assert scores["threes.npz"]["recall"] < scores["real.npz"]["recall"]
    assert scores["noise.npz"]["precision"] < 0.1 < scores["real.npz"]["precision"]
    assert scores["copies.npz"]["copying"] == pytest.approx(0, abs=1e-3)
    assert 0.5 < scores["real.npz"]["copying"] < 2
    assert scores["run"]["sure"] <= 1
    assert Image.open("n.png").size[0] > 9 * 16


def test_quality_sees_washed_out_colours():
    """The same pictures half as colourful; their grey versions."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (240, 16, 16, 3), dtype=np.uint8)
    for i, image in enumerate(images):
        Path("data", "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(f"data/{'ab'[i % 2]}/{i}.png")
    grey = images.mean(3, keepdims=True).astype(np.uint8).repeat(3, 3)
    np.savez("same.npz", images)
    np.savez("half.npz", images // 2 + grey // 2)
    np.savez("grey.npz", grey)
    argv = ["--n_samples", 100, "--epochs", 1, "--cache", ".", "--json", "s.json"]
    rows("quality.py", "same.npz", "half.npz", "grey.npz", "--dataset", "data", *argv)
    scores = json.loads(Path("s.json").read_text())["scores"]
    assert scores["same.npz"]["colour"] == pytest.approx(1, abs=0.05)
    assert scores["half.npz"]["colour"] == pytest.approx(0.5, abs=0.05)
    assert scores["grey.npz"]["colour"] == 0


def test_quality_compares_a_checkpoint_with_its_onnx_file():
    """The same latents, the same scores, whoever computes the pictures."""
    train(acgan, "--max_steps", 1, "--nc", 1)
    assert command("export", "run", "-o", "m.onnx").returncode == 0
    argv = ["--n_samples", 100, "--epochs", 1, "--cache", ".", "--json", "s.json"]
    rows("quality.py", "run", "m.onnx", "--dataset", "digits", *argv)
    scores = json.loads(Path("s.json").read_text())["scores"]
    assert scores["run"]["FID"] == pytest.approx(scores["m.onnx"]["FID"], rel=1e-2)
    assert scores["run"]["asked"] == scores["m.onnx"]["asked"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["none.npz", "--dataset", "digits"], "none.npz: no .npz of samples"),
        (["bad.npz", "--dataset", "digits"], "bad.npz: arr_0 is float64"),
        (["ok.npz", "--dataset", "digits", "--n_samples", "3"], "--n_samples 3: too few"),
        (["ok.npz", "--dataset", "nowhere"], "--dataset nowhere: no such folder"),
        (["ok.npz", "other.npz", "--dataset", "digits"], "different sizes"),
        (["none.pt", "--dataset", "digits"], "none.pt: no such file"),
    ],
)
def test_quality_refuses(argv, said):
    np.savez("bad.npz", np.zeros((200, 16, 16, 1)))
    np.savez("ok.npz", np.zeros((200, 16, 16, 1), np.uint8))
    np.savez("other.npz", np.zeros((200, 32, 32, 1), np.uint8))
    done = command("benchmarks/quality", *argv)
    assert done.returncode in (1, 2)
    assert said in done.stderr
    assert done.stderr.startswith("quality.py: error:")
    assert "Traceback" not in done.stderr


def test_memory_and_startup(data_dir):
    table = rows("training.py", "--runs", "gan", "--made_up", 200)
    assert [row[0] for row in table[2:]] == ["100 images", "200 images"]
    assert float(table[3][1]) >= 200 * 64 * 64 * 3 / 1e6 // 1
    assert all(float(row[3]) > 10 for row in table[2:])
    table = rows("training.py", "--runs", "gan", "--startup", "--rounds", 1, "--data_dir", data_dir)
    assert len(table) == 2 + 5 + 2
    assert all(first_number(row[1]) > 0 for row in table[2:])
