"""Generation: PyTorch, a plain ONNX export, our exports, infer_ort.py and deploy/infer_ort.cpp.

    python benchmarks/inference.py runs/dcgan-celeba                # CPU; with a GPU its table first
    python benchmarks/inference.py runs/dcgan-celeba --gpu_only     # that table alone
    python benchmarks/inference.py CHECKPOINT --cpp build/infer_ort # built as README says

Everything that is compared is run in turn, round by round, in this process or as a user would
start it. Figures are medians over the rounds, with the range in which they all lay.
"""

import argparse
import copy
import functools
import logging
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import export
import infer_ort

BATCHES = (1, 16, 64)
GPU_BATCHES = (1, 64, 512)

def get_args():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("checkpoint", help="what export.py takes")
    p.add_argument("--rounds", type=int, default=7, help="how often each is measured")
    p.add_argument("--seconds", type=float, default=1.0, help="of one measurement")
    p.add_argument("--n_samples", type=int, default=10000, help="pictures written by the programs")
    p.add_argument("--cpp", metavar="PROGRAM", help="deploy/infer_ort.cpp, built")
    p.add_argument("--gpu_only", action="store_true", help="the GPU's table alone")
    return p.parse_args()

def rate(step, n, seconds, sync=lambda: None):
    """Images/s of step(), which makes n."""
    step()
    sync()
    done, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        step()
        sync()
        done += n
    return done / (time.perf_counter() - begin)

def in_turn(variants, rounds, measure):
    """{name: [figures]}: each of the variants measured once a round."""
    figures = {name: [] for name in variants}
    for _ in range(rounds):
        for name, variant in variants.items():
            figures[name].append(measure(variant))
    return figures

def show(values, digits=0):
    low, middle, high = min(values), float(np.median(values)), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"

def arrays_to_tensors(inputs):
    return [torch.from_numpy(x) for x in inputs.values()]

# -------------------------------------------------------------------------------------------- CPU

def plain_export(netG, inputs, path):
    """What torch.onnx.export gives of netG as it is."""
    example = {name: torch.from_numpy(x[:2]) for name, x in inputs.items()}
    shapes = {name: {0: torch.export.Dim("N")} for name in example}
    torch.onnx.export(netG, (), str(path), kwargs=example, dynamo=True, dynamic_shapes=shapes,
                      external_data=False, optimize=False, verbose=False,
                      input_names=list(example), output_names=["images"])

def bf16(netG):
    """PyTorch at its best on a CPU: BatchNorm folded, channels_last, bfloat16."""
    net = export.fold_batchnorm(copy.deepcopy(netG)).to(memory_format=torch.channels_last)

    def run(*inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return net(*inputs)

    return run

# The rows of the table, and the files that are read in them.
EAGER = "A PyTorch eager fp32"
PLAIN = "B plain ONNX export"
BFLOAT = "C PyTorch bf16, folded, channels_last"
FILES = {PLAIN: "plain", "export.py fp32": "fp32", "export.py fp32 --phases": "phases",
         "export.py int8": "int8", "export.py int8 --uint8": "uint8"}
RATIOS = [("export.py fp32", PLAIN), ("export.py fp32", EAGER), ("export.py int8", PLAIN),
          ("export.py int8", BFLOAT), ("export.py fp32 --phases", "export.py fp32")]

def cpu_tables(args, script, netG, files, folder):
    nets = {EAGER: netG, BFLOAT: bf16(netG)}
    # infer_ort's own sessions: what a user gets, threads and all.
    sessions = {row: infer_ort.open_session(files[name], "cpu") for row, name in FILES.items()}
    results = {row: {} for row in (*nets, *sessions)}
    for n in BATCHES:
        inputs = export.draw(script, netG, 0, 0, n)
        tensors = arrays_to_tensors(inputs)
        variants = {}
        for row, net in nets.items():
            variants[row] = functools.partial(net, *tensors)
        for row, session in sessions.items():
            variants[row] = functools.partial(session.run, None, inputs)
        with torch.inference_mode():
            measure = functools.partial(rate, n=n, seconds=args.seconds)
            for row, values in in_turn(variants, args.rounds, measure).items():
                results[row][n] = values
    errors = squared_errors(script, netG, nets, sessions)
    print(f"\n| images/s | file | {' | '.join(f'batch {n}' for n in BATCHES)} | PSNR against A |")
    print(f"|---|---|{'---|' * len(BATCHES)}---|")
    for row, speeds in results.items():
        size = f"{os.path.getsize(files[FILES[row]]) / 1e6:.1f} MB" if row in FILES else ""
        quality = f"{10 * np.log10(4 / errors[row]):.1f} dB" if errors[row] else "equal"
        print(f"| {row} | {size} | {' | '.join(show(speeds[n]) for n in BATCHES)} | {quality} |")
    print("\nRatios, medians of the rounds' own (1 is as fast):\n")
    for row, other in RATIOS:
        ratios = []
        for n in BATCHES:
            ratio = np.median(np.divide(results[row][n], results[other][n]))
            ratios.append(f"{ratio:.2f} at batch {n}")
        against = other[0] if other in (PLAIN, EAGER, BFLOAT) else other
        print(f"- {row} / {against}: {', '.join(ratios)}")
    plain = os.path.getsize(files["plain"])
    sizes = [f"{name} {os.path.getsize(files[name]) / plain:.3f}" for name in ("fp32", "int8")]
    print(f"- file size / B: {', '.join(sizes)}")
    programs(args, script, netG, files, folder)

def squared_errors(script, netG, nets, sessions):
    """{row: mean squared difference from PyTorch's float32 pictures, in [-1, 1]}, of 256."""
    inputs = export.draw(script, netG, 0, 2**30, 256)
    tensors = arrays_to_tensors(inputs)
    got = {}
    with torch.inference_mode():
        want = netG(*tensors).numpy().astype(np.float64)
        for row, net in nets.items():
            got[row] = net(*tensors).float().numpy()
    for row, session in sessions.items():
        x = session.run(None, inputs)[0]
        if x.dtype == np.uint8:
            x = (x.transpose(0, 3, 1, 2) - 127.5) / 127.5
        got[row] = x
    return {row: np.square(x - want).mean() for row, x in got.items()}

def launch(argv):
    """(seconds, peak resident MB) of a program, as a user starts it."""
    begin, peak = time.perf_counter(), 0
    argv = list(map(str, argv))
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=errors)
        while process.poll() is None:  # wait4's figure would be this process's, from before exec
            status = Path(f"/proc/{process.pid}/status").read_text()
            found = re.search(r"VmHWM:\s*(\d+)", status)
            peak = max(peak, int(found.group(1)) if found else 0)
            time.sleep(0.02)
        seconds = time.perf_counter() - begin
        if process.returncode:
            errors.seek(0)
            sys.exit(f"{argv}: {errors.read().decode()}")
    return seconds, peak / 1000

PROGRAMS = ("file", "one picture, cold start", "to an array file, images/s",
            "to a folder of PNG, images/s", "bare session, images/s", "array / bare", "peak resident")

def programs(args, script, netG, files, folder):
    """The two programs, end to end, against the bare session."""
    kinds = {"infer_ort.py": [sys.executable, ROOT / "infer_ort.py", "--provider", "cpu"]}
    if args.cpp:
        kinds["infer_ort.cpp"] = [args.cpp, "--provider", "cpu"]
    print(f"\n| program, {args.n_samples} pictures | {' | '.join(PROGRAMS)} |")
    print(f"|---|{'---|' * len(PROGRAMS)}")
    for precision in ("fp32", "int8"):
        file = files[precision]
        session = infer_ort.open_session(file, "cpu")
        bare = functools.partial(session.run, None, export.draw(script, netG, 0, 0, 64))
        rows = {name: [] for name in kinds}
        for _ in range((args.rounds + 1) // 2):
            for name, program in kinds.items():
                rows[name].append(one_round(args, [*program, file], bare, folder, name))
        for name, rounds in rows.items():
            cold, array, png, alone, memory = map(np.array, zip(*rounds))
            print(f"| {name} | {precision} | {show(cold, 2)} s | {show(array)} | {show(png)} | "
                  f"{show(alone)} | {np.median(array / alone):.2f} | {show(memory)} MB |")

def one_round(args, program, bare, folder, name):
    """(seconds to one picture; images/s to an array, to PNG files, of the bare session; MB)."""
    n, many = args.n_samples, ["--n_samples", args.n_samples, "--out"]
    array_file = folder / ("x.npz" if name.endswith("py") else "x.npy")
    alone = rate(bare, 64, 3 * args.seconds)
    cold, _ = launch([*program, "--n_samples", 1, "--out", folder / "x.png"])
    array, memory = launch([*program, *many, array_file])
    png, _ = launch([*program, *many, f"{folder}/png/"])
    return cold, n / array, n / png, alone, memory

# -------------------------------------------------------------------------------------------- GPU

def gpu_table(args, script, netG, files):
    """fp16, several ways; latents come from RAM, pixels go there."""
    device = torch.device("cuda")
    torch.backends.cudnn.benchmark = True  # as ONNX Runtime searches too
    eager = copy.deepcopy(netG).to(device)
    folded = export.fold_batchnorm(copy.deepcopy(netG)).to(device).half()
    folded = folded.to(memory_format=torch.channels_last)
    compiled = torch.compile(folded, dynamic=False)
    graphs = torch.compile(folded, dynamic=False, mode="reduce-overhead")

    def pytorch(net, half, inputs):
        tensors = [x.to(device) for x in arrays_to_tensors(inputs)]
        if half:
            tensors[0] = tensors[0].half()
        return script.to_uint8(net(*tensors))

    def of_pytorch(inputs):
        return {
            "PyTorch eager fp32": functools.partial(pytorch, eager, False, inputs),
            "PyTorch eager fp16, folded, channels_last": functools.partial(pytorch, folded, True, inputs),
            "torch.compile of that": functools.partial(pytorch, compiled, True, inputs),
            "torch.compile of that, CUDA graph": functools.partial(pytorch, graphs, True, inputs),
        }

    def of_onnx_runtime(inputs, n):
        ours = infer_ort.Generator(files["fp16"], n, provider="cuda")
        nhwc = infer_ort.Generator(files["fp16"], n, provider="cuda", cuda_options={"prefer_nhwc": "1"})
        return {
            "ONNX Runtime fp16, session.run": functools.partial(ours.session.run, None, inputs),
            "infer_ort.py fp16": functools.partial(ours, *inputs.values()),
            "the same, prefer_nhwc": functools.partial(nhwc, *inputs.values()),
        }

    has_cuda = "CUDAExecutionProvider" in ort.get_available_providers()
    if not has_cuda:
        print(f"\nonnxruntime {ort.__version__} has no CUDA provider: the table is without its rows")
    results = {}
    for n in GPU_BATCHES:
        inputs = export.draw(script, netG, 0, 0, n)
        variants = of_pytorch(inputs)
        if has_cuda:
            variants |= of_onnx_runtime(inputs, n)
        measure = functools.partial(rate, n=n, seconds=args.seconds, sync=torch.cuda.synchronize)
        with torch.inference_mode():
            for name, values in in_turn(variants, args.rounds, measure).items():
                results.setdefault(name, {})[n] = values
    columns = " | ".join(f"batch {n}" for n in GPU_BATCHES)
    print(f"\n{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}\n")
    print(f"| images/s, latents from and pixels to RAM | {columns} |")
    print(f"|---|{'---|' * len(GPU_BATCHES)}")
    for name, row in results.items():
        print(f"| {name} | {' | '.join(show(row[n]) for n in GPU_BATCHES)} |")

# ------------------------------------------------------------------------------------------- main

def processor():
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found.group(1) if found else platform.processor()

def describe(args, script, netG):
    """What is measured, and on what."""
    with torch.inference_mode():
        images = netG(*arrays_to_tensors(export.draw(script, netG, 0, 0, 1)))
    millions = sum(p.numel() for p in netG.parameters()) / 1e6
    print(f"\n{script.SCRIPT} {tuple(images.shape[1:])}, {millions:.2f} M parameters; "
          f"{processor()}, {torch.get_num_threads()} threads; "
          f"torch {torch.__version__}, onnxruntime {ort.__version__}; "
          f"images/s: median of {args.rounds} rounds in turn, and their range")

def main():
    args = get_args()
    if args.gpu_only and not torch.cuda.is_available():
        sys.exit("inference.py: error: --gpu_only: PyTorch finds no GPU here; leave it out")
    logging.disable(logging.WARNING)  # of onnxruntime.quantization, about how it works inside
    checkpoint = export.get_args([args.checkpoint]).checkpoint
    script, netG, *_ = export.load(checkpoint)
    flags = {"fp16": "--precision fp16 --uint8"}
    if not args.gpu_only:
        flags |= {"fp32": "", "phases": "--phases", "int8": "--precision int8",
                  "uint8": "--precision int8 --uint8"}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        files = {name: folder / f"{name}.onnx" for name in ("plain", *flags)}
        plain_export(netG, export.draw(script, netG, 0, 0, 2), files["plain"])
        for name, words in flags.items():
            argv = [checkpoint, "-o", str(files[name]), *words.split()]
            export.export(export.get_args(argv))
        describe(args, script, netG)
        if torch.cuda.is_available():
            gpu_table(args, script, netG, files)
        if not args.gpu_only:
            cpu_tables(args, script, netG, files, folder)

if __name__ == "__main__":
    main()
