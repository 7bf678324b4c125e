"""Faults on purpose: killed at any moment, no room left, damaged and hostile files. `pytest --slow` runs them longer.

Every long loop counts its cases and asserts the count; the seeds are fixed.
"""

import contextlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import POSIX, TINY, assert_same, command, ended, forked, main, picture, train
from PIL import Image

import acgan
import dcgan
import gan

pytestmark = POSIX
slow = pytest.mark.slow

def said(file=Path("said.txt")):
    return file.read_text(errors="replace") if file.exists() else ""

def run(name, *argv):
    """A run that saves after each step, or goes on where it stopped."""
    go_on = ["--resume cut"] if Path("cut/checkpoint.pt").exists() else [*TINY, "--max_steps 40 --save_interval 1", *argv]
    main(name, *go_on)

@pytest.mark.parametrize(("script", "signum", "wanted"), [
    (gan, signal.SIGKILL, 3), *(pytest.param(script, signum, wanted, marks=slow) for script in (gan, dcgan, acgan)
                                for signum, wanted in ((signal.SIGKILL, 60), (signal.SIGTERM, 20), (signal.SIGINT, 20)))])
def test_killed_at_random_moments(script, signum, wanted):
    """Most signals meet a save: each resume loads, nothing saved is lost, the end is the same."""
    run(script.SCRIPT, "--out_dir whole")
    whole = script.load_checkpoint("whole/checkpoint.pt", [script.SCRIPT])
    rng, kills, saved = np.random.default_rng(0), 0, 0
    while kills < wanted:
        shutil.rmtree("cut", ignore_errors=True)
        step = 0
        while step < whole["step"]:
            process = forked(run, script.SCRIPT, "--out_dir cut")
            if (status := ended(process, rng.uniform(0, 0.5))) is None:
                os.kill(process.pid, signum)
                status = ended(process, 20)
                kills += 1
            assert status in (0, 1, -signum, 128 + signum), said()  # 1: interrupted before or after main()'s own handler
            assert not re.search("error: (?!KeyboardInterrupt)", said())
            if not Path("cut/checkpoint.pt").exists():
                shutil.rmtree("cut", ignore_errors=True)  # or the next would get a number
                continue
            saved += status != 0
            now = script.load_checkpoint("cut/checkpoint.pt", [script.SCRIPT])["step"]
            logged = json.loads(Path("cut/log.jsonl").read_text().splitlines()[-1])["step"]
            assert now >= max(step, logged - 1), "a save was lost"
            step = now
        assert_same(script.load_checkpoint("cut/checkpoint.pt", [script.SCRIPT]), whole)
    assert kills >= wanted
    assert saved > 0

def cached(n):
    dcgan.load_data(dcgan.get_args([*TINY, "--max_images", str(n)]))

@pytest.mark.parametrize("wanted", [2, pytest.param(30, marks=slow)])
def test_killed_while_the_cache_is_written(wanted):
    """It is whole, or not there under its name; and three that build it at once do not disturb each other."""
    cached(3000)
    (file,) = Path("data/cache").iterdir()
    whole, rng, kills = file.read_bytes(), np.random.default_rng(0), 0
    while kills < wanted:
        file.unlink(missing_ok=True)
        process = forked(cached, 3000)
        if ended(process, rng.uniform(0, 0.3)) is None:
            os.kill(process.pid, signal.SIGKILL)
            ended(process, 20)
            kills += 1
        assert not file.exists() or file.read_bytes() == whole
    file.unlink(missing_ok=True)
    processes = [forked(cached, 3000) for _ in range(3)]
    assert [ended(process, 60) for process in processes] == [0, 0, 0]
    assert file.read_bytes() == whole

@pytest.mark.parametrize(("argv", "limit"), [
    ("--resume run --max_steps 3", 60000), ("--sample run --out x.png", 250), ("--sample run --out x.npz", 250),
    ("--sample run --out folder/", 100),
    ("--dataset digits --max_images 3000 --out_dir other --max_steps 1", 60000)])
def test_no_room(argv, limit):
    """A limit to the size of files stands for a full disk: one line, no half file, and what was there is there."""
    train(dcgan, "--max_steps 1 --nc 3 --ngf 16")
    before, content = set(Path(".").rglob("*")), Path("run/checkpoint.pt").read_bytes()
    assert ended(forked(main, "dcgan", argv, limit=limit), 60) == 1, said()
    assert "Traceback" not in said()
    assert said().splitlines()[-1].startswith("dcgan.py: error: ")
    assert Path("run/checkpoint.pt").read_bytes() == content
    assert {f.name for f in set(Path(".").rglob("*")) - before} <= {"said.txt", "folder", "log.jsonl", ".lock", "step_00000001.png", "real.png"}

class Code:
    def __reduce__(self):
        return os.mkdir, ("code-ran",)

def damaged(data, rng, kind):
    """Bytes as an accident leaves them: cut, with bits flipped, a piece overwritten, or noise."""
    a, b = sorted(rng.integers(len(data), size=2))
    flipped = bytearray(data)
    for at in rng.integers(len(data), size=rng.integers(1, 30)):
        flipped[at] ^= 1 << rng.integers(8)
    return [data[:a], bytes(flipped), data[:a] + rng.bytes(b - a) + data[b:], rng.bytes(rng.integers(3000))][kind]

def absurd(ckpt, rng, kind):
    """A checkpoint with code in it, or one value of it that nobody would write."""
    state = [ckpt["netG"], ckpt["netD"], ckpt["optG"]["state"], ckpt["optD"]["state"]][rng.integers(4)]
    where = [ckpt, ckpt, ckpt["netG_ema"], ckpt["config"], ckpt["args"], state][kind]
    values = [None, -4, 0, 10**15, 10**30, 2.5, float("nan"), "64", "--help", [1], {}, torch.zeros(2, 3), torch.zeros(0),
              torch.zeros(()).expand(10**15, 1), torch.tensor(float("nan"))]
    key = list(where)[rng.integers(len(where))]
    where[key] = Code() if kind == 0 else values[rng.integers(len(values))]
    return ckpt

@pytest.mark.parametrize(("script", "n"), [(dcgan, 60), *(pytest.param(s, 1000, marks=slow) for s in (gan, dcgan, acgan))])
def test_hostile_checkpoints(script, n):
    """By accident: one line, but where a flipped bit renames an entry, for PyTorch looks at no CRC: less than 1 in 100.
    On purpose: any exception. No code is run, nothing hangs, no interpreter crashes."""
    train(script, "--max_steps 1")
    shutil.move("run", "good")
    good, rng = Path("good/checkpoint.pt").read_bytes(), np.random.default_rng(0)
    refused = read = renamed = 0
    for i in range(n):
        if i % 10 < 4:
            Path("bad.pt").write_bytes(damaged(good, rng, i % 10))
        else:
            with open("bad.pt", "wb") as f:
                save = pickle.dump if i % 20 == 4 else torch.save
                save(absurd(torch.load(io.BytesIO(good), weights_only=True), rng, i % 10 - 4), f)
        for argv in ("--sample bad.pt --n_samples 4 --out x.png",
                     "--resume bad.pt --out_dir again --dataset digits --max_images 64 --max_steps 3 --no-compile"):
            begin = time.perf_counter()
            try:
                main(script, argv)
                read += 1
            except (Exception, SystemExit) as e:  # noqa: BLE001  a flipped bit of a weight may show as an infinite loss
                refused += 1
                renamed += i % 10 < 4 and not isinstance(e, SystemExit)
            assert time.perf_counter() - begin < 20, i
            assert not Path("code-ran").exists(), i
    assert 2 * n == refused + read < 4 * refused
    assert renamed <= n / 100

def strange_image(rng, i):
    """Bytes of a picture of any mode and shape, half of them damaged."""
    size = [(1, 1), (1, 300), (20000, 1), (1, 20000), (33, 17), (64, 64)][rng.integers(6)]
    mode, fmt = [("1", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("CMYK", "JPEG"), ("I;16", "PNG"), ("I", "TIFF"),
                 ("F", "TIFF"), ("YCbCr", "JPEG")][i % 9]
    if mode in ("I;16", "I", "F"):
        dtype = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        img = Image.fromarray((rng.random(size[::-1]) * 60000).astype(dtype))
    else:
        img = picture(i, size).convert(mode)
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = int(rng.integers(0, 12))  # orientation, also absurd ones
    img.save(buffer, fmt, exif=exif, **({"transparency": int(rng.integers(256))} if mode == "P" else {}))
    kind = rng.integers(6)
    return damaged(buffer.getvalue(), rng, kind) if kind < 3 else buffer.getvalue()

@pytest.mark.parametrize("n", [150, pytest.param(1500, marks=slow)])
def test_hostile_images(n, capfd):
    """Each is decoded or skipped by name; nothing else happens."""
    rng, suffixes, bomb = np.random.default_rng(0), ["png", "jpg", "tif", "gif", "webp"], io.BytesIO()
    Image.new("1", (30000, 30000)).save(bomb, "PNG")
    with zipfile.ZipFile("hostile.zip", "w") as z:
        for i in range(n):
            name = f"{i:05d}-{['a', 'ü', 'b b', 'x/y', '名'][rng.integers(5)]}.{suffixes[rng.integers(5)]}"
            z.writestr(name, strange_image(rng, i) if i % 25 else b"")
        z.writestr("bomb.png", bomb.getvalue())
        z.writestr("/absolute.png", picture(1).tobytes())
    images, *_ = dcgan.load_data(dcgan.get_args(["--dataset", "hostile.zip", "--img_size", "16"]))
    skipped = int(re.search(r"left out (\d+) images", capfd.readouterr().err)[1])
    assert len(images) + skipped == n + 2
    assert n / 25 < skipped < n / 2
    assert set(os.listdir()) == {"hostile.zip", "data"}
    assert not Path("/absolute.png").exists()

def infer():
    import infer_ort

    sys.argv = ["infer_ort.py", "model.onnx", "--provider", "cpu", "--n_samples", "4", "--out", "x.png"]
    infer_ort.main()

@slow
def test_hostile_onnx_files(cpp):
    """Each in a process of its own, for a crash inside ONNX Runtime; infer_ort.cpp, if built, meets the same files."""
    train(dcgan, "--max_steps 1 --nc 3")
    assert command("export", "run -o model.onnx").returncode == 0
    good, rng, statuses = Path("model.onnx").read_bytes(), np.random.default_rng(0), []
    for i in range(1000):
        Path("model.onnx").write_bytes(damaged(good, rng, i % 4))
        Path("x.png").unlink(missing_ok=True)
        status = ended(forked(infer), 60)
        assert status in (0, 1, 2), (i, status, said())
        assert (status == 0) == Path("x.png").exists(), i
        statuses.append(status)
        if cpp:
            argv = [cpp, "model.onnx", "--n_samples", "4", "--threads", "1", "--out", "y.png"]
            done = subprocess.run(argv, capture_output=True, text=True, errors="replace", timeout=60, check=False)
            assert done.returncode in (0, 1, 2), (i, done)
            assert done.returncode == 0 or re.fullmatch("infer_ort: error: .+\n", done.stderr), (i, done)
    assert len(statuses) == 1000 > statuses.count(0) + 100

@slow
def test_20000_steps_in_flat_memory(script):
    """Memory of its own (kB) and open files, with TensorBoard on, from step 2000 to the end."""
    process = forked(main, script.SCRIPT, *TINY, "--log_interval 50 --max_steps 20000 --save_interval 500 --tensorboard",
                     "--out_dir run")
    proc, seen = Path("/proc", str(process.pid)), []
    while ended(process, 0.5) is None:
        with contextlib.suppress(OSError, IndexError):
            step = json.loads(Path("run/log.jsonl").read_text().splitlines()[-1])["step"]
            anonymous = int((proc / "status").read_text().split("RssAnon:")[1].split()[0])
            seen.append((step, anonymous, len(os.listdir(proc / "fd"))))
    assert process.exitcode == 0, said()
    early = np.median([s[1:] for s in seen if 2000 <= s[0] <= 6000], 0)
    late = np.median([s[1:] for s in seen if s[0] >= 16000], 0)  # a file more is open for the instant of a save
    assert (late[0] < early[0] + 8000, late[1] <= early[1]) == (True, True)
