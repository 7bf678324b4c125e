"""Faults that users of other tools reported, each by its smallest input: nothing given is lost, mistaken or dropped."""

import functools
import importlib
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import POSIX, ROOT, SCRIPTS, TINY, ended, error_of, forked, main, picture, resume, train, words
from PIL import Image

import acgan
import dcgan
import gan

def load(dataset, *argv, script=dcgan, **kwargs):
    return script.load_data(script.get_args(words("--img_size 16 --dataset", dataset, *argv)), **kwargs)

def whole(folder):
    """How many steps the checkpoint has, and the log: equal if one process alone wrote them."""
    steps = [json.loads(line)["step"] for line in Path(folder, "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))
    return torch.load(f"{folder}/checkpoint.pt", weights_only=True)["step"]

# ----------------------------------------------------------------------------- 1: two processes, one folder

@POSIX
def test_starts_at_the_same_time_take_folders_of_their_own():
    """Without --out_dir, and with the same one for all."""
    for flags, names in (("", ["runs/gan-digits", "runs/gan-digits-2", "runs/gan-digits-3"]), ("--out_dir x", ["x", "x-2", "x-3"])):
        processes = [forked(main, "gan", *TINY, "--max_steps 5", flags, said=f"said{i}.txt") for i in range(3)]
        assert [ended(process, 60) for process in processes] == [0, 0, 0]
        assert [whole(name) for name in names] == [5, 5, 5]

@POSIX
def test_a_run_is_resumed_once():
    train(gan, "--max_steps 1")
    first = forked(main, "gan", "--resume run --max_steps 1000000", said="first.txt")
    while len(Path("run/log.jsonl").read_text().splitlines()) < 5:
        time.sleep(0.05)
    assert ended(forked(main, "gan", "--resume run --max_steps 1000000"), 60) == 1
    assert "another process is training in run" in Path("said.txt").read_text()
    os.kill(first.pid, signal.SIGTERM)
    assert ended(first, 60) == 128 + signal.SIGTERM
    assert whole("run") > 5

# ------------------------------------------------------------------------------------------ 2: the cache

def test_the_cache_is_of_these_pictures_only(folder):
    """The same names, sizes and times in another folder; in the same one, exchanged by cp -p; a torchvision set."""
    def fill(path, value):
        Path(path).mkdir(parents=True, exist_ok=True)
        Image.new("L", (16, 16), value).save(f"{path}/000.bmp")
        os.utime(f"{path}/000.bmp", (10**9, 10**9))

    fill("A/images", 100)
    fill("B/images", 200)
    assert load("A/images")[0].max() == 100
    assert load("B/images")[0].max() == 200
    shutil.copy2("B/images/000.bmp", "A/images/000.bmp")
    assert load("A/images")[0].max() == 200

def test_the_cache_is_of_this_to_pixels_only(folder, monkeypatch):
    """Somebody who edits a copy sees the edit."""
    before = load(folder)[0]
    monkeypatch.setattr(dcgan, "to_pixels", lambda *args: bytes(16 * 16 * 3))
    assert before.max() > 0 == load(folder)[0].max()

def test_raw_files_of_a_torchvision_set_that_were_exchanged(monkeypatch):
    class Set:
        def __init__(self, value):
            self.data = np.full((2, 28, 28), value, np.uint8)
            self.classes, self.targets = ["a"], [0, 0]

        def __len__(self):
            return 2

        def __getitem__(self, i):
            return Image.fromarray(self.data[i]), 0

    for value in (100, 200):
        monkeypatch.setattr(dcgan, "download", lambda args, value=value: Set(value))
        assert load("mnist")[0].max() == value

def test_a_picture_that_can_be_read_again_is_read_again(folder, capfd):
    good = (folder / "cat" / "000.png").read_bytes()
    (folder / "cat" / "000.png").write_bytes(b"")
    for _ in range(2):
        assert len(load(folder)[0]) == 23
        assert "cat/000.png" in capfd.readouterr().err
    (folder / "cat" / "000.png").write_bytes(good)
    assert len(load(folder)[0]) == 24
    assert "left out" not in capfd.readouterr().err

# ------------------------------------------------------------------------------- 3, 11, 12, 13: folders

@POSIX
def test_folders_behind_links(folder):
    """Classes that are links, only links, and a link in circles; celeba behind one."""
    os.makedirs("d")
    shutil.copytree(folder / "cat", "d/cat")
    os.symlink(folder / "dog", "d/dog")
    os.symlink(Path("d").resolve(), "d/cat/round")
    images, labels, classes = load("d")
    assert (len(images), labels.tolist(), classes) == (24, [0] * 12 + [1] * 12, ["cat", "dog"])
    os.makedirs("links/only")
    for file in (folder / "cat").iterdir():
        os.symlink(file, f"links/only/{file.name}")
    assert len(load("links")[0]) == 12
    os.makedirs("elsewhere/img_align_celeba")
    picture(1).save("elsewhere/img_align_celeba/000001.jpg")
    os.makedirs("data", exist_ok=True)
    os.symlink(Path("elsewhere").resolve(), "data/celeba")
    assert len(load("celeba")[0]) == 1

@POSIX
def test_what_cannot_be_read_is_named(folder, capfd, monkeypatch):
    """A folder that may not be entered, a link to nothing, and one that is no image."""
    scandir = os.scandir

    def forbidden(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    os.symlink("nothing", folder / "cat" / "gone.png")
    os.symlink("nothing", folder / "notes.txt")
    assert len(load(folder)[0]) == 12
    said = capfd.readouterr().err
    for name in ("dog: Permission denied", "gone.png: No such file", "notes.txt: No such file"):
        assert name in said

def test_files_that_are_no_images_are_counted(folder, capfd):
    (folder / ".fish").mkdir()
    for name in ("a.HEIC", "b.heic", "c.jpg_large", "d", ".hidden", "cat/e.txt", ".fish/f.png"):
        (folder / name).write_bytes(b"x")
    assert len(load(folder)[0]) == 24
    said = capfd.readouterr().err
    for text in ("2 .heic", "1 .jpg_large", "1 without a suffix", "1 .txt", "1 hidden images", "save .heic as .jpg"):
        assert text in said

def test_data_sets_that_are_none(capfd):
    Path("cut.zip").write_bytes(b"PK half of it")
    assert "empty" in error_of(capfd, main, dcgan, "--dataset=")
    assert "incomplete" in error_of(capfd, load, "cut.zip")

def test_classes_beside_which_there_is_a_picture(folder, capfd):
    """dcgan.py takes it, acgan.py leaves it out and says so; a zip with backslashes has classes too."""
    picture(7).save(folder / "preview.jpg")
    assert len(load(folder)[0]) == 25
    images, labels, classes = load(folder, script=acgan, labelled=True)
    assert (len(images), sorted(set(labels)), classes) == (24, [0, 1], ["cat", "dog"])
    assert "left out 1 images" in capfd.readouterr().err
    assert train(acgan, "--max_steps 1 --dataset", folder)["classes"] == ["cat", "dog"]
    shutil.copytree(folder, "deeper/inner")
    shutil.copy(folder / "preview.jpg", "deeper")
    assert load("deeper", script=acgan, labelled=True)[2] == ["cat", "dog"]
    capfd.readouterr()
    load(f"{folder} --max_images 1", script=acgan, labelled=True)
    assert "no image of cat" in capfd.readouterr().err
    with zipfile.ZipFile("w.zip", "w") as z:
        for file in sorted(folder.glob("*/*.png")):
            z.writestr(f"pets\\{file.parent.name}\\{file.name}", file.read_bytes())
    assert load("w.zip")[2] == ["cat", "dog"]

# ------------------------------------------------------------------------------------ 4, 5: checkpoints

def test_the_last_checkpoint_is_told_by_its_name(monkeypatch):
    train(gan, "--epochs 2 --keep_every 1")
    shutil.copytree("run", "copied")
    names = ("checkpoint.pt", "checkpoint_epoch_0001.pt", "checkpoint_epoch_0002.pt")
    for time_of, name in enumerate(names):
        os.utime(f"copied/{name}", (10**9 + time_of, 10**9 + time_of))
    assert gan.last_checkpoint("copied") == os.path.join("copied", "checkpoint.pt")
    os.remove("copied/checkpoint.pt")
    os.utime("copied/checkpoint_epoch_0001.pt")
    assert gan.last_checkpoint("copied") == os.path.join("copied", "checkpoint_epoch_0002.pt")

def test_a_run_of_an_older_script_does_not_stop_the_others(capfd):
    stopped = train(gan, "--max_steps 2", out="runs/gan-older")
    torch.save({name: stopped[name] for name in stopped if name not in ("total", "time")}, "runs/gan-older/checkpoint.pt")
    torch.save(train(gan, "--max_steps 2", out="runs/gan-new") | {"total": 9}, "runs/gan-new/checkpoint.pt")
    assert gan.get_args(["--resume"]).out_dir == "runs/gan-new"
    assert "runs/gan-older" in capfd.readouterr().err

def test_a_resume_into_another_folder_takes_a_free_one():
    train(gan, "--max_steps 1")
    train(gan, "--max_steps 3", out="other")
    gan.train(gan.get_args(words("--resume run --max_steps 2 --out_dir other")))
    assert (whole("other"), torch.load("other-2/checkpoint.pt", weights_only=True)["step"]) == (3, 2)

def test_a_resume_from_a_numbered_checkpoint_overwrites_nothing():
    train(gan, "--epochs 2 --keep_every 1")
    before = {file: file.read_bytes() for file in Path("run").rglob("*.*") if file.is_file()}
    gan.train(gan.get_args(words("--resume run/checkpoint_epoch_0001.pt --epochs 3 --keep_every 1")))
    assert sorted(file.name for file in Path("run-2").glob("*.pt")) == ["checkpoint.pt", "checkpoint_epoch_0002.pt",
                                                                        "checkpoint_epoch_0003.pt"]
    assert {file: file.read_bytes() for file in before} == before

def test_other_classes_are_refused(folder, capfd):
    train(acgan, "--max_steps 1 --dataset", folder)
    (folder / "cat").rename(folder / "zebra")
    said = error_of(capfd, main, acgan, "--resume run --max_steps 2")
    assert "cat, dog" in said
    assert "dog, zebra" in said

# ---------------------------------------------------------------------------------------- 6: pixel values

@pytest.mark.parametrize(("dtype", "top", "suffix"), [
    (np.uint16, 4095, "png"), (np.uint16, 65535, "png"), (np.float32, 1, "tiff"), (np.float32, 255, "tiff"),
    (np.float32, 65535, "tiff"), (np.int32, 4095, "tiff")])
def test_values_are_scaled_by_what_the_data_set_holds(dtype, top, suffix):
    """12 bits in 16; floats to 1, 255 and 65535: a ramp to the top is a ramp to 255, in a darker picture too."""
    os.makedirs("deep")
    ramp = np.linspace(0, top, 16).astype(dtype)[None].repeat(16, 0)
    Image.fromarray(ramp).save(f"deep/a.{suffix}")
    Image.fromarray((ramp / 4).astype(dtype)).save(f"deep/b.{suffix}")
    images, *_ = load("deep", "--nc 1")
    np.testing.assert_allclose(images[0, 0, :, 0], np.linspace(0, 255, 16), atol=1)
    np.testing.assert_allclose(images[1, 0, :, 0], np.linspace(0, 64, 16), atol=1)

def test_one_deep_picture_among_many():
    os.makedirs("deep")
    for i in range(150):
        Image.new("L", (16, 16), 200).save(f"deep/{i:03d}.png")
    Image.fromarray(np.full((16, 16), 4095, np.uint16)).save("deep/001.png")
    images, *_ = load("deep", "--nc 1")
    assert (images[0].max(), images[1].min()) == (200, 255)

def test_a_black_data_set_is_warned_of(capfd):
    os.makedirs("masks")
    Image.fromarray(np.eye(16, dtype=np.uint8)).save("masks/a.png")
    load("masks")
    assert "dark" in capfd.readouterr().err

@pytest.mark.parametrize(("values", "expected"), [
    (np.linspace(-1, 1, 16), np.linspace(0, 255, 16)), (np.linspace(-1000, 2000, 16), np.linspace(0, 255, 16)),
    (np.r_[np.linspace(0, 1, 15), 1.0001], np.r_[np.linspace(0, 255, 15), 255]),
    (np.r_[np.linspace(0, 4095, 14), np.inf, np.nan], np.r_[np.linspace(0, 255, 14), 255, 0])])
def test_values_below_0_a_little_beyond_and_not_finite(values, expected):
    """Signed floats and CT scans; what resizing leaves; infinities. The one bright picture of many counts too."""
    os.makedirs("deep")
    for i in range(250):
        scaled = values if i == 7 else values / 2
        Image.fromarray(scaled.astype(np.float32)[None].repeat(16, 0)).save(f"deep/{i:03d}.tiff")
    images, *_ = load("deep", "--nc 1")
    np.testing.assert_allclose(images[7, 0, :, 0], expected, atol=1)

# ------------------------------------------------------------------------------------ 8: ranges of numbers

def numbers(script):
    """(flag, kind, low, high) of every number that a script takes; choices are told apart by argparse."""
    for action in importlib.import_module(script).make_parser()._actions:
        if action.option_strings and action.type and not action.choices:
            assert isinstance(action.type, functools.partial), f"{action.dest} of {script} has no range"
            yield action.option_strings[0], *action.type.args

@pytest.mark.parametrize("name", SCRIPTS)
def test_every_number_has_a_range(name, capfd):
    script = importlib.import_module(name)
    found = list(numbers(name))
    assert len(found) > 15
    for flag, kind, low, high in found:
        sampling = ["--sample", "x"] if flag in ("--n_samples", "--walk_dim") else []
        for good in (low, high):
            value = getattr(script.get_args([*sampling, f"{flag}={good}"]), {"--lr": "lr_g"}.get(flag, flag[2:]))
            assert value == kind(good)
        for bad in ("nan", "x", "", low - 1, high * 2 + 1, float("inf")):
            assert flag in error_of(capfd, main, script, *sampling, f"{flag}={bad}")

def test_a_launcher_that_is_none(capfd, monkeypatch):
    for env in ({"WORLD_SIZE": "2"}, {"WORLD_SIZE": "abc"}, {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}):
        for name, value in ({"WORLD_SIZE": "2"} | env).items():
            monkeypatch.setenv(name, value)
        assert "torchrun" in error_of(capfd, main, gan, *TINY, "--max_steps 1")

def test_a_mistyped_recipe_ends_at_the_start(capfd, monkeypatch):
    for recipe, said in (("--dsteps 5", "--dsteps"), ("--gp R1", "R1"), ("--ngf 0", "0")):
        monkeypatch.setitem(dcgan.RECIPES, "paper", recipe)
        assert said in error_of(capfd, main, dcgan, *TINY, "--max_steps 1")

# --------------------------------------------------------------------------------------- 9, 10: surroundings

def test_a_terminal_that_is_not_utf8(folder):
    shutil.copytree(folder, "猫")
    env = os.environ | {"PYTHONIOENCODING": "cp1252"}
    for argv in ("--dataset 猫 --max_steps 1 --out_dir 犬", "--sample 犬 --device cpu"):
        flags = TINY if "dataset" in argv else []
        done = subprocess.run([sys.executable, ROOT / "gan.py", *flags, *argv.split()], env=env, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr

def test_a_data_dir_that_may_only_be_read(monkeypatch, tmp_path):
    os.makedirs("input")
    """Or that is not there, in a folder that may only be read."""
    monkeypatch.setattr(os, "access", lambda path, mode: "input" not in str(path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for data_dir in ("input", "input/sub"):
        assert len(load("digits --max_images 10 --data_dir", data_dir)[0]) == 10
    assert os.listdir("input") == []

# ---------------------------------------------------------------------------------- 14: signals, notebooks

@POSIX
def test_a_lost_terminal_saves():
    """The terminal is closed, as when ssh is lost: SIGHUP comes, and nothing can be written there any more."""
    parent, child = pty.openpty()
    argv = [sys.executable, ROOT / "gan.py", *TINY, *words("--max_steps 1000000 --out_dir run")]
    process = subprocess.Popen(argv, stdin=child, stdout=child, stderr=child, start_new_session=True)
    os.close(child)
    threading.Thread(target=lambda: [None for _ in iter(functools.partial(drained, parent), b"")], daemon=True).start()
    while not Path("run/log.jsonl").exists():
        time.sleep(0.1)
    os.close(parent)
    os.kill(process.pid, signal.SIGHUP)
    assert process.wait(60) == 128 + signal.SIGHUP
    assert whole("run") >= 1

def drained(fd):
    try:
        return os.read(fd, 1000)
    except OSError:
        return b""

def test_an_imported_script_leaves_signals_and_works_in_a_thread():
    before = signal.getsignal(signal.SIGINT)
    train(gan, "--max_steps 1")
    assert signal.getsignal(signal.SIGINT) == before
    thread = threading.Thread(target=train, args=(gan, "--max_steps 1"), kwargs={"out": "threaded"})
    thread.start()
    thread.join()
    assert whole("threaded") == 1

def test_in_a_notebook_cell(script):
    """Pasted there, a script only defines names; train() then works."""
    cell = {"__name__": "__main__"}
    exec(compile((ROOT / f"{script.SCRIPT}.py").read_text(), "<cell>", "exec"), cell)  # noqa: S102  what a notebook does
    cell["train"](cell["get_args"]([*TINY, "--out_dir", "run", "--max_steps", "1"]))
    assert whole("run") == 1

@pytest.mark.parametrize("name", SCRIPTS)
def test_without_docstrings(name):
    done = subprocess.run([sys.executable, "-OO", ROOT / f"{name}.py", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--batch_size" in done.stdout

# ------------------------------------------------------------------------------------- 15, 16, 18: small ones

def test_a_renamed_copy_reads_its_older_runs():
    shutil.copy(ROOT / "gan.py", "my_gan.py")
    train(gan, "--max_steps 1")
    for argv in ("--resume run --max_steps 2", "--sample run --n_samples 2 --device cpu --out x.png"):
        done = subprocess.run([sys.executable, "my_gan.py", *argv.split()], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert "python my_gan.py --sample run" in subprocess.run(
        [sys.executable, "my_gan.py", *words("--resume run --max_steps 3")], capture_output=True, text=True, check=False).stdout

@pytest.mark.parametrize("wrap", ["netG_state_dict", "generator_state_dict", "gen", "G", None])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "generator.", "netG.", "module._orig_mod."])
def test_state_dicts_under_any_name(wrap, prefix):
    netG, netD = dcgan.Generator(5, 4, 3, 32), dcgan.Discriminator(3, 4, 32)
    state = {f"{prefix}{name}": w for name, w in netG.state_dict().items()}
    others = {f"netD.{name}": w for name, w in netD.state_dict().items()}
    torch.save({"names": {0: "cat"}, "models": {"D": netD.state_dict(), wrap: state}, "epoch": 3} if wrap else (others if prefix else {}) | state, "theirs.pth")
    loaded, _ = dcgan.load_generator("theirs.pth")
    assert loaded.config | {"widest": 8} == netG.config  # its widest layer has 4 times ngf, and could have 8
    assert torch.equal(loaded.main[0].weight, netG.main[0].weight)

def test_flags_that_are_for_other_work_are_refused(capfd):
    """Sampling's without --sample, training's with it, a recipe for a run that has one."""
    train(gan, "--max_steps 1")
    for argv, said in (("--n_samples 5", "--n_samples"), ("--sample run --ngf 3", "--ngf"), ("--labels 1", "--labels"),
                       ("--resume run --recipe paper", "--recipe"), ("--resume --dataset digits", "--resume RUN"),
                       ("--sample=", "No such file"), ("--resume=", "No such file")):
        assert said in error_of(capfd, main, gan, argv)

def test_labels_with_spaces_and_folders_with_dots(folder):
    train(acgan, "--max_steps 1 --dataset", folder)
    acgan.sample(acgan.get_args(["--sample", "run", "--device", "cpu", "--labels", "0, dog", "--n_samples", "3", "--out", "s.v1/"]))
    assert len(os.listdir("s.v1")) == 3

def test_printed_commands_are_quoted(capfd):
    gan.train(gan.get_args([*TINY, "--max_steps", "1", "--out_dir", "my run"]))
    assert "--sample 'my run'" in capfd.readouterr().out

def test_a_folder_beside_a_data_set_of_its_name(folder, capfd):
    shutil.copytree(folder, "digits")
    assert load("digits --max_images 10")[2] == list("0123456789")
    assert "./digits" in capfd.readouterr().err
    assert load("./digits")[2] == ["cat", "dog"]

def test_betas_of_a_resumed_run_are_those_asked_for():
    train(gan, "--max_steps 1")
    assert resume(gan, "--max_steps 2 --beta1 0.7")["optG"]["param_groups"][0]["betas"] == (0.7, 0.999)

# ------------------------------------------------------------------------------------------ 17: many samples

def test_many_samples_do_not_fill_memory(monkeypatch):
    """Each batch is written before the next is made."""
    train(gan, "--max_steps 1")
    written, generate = [], gan.generate
    monkeypatch.setattr(gan, "generate", lambda *args: written.append(len(list(Path("folder").glob("*")))) or generate(*args))
    main(gan, "--sample run --device cpu --n_samples 50 --batch_size 10 --out folder/")
    assert written[2:] == [20, 30, 40]  # one batch ahead
    main(gan, "--sample run --device cpu --n_samples 50 --batch_size 10 --out x.npz")
    files = [np.asarray(Image.open(f"folder/{i:06d}.png")) for i in range(50)]
    np.testing.assert_array_equal(np.load("x.npz")["arr_0"][..., 0], np.stack(files))

# ------------------------------------------------------------------------------- mistakes in somebody's edit

@pytest.mark.parametrize(("old", "new", "said"), [
    ('self.config = {"nz": nz, "ngf": ngf, "nc": nc, "img_size": img_size, "widest": widest}', "config = {}", "config"),
    ('"img_size": img_size, "widest"', '"img_size": 2 * img_size, "widest"', "img_size 32, not --img_size"),
    ('"ngf": ngf, "nc"', '"ngf": 2 * ngf, "nc"', "mismatch"),
    ("netG_ema=netG_ema, ", "", "missing 1 required keyword-only argument: 'netG_ema'"),
    (" --gp r1", "", "--gp has no default: write one into RECIPES"),
    ("copy.deepcopy(netG).eval().requires_grad_(False)", "netG", "copy.deepcopy(netG).eval()"),
    ('"img_size": img_size, "widest"', '"widest"', "KeyError: 'img_size'"),
    ("replay=replay)", "replay=0.5)", "'float' object has no attribute 'state_dict'"),
    ('choices=("bce", "hinge"), default="bce"', 'type=Path, default="bce"', "PosixPath"),
    ("layers += [nn.ConvTranspose2d(ngf, nc, 4, 2, 1, bias=False)", "layers += [nn.ConvTranspose2d(ngf, nc, 3, 1, 1, bias=False)", "shape"),
    ("def forward(self, z, labels=None)", "def forward(self, z)", "forward")])
def test_a_mistake_in_an_edit_shows_before_the_first_step(old, new, said):
    text = (ROOT / "dcgan.py").read_text()
    assert text.count(old) >= 1
    Path("mine.py").write_text(text.replace(old, new, 1))
    argv = [sys.executable, "mine.py", *TINY, *words("--max_steps 3 --out_dir run")]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert "Traceback" in done.stderr
    assert said in done.stderr
    assert not Path("run/log.jsonl").exists()

def test_a_net_with_classes_on_images_without(monkeypatch):
    os.mkdir("flat")
    for i in range(8):
        Image.new("RGB", (16, 16), (30 * i, 99, 0)).save(f"flat/{i}.png")
    run = acgan.Run
    monkeypatch.setattr(acgan, "Run", lambda args, labelled: run(args))
    with pytest.raises(ValueError, match="labelled=True"):
        train(acgan, "--dataset flat --max_steps 1")
