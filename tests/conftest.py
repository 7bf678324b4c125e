"""What the tests share: the three scripts as modules, tiny runs of them, and small files of images."""

import functools
import importlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from unittest import mock

# One thread, before torch reads it: faster for tiny nets, and only equal numbers of threads give equal bits.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SCRIPTS = ("gan", "dcgan", "acgan")
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="needs signals between processes")

def words(*argv):
    """A command line as a list: an argument may be several, with spaces between."""
    return [word for arg in argv for word in str(arg).split()]

TINY = words("--img_size 16 --ngf 4 --ndf 4 --nz 8 --max_images 64 --batch_size 8 --device cpu",
             "--precision fp32 --log_interval 1")

def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="the long versions of loops, too")

def pytest_configure(config):
    config.addinivalue_line("markers", "slow: the long version of a loop, with --slow only")
    config.addinivalue_line("markers", "numbers: looks at what is computed; not on a stand-in for CUDA")

def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        long = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]

@pytest.fixture(params=SCRIPTS)
def script(request):
    """Each of the three scripts in turn, as a module."""
    return importlib.import_module(request.param)

@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    """Every test works in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)

@pytest.fixture
def data_dir():
    """Real data sets (MNIST/raw) where there are any. They may be read-only."""
    folder = os.environ.get("GAN_DATA_DIR")
    return Path(folder).resolve() if folder else pytest.skip("GAN_DATA_DIR names no folder of real data sets")

def train(script, *argv, out="run"):
    """A tiny run in this process, into a new folder. Returns its last checkpoint."""
    assert not os.path.exists(out)
    script.train(script.get_args([*TINY, "--out_dir", out, *words(*argv)]))
    return script.load_checkpoint(f"{out}/checkpoint.pt")

def resume(script, *argv, out="run"):
    """Goes on with the run in the folder `out`. Returns its last checkpoint."""
    script.train(script.get_args(["--resume", out, *words(*argv)]))
    return script.load_checkpoint(f"{out}/checkpoint.pt")

def rows(out="run"):
    """What log.jsonl says."""
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]

def main(program, *argv):
    """main() of a program, by its name, in this process, as a command line starts it."""
    streams = sys.stdout, sys.stderr
    try:
        with mock.patch.object(sys, "argv", [f"{program}.py", *words(*argv)]):
            importlib.import_module(program).main()
    finally:
        sys.stdout, sys.stderr = streams

def error_of(capfd, program, *argv):
    """The one line with which a program ends. Usage may stand before it, but no traceback."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as e:
        main(program, *argv)
    said = capfd.readouterr().err
    if not isinstance(e.value.code, int):  # Python prints it
        said += f"\n{e.value.code}"
    last = said.replace("\r", "\n").strip().splitlines()[-1]
    assert e.value.code != 0
    assert "Traceback" not in said
    assert last.startswith(f"{program.split('.')[-1]}.py: error: ")
    return last

@functools.cache
def forkserver():
    """A clean process that forks for each start: pytest's own has threads, whose locks a fork would inherit."""
    if sys.platform == "win32":
        pytest.skip("Windows cannot fork")
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*SCRIPTS, "conftest", "torchvision.utils", "torch._dynamo"])
    return context

def forked(call, *args, **kwargs):
    """Starts call(*args) in a process of its own, without the seconds that importing torch takes."""
    process = forkserver().Process(target=contained, args=(call, args), kwargs=kwargs)
    process.start()
    return process

def contained(call, args, said="said.txt", limit=None):
    """What `call` prints goes to the file `said`. A traceback ends the process with 70. limit: to the size of files."""
    import resource

    code = 70
    try:
        out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if limit:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        call(*args)
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else print(e, file=sys.stderr) or 1
    except KeyboardInterrupt:
        code = 1  # before main() or after it
    except BaseException:  # noqa: BLE001  told by the exit status
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

def ended(process, seconds=60):
    """Exit status (negative: the signal) if the process ends within so many seconds, else None."""
    process.join(seconds)
    return process.exitcode

def picture(i, size=(20, 20), mode="RGB"):
    rng = np.random.default_rng(i)
    return Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).convert(mode)

def fill(folder, n=12, first=0):
    """n pictures, 20x20 RGB, in a new folder."""
    Path(folder).mkdir(parents=True)
    for i in range(n):
        picture(first + i).save(Path(folder, f"{i:03d}.png"))

@pytest.fixture
def pets():
    """Two class folders, cat and dog, of 12 pictures each."""
    fill("pets/cat")
    fill("pets/dog", first=100)
    return "pets"

def pixels(file):
    return np.asarray(Image.open(file).convert("RGB"))

def assert_same(a, b, path=""):
    """Equal bit for bit, through dicts, lists and tensors; but for flags, which name the run's folder."""
    if isinstance(a, (list, tuple)):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for k in set(a) - {"args"}:
            assert_same(a[k], b[k], f"{path}.{k}")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, path

def run(*argv, **kwargs):
    """A command in a process of its own."""
    return subprocess.run(words(*argv), text=True, capture_output=True, timeout=300, check=False, **kwargs)
