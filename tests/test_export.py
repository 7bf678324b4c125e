"""export.py: one file, the same pictures as PyTorch in every precision, and a line for every mistake."""

import argparse
import functools
import hashlib
import importlib
import json
import os
import pickle
import shutil
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from conftest import ROOT, command, error_of, train, words

import dcgan
import export
import infer_ort

LEAST_PSNR = {"": 90, "--uint8": 50, "--precision fp16": 40, "--precision int8 --uint8": 35}
KEPT = tempfile.TemporaryDirectory(prefix="tests-of-export-")  # what costs seconds is made once

@functools.cache
def run_of(name):
    """The folder of a tiny run, RGB, long enough for weights that are not those of the start."""
    out = f"{KEPT.name}/{name}"
    train(importlib.import_module(name), f"--max_steps 5 --lr 0.01 --nc 3 --data_dir {KEPT.name}", out=out)
    return out

@functools.cache
def model_of(name, flags=""):
    """The file that export.py makes of that run."""
    return exported(run_of(name), flags, out=f"{KEPT.name}/{name}{flags.replace(' ', '')}.onnx")

def exported(checkpoint, flags="", out="model.onnx"):
    export.export(export.get_args([checkpoint, *flags.split(), "-o", out]))
    return out

def typed(program, *argv):
    """Its main() in this process, as a command line starts it."""
    with mock.patch.object(sys, "argv", [program.__name__, *map(str, argv)]):
        program.main()

def conditional(script):
    return script.SCRIPT == "acgan"

def operations(path):
    return [node.op_type for node in onnx.load(path).graph.node]

def session(path):
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"])

def metadata(path):
    return {p.key: p.value for p in onnx.load(path).metadata_props}

def reference(checkpoint, seed, start, n):
    """(inputs, PyTorch's images) for samples start to start + n - 1."""
    script, netG, *_ = export.load(export.dcgan.last_checkpoint(checkpoint))
    inputs = export.draw(script, netG, seed, start, n)
    with torch.no_grad():
        return inputs, netG(*map(torch.from_numpy, inputs.values()))

def assert_pytorchs_pictures(path, checkpoint, flags="", sizes=(1, 5, 33)):
    for n in sizes:
        inputs, want = reference(checkpoint, 9, 1000, n)
        (got,) = session(path).run(["images"], inputs)
        if "--uint8" in flags:
            assert got.dtype == np.uint8
            got, want = got.astype(float), dcgan.to_uint8(want).astype(float)
        else:
            assert got.dtype == np.float32
            want = want.numpy()
        assert got.shape == want.shape
        error = np.square((got - want) / np.ptp(want) * 2).mean()
        assert 10 * np.log10(4 / max(error, 1e-20)) > LEAST_PSNR[flags]
        if "precision" not in flags:
            np.testing.assert_allclose(got, want, atol=1 if "--uint8" in flags else 1e-4)

@pytest.mark.parametrize("flags", LEAST_PSNR)
def test_every_script_and_precision_gives_pytorchs_pictures(script, flags):
    assert_pytorchs_pictures(path := model_of(script.SCRIPT, flags), run_of(script.SCRIPT), flags)
    model = onnx.load(path)
    graph, ops = model.graph, [node.op_type for node in model.graph.node]
    assert (model.ir_version, model.opset_import[0].version) == (8, 17)  # ONNX Runtime 1.15 loads these
    assert not {"BatchNormalization", "Unsqueeze"} & {*ops}  # nor allowzero, nor labels without a Reshape: OpenCV 4
    assert "allowzero" not in [a.name for node in graph.node for a in node.attribute]
    assert "Gather" not in ops or "Reshape" in [n.op_type for n in graph.node if "embedding.rows" in n.input]
    if script.SCRIPT != "gan":
        assert (ops.count("Conv"), ops.count("ConvTranspose")) == ((4, 1) if "precision int8" in flags else (0, 3))
    assert [i.name for i in graph.input] == ["z", "labels"][:1 + conditional(script)]
    assert all(not t.external_data for t in graph.initializer)

def test_metadata_explains_the_file(script):
    path, run = model_of(script.SCRIPT), Path(run_of(script.SCRIPT))
    meta = metadata(path)
    assert meta == session(path).get_modelmeta().custom_metadata_map
    sha256 = hashlib.sha256((run / "checkpoint.pt").read_bytes()).hexdigest()
    expected = {"format_version": 1, "script": script.SCRIPT, "nz": 8, "nc": 3, "img_size": 16, "layout": "NCHW",
                "n_classes": 10 if conditional(script) else 0, "value_range": "-1 to 1", "precision": "fp32",
                "latent": "N(0, 1)", "dataset": "digits", "steps": 5, "weights": "ema", "checkpoint_sha256": sha256}
    assert {k: meta[k] for k in expected} == {k: str(v) for k, v in expected.items()}
    assert json.loads(meta["classes"]) == ([str(k) for k in range(10)] if conditional(script) else [])
    pixels = metadata(model_of(script.SCRIPT, "--precision int8 --uint8"))
    assert (pixels["layout"], pixels["value_range"], pixels["precision"]) == ("NHWC", "0 to 255", "int8")

@pytest.mark.parametrize(("dataset", "name"), [("C:\\Users\\bob\\faces", "faces"), ("/home/bob/faces", "faces")])
def test_a_data_set_is_named_without_its_folder(dataset, name):
    args = argparse.Namespace(uint8=False, precision="fp32")
    run = {"script": "dcgan", "args": {"dataset": dataset}}
    assert export.describe(args, dcgan.Generator(), [], run, "0" * 64)["dataset"] == name

@pytest.mark.parametrize("flags", LEAST_PSNR)
def test_no_local_path(flags):
    data = Path(model_of("dcgan", flags)).read_bytes()
    for text in (str(ROOT), KEPT.name, "/tmp", "/home", "site-packages", ".py", "Traceback", "forward("):
        assert text.encode() not in data, text

def test_batch_size_and_opset():
    model = onnx.load(model_of("dcgan", "--batch_size 3 --opset 20"))
    assert (model.ir_version, model.opset_import[0].version) == (9, 20)
    assert [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == [3, 8]
    assert_pytorchs_pictures(model_of("dcgan", "--batch_size 3 --opset 20"), run_of("dcgan"), sizes=[3])

def test_the_plain_graph():
    """What CUDA, TensorRT, browsers and phones take: a person can read it; with labels no node more than they need."""
    layers = ["ConvTranspose", "Relu", "ConvTranspose", "Relu", "ConvTranspose", "Tanh"]
    assert operations(model_of("dcgan")) == ["Reshape", *layers]
    assert operations(model_of("acgan")) == ["Gather", "Reshape", "Mul", "Reshape", *layers]
    assert operations(model_of("gan")) == ["Gemm", "Relu"] * 2 + ["Gemm", "Tanh", "Reshape"]

def test_a_net_of_somebodys_own_that_does_more_with_z():
    """As InfoGAN's, which makes its codes of z: the graph is what PyTorch writes."""
    class Own(dcgan.Generator):
        def forward(self, z):
            return super().forward(torch.cat((z[:, :2].square(), z[:, 2:]), 1))

    netG = Own(nz=5, ngf=2, img_size=16).eval()
    inputs = {"z": dcgan.latents(0, 0, 4, 5)}
    model = export.to_onnx(export.Exported(netG, False, False), inputs, None, 17)
    images = ort.InferenceSession(model.SerializeToString()).run(None, inputs)[0]
    np.testing.assert_allclose(images, netG(torch.from_numpy(inputs["z"])).detach(), atol=1e-5)

def test_int8_runs_in_int8_and_is_small():
    """What ONNX Runtime makes of the file: every convolution but the last in int8, and no detour through NCHW."""
    torch.save(dcgan.Generator(nz=100, ngf=32, nc=3, img_size=32).state_dict(), "netG.pth")
    exported("netG.pth", "--precision int8")
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = "optimized.onnx", 4
    ort.InferenceSession("model.onnx", options, providers=["CPUExecutionProvider"])
    ops = [n.op_type for n in onnx.load("optimized.onnx").graph.node]
    assert (ops.count("QLinearConv"), ops.count("ConvTranspose")) == (8, 1)
    assert ops.count("Conv") + ops.count("FusedConv") == 0
    assert ops.count("Transpose") <= 2
    assert os.path.getsize("model.onnx") < 0.35 * os.path.getsize("netG.pth")

def test_somebody_elses_state_dict():
    torch.manual_seed(0)
    state = dcgan.Generator(nz=20, ngf=4, nc=3, img_size=64).state_dict()
    torch.save({"g_model_state_dict": {f"module.{k}": v for k, v in state.items()}}, "theirs.pth")
    for flags, convs in (("", (0, 5)), ("--phases", (12, 1))):  # four for each layer between the first and the last
        meta = metadata(exported("theirs.pth", flags))
        assert [meta[k] for k in ("nz", "nc", "img_size", "dataset", "steps")] == words("20 3 64 unknown unknown")
        ops = operations("model.onnx")
        assert (ops.count("Conv"), ops.count("ConvTranspose")) == convs
        assert_pytorchs_pictures("model.onnx", "theirs.pth")

def test_default_name_is_beside_the_checkpoint():
    assert export.get_args(["a/netG.pth"]).out == "a/netG.onnx"
    assert export.get_args(["a/netG.pth", "--precision", "int8"]).out == "a/netG_int8.onnx"
    assert export.get_args([run_of("dcgan")]).out == f"{run_of('dcgan')}/checkpoint.onnx"

def test_what_differs_from_pytorch_is_not_written(capfd, monkeypatch):
    original = export.fold_batchnorm

    def wrong(net):
        net = original(net)
        net.main[-2].weight.data += 1
        return net

    monkeypatch.setattr(export, "fold_batchnorm", wrong)
    message = error_of(capfd, exported, run_of("dcgan"), "--uint8")
    assert "model.onnx: not written" in message
    assert "--precision" in message
    assert os.listdir(".") == []
    exported(run_of("dcgan"), "--uint8 --no-verify")
    assert os.path.exists("model.onnx")

def test_a_diverged_net_is_not_written(capfd):
    netG = dcgan.Generator(nz=8, ngf=4, nc=1, img_size=16)
    netG.main[0].weight.data[0, 0] = float("nan")
    torch.save(netG.state_dict(), "nan.pth")
    for flags in ("--uint8", "--precision int8"):
        assert "nan.pth: " in error_of(capfd, exported, "nan.pth", flags)
    assert os.listdir(".") == ["nan.pth"]

def test_a_checkpoint_that_its_run_saves_meanwhile(capfd, monkeypatch):
    shutil.copytree(run_of("dcgan"), "run")
    def load(path, load=export.load):
        with open(path, "ab") as f:
            f.write(b"more")
        return load(f"{run_of('dcgan')}/checkpoint.pt")
    monkeypatch.setattr(export, "load", load)
    assert "run/checkpoint.pt: " in error_of(capfd, exported, "run")
    assert not os.path.exists("model.onnx")

def test_pictures_of_five_channels(capfd):
    """For other programs than ours: infer_ort.py is not named."""
    torch.save(dcgan.Generator(nz=8, ngf=4, nc=5, img_size=16).state_dict(), "five.pth")
    exported("five.pth")
    assert "infer_ort.py" not in capfd.readouterr().out

class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)

def test_errors(capfd):
    Path("evil.pt").write_bytes(pickle.dumps({"netG": Payload()}, 2))
    Path("cut.pt").write_bytes(b"PK\x03\x04 cut off")
    torch.save(torch.nn.Linear(2, 2), "module.pt")
    torch.save({"weight": torch.zeros(3, 3)}, "other.pt")
    torch.save({"script": "wgan", "netG": {}}, "wgan.pt")
    Path("file").touch()
    before = sorted(os.listdir("."))
    for name in ("", "nope.pt", "evil.pt", "cut.pt", "module.pt", "other.pt", "wgan.pt"):
        assert name in error_of(capfd, exported, name)
    torch.save({"script": "dcgan", "netG": {}, "config": {"ngf": 4}}, "empty.pt")
    assert "empty.pt" in error_of(capfd, typed, export, "empty.pt")
    os.remove("empty.pt")
    for line in ("--out model.pt", "--phases --precision fp16", "--phases"):
        assert line.split()[0] in error_of(capfd, typed, export, run_of("gan"), *line.split())
    assert "file" in error_of(capfd, typed, export, run_of("gan"), "--out", "file/model.onnx")
    assert sorted(os.listdir(".")) == before

@pytest.mark.parametrize("program", [export, infer_ort])
def test_every_number_has_a_range(capfd, program):
    """Below, at and above it; what a new flag forgets is told here."""
    for action in program.make_parser()._actions:
        if action.type is None:  # text, or a switch
            assert not isinstance(action.default, (int, float)) or action.nargs == 0, action.dest
            continue
        kind, low, high = action.type.args
        for value in (low, high):
            args = program.make_parser().parse_args(["x", action.option_strings[-1], str(value)])
            assert getattr(args, action.dest) == kind(value)
        for value in (low - 1, high + 1, "nan", "x", ""):
            error = error_of(capfd, program.get_args, ["x", f"{action.option_strings[-1]}={value}"])
            assert action.option_strings[-1] in error

def test_the_command():
    """Without docstrings, in a terminal that cannot show the name."""
    env = os.environ | {"PYTHONOPTIMIZE": "2", "PYTHONIOENCODING": "cp1252"}
    done = command("export", run_of("gan"), "-o 猫.onnx", env=env)
    assert done.returncode == 0, done.stderr
    assert "PSNR" in done.stdout
    assert r"python infer_ort.py '\u732b.onnx'" in done.stdout
    assert os.listdir(".") == ["猫.onnx"]
