"""Fixtures shared by the tests: the three scripts as modules, tiny runs of them, and small files of real images."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

# One thread for these tiny nets: faster, and on a busy machine several threads wait for each other more than they work.
# Before torch, which reads it once: bit for bit holds between equal numbers of threads.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SCRIPTS = ("gan", "dcgan", "acgan")
TINY = [
    "--img_size",
    "16",
    "--ngf",
    "4",
    "--ndf",
    "4",
    "--nz",
    "8",
    "--max_images",
    "64",
    "--batch_size",
    "8",
    "--device",
    "cpu",
    "--precision",
    "fp32",
    "--log_interval",
    "1",
    "--workers",
    "0",
]


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="the long versions of loops too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: the long version of a loop, with --slow only")


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
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def data_dir():
    """Real data sets (MNIST/raw, cifar10_train.zip) where there are any."""
    folder = os.environ.get("GAN_DATA_DIR")
    if not folder:
        pytest.skip("GAN_DATA_DIR names no folder of real data sets")
    return Path(folder).resolve()


def train(script, *argv, out="run"):
    """A tiny run in this process. Returns its last checkpoint."""
    script.train(script.get_args([*TINY, "--out_dir", out, *map(str, argv)]))
    return script.load_checkpoint(f"{out}/checkpoint.pt", script.SCRIPT)


def command(script, *argv, **kwargs):
    """The script as a user starts it, in a process of its own."""
    return subprocess.run(
        [sys.executable, str(ROOT / f"{script}.py"), *map(str, argv)],
        text=True,
        capture_output=True,
        timeout=300,
        check=False,
        **kwargs,
    )


def error_of(capfd, call, *args):
    """The one line with which `call` ends the program, after its progress bars. Exit code 2 goes with a flag's name."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as e:
        call(*args)
    err = capfd.readouterr().err
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip()]
    assert e.value.code == (2 if re.search(r"\.py: error: (--|argument|unrecog)", lines[-1]) else 1), lines[-1]
    assert err.endswith(lines[-1] + "\n")
    assert err.count(": error: ") == 1
    return lines[-1]


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
    """Equal bit for bit, through dicts, lists and tensors."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for k in a:
            assert_same(a[k], b[k], f"{path}.{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{path}[{i}]")
    else:
        assert a == b, path


def assert_same_state(a, b):
    """assert_same of two checkpoints, but for the arguments, which name their folders."""
    assert_same({k: v for k, v in a.items() if k != "args"}, {k: v for k, v in b.items() if k != "args"})


def ort_root(folder):
    """A folder with ONNX Runtime's include/ and lib/: ORT_ROOT, completed by the wheel and the system's headers."""
    import onnxruntime

    given = Path(os.environ.get("ORT_ROOT", "nowhere"))
    includes = [given / "include", Path("/usr/include/onnxruntime"), Path("/usr/local/include/onnxruntime")]
    include = next((i for i in includes if (i / "onnxruntime_cxx_api.h").exists()), None)
    if include is None:
        pytest.skip("no onnxruntime_cxx_api.h: install libonnxruntime-dev, or set ORT_ROOT to an unpacked release")
    (folder / "include").symlink_to(include)
    if (given / "lib").is_dir():
        (folder / "lib").symlink_to(given / "lib")
        return folder
    wheel = next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*"), None)
    if wheel is None:
        pytest.skip("this onnxruntime wheel has no shared library")
    (folder / "lib").mkdir()
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (folder / "lib" / name).symlink_to(wheel)
    return folder


@pytest.fixture(scope="session")
def cpp_program(tmp_path_factory):
    """infer_ort.cpp, built by the line that stands in it, all warnings being errors. A reason where that cannot be."""
    if not shutil.which("g++"):
        return "no g++"
    folder = tmp_path_factory.mktemp("cpp")
    try:
        root = ort_root(folder)
    except pytest.skip.Exception as e:
        return e.msg
    line = next(line for line in (ROOT / "infer_ort.cpp").read_text().splitlines() if "g++ " in line).lstrip("/ ")
    done = subprocess.run(
        f"{line} -Wall -Wextra -Werror -o {folder}/infer_ort",
        shell=True,
        cwd=ROOT,
        env=os.environ | {"ORT_ROOT": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    if "png.h: No such file" in done.stderr:
        return "no png.h: install libpng-dev"
    assert done.returncode == 0, done.stderr
    return folder / "infer_ort"


@pytest.fixture
def cpp(cpp_program):
    """The program, or None where it cannot be built."""
    return None if isinstance(cpp_program, str) else cpp_program


@pytest.fixture
def need_cpp(cpp_program):
    if isinstance(cpp_program, str):
        pytest.skip(cpp_program)
    return cpp_program
