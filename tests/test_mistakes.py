"""A user's mistake is one line that names the flag or file and the way out; a bug, or a mistake in an edit, is a traceback."""

import contextlib
import os
import pickle
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import ROOT, SCRIPTS, TINY, ended, error_of, fill, forked, main, train, words

import acgan
import dcgan
import gan

TRAIN = " ".join([*TINY, "--max_steps 1"])

@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """What the tables below name: files of many kinds, and runs of gan.py and acgan.py."""
    folder = tmp_path_factory.mktemp("tree")
    with contextlib.chdir(folder):
        fill("pets/cat")
        fill("pets/dog")
        for name in ("empty", "broken"):
            os.mkdir(name)
        for name in ("broken/a.png", "text.zip", "file.txt", "damaged.pt", "model.onnx"):
            Path(name).write_text("hello")
        train(gan, "--max_steps 1", out="runs/g")
        train(acgan, "--max_steps 1", out="runs/a")
    return folder

@pytest.fixture
def files(tree):
    shutil.copytree(tree, ".", dirs_exist_ok=True)

@pytest.mark.parametrize(("program", "flags", "said"), [
    ("dcgan", "--dataset mnits", "mnits"), ("dcgan", "--dataset text.zip", "unpack"), ("dcgan", "--dataset empty", "empty"),
    ("dcgan", "--dataset=", "--dataset"), ("dcgan", "--dataset broken", "cannot identify"), ("dcgan", "--dataset runs/g", "a run"),
    ("dcgan", "--data_dir file.txt", "file.txt"), ("dcgan", "--img_size 48", "--img_size"), ("gan", "--img_size 0", "--img_size"),
    ("dcgan", "--batch_size 65", "64 images"), ("dcgan", "--batch_size 1", "--batch_size"), ("dcgan", "--lr_g nan", "--lr_g"),
    ("dcgan", "--lr_d fast", "--lr_d"), ("dcgan", "--ema 1", "--ema"), ("dcgan", "--seed -1", "--seed"), ("dcgan", "--epocs 3", "--epocs"),
    ("dcgan", "--max_steps 3 --epochs 3", "type one of them"), ("dcgan", "--device gpu", "--device gpu"),
    ("dcgan", "--device cuda:99", "--device cuda:99"), ("dcgan", "--out_dir file.txt", "file.txt"), ("dcgan", "--out_dir file.txt/run", "file.txt"),
    ("dcgan", "--labels 3", "--sample"), ("gan", "--n_samples 5", "--sample"), ("gan", "--lr 1", "--lr"),
    ("acgan", "--dataset pets/cat", "no classes")])
def test_in_training(program, flags, said, files, capfd):
    assert said in error_of(capfd, program, TRAIN, flags)

@pytest.mark.parametrize(("program", "flags", "said"), [
    ("gan", "--sample missing.pt", "missing.pt"), ("gan", "--sample empty", "empty/checkpoint.pt"), 
    ("gan", "--sample damaged.pt", "damaged.pt"), ("gan", "--sample runs/a", "acgan.py"), ("gan", "--resume runs/a", "acgan.py"),
    ("gan", "--resume", "--resume"), ("gan", "--resume runs/g --recipe paper", "--recipe"), ("gan", "--resume runs/g", "--max_steps"),
    ("gan", "--sample runs/g --ngf 3", "--ngf"), ("acgan", "--sample runs/a --out x.jpg", "--out x.jpg"),
    ("acgan", "--sample runs/a --out file.txt/x.png", "file.txt"), ("acgan", "--sample runs/a --out file.txt/x", "file.txt"),
    ("acgan", "--sample runs/a --walk_dim 8", "0 to 7"), ("acgan", "--sample runs/a --labels 3,bird", "choose from 0, 1"),
    ("gan", "--sample runs/g --labels 3", "none"),
    *(("acgan", f"--resume runs/a --max_steps 5 {flag}", flag) for flag in ("--ngf 8", "--ndf 8", "--nz 9", "--img_size 32", "--nc 3", "--aux acgan")),
    ("export", "missing.pt", "missing.pt"), ("export", "damaged.pt", "damaged.pt"), ("export", "runs/g -o runs/g/checkpoint.pt", ".onnx"),
    ("export", "runs/g --opset 99", "--opset"), ("export", "runs/g -o file.txt/m.onnx", "file.txt"),
    ("infer_ort", "missing.onnx", "missing.onnx"), ("infer_ort", "model.onnx", "model.onnx"), ("infer_ort", "runs/g/checkpoint.pt", "checkpoint.pt"),
    ("infer_ort", "model.onnx --n_samples 0", "--n_samples"), ("infer_ort", "model.onnx --seed -1", "--seed"), ("infer_ort", "model.onnx --out x.jpg", "x.jpg")])
def test_with_files(program, flags, said, files, capfd):
    """No file is written, and the runs stay as they are."""
    def contents():
        return {file: file.read_bytes() for file in Path().rglob("*") if file.is_file() and "cache" not in str(file)}

    before = contents()
    assert said in error_of(capfd, program, flags)
    assert contents() == before

def test_another_optimizer_at_a_resume_is_named(capfd):
    train(dcgan, "--max_steps 1")
    assert "--optim_d rmsprop" in error_of(capfd, "dcgan", "--resume run --max_steps 3 --optim_d rmsprop")

class Code:
    def __reduce__(self):
        return os.mkdir, ("code-ran",)

@pytest.mark.parametrize("program", [*SCRIPTS, "export"])
def test_files_that_are_no_checkpoints(program, capfd):
    """Cut, of another script, somebody else's, TorchScript, safetensors, with code in it: one line; no code runs."""
    ckpt = train(dcgan, "--max_steps 1")
    whole = Path("run/checkpoint.pt").read_bytes()
    contents = {"cut.pt": whole[:len(whole) // 2], "empty.pt": b"", "evil.pkl": pickle.dumps(Code()),
                "g.safetensors": b"\x10\0\0\0\0\0\0\0{\"a\":{}}        "}
    for name, data in contents.items():
        Path(name).write_bytes(data)
    for name, content in (("other.pt", ckpt | {"script": "stylegan"}), ("code.pt", {"netG": Code()}), ("module.pt", torch.nn.Linear(2, 2)),
                          ("strange.pt", {"weights": torch.zeros(3)}), ("list.pt", [1]), ("tensor.pt", torch.zeros(3))):
        torch.save(content, name)
    torch.jit.script(torch.nn.Linear(2, 2)).save("script.pt")
    for file in [*Path().glob("*.p*"), "g.safetensors"]:
        for flag in ("",) if program == "export" else ("--sample", "--resume"):
            line = error_of(capfd, program, flag, file)
            assert str(file) in line
            assert "weights_only" not in line
    assert not Path("code-ran").exists()

def test_no_memory_and_an_interrupt_are_one_line_and_a_bug_is_none(capfd, monkeypatch):
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nGPU 0 has ..."), MemoryError(), KeyboardInterrupt()):
        monkeypatch.setattr(gan, "train", mock.Mock(side_effect=error))
        assert error_of(capfd, "gan")
    monkeypatch.setattr(gan, "train", mock.Mock(side_effect=RuntimeError("CUDA error: an illegal memory access")))
    with pytest.raises(RuntimeError, match="illegal"):
        main("gan")

def edited(*argv):
    sys.argv = ["mine.py", *argv]
    runpy.run_path("mine.py", run_name="__main__")

@pytest.mark.parametrize(("old", "new", "said"), [
    ("return self.main(z)", "return self.mian(z)", "mian"),
    ("torch.randn(len(real), args.nz,", "torch.randn(len(real), args.nz + 1,", ", in train\n"),
    ('self.config = {"nz": nz, "ngf": ngf, "nc": nc, "img_size": img_size}', "self.config = {}", "Generator.__init__"),
    ('"img_size": img_size}', '"img_size": 2 * img_size}', "Missing key(s)"), ('"ngf": ngf, "nc"', '"ngf": 2 * ngf, "nc"', "size mismatch"),
    ("netG_ema=netG_ema, ", "", "netG_ema"), ("replay=replay)", "replay=0.5)", "'float' object has no attribute 'state_dict'"),
    ('choices=("bce", "hinge"), default="bce"', 'type=Path, default="bce"', "Path"), ('"gp": "none", "ema"', '"pg": "none", "ema"', "pg"),
    ("def forward(self, z)", "def forward(self)", "forward"), ("PAPER = {", "PAPER = 1 + {", "PAPER")])
def test_a_mistake_in_an_edit_shows_before_the_first_step_and_leaves_no_run(old, new, said):
    text = (ROOT / "dcgan.py").read_text()
    assert text.count(old) >= 1
    Path("mine.py").write_text(text.replace(old, new, 1))
    assert ended(forked(edited, *TINY, *words("--max_steps 3 --out_dir run --recipe paper --batch_size 8 --ngf 4 --ndf 4"))) == 70
    output = Path("said.txt").read_text()
    assert "Traceback" in output
    assert said in output
    assert not Path("run/log.jsonl").exists()
    assert Path("run").exists() == (", in train" in said)  # only where a batch is needed to show it

def test_a_terminal_that_is_not_utf8():
    """Names of folders in other letters."""
    fill("猫/a", 8)
    argv = [sys.executable, ROOT / "gan.py", *words(TRAIN, "--dataset 猫 --out_dir 犬")]
    done = subprocess.run(argv, env=os.environ | {"PYTHONIOENCODING": "cp1252"}, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
