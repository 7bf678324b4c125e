"""A user's mistake: one line that names the flag or file, exit code not 0, no traceback. A bug keeps its traceback."""

import os
import pickle
import runpy
import sys
import zipfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import ROOT, TINY, ended, error_of, forked, main, train, words

import acgan
import dcgan
import gan

@pytest.mark.parametrize("flags", [
    *(f"--dataset {name}" for name in ("mnits", "no/such/path", "empty", "text.zip", "hollow.zip", "cut.zip", "broken")),
    "--img_size 48", "--batch_size 65", "--batch_size 0", "--lr fast", "--epocs 3", "--device gpu", "--device cuda",
    "--out_dir file.txt", "--out_dir file.txt/run", "--out_dir .", "--data_dir file.txt", "--resume", "--resume missing.pt",
    "--sample missing.pt", "--sample empty"])
def test_mistake(flags, capfd):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    os.mkdir("empty")
    os.mkdir("broken")
    for name in ("broken/a.png", "broken/b.jpg", "text.zip", "file.txt"):
        Path(name).write_text("hello")
    with zipfile.ZipFile("hollow.zip", "w") as z:
        z.writestr("readme.txt", "no pictures")
    Path("cut.zip").write_bytes(Path("hollow.zip").read_bytes()[:50])
    line = error_of(capfd, main, dcgan, *TINY, "--max_steps 1", flags)
    flag, value = words(flags, "runs/dcgan")[:2]
    assert flag in line or value in line or "GPU" in line

def test_too_few_images(capfd):
    assert "give --batch_size 3 or less" in error_of(capfd, main, dcgan, "--max_images 3 --img_size 16")
    assert "give more images" in error_of(capfd, main, dcgan, "--max_images 1 --img_size 16")

def test_acgan_needs_classes(folder, capfd):
    assert str(folder / "cat") in error_of(capfd, main, acgan, *TINY, "--dataset", folder / "cat")

@pytest.mark.parametrize(("flags", "named"), [
    ("--out x.jpg", "--out x.jpg"), ("--out file.txt/x.png", "file.txt"), ("--out file.txt/x.npz", "file.txt"),
    ("--out file.txt/x", "file.txt"), ("--walk_dim 8", "--walk_dim 8"), ("--labels 3,bird", "--labels 3,bird")])
def test_mistake_in_sampling(flags, named, capfd):
    train(acgan, "--max_steps 1")
    Path("file.txt").touch()
    assert named in error_of(capfd, main, acgan, "--sample run", flags)

class Code:
    def __reduce__(self):
        return os.mkdir, ("code-ran",)

def test_checkpoints_that_cannot_be_used(script, capfd):
    """Cut, of another script, somebody's else or with code in it: by --sample and --resume; no code runs."""
    ckpt = train(script, "--max_steps 1")
    whole = Path("run/checkpoint.pt").read_bytes()
    for name, data in (("cut.pt", whole[:len(whole) // 2]), ("empty.pt", b""), ("text.pt", b"hello"),
                       ("evil.pkl", pickle.dumps(Code()))):
        Path(name).write_bytes(data)
    torch.save(ckpt["netG"], "legacy.pth", _use_new_zipfile_serialization=False)  # as older PyTorch wrote
    Path("cut.pth").write_bytes(Path("legacy.pth").read_bytes()[:1500])
    for name, content in (("other.pt", ckpt | {"script": "stylegan"}), ("evil.pt", {"netG": Code()}),
                          ("module.pt", torch.nn.Linear(2, 2)), ("strange.pt", {"weights": torch.zeros(3)}),
                          ("list.pt", [1]), ("tensor.pt", torch.zeros(3))):
        torch.save(content, name)
    for file in set(Path().glob("*.p*")) - {Path("legacy.pth")}:
        for flag in ("--sample", "--resume"):
            line = error_of(capfd, main, script, flag, file)
            assert str(file) in line, (file, flag)
            assert "weights_only" not in line, (file, flag)
    assert not Path("code-ran").exists()
    assert "legacy.pth" in error_of(capfd, main, script, "--resume legacy.pth")  # weights without a run

def test_resume_that_cannot_be(capfd):
    """With other nets, by another script, of a finished run: the checkpoint stays as it is."""
    train(dcgan, "--epochs 1")
    before = Path("run/checkpoint.pt").read_bytes()
    for flags in ("--ngf 8", "--ndf 8", "--nz 9", "--img_size 32", "--nc 3", "--sn", "--optim_d rmsprop"):
        assert "run/checkpoint.pt" in error_of(capfd, main, dcgan, "--resume run --max_steps 12", flags)
    assert "--epochs" in error_of(capfd, main, dcgan, "--resume run")
    for flag in ("--resume", "--sample"):
        assert "dcgan" in error_of(capfd, main, gan, flag, "run/checkpoint.pt")
    assert Path("run/checkpoint.pt").read_bytes() == before

def test_no_memory_and_an_interrupt_are_one_line_and_a_fault_of_the_gpu_is_none(capfd, monkeypatch):
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nGPU 0 has ..."), MemoryError(), KeyboardInterrupt()):
        monkeypatch.setattr(gan, "train", mock.Mock(side_effect=error))
        assert error_of(capfd, main, gan).startswith("gan.py: ")
    monkeypatch.setattr(gan, "train", mock.Mock(side_effect=RuntimeError("CUDA error: an illegal memory access")))
    with pytest.raises(RuntimeError, match="illegal"):
        main(gan)

def edited(*argv):
    sys.argv = ["mine.py", *argv]
    runpy.run_path("mine.py", run_name="__main__")

@pytest.mark.parametrize(("old", "new"), [("return self.main(z[:, :", "return self.mian(z[:, :"),  # a typo in Generator
                                          ("torch.randn(len(real), args.nz,", "torch.randn(len(real), args.nz + 1,")])
def test_a_mistake_in_an_edit_keeps_its_traceback(old, new):
    """A copy of the script in a folder of its own, as a reader edits it."""
    text = (ROOT / "dcgan.py").read_text()
    assert text.count(old) == 1
    Path("mine.py").write_text(text.replace(old, new))
    ended(forked(edited, *TINY, "--max_steps", "1"), 60)
    said = Path("said.txt").read_text()
    assert "Traceback" in said
    assert ", in train\n" in said
