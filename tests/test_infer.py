"""infer_ort.py and deploy/infer_ort.cpp: the training scripts' pictures, from an ONNX file alone."""

import functools
import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import POSIX, ROOT, cmake, error_of, train, words
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi.onnxruntime_pybind11_state import EPFail
from onnxruntime.tools.onnx_model_utils import make_dim_param_fixed
from PIL import Image, ImageSequence
from test_export import KEPT, LEAST_PSNR, conditional, exported, model_of, run_of, typed

import acgan
import infer_ort

def infer(model, *argv, out="x.npz"):
    """infer_ort.py in this process; the arrays if it wrote an .npz."""
    out = ["--out", out] if out else []
    infer_ort.generate(infer_ort.get_args([model, *words("--threads 1 --provider cpu", *argv), *out]))
    return arrays(out[1]) if out and os.path.exists(out[1]) and out[1].endswith(".npz") else None

def arrays(path):
    with np.load(path) as f:
        return dict(f)

def sampled(script, *argv, out):
    """What --sample of the training script makes of the run that model_of exports."""
    script.sample(script.get_args(["--sample", run_of(script.SCRIPT), *words("--device cpu --out", out, *argv)]))
    return out

@functools.cache
def first_fifty(script):
    return arrays(sampled(script, "--n_samples 50", out=f"{KEPT.name}/{script.SCRIPT}.npz"))

def run_cpp(program, *argv, check=True):
    done = subprocess.run([program, *words(*argv)], capture_output=True, text=True, timeout=100, check=False)
    assert not check or done.returncode == 0, done.stderr
    return done

def far(a, b):
    """The greatest difference in levels, of arrays or image files, each frame."""
    if isinstance(a, str):
        a, b = (np.stack([np.asarray(f.convert("RGB")) for f in ImageSequence.Iterator(Image.open(x))]) for x in (a, b))
    assert a.shape == b.shape
    return np.abs(a.astype(int) - b).max()

# ---------------------------------------------------------------------------------------------- the same pictures

def test_latents_are_those_of_the_scripts(script):
    for seed, start, nz in ((0, 0, 100), (2**63 - 1, 2**40, 7)):
        np.testing.assert_array_equal(infer_ort.latents(seed, start, 5, nz), script.latents(seed, start, 5, nz))

def test_pictures_are_those_of_sample(script):
    """And neither the batch size nor where one starts changes any."""
    model, want = model_of(script.SCRIPT), first_fifty(script)
    for argv in ("", "--batch_size 7", "--batch_size 50"):
        got = infer(model, "--n_samples 50", argv)
        assert got.keys() == want.keys()
        assert got["arr_0"].dtype == np.uint8
        assert far(got["arr_0"], want["arr_0"]) <= 1
    some = infer(model, "--start 20 --n_samples 13")
    assert far(some["arr_0"], want["arr_0"][20:33]) <= 1
    if conditional(script):
        np.testing.assert_array_equal(got["labels"], want["labels"])
        np.testing.assert_array_equal(some["labels"], want["labels"][20:33])
    assert far(infer(model, "--n_samples 50 --seed 1")["arr_0"], want["arr_0"]) > 1

@pytest.mark.parametrize("flags", LEAST_PSNR)
def test_cpp_makes_the_same_pictures(script, need_cpp, flags):
    model = model_of(script.SCRIPT, flags)
    argv = f"--n_samples 50 --seed {2**62 + 1} --start {2**40} --threads 1"
    want = infer(model, argv)
    run_cpp(need_cpp, model, argv, "--out cpp.npy --batch_size 7")
    got = np.load("cpp.npy")
    assert far(got, want["arr_0"]) <= 1
    assert (got != want["arr_0"]).mean() < 0.01
    if script.SCRIPT == "acgan":
        np.testing.assert_array_equal(np.load("cpp_labels.npy"), want["labels"])
        run_cpp(need_cpp, model, argv, "--out cpp.npy --labels 7,3")
        assert far(np.load("cpp.npy"), infer(model, argv, "--labels 7,3")["arr_0"]) <= 1

def test_grids_are_those_of_sample(script, cpp):
    for argv in ("", "--n_samples 7", "--n_samples 1", *["--labels 3,7,1", "--labels 7"] * (script.SCRIPT == "acgan")):
        sampled(script, argv, out="want.png")
        infer(model_of(script.SCRIPT), argv, out="python.png")
        assert far("python.png", "want.png") <= 1
        if cpp:
            run_cpp(cpp, model_of(script.SCRIPT), argv, "--out cpp.png")
            assert far("cpp.png", "want.png") <= 1

def test_walk_dim_is_that_of_sample(script):
    sampled(script, "--walk_dim 3 --n_samples 40", out="want.png")
    infer(model_of(script.SCRIPT), "--walk_dim 3 --n_samples 40", out="got.png")
    assert far("got.png", "want.png") <= 1

def test_interpolate_is_a_closed_walk(script):
    """A GIF of so many frames: on a great circle through latents i and n + i, without a jump, also none at its end."""
    z = infer_ort.walk(7, 5, 8, 24)
    np.testing.assert_allclose(z[[0, 6]], infer_ort.latents(7, 0, 10, 8).reshape(2, 5, 8), atol=1e-6)
    jumps = np.abs(np.diff(z, axis=0, append=z[:1])).mean((1, 2))
    assert jumps.max() < np.abs(z[0] - z[6]).mean() / 3
    infer(model_of(script.SCRIPT), "--interpolate 6 --n_samples 5", out="got.gif")
    with Image.open("got.gif") as gif:
        assert gif.n_frames == 6

def test_a_file_of_fixed_batch_size(cpp):
    model = model_of("acgan", "--batch_size 4")
    want = infer(model_of("acgan"), "--n_samples 33 --start 5")["arr_0"]
    infer(model, "--n_samples 33 --start 5", out="python/")
    if cpp:
        run_cpp(cpp, model, "--n_samples 33 --start 5 --out cpp/")
    for folder in ("python", "cpp")[:1 + bool(cpp)]:
        assert sorted(os.listdir(folder)) == [f"{i:06d}.png" for i in range(5, 38)]
        for i in range(33):
            assert far(np.asarray(Image.open(f"{folder}/{i + 5:06d}.png")), want[i]) <= 1

# ------------------------------------------------------------------------------------------------------- Python

@pytest.mark.parametrize("names", ["RANK WORLD_SIZE LOCAL_RANK", "SLURM_PROCID SLURM_STEP_NUM_TASKS SLURM_LOCALID",
                                   "OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE OMPI_COMM_WORLD_LOCAL_RANK"])
def test_processes_share_the_range(names, monkeypatch):
    argv = "--n_samples 20 --start 5 --seed 3"
    whole = infer(model_of("dcgan"), argv)["arr_0"]
    for rank in range(3):
        for name, value in zip(names.split(), (rank, 3, rank)):
            monkeypatch.setenv(name, str(value))
        infer(model_of("dcgan"), argv, out="part.npz")
        infer(model_of("dcgan"), argv, out="folder/")
    parts = sorted(f for f in os.listdir(".") if f.startswith("part"))
    assert parts == [f"part_{a:09d}-{b:09d}.npz" for a, b in ((5, 10), (11, 17), (18, 24))]
    np.testing.assert_array_equal(np.concatenate([arrays(f)["arr_0"] for f in parts]), whole)
    assert sorted(os.listdir("folder")) == [f"{i:06d}.png" for i in range(5, 25)]
    np.testing.assert_array_equal(np.asarray(Image.open("folder/000024.png")), whole[19])

def test_launchers(capfd, monkeypatch):
    model = model_of("dcgan")
    monkeypatch.setenv("SLURM_PROCID", "0")  # sbatch: once, with the number of tasks that srun would start
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert infer_ort.process() == (0, 1, 0)
    monkeypatch.setenv("RANK", "")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert infer_ort.process() == (0, 1, 0)
    monkeypatch.setenv("RANK", "1")
    assert "--n_samples" in error_of(capfd, infer, model, "--n_samples 2")

def test_a_folder_is_what_fid_tools_read():
    """torch-fidelity reads the very pictures and tells two folders apart; its features here need no weights."""
    torch_fidelity = pytest.importorskip("torch_fidelity")
    seen = []

    class Corner(torch_fidelity.FeatureExtractorBase):
        get_provided_features_list = staticmethod(lambda: ("corner",))

        def __init__(self, name, features, **_):
            super().__init__(name, features)

        def forward(self, images):
            seen.extend(images.permute(0, 2, 3, 1).numpy())
            return (images[:, 0, :2, :2].flatten(1).double(),)

    torch_fidelity.register_feature_extractor("corner", Corner)
    for seed in (0, 1):
        infer(model_of("dcgan"), "--n_samples 40 --seed", seed, out=f"{seed}/")
    fid = functools.partial(torch_fidelity.calculate_metrics, input1="0", fid=True, cuda=False, cache=False,
                            feature_extractor="corner", feature_layer_fid="corner", verbose=False, save_cpu_ram=True)
    assert fid(input2="0")["frechet_inception_distance"] < 0.01 < fid(input2="1")["frechet_inception_distance"]
    np.testing.assert_array_equal(seen[:40], infer(model_of("dcgan"), "--n_samples 40")["arr_0"])

def test_npz_is_streamed():
    """As much memory for many pictures as for few."""
    peaks = []
    for n in (10, 200):
        parts = (np.full((64, 32, 32, 3), i, np.uint8) for i in range(n))  # 0.2 MB each
        tracemalloc.start()
        infer_ort.write_npz(f"{n}.npz", parts, 64 * n, np.arange(64 * n))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 1e6
    got = arrays("200.npz")
    assert got["arr_0"].shape == (12800, 32, 32, 3)
    assert (got["arr_0"][::64, 0, 0, 0] == np.arange(200)).all()
    assert (got["labels"] == np.arange(12800)).all()

def test_threads_of_a_server_share_one_generator():
    generator = infer_ort.Generator(model_of("dcgan"), provider="cpu", threads=1)
    z = infer_ort.latents(0, 0, 20, generator.nz)
    alone = generator(z)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(generator, [z] * 200))
    assert all((images == alone).all() for images in together)

def test_latents_of_another_width():
    """(20, 2 * nz) is not 40 latents of nz."""
    generator = infer_ort.Generator(model_of("dcgan"), provider="cpu")
    with pytest.raises(ValueError):
        generator(infer_ort.latents(0, 0, 20, 2 * generator.nz))

def test_a_class_that_is_called_all(folder):
    (folder / "cat").rename(folder / "all")
    train(acgan, "--max_steps 1 --dataset", folder)
    exported("run")
    assert infer("model.onnx", "--labels all --n_samples 3")["labels"].tolist() == [0, 0, 0]

def test_labels(folder):
    assert infer(model_of("acgan"), "--labels 7,3 --n_samples 5")["labels"].tolist() == [7, 3, 7, 3, 7]
    assert infer(model_of("acgan"), "--labels all --n_samples 12")["labels"].tolist() == [*range(10), 0, 1]
    train(acgan, "--max_steps 1 --dataset", folder)
    assert infer(exported("run"), "--labels dog,cat,1 --n_samples 3")["labels"].tolist() == [1, 0, 1]

def test_runs_without_torch_and_the_scripts():
    code = f"""import sys
for name in ('torch', 'torchvision', 'onnx', 'gan', 'dcgan', 'acgan', 'export'):
    sys.modules[name] = None
sys.path.insert(0, {str(ROOT)!r})
import infer_ort
sys.argv = ['infer_ort.py', {model_of("dcgan")!r}, '--n_samples', '3', '--out', '猫.png']
infer_ort.main()"""
    env = os.environ | {"PYTHONOPTIMIZE": "2", "PYTHONIOENCODING": "cp1252"}  # nor docstrings, nor Unicode
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100, env=env)
    assert os.path.exists("猫.png")

def test_benchmarks(capsys, cpp):
    model = model_of("acgan", "--batch_size 4")
    infer(model, "--benchmark", out=None)
    tables = [capsys.readouterr().out.splitlines()[-3:]]
    if cpp:
        tables.append(run_cpp(cpp, model, "--benchmark --threads 1").stdout.splitlines()[-3:])
    for facts, head, figures in tables:
        assert "fp32" in facts
        assert head.split() == words("batch images/s p50 ms p95 ms p99 ms")
        batch, speed, p50, p95, p99 = map(float, figures.split())
        assert batch == 4
        assert 0 < p50 <= p95 <= p99
        assert 0.2 < speed * p50 / 4000 < 5

def test_a_gpu_that_cannot_be_used_is_told_of(capfd, monkeypatch):
    if onnxruntime.get_device() != "CPU" and infer_ort.gpu_count():
        pytest.skip("the GPU can be used")
    monkeypatch.setattr(infer_ort, "gpu_count", lambda: 1)
    typed(infer_ort, model_of("dcgan"), *words("--threads 1 --n_samples 2 --out x.png"))
    assert "warning: there is a GPU" in capfd.readouterr().err
    assert os.path.exists("x.png")

@pytest.fixture
def gpu_that_fails(monkeypatch):
    """Sessions of CUDA compute on the CPU twice, and then fail as ONNX Runtime does where CUDA's kernels fail."""
    class Fails:
        def __init__(self, session):
            self.session, self.left = session, 2

        def __getattr__(self, name):
            return getattr(self.session, name)

        def run(self, *args):
            self.left -= 1
            if self.left < 0:
                raise EPFail("Non-zero status code returned while running Conv node. Status Message: CUDA failure 700")
            return self.session.run(*args)

    class Session(onnxruntime.InferenceSession):
        def __init__(self, *args, providers=(), **kwargs):
            super().__init__(*args, providers=["CPUExecutionProvider"], **kwargs)
            names = [name if isinstance(name, str) else name[0] for name in providers]
            if len(names) > 1:
                self._sess, self._providers = Fails(self._sess), names

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(infer_ort, "gpu_count", lambda: 1)

def on_gpu(*argv):
    typed(infer_ort, *words(*argv, "--threads 1 --batch_size 4 --n_samples 20 --out x.npz"))

def test_a_gpu_that_fails_is_never_hidden(gpu_that_fails, capfd):
    for provider in ("cuda", "tensorrt"):
        error = error_of(capfd, on_gpu, model_of("dcgan"), "--provider", provider)
        assert "CUDA failure 700" in error
        assert "--provider cpu" in error
    assert os.listdir(".") == []

def test_auto_goes_on_with_the_cpu(gpu_that_fails, capfd):
    model = model_of("acgan", "--batch_size 4")
    capfd.readouterr()
    on_gpu(model)
    said = capfd.readouterr()
    assert said.out == "wrote x.npz\n"
    assert said.err.count("warning: ") == said.err.count("CUDA failure 700") == 1
    np.testing.assert_array_equal(arrays("x.npz")["arr_0"], infer(model, "--n_samples 20")["arr_0"])
    gen = infer_ort.Generator(model)
    assert gen.provider == "CUDAExecutionProvider"
    infer_ort.benchmark(gen, gen.labels(), infer_ort.get_args([model]))
    assert gen.provider == "CPUExecutionProvider"
    facts = [line for line in capfd.readouterr().out.splitlines() if "Provider" in line]
    assert len(facts) == 1  # what was measured, not what was asked for
    assert "CPUExecutionProvider" in facts[0]

def test_auto_takes_the_cpu_for_int8(gpu_that_fails):
    model = model_of("dcgan", "--precision int8 --uint8")
    assert infer_ort.Generator(model).provider == "CPUExecutionProvider"
    assert infer_ort.Generator(model, provider="cuda").provider == "CUDAExecutionProvider"

def test_a_gpu_that_is_not_there(gpu_that_fails, capfd):
    for provider in ("auto", "cuda"):
        error = error_of(capfd, on_gpu, model_of("dcgan"), "--device_id 3 --provider", provider)
        assert "--device_id 3: " in error
        assert "1" in error.split("--device_id 3: ")[1]

# ---------------------------------------------------------------------------------------- somebody else's files

def save_graph(name, nodes, inputs, outputs, initializers=()):
    graph = helper.make_graph(nodes, "g", inputs, outputs, initializers)
    file = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(file, full_check=True)
    onnx.save(file, name)

def foreign(shape_in, shape_out, label=False):
    """An ONNX file of another origin: each pixel is tanh of the mean of z, or a tenth of the label less a half."""
    node, tensor, info = helper.make_node, helper.make_tensor, helper.make_tensor_value_info
    inputs = [info("noise", TensorProto.FLOAT, shape_in)]
    nodes = [node("Flatten", ["noise"], ["flat"]), node("ReduceMean", ["flat"], ["mean"], axes=[1], keepdims=1),
             node("Tanh", ["mean"], ["value"])]
    if label:
        inputs.insert(0, info("class", TensorProto.INT64, ["n"]))
        nodes = [node("Cast", ["class"], ["real"], to=TensorProto.FLOAT), node("Div", ["real", "ten"], ["tenth"]),
                 node("Sub", ["tenth", "half"], ["value"])]
    nodes += [node("Reshape", ["value", "four"], ["one"]), node("Expand", ["one", "size"], ["image"])]
    constants = [tensor("four", TensorProto.INT64, [4], [-1, 1, 1, 1]), tensor("ten", TensorProto.FLOAT, [], [10.0]),
                 tensor("half", TensorProto.FLOAT, [], [0.5]),
                 tensor("size", TensorProto.INT64, [4], [1, *shape_out[1:]])]
    save_graph("foreign.onnx", nodes, inputs, [info("image", TensorProto.FLOAT, shape_out)], constants)

@pytest.mark.parametrize("shape_in", [["n", 12], ["n", 12, 1, 1], [4, 12]])
@pytest.mark.parametrize("shape_out", [[3, 8, 10], [8, 10, 3], [1, 8, 8]])
def test_foreign_generators(shape_in, shape_out, cpp):
    foreign(shape_in, [shape_in[0], *shape_out])
    want = (np.tanh(infer_ort.latents(2, 0, 10, 12).mean(1)) * np.float32(127.5) + 128).astype(np.uint8)
    results = [infer("foreign.onnx", "--n_samples 10 --seed 2")["arr_0"]]
    if cpp:
        run_cpp(cpp, "foreign.onnx --n_samples 10 --seed 2 --out cpp.npy")
        results.append(np.load("cpp.npy"))
    for got in results:
        assert got.shape == (10, *([8, 8, 1] if 1 in shape_out else [8, 10, 3]))
        assert far(got[:, 0, 0, 0], want) <= 1

def test_foreign_conditional_generator(capfd, cpp):
    foreign(["n", 12], ["n", 3, 8, 8], label=True)
    got = infer("foreign.onnx", "--labels 0,5 --n_samples 4")
    assert got["arr_0"][:, 0, 0, 0].tolist() == [64, 128, 64, 128]
    assert "--labels" in error_of(capfd, infer, "foreign.onnx")
    assert "--labels" in error_of(capfd, infer, "foreign.onnx", "--labels", 2**64)
    if cpp:
        run_cpp(cpp, "foreign.onnx --labels 0,5 --n_samples 4 --out cpp.npy")
        np.testing.assert_array_equal(np.load("cpp.npy"), got["arr_0"])
        assert np.load("cpp_labels.npy").tolist() == [0, 5, 0, 5]

@pytest.mark.parametrize("batch", ["n", 5])
@pytest.mark.parametrize(("scale", "shift", "low", "high"), [
    (0.5, 0.5, 0, 1), (127.5, 127.5, 0, 255), (1, 0, -1, 1), (3, 0, -1, 1)])
def test_the_range_of_somebody_elses_pictures(capfd, batch, scale, shift, low, high):
    """Pixels a * tanh(mean z) + b: told by fixed latents, so that a picture is the same in every batch."""
    foreign([batch, 12], [batch, 3, 8, 10])
    file = onnx.load("foreign.onnx")
    tanh = next(n for n in file.graph.node if n.op_type == "Tanh")
    tanh.output[0] = "tanh"
    index = list(file.graph.node).index(tanh) + 1
    file.graph.node.insert(index, helper.make_node("Add", ["scaled", "shift"], ["value"]))
    file.graph.node.insert(index, helper.make_node("Mul", ["tanh", "scale"], ["scaled"]))
    for name, value in (("scale", scale), ("shift", shift)):
        file.graph.initializer.append(helper.make_tensor(name, TensorProto.FLOAT, [], [value]))
    onnx.save(file, "foreign.onnx")
    value = scale * np.tanh(infer_ort.latents(2, 0, 300, 12).mean(1)) + shift
    want = ((value - low) * (255 / (high - low)) + 0.5).clip(0, 255).astype(np.uint8)
    for argv in ("", "--batch_size 1 --start 100", "--n_samples 1 --start 299"):
        start = infer_ort.get_args(["x", *words(argv)]).start
        got = infer("foreign.onnx", f"--n_samples {300 - start} --seed 2", argv)["arr_0"]
        assert far(got[:, 0, 0, 0], want[start:start + len(got)]) <= 1
        said = capfd.readouterr().err
        assert said.count("warning: foreign.onnx: ") == (scale != 1)
        assert f"[{low}, {high}]" in said or scale == 1

# ------------------------------------------------------------------------------------------------------- errors

def refused(capfd, cpp, said, *argv):
    """Both programs end in one line that names a file or flag, and write nothing."""
    before, argv = sorted(os.listdir(".")), words(*argv)
    if ".npy" not in argv[-1]:
        assert said in error_of(capfd, typed, infer_ort, *argv)
    if cpp and ".npz" not in argv[-1]:
        done = run_cpp(cpp, *argv, check=False)
        assert said in done.stderr
        assert done.returncode == (2 if done.stderr.startswith("infer_ort: error: --") else 1)
        assert done.stderr.count("\n") == 1
    assert sorted(os.listdir(".")) == before

def test_files_that_are_no_generators(capfd, cpp):
    data = Path(model_of("dcgan")).read_bytes()
    Path("cut.onnx").write_bytes(data[:len(data) // 2])
    Path("text.onnx").write_text("I am no model")
    Path("empty.onnx").touch()
    os.mkdir("directory.onnx")
    shapes = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 7]) for name in "xy"]
    save_graph("identity.onnx", [helper.make_node("Identity", ["x"], ["y"])], shapes[:1], shapes[1:])
    picture = helper.make_tensor("x", TensorProto.FLOAT, [1, 1, 2, 2], [0.0] * 4)
    image = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, 2, 2])
    constant = helper.make_node("Constant", [], ["y"], value=picture)
    save_graph("no_inputs.onnx", [constant], [], [image])
    foreign(["n", 12], ["n", 3, 8, 8])
    file = onnx.load("foreign.onnx")
    file.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 0
    onnx.save(file, "no_width.onnx")
    foreign([0, 12], [0, 3, 8, 8])
    for name in ("nope", "directory", "cut", "text", "empty", "identity", "no_inputs", "no_width", "foreign"):
        refused(capfd, cpp, f"{name}.onnx: ", f"{name}.onnx")
    refused(capfd, cpp, "checkpoint.pt: ", f"{run_of('dcgan')}/checkpoint.pt")
    refused(capfd, None, ".: ", ".")

def test_flags_that_do_not_fit(capfd, cpp):
    Path("file").touch()
    lines = ["--labels 1", "--out file/x.png", "--out file/x.npy", "--out file/", "--out file/x.npz", "--out x.bmp",
             "--n_samples 0", "--seed -1", "--batch_size x", "--unknown"]
    if onnxruntime.get_device() == "CPU" or not infer_ort.gpu_count():
        lines.append("--provider cuda")
    for line in lines:
        refused(capfd, cpp, line.split()[0], model_of("dcgan"), line)
    for text in ("10", "-1", "3,cat", "3,,4", "99999999999999999999"):
        refused(capfd, cpp, "--labels", model_of("acgan"), "--labels", text)
    for line in ("--walk_dim 8", "--walk_dim 1 --interpolate 5", "--out x.png --interpolate 5", "--threads 100000",
                 "--start 1 --interpolate 5"):
        refused(capfd, None, line.split()[0], model_of("dcgan"), line)

def tampered(name, **metadata):
    file = onnx.load(model_of(name))
    for p in file.metadata_props:
        p.value = metadata.get(p.key, p.value)
    onnx.save(file, "tampered.onnx")
    return file

def test_a_file_that_makes_another_number_of_pictures(capfd, cpp):
    value = helper.make_node("Constant", [], ["y"], value=helper.make_tensor("x", TensorProto.FLOAT, [1, 1, 2, 2], [0.0] * 4))
    shapes = [helper.make_tensor_value_info(*v) for v in (("z", TensorProto.FLOAT, ["n", 7]), ("y", TensorProto.FLOAT, [1, 1, 2, 2]))]
    save_graph("one.onnx", [value], shapes[:1], shapes[1:])
    refused(capfd, cpp, "one.onnx: ", "one.onnx")

@pytest.mark.parametrize("text", ["n_classes -3", "n_classes ten", "n_classes 10abc", f"n_classes {'9' * 20}",
                                  "n_classes 9999999", "layout NHWC", "format_version 99"])
def test_tampered_metadata(capfd, cpp, text):
    key, value = text.split()
    tampered("acgan", **{key: value})
    refused(capfd, cpp, "tampered.onnx: ", "tampered.onnx")

def test_names_of_classes_without_an_end(capfd):
    tampered("acgan", classes="[" * 100_000)
    refused(capfd, None, "tampered.onnx: ", "tampered.onnx")

def test_more_classes_stated_than_there_are(capfd, cpp):
    tampered("acgan", n_classes="100", classes="[]")
    refused(capfd, cpp, "tampered.onnx: ", "tampered.onnx --labels 50")

def test_pictures_that_are_not_finite(capfd, cpp):
    file = tampered("dcgan")
    weight = next(t for t in file.graph.initializer if t.data_type == TensorProto.FLOAT)
    weight.CopyFrom(numpy_helper.from_array(np.full_like(numpy_helper.to_array(weight), np.nan), weight.name))
    onnx.save(file, "tampered.onnx")
    refused(capfd, cpp, "tampered.onnx: ", "tampered.onnx")

def test_files_that_other_tools_saved():
    """onnxsim and onnxslim too were tried by hand."""
    want = infer(model_of("acgan"))["arr_0"]
    options, extended = onnxruntime.SessionOptions(), onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath, options.graph_optimization_level = "optimized.onnx", extended
    onnxruntime.InferenceSession(model_of("acgan"), options, providers=["CPUExecutionProvider"])
    model = onnx.load(model_of("acgan"))
    make_dim_param_fixed(model.graph, model.graph.input[0].type.tensor_type.shape.dim[0].dim_param, 5)
    onnx.save(model, "fixed.onnx")
    for name in ("optimized.onnx", "fixed.onnx"):
        assert far(infer(name, "--n_samples", len(want))["arr_0"], want) <= 1

def test_what_a_file_is_too_new_for(capfd):
    for said, version in (("Unsupported model IR version: 10, max supported IR version: 9", "1.18"),
                          (f"{'x' * 200} Opset 22 is under development and support for this is limited.", "1.21")):
        assert f"onnxruntime {version} or later" in infer_ort.reason(RuntimeError(said))
    for ir, opset in ((99, 17), (8, 99)):
        file = onnx.load(model_of("gan"))
        file.ir_version, file.opset_import[0].version = ir, opset
        onnx.save(file, "new.onnx")
        assert f"a newer onnxruntime; this is {onnxruntime.__version__}" in error_of(capfd, infer, "new.onnx")

def test_what_cpp_would_have_no_room_for(need_cpp):
    """Sizes whose products overflow; a value that was forgotten."""
    for shape in (["n", 2**60], [2**61, 12]):
        foreign(shape, [shape[0], 3, 8, 8])
        done = run_cpp(need_cpp, "foreign.onnx --out x.npy", check=False)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert "foreign.onnx: " in done.stderr
    done = run_cpp(need_cpp, model_of("dcgan"), "--out --benchmark", check=False)
    assert "--out" in done.stderr
    assert os.listdir(".") == ["foreign.onnx"]

def test_what_cpp_alone_could_get_wrong(need_cpp):
    model = model_of("dcgan")
    for n in (2**53, 10**11):
        done = run_cpp(need_cpp, model, "--out x.png --n_samples", n, check=False)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert "memory" in done.stderr
    run_cpp(need_cpp, model, "--n_samples 5 --batch_size 100000 --out five.npy")
    np.testing.assert_array_equal(np.load("five.npy"), infer(model, "--n_samples 5")["arr_0"])
    line = f'trap "" XFSZ; ulimit -f 1; "{need_cpp}" "{model}" --n_samples 999 --out big.npy'
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--out big.npy" in done.stderr
    assert not [name for name in os.listdir(".") if "big" in name]

def sigmoid(low, high, shape_in=("n", 12), label=False):
    """A foreign generator with an end of its own: each pixel is in [low, high]. Returns its values for a seed."""
    node, tensor, info = helper.make_node, helper.make_tensor, helper.make_tensor_value_info
    numbers = {"steep": 4.0, "size": high - low, "low": low}
    constants = [tensor(name, TensorProto.FLOAT, [1], [x]) for name, x in numbers.items()]
    constants += [tensor("one", TensorProto.INT64, [4], [-1, 1, 1, 1]),
                  tensor("shape", TensorProto.INT64, [4], [1, 3, 8, 10])]
    nodes = [node("ReduceMean", ["z"], ["mean"], axes=[1], keepdims=1), node("Mul", ["mean", "steep"], ["x"]),
             node("Sigmoid", ["x"], ["y"]), node("Mul", ["y", "size"], ["sized"]),
             node("Add", ["sized", "low"], ["pixel"]), node("Reshape", ["pixel", "one"], ["image"]),
             node("Expand", ["image", "shape"], ["images"])]
    inputs = [info("z", TensorProto.FLOAT, shape_in)] + [info("labels", TensorProto.INT64, shape_in[:1])] * label
    save_graph("sigmoid.onnx", nodes, inputs, [info("images", TensorProto.FLOAT, [shape_in[0], 3, 8, 10])], constants)
    return lambda seed, n: low + (high - low) / (1 + np.exp(-4 * infer_ort.latents(seed, 0, n, 12).mean(1)))

def pixels_of(x, name):
    scale, offset = {"[-1, 1]": (127.5, 128), "[0, 1]": (255, 0.5), "[0, 255]": (1, 0.5)}[name]
    return np.floor((x * scale + offset).clip(0, 255))

@pytest.mark.parametrize(("low", "high", "name"), [(-1, 1, "[-1, 1]"), (0, 1, "[0, 1]"), (0, 255, "[0, 255]"),
                                                   (-0.5, 0.9, "[-1, 1]"), (0, 800, "[-1, 1]"), (0, 8, "[-1, 1]")])
def test_cpp_recognises_the_range_of_foreign_pictures(need_cpp, low, high, name):
    """One that ends in a sigmoid would be washed out; labels and fixed sizes of batches, which differ from 16, too."""
    for shape_in, label in ((["n", 12], False), ([5, 12], False), (["n", 12], True)):
        want = pixels_of(sigmoid(low, high, shape_in, label)(3, 20), name)
        done = run_cpp(need_cpp, "sigmoid.onnx --n_samples 20 --seed 3 --out x.npy", *["--labels 0"] * label)
        assert (f"are in {name}" in done.stderr) == (name != "[-1, 1]")
        assert far(np.load("x.npy")[:, 0, 0, 0], want) <= 1

def test_cpp_believes_a_stated_range(need_cpp):
    want = pixels_of(sigmoid(0, 1)(3, 20), "[-1, 1]")
    file = onnx.load("sigmoid.onnx")
    helper.set_model_props(file, {"value_range": "-1 to 1"})
    onnx.save(file, "sigmoid.onnx")
    assert not run_cpp(need_cpp, "sigmoid.onnx --n_samples 20 --seed 3 --out x.npy").stderr
    assert far(np.load("x.npy")[:, 0, 0, 0], want) <= 1

def test_numbers_have_ranges_in_cpp(need_cpp):
    """--help keeps the largest ones from being tried."""
    ranges = {"n_samples": (1, 2**53), "batch_size": (1, 2**53), "seed": (0, 2**63 - 1), "start": (0, 2**53),
              "threads": (0, 1024), "device_id": (0, 1023)}
    assert set(ranges) == set(re.findall(r"\[--(\w+) N\]", run_cpp(need_cpp, "--help").stdout))
    for flag, (low, high) in ranges.items():
        for good in (low, high):
            run_cpp(need_cpp, f"--help --{flag} {good}")
        for bad in (low - 1, high + 1, 10**30, "1.5", "nan", "1x"):
            done = run_cpp(need_cpp, f"--help --{flag} {bad}", check=False)
            assert (done.returncode, done.stderr.count("\n")) == (2, 1)
            assert done.stderr.startswith(f"infer_ort: error: --{flag} {bad}: ")

@pytest.mark.skipif(sys.platform != "linux" or infer_ort.gpu_count() > 0, reason="there is a GPU")
def test_cpp_with_a_gpu_that_cannot_be_used(need_cpp, monkeypatch):
    """A driver that counts two GPUs, and nothing else of CUDA."""
    code = "int cuInit(unsigned x) { return x; } int cuDeviceGetCount(int *n) { *n = 2; return 0; }"
    subprocess.run(["c++", "-shared", "-fPIC", "-x", "c", "-", "-o", "libcuda.so.1"], input=code, text=True, check=True)
    monkeypatch.setenv("LD_LIBRARY_PATH", os.getcwd())
    plain, int8 = model_of("dcgan"), model_of("dcgan", "--precision int8 --uint8")
    infer(plain, "--n_samples 5")
    warned = run_cpp(need_cpp, plain, "--n_samples 5 --out x.npy").stderr
    assert warned.startswith("infer_ort: warning: ")
    assert warned.count("\n") == 1
    np.testing.assert_array_equal(np.load("x.npy"), arrays("x.npz")["arr_0"])
    for model, flags in ((plain, "--provider cpu"), (int8, "")):  # neither takes a GPU
        assert not run_cpp(need_cpp, model, flags, "--n_samples 5 --out x.npy").stderr
    for flags, said in (("--provider cuda", "--provider cpu"), ("--device_id 2", "2 GPUs"),
                        ("--provider cpu --device_id 0", "--provider cpu")):
        done = run_cpp(need_cpp, plain, flags, "--out no.npy", check=False)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert said in done.stderr
    assert not os.path.exists("no.npy")

def test_cpp_says_why_a_file_does_not_load(need_cpp):
    file = onnx.load(model_of("dcgan"))
    file.ir_version = 99
    onnx.save(file, "newer.onnx")
    assert "newer.onnx: " in (said := run_cpp(need_cpp, "newer.onnx", check=False).stderr)
    assert "IR version: 99" in said

def test_a_failed_search_for_onnx_runtime_says_what_to_get(need_cpp):
    done = cmake("build", "-DCMAKE_FIND_ROOT_PATH=/nowhere", "-DCMAKE_FIND_ROOT_PATH_MODE_INCLUDE=ONLY")
    assert done.returncode != 0
    assert ["-DORT_ROOT=" in line for line in done.stderr.splitlines() if "ONNX Runtime" in line] == [True]

@POSIX
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_program_leaves_nothing_half_written(cpp, signum):
    for program, out in (([sys.executable, ROOT / "infer_ort.py"], "python.npz"), ([cpp], "cpp.npy"))[:1 + bool(cpp)]:
        argv = [*program, model_of("dcgan"), *words("--n_samples 100000000 --threads 1 --out", out)]
        with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as running:
            while running.poll() is None and not any(out in name for name in os.listdir(".")):
                time.sleep(0.05)
            running.send_signal(signum)
            _, err = running.communicate(timeout=60)
        assert running.returncode == 1
        assert "error: interrupted" in err.replace("\r", "\n").splitlines()[-1]
        assert not [name for name in os.listdir(".") if out in name]
