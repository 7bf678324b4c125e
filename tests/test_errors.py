"""A user's mistake: one line that names the flag or file and the way out, exit code not 0, no traceback."""

import os
import signal
import sys
import zipfile

import pytest
import torch
from conftest import TINY, command, error_of, picture, train

import dcgan
import gan


def run(script, *argv):
    args = script.get_args([*TINY, *map(str, argv)])
    script.sample(args) if args.sample else script.train(args)


def messages(script, capfd, *argv):
    return error_of(capfd, run, script, *argv)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--dataset", "mnits"], "mnits: no such folder or .zip, and not one of digits, mnist"),
        (["--dataset", "no/such/path"], "--dataset no/such/path"),
        (["--dataset", "empty"], "empty: no images in it"),
        (["--dataset", "text.zip"], "text.zip: cannot be read as a zip file"),
        (["--dataset", "hollow.zip"], "hollow.zip: no images in it"),
        (["--dataset", "broken"], "none of 2 images can be read"),
        (["--batch_size", "65"], "--batch_size 65"),
        (["--batch_size", "0"], "--batch_size: 0 is not 1 or more"),
        (["--lr", "fast"], "--lr: invalid float value: 'fast'"),
        (["--dropout", "1.5"], "--dropout"),
        (["--walk_step", "1"], "--walk_step goes with --walk_dim"),
        (["--sample", "x", "--walk_dim", "1", "--walk_step", "nan"], "--walk_step: nan is not between"),
        (["--dataset", "no\nsuch"], "--dataset no such: no such folder"),
        (["--epocs", "3"], "--epocs"),
        (["--device", "cuda:77"], "--device cuda:77: cannot be used here"),
        (["--device", "gpu"], "--device gpu: cannot be used here"),
        (["--loss", "hinge", "--real_label", "0.9"], "--real_label"),
        (["--sample", "x.pt", "--interpolate", "--walk_dim", "1"], "choose one"),
        (["--sample", "x.pt", "--resume", "y.pt"], "choose one"),
        (["--out", "x.png"], "--out goes with --sample"),
        (["--beta1", "1"], "--beta1"),
        (["--dataset", ""], "no such folder"),
        (["--resume"], "--resume: no checkpoint in runs/"),
        (["--resume", "missing.pt"], "missing.pt: no such file"),
        (["--sample", "missing.pt"], "missing.pt: no such file"),
        (["--sample", "truncated.pt"], "truncated.pt: cannot be read"),
        (["--sample", "noise.pt"], "noise.pt"),
        (["--sample", "empty.pt"], "empty.pt"),
        (["--sample", "other.pt"], "other.pt: no generator of"),
        (["--sample", "tensor.pt"], "tensor.pt: no generator of"),
        (["--resume", "other.pt"], "other.pt"),
        (["--out_dir", "file.txt"], "--out_dir file.txt"),
    ],
)
def test_message(script, argv, expected, capfd):
    os.makedirs("empty")
    os.makedirs("broken")
    for name in ("broken/a.png", "broken/b.jpg", "text.zip", "file.txt", "noise.pt"):
        with open(name, "w") as f:
            f.write("hello")
    with zipfile.ZipFile("hollow.zip", "w") as z:
        z.writestr("readme.txt", "no pictures")
    torch.save({"script": "x", "netG": torch.zeros(10000)}, "truncated.pt")
    with open("truncated.pt", "r+b") as f:
        f.truncate(9000)
    open("empty.pt", "w").close()
    torch.save({"weights": torch.zeros(3)}, "other.pt")
    torch.save(torch.zeros(3), "tensor.pt")
    if script.SCRIPT == "acgan" and "broken" in argv:
        expected = "no labels in it"
    assert expected in messages(script, capfd, *argv)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--out", "x.jpg"], "--out x.jpg: give a .png, an .npz or a folder/"),
        (["--interpolate", "--out", "x.png"], "give a .gif"),
        (["--walk_dim", "8"], "--walk_dim 8: this generator's latents have coordinates 0 to 7"),
        (["--out", "file.txt/x.png"], "--out file.txt/x.png: cannot be written"),
        (["--out", "/proc/x.npz"], "--out /proc/x.npz: cannot be written"),
    ],
)
def test_sampling_message(script, argv, expected, capfd):
    train(script, "--max_steps", 1)
    open("file.txt", "w").close()
    assert expected in messages(script, capfd, "--sample", "run/checkpoint.pt", *argv)


def test_checkpoint_of_another_script(capfd):
    train(gan, "--max_steps", 1)
    assert "gan.py wrote it" in error_of(capfd, dcgan.get_args, ["--resume", "run/checkpoint.pt"])
    assert "written by gan.py" in error_of(capfd, dcgan.load_generator, "run/checkpoint.pt")


def test_tampered_checkpoint(script, capfd):
    ckpt = train(script, "--max_steps", 1)
    for part in ("netD", "optG", "step"):
        torch.save({k: v for k, v in ckpt.items() if k != part}, "less.pt")
        assert "less.pt" in messages(script, capfd, "--resume", "less.pt")
    torch.save({k: v for k, v in ckpt.items() if k != "args"}, "less.pt")
    assert "less.pt" in messages(script, capfd, "--resume", "less.pt")
    torch.save({**ckpt, "netG_ema": {}}, "less.pt")
    assert "less.pt" in messages(script, capfd, "--sample", "less.pt")
    torch.save({"script": script.SCRIPT}, "less.pt")
    assert "less.pt" in messages(script, capfd, "--sample", "less.pt")


def test_finished_run_says_so(script, capfd):
    train(script, "--epochs", 1)
    assert "has done 1; go on with --epochs 11" in messages(
        script, capfd, "--resume", "run/checkpoint.pt", "--epochs", 1
    )


def test_run_is_never_overwritten(script, capfd):
    train(script, "--max_steps", 1)
    assert "--out_dir run: there is a run in it" in messages(script, capfd, "--out_dir", "run")


@pytest.mark.parametrize("environment", [{"RANK": "x"}, {"RANK": "1"}, {"WORLD_SIZE": "0"}, {"WORLD_SIZE": "2"},
                                         {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}])
def test_a_launcher_that_was_not_torchrun(script, environment, capfd, monkeypatch):
    """And not a wait of hours for processes that nobody started."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    line = error_of(capfd, train, script, "--max_steps", "1")
    assert "in the environment do not fit together" in line


def test_sizes_the_net_cannot_make(capfd):
    assert "--img_size 48" in messages(dcgan, capfd, "--img_size", 48)
    assert "--img_size 0" in messages(gan, capfd, "--img_size", 0)


def test_acgan_needs_labels(folder, capfd):
    import acgan

    assert "one folder per class" in messages(acgan, capfd, "--dataset", folder / "cat")


@pytest.mark.parametrize("name", ["gan", "dcgan", "acgan"])
def test_as_a_user_sees_it(name):
    for argv, code in ((["--dataset", "nowhere"], 2), (["--lr", "fast"], 2), (["--sample", "nothing.pt"], 1)):
        done = command(name, *argv)
        assert done.returncode == code
        assert done.stdout == ""
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith(f"{name}.py: error: ")


@pytest.mark.parametrize("cut", range(0, 4000, 400))
def test_damaged_bytes_never_end_in_a_traceback(script, cut, capfd):
    """A legacy (not zipped) file, as older PyTorch and pickle write, cut and garbled."""
    torch.save(script.Generator(5, 2, 1, 16).state_dict(), "old.pth", _use_new_zipfile_serialization=False)
    content = bytearray(open("old.pth", "rb").read())  # noqa: SIM115
    for name, data in (("cut.pth", content[:cut]), ("noise.pth", content[:cut] + b"\xff\x00Q" + content[cut + 3 :])):
        with open(name, "wb") as f:
            f.write(data)
    assert "cut.pth" in error_of(capfd, script.load_generator, "cut.pth")


@pytest.mark.parametrize(
    "content",
    [
        {"generator": [1]},
        {"netG": 5},
        {1: torch.zeros(2)},
        [],
        7,
        "text",
        {f"main.{i}.weight": torch.zeros(2, 2, 4, 4) for i in range(20)},
    ],
)
def test_strange_content(script, content, capfd):
    torch.save(content, "strange.pt")
    message = error_of(capfd, script.load_generator, "strange.pt")
    assert "strange.pt" in message or "--img_size" in message


def test_attributes(capfd, tmp_path):
    import acgan

    assert "--attr picks classes of --dataset celeba" in messages(acgan, capfd, "--attr", "Smiling")
    (tmp_path / "data" / "img_align_celeba").mkdir(parents=True)
    picture(0).save("data/img_align_celeba/000001.jpg")
    celeba = ("--dataset", "celeba", "--attr", "Smiling")
    assert "no list_attr_celeba.txt under ./data" in messages(acgan, capfd, *celeba)
    for text in ("", "1", "2\nSmiling\n000001.jpg x\n"):
        (tmp_path / "data" / "list_attr_celeba.txt").write_text(text)
        assert "is not CelebA's table" in messages(acgan, capfd, *celeba)
    (tmp_path / "data" / "list_attr_celeba.txt").write_text("1\nMale\n000001.jpg 1\n")
    assert "--attr Smiling: not in" in messages(acgan, capfd, *celeba)
    (tmp_path / "data" / "list_attr_celeba.txt").write_text("1\nSmiling\n000002.jpg 1\n")
    assert "says nothing of" in messages(acgan, capfd, *celeba)


def test_pretraining_must_leave_something(capfd):
    import acgan

    assert "--pretrain_aux 5" in messages(acgan, capfd, "--pretrain_aux", 5, "--epochs", 2)


def test_too_little_memory_is_one_line_and_a_fault_of_the_gpu_is_not_that(script, capfd, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{script.SCRIPT}.py"])
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    for text in ("CUDA out of memory. Tried to allocate 2 GiB", "DefaultCPUAllocator: can't allocate memory"):
        monkeypatch.setattr(script, "train", lambda args, text=text: (_ for _ in ()).throw(RuntimeError(text)))
        assert f"not enough memory ({text}); lower --batch_size" in error_of(capfd, script.main)
    fault = RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(script, "train", lambda args: (_ for _ in ()).throw(fault))
    with pytest.raises(RuntimeError, match="illegal"):
        script.main()
