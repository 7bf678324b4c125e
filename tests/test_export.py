"""export.py: one file, the same pictures as PyTorch in every precision, and a line for every mistake."""

import copy
import hashlib
import importlib
import json
import os
import pickle
import zlib
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from conftest import ROOT, error_of, train
from test_sampling import ExamplesGenerator

import dcgan
import export

LEAST_PSNR = {"fp32": 90, "fp16": 40, "int8": 35}


def exported(*argv, out="model.onnx"):
    """A file made in this process from run/checkpoint.pt, or from what argv names."""
    argv = [str(a) for a in argv]
    if not argv or argv[0].startswith("-"):
        argv = ["run", *argv]
    export.export(export.get_args([*argv, "-o", out]))
    return onnx.load(out)


def session(path="model.onnx"):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def psnr(a, b):
    error = np.square(a.astype(np.float64) - b).mean()
    return 10 * np.log10(4 / error) if error else np.inf


def reference(script, path, seed, start, n, weights="ema"):
    """(inputs, PyTorch's images) for samples start to start + n - 1."""
    netG, _ = script.load_generator(path, weights)
    inputs = export.draw(script, netG, seed, start, n)
    with torch.no_grad():
        return inputs, netG(*map(torch.from_numpy, inputs.values()))


@pytest.mark.parametrize("precision", export.TOLERANCE)
def test_every_script_and_precision_gives_pytorchs_pictures(script, precision, capsys):
    train(script, "--max_steps", 5, "--lr", 0.01)
    model = exported("--precision", precision)
    said = capsys.readouterr().out
    assert "PSNR" in said
    assert "next: python infer_ort.py model.onnx" in said
    assert sorted(os.listdir(".")) == ["data", "model.onnx", "run"]
    for n in (1, 5, 33):
        inputs, want = reference(script, "run/checkpoint.pt", 9, 1000, n)
        (got,) = session().run(["images"], inputs)
        assert got.dtype == np.float32
        assert got.shape == (n, 1, 16, 16)
        assert psnr(got, want.numpy()) > LEAST_PSNR[precision]
        if precision == "fp32":
            np.testing.assert_allclose(got, want.numpy(), atol=1e-4)
    ops = [node.op_type for node in model.graph.node]
    if script.SCRIPT != "gan":
        assert (ops.count("Conv"), ops.count("ConvTranspose")) == ((0, 3) if precision == "fp16" else (4, 1))
    assert [i.name for i in model.graph.input] == ["z", "labels"][: 2 if script.SCRIPT == "acgan" else 1]
    assert "BatchNormalization" not in ops


@pytest.mark.parametrize("precision", export.TOLERANCE)
def test_uint8_graph_ends_in_pixels(script, precision):
    train(script, "--max_steps", 3, "--nc", 3)
    exported("--precision", precision, "--uint8")
    inputs, want = reference(script, "run/checkpoint.pt", 0, 0, 20)
    (got,) = session().run(["images"], inputs)
    want = script.to_uint8(want)
    assert got.dtype == np.uint8
    assert got.shape == (20, 16, 16, 3)
    assert psnr(got / 127.5, want / 127.5) > min(LEAST_PSNR[precision], 50)
    if precision == "fp32":
        assert np.abs(got.astype(int) - want).max() <= 1


def test_metadata_explains_the_file(script):
    ckpt = train(script, "--max_steps", 6, "--nc", 3)
    model = exported("--uint8")
    meta = {p.key: p.value for p in model.metadata_props}
    assert meta == session().get_modelmeta().custom_metadata_map
    conditional = script.SCRIPT == "acgan"
    expected = {
        "format_version": "1",
        "script": script.SCRIPT,
        "nz": "8",
        "nc": "3",
        "img_size": "16",
        "n_classes": "10" if conditional else "0",
        "layout": "NHWC",
        "value_range": "0 to 255",
        "precision": "fp32",
        "latent": "N(0, 1)",
        "dataset": "digits",
        "epochs": str(ckpt["epoch"]),
        "steps": "6",
        "weights": "ema",
        "checkpoint_sha256": hashlib.sha256(Path("run/checkpoint.pt").read_bytes()).hexdigest(),
    }
    assert {k: meta[k] for k in expected} == expected
    assert json.loads(meta["classes"]) == ([str(k) for k in range(10)] if conditional else [])
    assert torch.__version__ in meta["versions"]


@pytest.mark.parametrize(("dataset", "name"), [("C:\\Users\\bob\\faces", "faces"), ("/home/bob/faces", "faces"), (5, "5")])
def test_a_data_set_is_named_without_its_folder(dataset, name):
    ckpt = train(dcgan, "--max_steps", 1)
    ckpt["args"]["dataset"] = dataset
    torch.save(ckpt, "run/checkpoint.pt")
    assert {p.key: p.value for p in exported().metadata_props}["dataset"] == name


def test_the_file_ends_in_its_checksum():
    train(dcgan, "--max_steps", 1)
    stated = {p.key: p.value for p in exported().metadata_props}["crc32"]
    data = Path("model.onnx").read_bytes()
    assert stated == data[-8:].decode() == f"{zlib.crc32(data[:-8]):08x}"


@pytest.mark.parametrize("precision", export.TOLERANCE)
def test_no_local_path_and_no_stack_trace(folder, precision):
    """The data set too is only named, not where it lay."""
    train(dcgan, "--max_steps", 2, "--dataset", folder)
    model = exported("--precision", precision)
    data = Path("model.onnx").read_bytes()
    for text in (str(ROOT), os.getcwd(), "/tmp", "/home", "site-packages", ".py", "Traceback", "forward("):
        assert text.encode() not in data, text
    assert {p.key: p.value for p in model.metadata_props}["dataset"] == "pets"
    assert all(not t.external_data for t in model.graph.initializer)


def test_no_phases():
    train(dcgan, "--max_steps", 3, "--img_size", 32)
    model = exported("--no-phases")
    ops = [node.op_type for node in model.graph.node]
    assert (ops.count("Conv"), ops.count("ConvTranspose")) == (0, 4)


def test_weights_and_batch_size_and_opset():
    train(dcgan, "--max_steps", 20, "--lr", 0.01)
    exported("--weights", "raw", "--batch_size", 3, "--opset", 20)
    model = onnx.load("model.onnx")
    assert model.opset_import[0].version == 20
    assert [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == [3, 8]
    inputs, want = reference(dcgan, "run/checkpoint.pt", 0, 0, 3, "raw")
    np.testing.assert_allclose(session().run(None, inputs)[0], want.numpy(), atol=1e-4)
    _, average = reference(dcgan, "run/checkpoint.pt", 0, 0, 3, "ema")
    assert not np.allclose(average.numpy(), want.numpy(), atol=1e-3)


@pytest.mark.parametrize("img_size", [16, 32, 64])
def test_phases_are_the_transposed_convolution_exactly(img_size):
    torch.manual_seed(0)
    netG = dcgan.Generator(nz=5, ngf=3, nc=3, img_size=img_size).eval()
    for p in netG.parameters():
        p.data.normal_(0, 0.3)
    net = export.Exported(export.fold_batchnorm(copy.deepcopy(netG)), half=False, uint8=False).eval()
    inputs = export.draw(dcgan, netG, 0, 0, 4)
    model = export.to_onnx(net, inputs)
    first = next(n for n in model.graph.node if n.op_type == "ConvTranspose")
    first.op_type = "First"  # for a checkpoint the first layer is a Gemm by now
    export.to_phases(model)
    next(n for n in model.graph.node if n.op_type == "First").op_type = "ConvTranspose"
    assert sum(n.op_type == "Conv" for n in model.graph.node) == 4 * (np.log2(img_size) - 3)
    got = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, inputs)[0]
    with torch.no_grad():
        np.testing.assert_allclose(got, netG(torch.from_numpy(inputs["z"])).numpy(), atol=1e-5)


def test_int8_runs_in_int8_and_is_small():
    """What ONNX Runtime makes of the file: every convolution but the last in int8, and no detour through NCHW."""
    netG = dcgan.Generator(nz=100, ngf=32, nc=3, img_size=32)
    torch.save(netG.state_dict(), "netG.pth")
    exported("netG.pth", out="fp32.onnx")
    exported("netG.pth", "--precision", "int8")
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = "optimized.onnx", 4
    ort.InferenceSession("model.onnx", options, providers=["CPUExecutionProvider"])
    ops = [n.op_type for n in onnx.load("optimized.onnx").graph.node]
    assert ops.count("QLinearConv") == 8
    assert ops.count("Conv") + ops.count("FusedConv") == 0
    assert ops.count("ConvTranspose") == 1
    assert ops.count("Transpose") <= 2
    assert os.path.getsize("model.onnx") < 0.35 * os.path.getsize("fp32.onnx")


def test_best_range_beats_the_greatest_value():
    x = np.abs(np.random.default_rng(0).standard_normal(20000)).astype(np.float32)
    x[0] = 40

    def error(top):
        return np.square(np.minimum(np.round(x * (255 / top)), 255) * (top / 255) - x)[1:].mean()

    assert error(export.best_range(x)) < error(40)
    assert export.best_range(np.zeros(10, np.float32)) > 0


@pytest.mark.parametrize("wrap", [None, "g_model_state_dict", "netG", "state_dict"])
def test_foreign_state_dicts_at_64(wrap):
    torch.manual_seed(0)
    net = ExamplesGenerator(nz=20, ngf=4, nc=3)
    state = {f"module.{k}": v for k, v in net.state_dict().items()} if wrap else net.state_dict()
    torch.save({wrap: state} if wrap else state, "netG_epoch_24.pth")
    model = exported("netG_epoch_24.pth")
    meta = {p.key: p.value for p in model.metadata_props}
    assert (meta["nz"], meta["nc"], meta["img_size"], meta["dataset"]) == ("20", "3", "64", "unknown")
    z = dcgan.latents(1, 0, 5, 20)
    with torch.no_grad():
        want = net.eval()(torch.from_numpy(z)[:, :, None, None]).numpy()
    np.testing.assert_allclose(session().run(None, {"z": z})[0], want, atol=1e-4)


def test_default_name_is_beside_the_checkpoint():
    assert export.get_args(["a/netG.pth"]).out == "a/netG.onnx"
    assert export.get_args(["a/netG.pth", "--precision", "int8"]).out == "a/netG_int8.onnx"
    train(dcgan, "--max_steps", 1)
    assert export.get_args(["run"]).out == "run/checkpoint.onnx"


@pytest.mark.parametrize("uint8", [[], ["--uint8"]])
def test_what_differs_from_pytorch_is_not_written(capfd, monkeypatch, uint8):
    train(dcgan, "--max_steps", 2)
    original = export.fold_batchnorm

    def wrong(net):
        net = original(net)
        net.main[-2].weight.data += 1
        return net

    monkeypatch.setattr(export, "fold_batchnorm", wrong)
    message = error_of(capfd, exported, *uint8)
    assert "model.onnx: not written" in message
    assert "--precision" in message
    assert sorted(os.listdir(".")) == ["data", "run"]
    exported("--no-verify", *uint8)
    assert os.path.exists("model.onnx")


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.filterwarnings("ignore:.torch.jit.script")
def test_errors(capfd, monkeypatch):
    def error(*argv, **kwargs):
        return error_of(capfd, lambda: exported(*argv, **kwargs))

    assert "nope.pt: no such file" in error("nope.pt")
    with open("evil.pt", "wb") as f:
        pickle.dump({"netG": Payload()}, f)
    assert "torch.save(netG.state_dict(), FILE)" in error("evil.pt")
    torch.save(torch.nn.Linear(2, 2), "module.pt")
    assert "torch.save(netG.state_dict(), FILE)" in error("module.pt")
    assert not os.path.exists("executed")
    torch.save({"weight": torch.zeros(3, 3)}, "other.pt")
    assert "no generator" in error("other.pt")
    torch.save({"script": "wgan", "netG": {}}, "script.pt")
    assert "script.pt: " in error("script.pt")
    Path("cut.pt").write_bytes(b"PK\x03\x04 cut off")
    assert "cut.pt: cannot be read" in error("cut.pt")
    train(dcgan, "--max_steps", 1)
    assert "--out model.pt" in error(out="model.pt")
    assert "--opset 3" in error("--opset", 3)
    assert "--opset 0" in error("--opset", 0)
    assert "--batch_size 0" in error("--batch_size", 0)
    assert "--batch_size 100000000000" in error("--batch_size", 10**11)
    assert "--seed" in error("--seed", 2**63)
    torch.jit.script(torch.nn.Linear(2, 2)).save("program.pt")
    assert "program.pt: is a TorchScript program; save its state dict" in error("program.pt")
    small = dcgan.Generator(nz=8, ngf=4, nc=1, img_size=16).state_dict()
    torch.save({k: v for k, v in small.items() if int(k.split(".")[1]) not in (3, 4)}, "small.pth")
    assert "small.pth: its size 8: " in error("small.pth")
    with monkeypatch.context() as patch:  # quantization writes files of its own
        patch.setattr(export, "quantize", lambda *args: open("/dev/full/x"))  # noqa: SIM115
        assert "TMPDIR" in error("--precision", "int8")
    assert "--no-phases: " in error("--no-phases", "--precision", "int8")
    Path("file").touch()
    assert "--out file/model.onnx: cannot be written" in error(out="file/model.onnx")
    assert not [name for name in os.listdir(".") if "onnx" in name]


def test_damaged_weights_are_not_exported(capfd):
    netG = dcgan.Generator(nz=8, ngf=4, nc=1, img_size=16)
    netG.main[0].weight.data[0, 0] = float("nan")
    torch.save(netG.state_dict(), "nan.pth")
    assert "holds weights that are not finite" in error_of(capfd, lambda: exported("nan.pth"))
    assert os.listdir(".") == ["nan.pth"]


def test_a_missing_package_is_named(capfd, monkeypatch):
    train(dcgan, "--max_steps", 1)
    monkeypatch.setitem(importlib.sys.modules, "onnx", None)
    monkeypatch.setattr("sys.argv", ["export.py", "run"])
    assert "requirements.txt" in error_of(capfd, export.main)


def test_an_onnx_file_is_no_checkpoint(capfd):
    train(dcgan, "--max_steps", 1)
    exported()
    assert "model.onnx: is no checkpoint but an ONNX file" in error_of(capfd, lambda: exported("model.onnx"))
