"""One seed, one picture: PyTorch's, in every precision, by infer_ort.py, infer_ort.cpp and the page; or no file."""

import functools
import importlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import ROOT, SCRIPTS, error_of, main, pixels, words
from PIL import Image, ImageSequence
from torch import nn

import dcgan
import export
import infer_ort

KEPT = tempfile.TemporaryDirectory()
PRECISIONS = {"": 100, "--uint8": 60, "--precision fp16": 45, "--precision int8 --uint8": 35}  # least PSNR
TWELVE = sorted(map(str, range(12)))  # as folders 0 to 11 are sorted: 0, 1, 10, 11, 2

@functools.cache
def checkpoint(name, n_classes=10):
    """Of a tiny net with random statistics: nothing need be trained."""
    torch.manual_seed(0)
    script = importlib.import_module(name)
    netG = script.Generator(8, 4, 3, 16, *([n_classes] if name == "acgan" else []))
    for m in netG.modules():
        if isinstance(m, nn.ConvTranspose2d):
            nn.init.normal_(m.weight, 0, 0.2)
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 2)
    classes = TWELVE if n_classes == 12 else [f"c{k}" for k in range(n_classes)]
    path = f"{KEPT.name}/{name}{n_classes}.pt"
    torch.save({"script": name, "config": netG.config, "netG_ema": netG.state_dict(), "step": 5,
                "classes": classes if name == "acgan" else ["x", "y"], "args": {"dataset": "/home/bob\\faces"}}, path)
    return path

@functools.cache
def model_of(name, flags="", n_classes=10):
    out = f"{KEPT.name}/{name}{n_classes}{flags.replace(' ', '')}.onnx"
    export.export(export.get_args([checkpoint(name, n_classes), "-o", out, *words(flags)]))
    return out

def by_torch(source, argv):
    """The pictures of --sample, or of somebody's netG."""
    name = Path(source).stem.rstrip("012")
    main(name, "--sample", source, "--device cpu --out want", argv)
    return np.stack([pixels(path) for path in sorted(Path("want").glob("*.png"))])

def by_python(model, argv):
    main("infer_ort", model, "--out python.npy --provider cpu", argv)
    return np.load("python.npy")

def by_cpp(program, model, argv):
    subprocess.run([program, model, "--out", "cpp.npy", *words(argv)], check=True, capture_output=True)
    return np.load("cpp.npy")

def psnr(a, b):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    error = np.square((a.astype(float) - b) / 127.5).mean()
    return 10 * math.log10(4 / max(error, 1e-20))

@pytest.fixture(scope="session")
def cpp(tmp_path_factory):
    """deploy/infer_ort.cpp, built as README says, all warnings being errors; the test is skipped where that cannot be.
    CXXFLAGS="-fsanitize=address,undefined" ASAN_OPTIONS=allocator_may_return_null=1 watch it."""
    if not (shutil.which("cmake") and shutil.which("c++")):
        pytest.skip("needs cmake and a C++ compiler")
    build, flags = tmp_path_factory.mktemp("cpp"), f"-Wall -Wextra -Wpedantic -Werror {os.environ.get('CXXFLAGS', '')}"
    env = os.environ | {"PATH": os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"]))}
    done = subprocess.run(["cmake", "-S", ROOT / "deploy", "-B", build, f"-DCMAKE_CXX_FLAGS={flags}"], env=env, text=True,
                          capture_output=True, check=False)
    if "ONNX Runtime not found" in done.stderr or "Could NOT find PNG" in done.stderr:
        pytest.skip("needs libpng-dev and ONNX Runtime's headers")
    assert done.returncode == 0, done.stderr
    done = subprocess.run(["cmake", "--build", build], text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return build / "infer_ort"

# -------------------------------------------------------------------------------- the same picture

@pytest.mark.parametrize("runtime", ["python", "cpp"])
@pytest.mark.parametrize("flags", PRECISIONS)
@pytest.mark.parametrize("name", SCRIPTS)
def test_one_seed_one_picture(name, flags, runtime, request):
    make = by_python if runtime == "python" else functools.partial(by_cpp, request.getfixturevalue("cpp"))
    model, least = model_of(name, flags), min(PRECISIONS[flags], 60)  # pixels are rounded
    labels = "--labels c7,3" if name == "acgan" else "--seed 5"
    for argv in ("--n_samples 50 --seed 9", f"--n_samples 9 {labels}", "--n_samples 12 --walk_dim 3"):
        shutil.rmtree("want", ignore_errors=True)
        assert psnr(make(model, argv), by_torch(checkpoint(name), argv)) > least
    some = make(model, "--n_samples 13 --start 20 --batch_size 5")
    assert psnr(some, make(model, "--n_samples 33")[20:]) > 50
    assert psnr(some, make(model, "--n_samples 13 --start 20 --seed 1")) < 40

@pytest.mark.parametrize("runtime", ["python", "cpp"])
def test_labels_are_names_before_they_are_numbers(runtime, request, capfd):
    """--labels 2 is the folder "2", which is the fifth: as in the scripts."""
    make = by_python if runtime == "python" else functools.partial(by_cpp, request.getfixturevalue("cpp"))
    argv = "--labels 2,10 --n_samples 6"
    assert psnr(make(model_of("acgan", "", 12), argv), by_torch(checkpoint("acgan", 12), argv)) > 60

def test_a_batch_changes_no_picture_and_one_costs_one(script):
    """On the CPU nothing is filled up; one session serves several threads."""
    gen, nz = infer_ort.Generator(model_of(script.METHOD), provider="cpu"), 8
    labels = np.arange(50) % 10 if gen.n_classes else None
    ran, session = [], gen.session
    gen.session = type("Spy", (), {"run": lambda self, outputs, feed: ran.append(len(feed["z"])) or session.run(outputs, feed)})()
    whole = gen(infer_ort.latents(3, 0, 50, nz), labels)
    gen(infer_ort.latents(3, 0, 1, nz), None if labels is None else labels[:1])
    assert ran == [50, 1]
    results = {}

    def work(k):
        rows = slice(5 * k, 5 * k + 5)
        results[k] = gen(infer_ort.latents(3, 5 * k, 5, nz), None if labels is None else labels[rows])

    threads = [threading.Thread(target=work, args=(k,)) for k in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.abs(np.concatenate([results[k] for k in range(10)]).astype(int) - whole).max() <= 1

@pytest.mark.parametrize(("z", "labels"), [((3, 8), None), ((3, 8), [-1, 0, 1]), ((3, 8), [0, 1, 10]), ((3, 8), [0, 1, 2.7]),
                                           ((3, 8), [0, 1]), ((3, 9), [0, 1, 2])])
def test_latents_and_labels_that_do_not_fit(z, labels):
    gen = infer_ort.Generator(model_of("acgan"), provider="cpu")
    with pytest.raises(infer_ort.InputError, match="are wanted"):
        gen(np.zeros(z, np.float32), None if labels is None else np.array(labels))

def test_latents_are_philox_and_box_muller():
    """Written again from the description, as somebody would in another language."""
    def philox4x64(counter, key):
        mask, c, k = 2**64 - 1, [counter, 0, 0, 0], [key, 0]
        for _ in range(10):
            a, b = c[0] * 0xD2E7470EE14C6C93, c[2] * 0xCA5A826395121157
            c = [(b >> 64) ^ c[1] ^ k[0], b & mask, (a >> 64) ^ c[3] ^ k[1], a & mask]
            k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
        return c

    seed, i, z = 12345678901234567890 % 2**63, 1000003, []
    for block in range(2):
        u = [((word >> 11) + 0.5) / 2**53 for word in philox4x64(i * 2 + block + 1, seed)]
        for u1, u2 in (u[:2], u[2:]):
            r, t = math.sqrt(-2 * math.log(u1)), 2 * math.pi * u2
            z += [r * math.cos(t), r * math.sin(t)]
    np.testing.assert_array_max_ulp(infer_ort.latents(seed, i, 1, 7)[0], np.float32(z[:7]), 1)
    many = infer_ort.latents(7, 0, 2000, 100)
    assert (many.mean(), many.std()) == (pytest.approx(0, abs=0.01), pytest.approx(1, abs=0.01))

# ----------------------------------------------------------------------------------------- outputs

@pytest.mark.parametrize("out", ["grid.png", "walk.gif", "folder/"])
def test_every_output_shows_the_same_pictures(out, capfd):
    want = by_python(model_of("dcgan"), "--n_samples 6")
    flags = "--interpolate 5" if "gif" in out else ""
    main("infer_ort", model_of("dcgan"), "--n_samples 6 --provider cpu --out", out, flags)
    if out == "folder/":
        got = np.stack([pixels(f"folder/{i:06d}.png") for i in range(6)])
    else:
        frames = [np.asarray(f.convert("RGB")) for f in ImageSequence.Iterator(Image.open(out))]
        assert len(frames) == (5 if flags else 1)
        got = np.stack([frames[0][2 + y * 18:18 + y * 18, 2 + x * 18:18 + x * 18] for y in (0, 1) for x in (0, 1, 2)])
    assert psnr(got, want) > (20 if flags else 60)  # a GIF has few colours
    if out == "folder/":  # others that lie there are told of, and stay
        main("infer_ort", model_of("dcgan"), "--n_samples 2 --start 6 --provider cpu --out", out)
        assert "6 other PNG files" in capfd.readouterr().err
        assert len(os.listdir("folder")) == 8

def test_a_grid_is_torchvisions():
    from torchvision.utils import make_grid

    for n, nc in ((1, 3), (5, 1), (6, 3)):
        images = np.random.default_rng(0).integers(0, 256, (n, 16, 16, nc), dtype=np.uint8)
        want = make_grid(torch.from_numpy(images).permute(0, 3, 1, 2), 3, pad_value=255).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(np.asarray(infer_ort.make_grid(images, 3).convert("RGB")), want)

def test_processes_take_parts_of_the_range(monkeypatch):
    """As torchrun starts them: a folder is shared, of arrays each has its own; labels beside them."""
    walk = by_python(model_of("acgan"), "--n_samples 11 --walk_dim 3")
    whole = by_python(model_of("acgan"), "--n_samples 11")
    np.testing.assert_array_equal(np.load("python_labels.npy"), np.arange(11) % 10)
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        for out in ("part.npy", "folder/", "walk/ --walk_dim 3"):
            main("infer_ort", model_of("acgan"), "--n_samples 11 --provider cpu --out", out)
    parts = [np.load(f"part_{rank}.npy") for rank in range(3)]
    assert psnr(np.concatenate(parts), whole) > 60
    for folder, want in (("folder", whole), ("walk", walk)):
        assert psnr(np.stack([pixels(f"{folder}/{i:06d}.png") for i in range(11)]), want) > 60

def test_runs_without_torch_and_measures(capfd):
    code = f"import sys; sys.modules.update(torch=None, onnx=None); import infer_ort as i; sys.argv = ['', {model_of('gan')!r}]; i.main()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True)
    assert Path(model_of("gan")).with_name("gan10_samples.png").exists()
    gen = infer_ort.Generator(model_of("gan"), provider="cpu")
    capfd.readouterr()
    infer_ort.benchmark(gen, None, seconds=0.01)
    assert [line.split()[0] for line in capfd.readouterr().out.splitlines()] == ["batch", "1", "4", "16", "64", "256"]

# --------------------------------------------------------------------------------------- providers

def test_a_provider_says_why(monkeypatch, capfd):
    """auto: what it took; cuda: the reason, where there is no GPU; int8 is for the CPU."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    model = model_of("dcgan")
    assert infer_ort.Generator(model).why.startswith("no GPU: ")
    assert infer_ort.Generator(model_of("dcgan", "--precision int8")).why == "int8 is for CPUs"
    for provider in ("cuda", "tensorrt"):
        assert f"--provider {provider}: " in error_of(capfd, "infer_ort", model, "--provider", provider)
    monkeypatch.setattr(infer_ort.ctypes, "CDLL", lambda name: None)  # as if there were a driver
    assert "onnxruntime" in infer_ort.Generator(model).why
    main("infer_ort", model, "--out x.png")
    assert "CPUExecutionProvider: no GPU: " in capfd.readouterr().out

def test_a_gpu_that_fails_in_mid_run_is_an_error(monkeypatch):
    """No silent CPU: with the exception at which ONNX Runtime's own session would fall back."""
    opened = infer_ort.open_session

    def failing(path, provider, *args, **kwargs):
        session = opened(path, "cpu")
        if provider == "cuda":
            session.get_providers = lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
            session._sess = type("Broken", (), {"run": lambda *args: (_ for _ in ()).throw(onnxruntime.capi.onnxruntime_pybind11_state.EPFail("out of memory"))})()
        return session

    monkeypatch.setattr(infer_ort, "open_session", failing)
    monkeypatch.setattr(infer_ort.ctypes, "CDLL", lambda name: None)
    gen = infer_ort.Generator(model_of("dcgan"))
    with pytest.raises(infer_ort.InputError, match="CUDAExecutionProvider failed; try a smaller --batch_size or --provider cpu"):
        gen(infer_ort.latents(0, 0, 3, 8))

# ------------------------------------------------------------------------------------------- files

@pytest.mark.parametrize("flags", PRECISIONS)
def test_a_file_explains_itself_and_holds_no_local_path(flags):
    path = model_of("acgan", flags)
    meta = {p.key: p.value for p in onnx.load(path).metadata_props}
    for key, value in {"nz": "8", "nc": "3", "img_size": "16", "n_classes": "10", "dataset": "faces", "steps": "5"}.items():
        assert meta[key] == value
    assert json.loads(meta["classes"]) == [f"c{k}" for k in range(10)]
    for text in ("/tmp", "/home", "site-packages", ".py", "Traceback"):
        assert text.encode() not in Path(path).read_bytes()
    assert onnx.load(path).ir_version <= 8  # which ONNX Runtime 1.16 reads
    assert json.loads({p.key: p.value for p in onnx.load(model_of("dcgan")).metadata_props}["classes"]) == []

def test_int8_runs_in_int8():
    """Every convolution but the last; the file is a quarter."""
    torch.save(dcgan.Generator(100, 32, 3, 32).state_dict(), "netG.pth")
    export.export(export.get_args(["netG.pth", "--precision", "int8"]))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = "optimized.onnx"
    onnxruntime.InferenceSession("netG_int8.onnx", options, providers=["CPUExecutionProvider"])
    ops = [n.op_type for n in onnx.load("optimized.onnx").graph.node]
    assert (ops.count("QLinearConv"), ops.count("ConvTranspose"), ops.count("Conv") + ops.count("Pad")) == (8, 1, 0)
    assert os.path.getsize("netG_int8.onnx") < 0.28 * os.path.getsize("netG.pth")

@pytest.mark.parametrize("change", ["no metadata", "another version", "diverged", "not PyTorch's"])
def test_what_is_refused(change, monkeypatch, capfd):
    """Other ONNX files; and to write a file that does not give PyTorch's pictures: then nothing is written."""
    if change in ("diverged", "not PyTorch's"):
        ckpt = torch.load(checkpoint("dcgan"))
        if change == "diverged":
            ckpt["netG_ema"]["main.0.weight"].fill_(math.nan)
        else:
            monkeypatch.setattr(export, "LEAST_PSNR", {"fp32": 999})
        torch.save(ckpt, "bad.pt")
        assert "not written" in error_of(capfd, "export", "bad.pt -o model.onnx")
        assert os.listdir() == ["bad.pt"]
        return
    model = onnx.load(model_of("gan"))
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, {"format_version": "2"} if change == "another version" else {})
    onnx.save(model, "other.onnx")
    assert "export.py" in error_of(capfd, "infer_ort", "other.onnx")

class Theirs(nn.Module):
    """A generator as tutorials print it, of any depth; 16 * ngf at 4x4 if deep. Also named layers, without BatchNorm."""

    def __init__(self, nz, ngf, nc, widths, norm=True, bias=False):
        super().__init__()
        layers, channels = [], nz
        for k, width in enumerate(widths):
            layers += [nn.ConvTranspose2d(channels, ngf * width, 4, 2 if k else 1, 1 if k else 0, bias=bias)]
            layers += [nn.BatchNorm2d(ngf * width)] * norm + [nn.ReLU(True)]
            channels = ngf * width
        self.main = nn.Sequential(*layers, nn.ConvTranspose2d(channels, nc, 4, 2, 1, bias=bias), nn.Tanh())

@pytest.mark.parametrize(("wrap", "prefix", "net"), [
    (None, "main.", (30, 6, 3, (8, 4, 2, 1))), ("netG", "module.main.", (30, 6, 3, (8, 4, 2, 1))), ("models", "_orig_mod.layers.", (7, 2, 1, (16, 8, 4, 2, 1))),
    ("g_model_state_dict", "", (5, 4, 3, (4, 2, 1), False, True)), (None, "netG.net.", (9, 3, 1, (2, 1)))])
def test_somebody_elses_checkpoint(wrap, prefix, net):
    """Of any depth, width, key and prefix; netD lies beside it; its pictures are PyTorch's, in int8, too."""
    torch.manual_seed(0)
    netG, netD = Theirs(*net).eval(), dcgan.Discriminator(3, 4, 32)
    for m in netG.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
    state = {name.replace("main.", prefix, 1): w for name, w in netG.state_dict().items()}
    others = {f"netD.{name}": w for name, w in netD.state_dict().items()}
    theirs = {"D": netD.state_dict(), "names": {0: "cat"}, "epoch": 3, "all": {wrap: state}} if wrap else others | state
    torch.save(theirs, "theirs.pth")
    size = 4 * 2 ** len(net[3])
    with torch.no_grad():
        want = netG.main(torch.from_numpy(infer_ort.latents(0, 0, 5, net[0])).reshape(5, -1, 1, 1))
    want = (want * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for flags, least in (("", 60), ("--precision int8 --uint8", 35))[:1 + (size == 128)]:
        main("export", "theirs.pth -o theirs.onnx", flags)
        got = by_python("theirs.onnx", "--n_samples 5")
        assert got.shape == (5, size, size, net[2])
        assert psnr(got, want) > least
