"""Fixtures shared by the tests: the three scripts as modules, tiny runs of them, and small files of real images."""

import functools
import importlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from unittest import mock

# One thread, before torch reads it: faster for tiny nets, and bits are equal between equal numbers of threads only.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SCRIPTS = ("gan", "dcgan", "acgan")
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
POSIX = pytest.mark.skipif(sys.platform == "win32", reason="needs signals between processes")

def words(*argv):
    """A command line as a list: an argument may be several, with spaces between."""
    return [word for arg in argv for word in str(arg).split()]

TINY = words("--img_size 16 --ngf 4 --ndf 4 --nz 8 --max_images 64 --batch_size 8 --device cpu --precision fp32",
             "--log_interval 1")

def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="the long versions of loops too")

def pytest_configure(config):
    config.addinivalue_line("markers", "slow: the long version of a loop, with --slow only")
    config.addinivalue_line("markers", "numbers: what is computed is looked at; not on a stand-in for CUDA")

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
    """Every test works in an empty folder of its own, as one process."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    yield

@pytest.fixture
def data_dir():
    """Real data sets (MNIST/raw, cifar10_train.zip) where there are any. They may be read-only."""
    folder = os.environ.get("GAN_DATA_DIR")
    if not folder:
        pytest.skip("GAN_DATA_DIR names no folder of real data sets")
    return Path(folder).resolve()

def train(script, *argv, out="run"):
    """A tiny run in this process, into a new folder (or it would get a number). Returns its last checkpoint.
    out=None: where the script puts it."""
    if out is None:
        return script.train(script.get_args([*TINY, *words(*argv)]))
    assert not os.path.exists(out)
    script.train(script.get_args([*TINY, "--out_dir", out, *words(*argv)]))
    return script.load_checkpoint(f"{out}/checkpoint.pt", [script.SCRIPT])

def resume(script, *argv, out="run"):
    """Goes on with the run in the folder `out`. Returns its last checkpoint."""
    script.train(script.get_args(["--resume", out, *words(*argv)]))
    return script.load_checkpoint(f"{out}/checkpoint.pt", [script.SCRIPT])

def main(script, *argv):
    """main() of a script, or of one by its name, in this process, as a command line starts it."""
    script = importlib.import_module(script) if isinstance(script, str) else script
    with mock.patch.object(sys, "argv", [f"{script.SCRIPT}.py", *words(*argv)]):
        script.main()

def command(script, *argv, **kwargs):
    """The script as a user starts it, in a process of its own."""
    return subprocess.run([sys.executable, str(ROOT / f"{script}.py"), *words(*argv)],
                          text=True, capture_output=True, timeout=300, check=False, **kwargs)

def error_of(capfd, call, *args):
    """The one line with which `call` ends the program, after its progress bars, or which main() would make of it."""
    capfd.readouterr()
    kinds = [importlib.import_module(name).UserError for name in SCRIPTS]
    with pytest.raises((OSError, FloatingPointError, SystemExit, *kinds)) as e:
        call(*args)
    said = capfd.readouterr().err
    if not isinstance(e.value, SystemExit):
        return str(e.value)
    if not isinstance(e.value.code, int):  # which Python prints
        said += f"\n{e.value}"
    assert e.value.code != 0
    assert "Traceback" not in said
    assert said.count(": error: ") == 1
    assert ": error: " in said.splitlines()[-1]
    return said.replace("\r", "\n").splitlines()[-1]

@functools.lru_cache
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

def contained(call, args, said="said.txt", limit=None, env=()):
    """What `call` prints goes to the file `said`; a traceback ends the process with 70. limit: of the size of files."""
    import resource

    code = 70
    try:
        os.environ.update(env)
        out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, signal.default_int_handler)
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

def ended(process, seconds):
    """Exit status (negative: the signal) if the process ends within so many seconds, else None."""
    process.join(seconds)
    return process.exitcode

def picture(i, size=(20, 20), mode="RGB"):
    rng = np.random.default_rng(i)
    return Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).convert(mode)

@pytest.fixture
def folder(tmp_path):
    """Two class folders, cat and dog, of 12 pictures each, 20x20 RGB."""
    for k, name in enumerate(("cat", "dog")):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(12):
            picture(100 * k + i).save(tmp_path / "pets" / name / f"{i:03d}.png")
    return tmp_path / "pets"

def assert_same(a, b, path=""):
    """Equal bit for bit, through dicts, lists and tensors; but for arguments of runs, which name their folders, and the time."""
    if isinstance(a, (list, tuple)):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for k in set(a) - {"args", "time"}:
            assert_same(a[k], b[k], f"{path}.{k}")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, path

def cmake(build, *flags):
    """README's first command; an active environment's python3 is the one that runs the tests."""
    env = os.environ | {"PATH": os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"]))}
    return subprocess.run(["cmake", "-S", ROOT / "deploy", "-B", build, *flags], env=env, text=True,
                          capture_output=True, check=False)

@pytest.fixture(scope="session")
def cpp(tmp_path_factory):
    """deploy/infer_ort.cpp, built as README says, all warnings being errors; None where that cannot be.
    CXXFLAGS="-fsanitize=address,undefined" ASAN_OPTIONS=allocator_may_return_null=1 watch it."""
    if not (shutil.which("cmake") and shutil.which("c++")):
        return None
    build, flags = tmp_path_factory.mktemp("cpp"), f"-Wall -Wextra -Wpedantic -Werror {os.environ.get('CXXFLAGS', '')}"
    done = cmake(build, f"-DCMAKE_CXX_FLAGS={flags}")
    if "ONNX Runtime not found" in done.stderr or "Could NOT find PNG" in done.stderr:
        return None
    assert done.returncode == 0, done.stderr
    done = subprocess.run(["cmake", "--build", build], text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return build / "infer_ort"

@pytest.fixture
def need_cpp(cpp):
    """The program; the test is skipped where it cannot be built."""
    return cpp or pytest.skip("needs cmake, a C++ compiler, libpng-dev and ONNX Runtime's headers")
