"""What only a GPU shows.

    python -m pytest --slow tests/test_gpu.py       # without --slow: --compile of dcgan.py alone

Without CUDA all of it is skipped. On a stand-in for CUDA, where kernels compute nothing: -m "not numbers".
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
from conftest import POSIX, ROOT, SCRIPTS, TINY, main, resume, train, words
from test_deploy import checkpoint, model_of

import infer_ort

GPU = "--device cuda"
FILES = ("", "--uint8", "--precision fp16", "--precision fp16 --uint8")
CUDA = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(not CUDA, reason="PyTorch finds no CUDA device")
BF16 = pytest.param("bf16", marks=pytest.mark.skipif(not (CUDA and torch.cuda.is_bf16_supported(False)), reason="no fast bfloat16"))

@pytest.fixture
def devices(script, monkeypatch):
    """The kind of device of each training step's images, as the steps are taken."""
    seen, steps = [], script.Run.steps

    def watched(run, **state):
        for step, real, labels in steps(run, **state):
            weights = [*state["netG"].parameters(), *state["netD"].parameters()]
            assert {w.device for w in weights} == {real.device}
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
    main(script.METHOD, "--sample run --n_samples 5 --out folder/", GPU)
    assert len(os.listdir("folder")) == 5

@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("precision", ["fp32", BF16])
def test_no_step_waits_for_the_gpu(script, monkeypatch, precision):
    """Else the GPU idles in every step. Log lines, grids and new epochs may wait; here are none."""
    checked, steps = [], script.Run.steps

    def strict(run, **state):
        for step, real, labels in steps(run, **state):
            torch.cuda.set_sync_debug_mode("error" if 3 <= step < 27 else "default")
            checked.append(torch.cuda.get_sync_debug_mode())
            yield step, real, labels

    monkeypatch.setattr(script.Run, "steps", strict)
    try:
        train(script, GPU, "--max_images 512 --max_steps 30 --log_interval 99 --precision", precision)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert checked.count(2) == 24

SOME = [pytest.param(name, marks=[pytest.mark.slow] if name != "dcgan" else []) for name in SCRIPTS]

@pytest.mark.parametrize("precision", [pytest.param("fp32", marks=pytest.mark.slow), BF16])
@pytest.mark.parametrize("script", SOME, indirect=True)
def test_compile(script, devices, precision):
    """With R1 in every fourth step, which is never compiled; the checkpoint is as any other."""
    train(script, GPU, "--compile --max_steps 16 --precision", precision)
    assert resume(script, "--no-compile --device cpu --max_steps 18")["step"] == 18
    assert devices == ["cuda"] * 16 + ["cpu"] * 2

@POSIX
@pytest.mark.parametrize(("visible", "flags", "says"), [("0", "--device cpu", "2 x cpu"), ("0,1", "", "2 x cuda")], ids=["cpu", "nccl"])
def test_two_processes(visible, flags, says):
    """On the CPU of a machine with one GPU; and with a GPU for each."""
    if torch.cuda.device_count() < len(visible.split(",")):
        pytest.skip("needs two GPUs")
    tiny = [word for word in TINY if word not in ("--device", "cpu")]
    argv = [sys.executable, *words("-m torch.distributed.run --standalone --nproc_per_node 2"), ROOT / "dcgan.py", *tiny,
            *words(flags, "--max_steps 12 --out_dir run")]
    done = subprocess.run(argv, text=True, capture_output=True, timeout=300, check=False, env=os.environ | {"CUDA_VISIBLE_DEVICES": visible})
    assert done.returncode == 0, done.stderr[-3000:]
    assert says in done.stdout
    assert len(Path("run/log.jsonl").read_text().splitlines()) == 12

# ------------------------------------------------------------------------------------------------------ pictures

def inputs_of(script, n=50):
    """Latents (n, nz), and for a net with classes labels (n)."""
    return infer_ort.latents(1, 0, n, 8), *([np.arange(n) % 10] if script.METHOD == "acgan" else [])

def levels(a, b):
    """The greatest difference of two arrays of pictures, of 255."""
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    return np.abs(a.astype(int) - b).max()

@pytest.mark.numbers
def test_pictures_of_pytorch(script):
    """TF32, by which cuDNN computes, is within two levels of the CPU's float32."""
    netG = script.load_generator(torch.load(checkpoint(script.METHOD)))
    want = script.generate(netG, *inputs_of(script))
    assert np.ptp(want) > 50
    assert levels(script.generate(netG.cuda(), *inputs_of(script)), want) <= 2

@pytest.fixture
def cuda_provider():
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip(f"onnxruntime {onnxruntime.__version__} has no CUDA provider: it is not onnxruntime-gpu")

def pictures(script, flags, provider):
    """50 uint8 pictures of an exported file, by what was asked for."""
    generator = infer_ort.Generator(model_of(script.METHOD, flags), provider=provider)
    assert generator.provider == f"{provider.upper()}ExecutionProvider"
    return generator(*inputs_of(script))

@pytest.mark.parametrize("flags", FILES)
def test_every_node_is_on_the_gpu(script, cuda_provider, flags):
    """And ONNX Runtime puts no copies between them; auto takes the GPU."""
    assert pictures(script, flags, "cuda").shape == (50, 16, 16, 3)
    file = model_of(script.METHOD, flags)
    assert infer_ort.Generator(file).provider == "CUDAExecutionProvider"
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    session = onnxruntime.InferenceSession(file, options, providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
    session.run(None, dict(zip(("z", "labels"), inputs_of(script))))
    events = json.loads(Path(session.end_profiling()).read_text())
    nodes = [e["args"] for e in events if "provider" in e.get("args", {})]
    assert len(nodes) > 5
    assert {node["provider"] for node in nodes} == {"CUDAExecutionProvider"}
    assert not [node["op_name"] for node in nodes if node["op_name"].startswith("Memcpy")]

@pytest.mark.numbers
@pytest.mark.parametrize("flags", FILES)
def test_pictures_of_onnx_runtime(script, cuda_provider, flags):
    assert levels(pictures(script, flags, "cuda"), pictures(script, flags, "cpu")) <= 2
