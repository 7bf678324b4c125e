"""What only a GPU shows: python -m pytest tests/test_gpu.py (--slow: --compile of all three scripts, and the benchmark).

Without CUDA all of it is skipped. Where kernels compute nothing, on a stand-in for CUDA: -m "not numbers".
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import POSIX, ROOT, SCRIPTS, TINY, resume, train, words
from test_export import exported, model_of, run_of

import infer_ort

GPU = "--device cuda"
FILES = ("--no-phases", "--no-phases --uint8", "--precision fp16", "--precision fp16 --uint8")
BF16 = pytest.param("bf16", marks=pytest.mark.skipif(not (torch.cuda.is_available() and torch.cuda.is_bf16_supported(False)),
                                                     reason="this GPU has no fast bfloat16"))
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device")

@pytest.fixture
def devices(script, monkeypatch):
    """The kind of device of each training step's images, as the steps are taken."""
    seen, steps = [], script.Run.steps

    def watched(run, **state):
        for step, real, labels in steps(run, **state):
            assert {w.device for net in (state["netG"], state["netD"]) for w in net.parameters()} == {real.device}
            seen.append(real.device.type)
            yield step, real, labels

    monkeypatch.setattr(script.Run, "steps", watched)
    return seen

# ------------------------------------------------------------------------------------------------------ training

def test_there_and_back(script, devices):
    """A checkpoint goes on anywhere; pictures are made on the GPU."""
    assert train(script, GPU, "--max_steps 3")["step"] == 3
    assert resume(script, "--device cpu --max_steps 5")["step"] == 5
    assert resume(script, GPU, "--max_steps 9")["step"] == 9
    assert devices == ["cuda"] * 3 + ["cpu"] * 2 + ["cuda"] * 4
    script.sample(script.get_args(words("--sample run --n_samples 5 --out x.npz", GPU)))
    with np.load("x.npz") as samples:
        assert samples["arr_0"].shape == (5, 16, 16, 1)

@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("precision", ["fp32", BF16])
def test_no_step_waits_for_the_gpu(script, monkeypatch, precision):
    """Else the GPU idles in every step. Log lines, grids and the first batches of an epoch may wait; here are none."""
    checked, steps = [], script.Run.steps

    def strict(run, **state):
        for step, real, labels in steps(run, **state):
            torch.cuda.set_sync_debug_mode("error" if 3 <= step < 27 else "default")
            checked.append(torch.cuda.get_sync_debug_mode())
            yield step, real, labels

    monkeypatch.setattr(script.Run, "steps", strict)
    try:
        train(script, GPU, "--max_images 512 --gp_every 4 --max_steps 30 --log_interval 99 --precision", precision)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert checked.count(2) == 24

SOME = [pytest.param(name, marks=[pytest.mark.slow] if name != "dcgan" else []) for name in SCRIPTS]

@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), BF16])
@pytest.mark.parametrize("script", SOME, indirect=True)
def test_compile(script, devices, precision):
    """With R1, which is never compiled; the checkpoint is as any other."""
    train(script, GPU, "--compile --max_steps 16 --gp r1 --gp_every 4 --precision", precision)
    assert resume(script, "--no-compile --device cpu --max_steps 18")["step"] == 18
    assert devices == ["cuda"] * 16 + ["cpu"] * 2
    exported("run", "--no-phases --no-verify")

@pytest.mark.parametrize(("visible", "flags", "says"), [("0", "--device cpu", "2 x cpu"), ("0,1", "", "2 x cuda")])
@POSIX
def test_two_processes(visible, flags, says):
    """On the CPU of a machine with one GPU; and with a GPU for each."""
    if torch.cuda.device_count() < len(visible.split(",")):
        pytest.skip("needs two GPUs")
    tiny = [word for word in TINY if word not in ("--device", "cpu")]
    argv = words("-m torch.distributed.run --standalone --nproc_per_node 2", ROOT / "dcgan.py", *tiny, flags,
                 "--max_steps 12 --out_dir run")
    env = os.environ | {"CUDA_VISIBLE_DEVICES": visible}
    done = subprocess.run([sys.executable, *argv], text=True, capture_output=True, timeout=300, check=False, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert says in done.stdout
    assert len(Path("run/log.jsonl").read_text().splitlines()) == 12

# ------------------------------------------------------------------------------------------------------ pictures

def inputs_of(script, n=50):
    """Latents (n, nz) and labels (n) for a tiny net."""
    return script.latents(1, 0, n, 8), np.arange(n) % (10 if script.SCRIPT == "acgan" else 1)

def levels(a, b):
    """The greatest difference of two arrays of pictures, of 255."""
    assert a.shape == b.shape
    assert a.dtype == b.dtype == np.uint8
    return np.abs(a.astype(int) - b).max()

@pytest.mark.numbers
def test_pictures_of_pytorch(script):
    """TF32, by which cuDNN computes, is within two levels of the CPU's float32."""
    netG, _ = script.load_generator(f"{run_of(script.SCRIPT)}/checkpoint.pt")
    inputs = inputs_of(script)
    want = script.generate(netG, *inputs)
    assert np.ptp(want) > 50
    assert levels(script.generate(netG.cuda(), *inputs), want) <= 2

@pytest.fixture
def cuda_provider():
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip(f"onnxruntime {onnxruntime.__version__} has no CUDA provider: pip install onnxruntime-gpu[cuda,cudnn]")

def pictures(script, flags, provider):
    """50 uint8 pictures of an exported file, by what was asked for."""
    generator = infer_ort.Generator(model_of(script.SCRIPT, flags), provider=provider)
    assert generator.provider == f"{provider.upper()}ExecutionProvider"
    z, labels = inputs_of(script)
    return generator(z, labels if generator.n_classes else None)

def profiled(file, feed):
    """[(operator, provider)] of the nodes that ONNX Runtime runs, with the copies that it has put between them."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    session = onnxruntime.InferenceSession(file, options, providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
    session.run(None, feed)
    events = json.loads(Path(session.end_profiling()).read_text())
    return [(e["args"]["op_name"], e["args"]["provider"]) for e in events if "provider" in e.get("args", {})]

@pytest.mark.parametrize("flags", FILES)
def test_every_node_is_on_the_gpu(script, cuda_provider, flags):
    assert pictures(script, flags, "cuda").shape == (50, 16, 16, 3)
    z, labels = inputs_of(script)
    nodes = profiled(model_of(script.SCRIPT, flags), {"z": z} | ({"labels": labels} if script.SCRIPT == "acgan" else {}))
    assert len(nodes) > 5
    assert {provider for _, provider in nodes} == {"CUDAExecutionProvider"}
    assert not [operator for operator, _ in nodes if operator.startswith("Memcpy")]

@pytest.mark.numbers
@pytest.mark.parametrize("flags", FILES)
def test_pictures_of_onnx_runtime(script, cuda_provider, flags):
    assert levels(pictures(script, flags, "cuda"), pictures(script, flags, "cpu")) <= 2
