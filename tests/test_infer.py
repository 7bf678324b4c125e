"""infer_ort.py and infer_ort.cpp: the training scripts' pictures, from an ONNX file alone."""

import inspect
import json
import os
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import ROOT, error_of, train
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from test_export import exported
from test_sampling import pictures

import dcgan
import export
import gan
import infer_ort

PRECISIONS = tuple(export.TOLERANCE)
OPTIONS = ("--threads", 1, "--provider", "cpu")


def infer(*argv, model="model.onnx", out="x.npz"):
    """infer_ort.py in this process; the arrays if it wrote an .npz."""
    out = ["--out", out] if out else []
    infer_ort.generate(infer_ort.get_args([model, *map(str, (*OPTIONS, *argv, *out))]))
    if out and out[1].endswith(".npz") and os.path.exists(out[1]):
        with np.load(out[1]) as f:
            return dict(f)
    return None


def far(a, b):
    """The greatest difference in levels."""
    assert a.shape == b.shape
    return np.abs(a.astype(int) - b).max()


@pytest.fixture
def model(script):
    """model.onnx of a net trained for some steps, and what --sample makes of its first 50 latents."""
    train(script, "--max_steps", 5, "--lr", 0.01, "--nc", 3)
    exported()
    return pictures(script, "--n_samples", 50)


# ------------------------------------------------------------------------------------------------------- Python


def test_pictures_are_those_of_sample(model):
    got = infer("--n_samples", 50)
    assert got["arr_0"].dtype == np.uint8
    assert far(got["arr_0"], model["arr_0"]) <= 1
    assert got.keys() == model.keys()
    if "labels" in model:
        np.testing.assert_array_equal(got["labels"], model["labels"])


def test_neither_batch_nor_start_changes_a_picture(model):
    for argv in (["--batch_size", 7], ["--batch_size", 50], ["--batch_size", 1]):
        assert far(infer("--n_samples", 50, *argv)["arr_0"], model["arr_0"]) <= 1
    some = infer("--start", 20, "--n_samples", 13)
    assert far(some["arr_0"], model["arr_0"][20:33]) <= 1
    if "labels" in some:
        np.testing.assert_array_equal(some["labels"], model["labels"][20:33])
    assert far(infer("--n_samples", 50, "--seed", 1)["arr_0"], model["arr_0"]) > 1


@pytest.mark.parametrize(
    "names",
    [
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ],
)
def test_processes_share_the_range(names, monkeypatch):
    train(dcgan, "--max_steps", 2)
    exported()
    whole = infer("--n_samples", 20, "--start", 5, "--seed", 3)["arr_0"]
    for rank in range(3):
        for name, value in zip(names, (rank, 3, rank)):
            monkeypatch.setenv(name, str(value))
        infer("--n_samples", 20, "--start", 5, "--seed", 3, out="part.npz")
        infer("--n_samples", 20, "--start", 5, "--seed", 3, out="folder/")
    parts = sorted(f for f in os.listdir(".") if f.startswith("part"))
    assert parts == [f"part_{a:09d}-{b:09d}.npz" for a, b in ((5, 10), (11, 17), (18, 24))]
    np.testing.assert_array_equal(np.concatenate([np.load(f)["arr_0"] for f in parts]), whole)
    assert sorted(os.listdir("folder")) == [f"{i:06d}.png" for i in range(5, 25)]
    np.testing.assert_array_equal(np.asarray(Image.open("folder/000024.png")), whole[19, ..., 0])


def test_default_is_the_grid_of_sample(model, script):
    script.sample(script.get_args(["--sample", "run", "--out", "want.png", "--device", "cpu"]))
    infer(out=None)
    got, want = (np.asarray(Image.open(f)) for f in ("model_samples.png", "want.png"))
    assert far(got, want) <= 1


def test_walks_are_those_of_sample(model, script):
    for argv, name in ((["--interpolate", "6"], "walk.gif"), (["--walk_dim", "3", "--walk_step", "0.2"], "walk_3.png")):
        script.sample(script.get_args(["--sample", "run", "--out", f"want_{name}", "--device", "cpu", *argv]))
        infer(*argv, out=None)
        with Image.open(f"model_{name}") as got, Image.open(f"want_{name}") as want:
            assert got.size == want.size
            assert getattr(got, "n_frames", 1) == getattr(want, "n_frames", 1)
            for frame in range(getattr(got, "n_frames", 1)):
                got.seek(frame)
                want.seek(frame)
                difference = np.asarray(got.convert("RGB")).astype(float) - np.asarray(want.convert("RGB"))
                assert np.abs(difference).mean() < 3  # GIF has 256 colours


@pytest.mark.parametrize(("suffix", "tolerance"), [("png", 0), ("jpg", 40), ("webp", 60)])
def test_folder_formats(suffix, tolerance):
    train(dcgan, "--max_steps", 2, "--nc", 3)
    exported()
    images = infer("--n_samples", 40)["arr_0"]
    infer("--n_samples", 40, "--format", suffix, out="folder/")
    assert sorted(os.listdir("folder")) == [f"{i:06d}.{suffix}" for i in range(40)]
    for i in (0, 15, 16, 39):
        with Image.open(f"folder/{i:06d}.{suffix}") as image:
            assert far(np.asarray(image), images[i]) <= tolerance


def test_npz_is_streamed():
    """As much memory for many pictures as for few."""

    def parts(n):
        for i in range(n):
            yield np.full((64, 32, 32, 3), i, np.uint8)  # 0.2 MB

    peaks = []
    for n in (10, 200):
        tracemalloc.start()
        infer_ort.write_npz(f"{n}.npz", parts(n), 64 * n, lambda i, k: np.arange(i, i + k))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 1e6
    with np.load("200.npz") as f:
        assert f["arr_0"].shape == (12800, 32, 32, 3)
        assert (f["arr_0"][::64, 0, 0, 0] == np.arange(200)).all()
        assert (f["labels"] == np.arange(12800)).all()


def test_labels():
    acgan = __import__("acgan")
    train(acgan, "--max_steps", 5, "--lr", 0.01)
    exported()
    got = infer("--labels", "7,3", "--n_samples", 5)
    assert got["labels"].tolist() == [7, 3, 7, 3, 7]
    assert far(got["arr_0"], pictures(acgan, "--labels", "7,3", "--n_samples", 5)["arr_0"]) <= 1
    assert infer("--labels", "all", "--n_samples", 12)["labels"].tolist() == [*range(10), 0, 1]


def test_class_names(folder):
    acgan = __import__("acgan")
    train(acgan, "--max_steps", 2, "--dataset", folder)
    exported()
    assert infer("--labels", "dog,cat, 1", "--n_samples", 3)["labels"].tolist() == [1, 0, 1]


def test_bound_buffers_give_the_same_pictures(model):
    """What runs on a GPU, with its buffers on the CPU."""
    gen = infer_ort.Generator("model.onnx", 8, provider="cpu", threads=1)
    assert not gen.bound
    choice = gen.labels(None) if gen.n_classes else None
    z = infer_ort.latents(0, 0, 20, gen.nz)
    labels = None if choice is None else choice[np.arange(20) % len(choice)]
    want = gen(z, labels)
    gen.bound, gen.device = True, ("cpu", 0)
    np.testing.assert_array_equal(gen(z, labels), want)
    binding = gen.binding
    np.testing.assert_array_equal(gen(z[5:], labels if labels is None else labels[5:]), want[5:])
    assert gen.binding is binding


def test_runs_without_torch_and_the_scripts():
    train(dcgan, "--max_steps", 2)
    exported()
    code = (
        "import sys\nfor name in ('torch', 'torchvision', 'onnx', 'gan', 'dcgan', 'acgan', 'export'):\n"
        "    sys.modules[name] = None\n"
        f"sys.path.insert(0, {str(ROOT)!r})\nimport infer_ort\n"
        "sys.argv = ['infer_ort.py', 'model.onnx', '--n_samples', '3', '--out', 'x.png']\ninfer_ort.main()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
    assert os.path.exists("x.png")


def test_latents_and_walks_are_written_as_in_the_scripts(script):
    for name in ("latents", "walk", "number"):
        assert inspect.getsource(getattr(infer_ort, name)) == inspect.getsource(getattr(script, name))


def test_benchmark_prints_a_table(capsys):
    train(gan, "--max_steps", 1)
    exported("--batch_size", 2)
    infer("--benchmark", out=None)
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert "fp32, CPUExecutionProvider, 1 CPU threads, onnxruntime " in lines[0]
    assert lines[1].split() == ["batch", "images/s", "p50", "ms", "p95", "ms", "p99", "ms"]
    batch, speed, p50, p95, p99 = map(float, lines[2].split())
    assert batch == 2
    assert 0 < p50 <= p95 <= p99
    assert 0.2 < speed * p50 / 2000 < 5


def foreign(shape_in, shape_out, label=False, kind=TensorProto.FLOAT):
    """An ONNX file of another origin: picture = mean of z, or z plus the label."""
    nodes = [
        helper.make_node("Flatten", ["noise"], ["flat"]),
        helper.make_node("ReduceMean", ["flat"], ["mean"], axes=[1], keepdims=1),
        helper.make_node("Tanh", ["mean"], ["tanh"]),
        helper.make_node("Reshape", ["tanh", "four"], ["one"]),
        helper.make_node("Expand", ["one", "size"], ["wide"]),
    ]
    inputs = [helper.make_tensor_value_info("noise", kind, shape_in)]
    if label:
        inputs.insert(0, helper.make_tensor_value_info("class", TensorProto.INT64, ["n"]))
        nodes += [
            helper.make_node("Cast", ["class"], ["real"], to=TensorProto.FLOAT),
            helper.make_node("Reshape", ["real", "four"], ["four_d"]),
            helper.make_node("Div", ["four_d", "ten"], ["tenth"]),
            helper.make_node("Mul", ["wide", "zero"], ["nothing"]),
            helper.make_node("Add", ["nothing", "tenth"], ["image"]),
        ]
    else:
        nodes.append(helper.make_node("Identity", ["wide"], ["image"]))
    initializers = [
        helper.make_tensor("four", TensorProto.INT64, [4], [-1, 1, 1, 1]),
        helper.make_tensor("size", TensorProto.INT64, [4], [1, *shape_out[1:]]),
        helper.make_tensor("ten", TensorProto.FLOAT, [], [10.0]),
        helper.make_tensor("zero", TensorProto.FLOAT, [], [0.0]),
    ]
    outputs = [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape_out)]
    graph = helper.make_graph(nodes, "g", inputs, outputs, initializers)
    file = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(file, full_check=True)
    onnx.save(file, "foreign.onnx")


@pytest.mark.parametrize("shape_in", [["n", 12], ["n", 12, 1, 1], [4, 12], [1, 12, 1, 1]])
@pytest.mark.parametrize("shape_out", [["n", 3, 8, 10], ["n", 8, 10, 3], ["n", 1, 8, 8]])
def test_foreign_generators(shape_in, shape_out, cpp):
    shape_out = [shape_in[0], *shape_out[1:]]
    foreign(shape_in, shape_out)
    mean = np.tanh(infer_ort.latents(2, 0, 10, 12).mean(1))
    want = (mean * np.float32(127.5) + 128).astype(np.uint8)
    size = {3: (8, 10, 3), 10: (8, 10, 3), 1: (8, 8, 1)}[1 if 1 in shape_out[1:] else shape_out[3]]
    for got in (
        infer("--n_samples", 10, "--seed", 2, model="foreign.onnx")["arr_0"],
        *cpp_pictures(cpp, "foreign.onnx"),
    ):
        assert got.shape == (10, *size)
        assert far(got[:, 0, 0, 0], want) <= 1


def cpp_pictures(cpp, model, seed=2):
    if cpp is None:
        return []
    run_cpp(cpp, model, "--n_samples", 10, "--seed", seed, "--out", "cpp.npy")
    return [np.load("cpp.npy")]


def test_foreign_conditional_generator(capfd, cpp):
    foreign(["n", 12], ["n", 3, 8, 8], label=True)
    got = infer("--labels", "0,5", "--n_samples", 4, model="foreign.onnx")
    assert got["arr_0"][:, 0, 0, 0].tolist() == [128, 191, 128, 191]
    message = error_of(capfd, lambda: infer(model="foreign.onnx"))
    assert "--labels: foreign.onnx does not say how many classes" in message
    if cpp:
        run_cpp(cpp, "foreign.onnx", "--labels", "0,5", "--n_samples", 4, "--out", "cpp.npy")
        np.testing.assert_array_equal(np.load("cpp.npy"), got["arr_0"])
        assert np.load("cpp_labels.npy").tolist() == [0, 5, 0, 5]


# --------------------------------------------------------------------------------------------------------- C++


def run_cpp(program, *argv, check=True):
    done = subprocess.run([program, *map(str, argv)], capture_output=True, text=True, timeout=100, check=False)
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("uint8", [[], ["--uint8"]])
def test_cpp_makes_the_same_pictures(script, need_cpp, precision, uint8):
    train(script, "--max_steps", 5, "--lr", 0.01, "--nc", 3)
    exported("--precision", precision, *uint8)
    argv = ["--n_samples", 50, "--seed", 2**62 + 1, "--start", 2**40, "--threads", 1]
    want = infer(*argv)
    run_cpp(need_cpp, "model.onnx", *argv, "--out", "cpp.npy", "--batch_size", 7)
    got = np.load("cpp.npy")
    assert far(got, want["arr_0"]) <= 1
    assert (got != want["arr_0"]).mean() < 0.01
    if "labels" in want:
        np.testing.assert_array_equal(np.load("cpp_labels.npy"), want["labels"])
        run_cpp(need_cpp, "model.onnx", *argv, "--out", "cpp.npy", "--labels", "7,3")
        assert far(np.load("cpp.npy"), infer(*argv, "--labels", "7,3")["arr_0"]) <= 1


def test_cpp_grid_and_folder(script, need_cpp):
    train(script, "--max_steps", 5, "--lr", 0.01)
    exported("--batch_size", 4)
    run_cpp(need_cpp, "model.onnx")
    got = np.asarray(Image.open("model_samples.png")).copy()
    infer(out=None)
    assert far(got, np.asarray(Image.open("model_samples.png"))) <= 1
    run_cpp(need_cpp, "model.onnx", "--n_samples", 33, "--start", 5, "--out", "cpp/")
    infer("--n_samples", 33, "--start", 5, out="python/")
    assert sorted(os.listdir("cpp")) == sorted(os.listdir("python"))
    for name in os.listdir("cpp"):
        assert far(np.asarray(Image.open(f"cpp/{name}")), np.asarray(Image.open(f"python/{name}"))) <= 1


def test_cpp_benchmark(need_cpp):
    train(gan, "--max_steps", 1)
    exported("--batch_size", 2)
    lines = run_cpp(need_cpp, "model.onnx", "--benchmark", "--threads", 1).stdout.splitlines()
    assert "fp32, cpu, 1 threads" in lines[0]
    batch, speed, p50, p95, p99 = map(float, lines[2].split())
    assert batch == 2
    assert 0 < p50 <= p95 <= p99
    assert speed > 0


# ------------------------------------------------------------------------------------------------------- errors


def tampered(**metadata):
    file = onnx.load("model.onnx")
    for p in file.metadata_props:
        p.value = metadata.get(p.key, p.value)
    del file.metadata_props[[p.key for p in file.metadata_props].index("crc32")]
    onnx.save(file, "tampered.onnx")


def test_errors_in_python_and_cpp(capfd, cpp):
    train(dcgan, "--max_steps", 1)
    exported()
    exported("--batch_size", 2, out="two.onnx")
    data = Path("model.onnx").read_bytes()
    Path("cut.onnx").write_bytes(data[: len(data) // 2])
    Path("text.onnx").write_text("I am no model")
    Path("empty.onnx").touch()
    os.mkdir("directory.onnx")
    Path("file").touch()
    identity = helper.make_node("Identity", ["x"], ["y"])
    shapes = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 7]) for name in "xy"]
    graph = helper.make_graph([identity], "g", shapes[:1], shapes[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), "identity.onnx")
    before = sorted(os.listdir("."))
    cases = [
        (["nope.onnx"], "nope.onnx: no such file"),
        (["directory.onnx"], "directory.onnx: is a folder"),
        (["cut.onnx"], "cut.onnx: not an ONNX file that can be run, or damaged"),
        (["text.onnx"], "text.onnx: not an ONNX file"),
        (["empty.onnx"], "empty.onnx: not an ONNX file"),
        (["identity.onnx"], "identity.onnx: no generator"),
        (["run/checkpoint.pt"], "run/checkpoint.pt: not an ONNX file"),
        (["model.onnx", "--labels", "1"], "--labels 1: "),
        (["model.onnx", "--out", "file/x.png"], "--out file/x.png: cannot be written"),
        (["model.onnx", "--out", "file/x.npy"], "--out file/x.npy: "),
        (["model.onnx", "--out", "file/"], "--out file/"),
        (["model.onnx", "--out", "/proc/x.npz"], "--out /proc/x.npz: "),
        (["model.onnx", "--out", "x.bmp"], "--out x.bmp: give a .png"),
        (["model.onnx", "--n_samples", "0"], "--n_samples"),
        (["model.onnx", "--seed", "-1"], "--seed"),
        (["model.onnx", "--batch_size", "x"], "--batch_size"),
        (["model.onnx", "--unknown"], "--unknown"),
    ]
    if onnxruntime.get_device() == "CPU" or not infer_ort.gpu_count():
        cases.append((["model.onnx", "--provider", "cuda"], "--provider cuda: "))

    def python(argv):
        sys.argv = ["infer_ort.py", *argv]
        infer_ort.main()

    for argv, expected in cases:
        if ".npy" not in argv[-1]:
            assert expected in error_of(capfd, python, argv)
        if cpp and ".npz" not in argv[-1]:
            done = run_cpp(cpp, *argv, check=False)
            assert expected in done.stderr
            assert done.stderr.count("\n") == 1
            assert done.returncode == (2 if expected.startswith("--") else 1), argv
        assert sorted(os.listdir(".")) == before


def test_walk_errors(capfd):
    train(dcgan, "--max_steps", 1)
    exported()
    for argv, expected in (
        (["--walk_dim", "8"], "--walk_dim 8: this generator's latents have coordinates 0 to 7"),
        (["--walk_dim", "1", "--interpolate", "5"], "--interpolate and --walk_dim"),
        (["--interpolate", "5", "--out", "x.png"], "--out x.png: give a .gif"),
        (["--interpolate", "5", "--start", "1"], "--start"),
        (["--walk_dim", "1", "--walk_step", "nan"], "--walk_step"),
        (["--walk_step", "1"], "--walk_step goes with --walk_dim"),
        (["--format", "jpg", "--out", "x.png"], "--format jpg"),
        (["--threads", "100000"], "--threads"),
    ):
        assert expected in error_of(capfd, lambda argv=argv: infer(*argv, out=None))


@pytest.mark.parametrize(
    ("key", "value"),
    [("nz", "9"), ("nc", "3"), ("nz", "many"), ("n_classes", "-3"), ("n_classes", "x"), ("classes", "[")],
)
def test_tampered_metadata(capfd, cpp, key, value):
    acgan = __import__("acgan")
    train(acgan, "--max_steps", 1)
    exported()
    tampered(**{key: value})
    assert "tampered.onnx: its metadata contradicts" in error_of(capfd, lambda: infer(model="tampered.onnx"))
    if cpp and key != "classes":  # the names are for Python alone
        assert "tampered.onnx: its metadata contradicts" in run_cpp(cpp, "tampered.onnx", check=False).stderr


@pytest.mark.parametrize("kind", ["flipped", "appended", "format", "nan"])
def test_damaged_files(capfd, cpp, kind):
    train(dcgan, "--max_steps", 1)
    exported()
    data = bytearray(Path("model.onnx").read_bytes())
    expected = "tampered.onnx: damaged, or changed since export.py wrote it"
    if kind == "flipped":
        data[data.index(struct.pack("<f", numpy_helper.to_array(onnx.load("model.onnx").graph.initializer[0]).flat[0]))] ^= 1
        Path("tampered.onnx").write_bytes(data)
    elif kind == "appended":
        Path("tampered.onnx").write_bytes(data + onnx.ModelProto(domain="elsewhere").SerializeToString())
    elif kind == "format":
        tampered(format_version="99")
        expected = "tampered.onnx: of "
    else:
        tampered()
        file = onnx.load("tampered.onnx")
        weight = next(t for t in file.graph.initializer if t.data_type == TensorProto.FLOAT)
        weight.CopyFrom(numpy_helper.from_array(np.full_like(numpy_helper.to_array(weight), np.nan), weight.name))
        onnx.save(file, "tampered.onnx")
        expected = "tampered.onnx: makes pictures that are not finite"
    before = sorted(os.listdir("."))
    assert expected in error_of(capfd, lambda: infer(model="tampered.onnx"))
    if cpp:
        done = run_cpp(cpp, "tampered.onnx", "--out", "x.npy", check=False)
        assert expected in done.stderr
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert sorted(os.listdir(".")) == before


def test_a_changed_file_is_taken_without_its_checksum():
    train(dcgan, "--max_steps", 1)
    exported()
    tampered(dataset="another")
    np.testing.assert_array_equal(infer(model="tampered.onnx")["arr_0"], infer()["arr_0"])


def test_what_cpp_alone_could_get_wrong(need_cpp):
    train(dcgan, "--max_steps", 1)
    exported()
    for n in (2**53, 2**52, 10**11):
        done = run_cpp(need_cpp, "model.onnx", "--n_samples", n, "--out", "x.png", check=False)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert "not enough memory" in done.stderr
    run_cpp(need_cpp, "model.onnx", "--n_samples=5", "--batch_size=100000", "--out=five.npy")
    np.testing.assert_array_equal(np.load("five.npy"), infer("--n_samples", 5)["arr_0"])
    done = subprocess.run(["bash", "-c", "ulimit -f 1; exec \"$@\"", "-", need_cpp, "model.onnx", "--n_samples", "999", "--out",
                           "big.npy"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--out big.npy: cannot be written" in done.stderr
    assert not [name for name in os.listdir(".") if "big" in name]


def test_a_closed_output(model):
    for script in ("infer_ort", "export"):
        argv = ["model.onnx", "--out", "y.png"] if script == "infer_ort" else ["run", "--out", "y.onnx"]
        subprocess.run(["bash", "-c", "exec \"$@\" >&-", "-", sys.executable, ROOT / f"{script}.py", *argv], check=True)
    assert os.path.exists("y.png")
    assert os.path.exists("y.onnx")


def test_launchers_that_say_nonsense(capfd, monkeypatch):
    train(dcgan, "--max_steps", 1)
    exported()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "--n_samples 2: too few for 4 processes" in error_of(capfd, lambda: infer("--n_samples", 2))
    monkeypatch.setenv("RANK", "")
    assert "RANK, WORLD_SIZE, LOCAL_RANK in the environment" in error_of(capfd, infer)


def test_a_batch_script_of_slurm_is_one_process(monkeypatch):
    """sbatch runs it once, with the number of tasks that srun would start in the environment."""
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert infer_ort.process() == (0, 1, 0)


def test_labels_out_of_range(capfd, cpp):
    acgan = __import__("acgan")
    train(acgan, "--max_steps", 1)
    exported()
    for text in ("10", "-1", "3,cat", "3,,4", "99999999999999999999"):
        assert "--labels" in error_of(capfd, lambda text=text: infer("--labels", text))
        if cpp:
            done = run_cpp(cpp, "model.onnx", "--labels", text, check=False)
            assert (done.returncode, done.stderr.count("\n")) == (2, 1)
            assert "--labels" in done.stderr
    # More classes stated than there are: ONNX Runtime's own refusal, in one line.
    tampered(n_classes="100", classes=json.dumps([str(k) for k in range(100)]))
    assert "tampered.onnx: cannot be run" in error_of(capfd, lambda: infer("--labels", "50", model="tampered.onnx"))


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_program_leaves_nothing_half_written(need_cpp, signum):
    train(dcgan, "--max_steps", 1)
    exported()
    python = [sys.executable, str(ROOT / "infer_ort.py")]
    for program, out in ((python, "python.npz"), ([str(need_cpp)], "cpp.npy")):
        argv = [*program, "model.onnx", "--n_samples", "100000000", "--out", out, "--threads", "1"]
        with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as running:
            for _ in range(600):
                if any(out in name for name in os.listdir(".")):
                    break
                time.sleep(0.1)
            running.send_signal(signum)
            _, err = running.communicate(timeout=60)
        assert running.returncode == 1
        assert err.replace("\r", "\n").strip().splitlines()[-1].endswith("interrupted; no file is half written")
        assert not [name for name in os.listdir(".") if out in name]


def test_a_gpu_that_cannot_be_used_is_told_of(capfd, monkeypatch):
    if onnxruntime.get_device() != "CPU" and infer_ort.gpu_count():
        pytest.skip("the GPU can be used")
    train(dcgan, "--max_steps", 1)
    exported()
    monkeypatch.setattr(infer_ort, "gpu_count", lambda: 1)
    infer_ort.generate(infer_ort.get_args(["model.onnx", "--threads", "1", "--n_samples", "2"]))
    assert "warning: there is a GPU, but the CPU is used" in capfd.readouterr().err
    assert os.path.exists("model_samples.png")
