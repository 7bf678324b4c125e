"""Generation measured in one run: PyTorch, a plain ONNX export, our exports, infer_ort.py and deploy/infer_ort.cpp.

    python benchmarks/inference.py runs/dcgan-celeba                    # CPU; with a GPU its table first
    python benchmarks/inference.py runs/dcgan-celeba --gpu_only         # that table alone
    python benchmarks/inference.py CHECKPOINT --cpp build/infer_ort     # the C++ program too, built as README says

Everything that is compared is run in turn, round by round, in this process or as a user would start it; figures are
medians over the rounds, with the range in which they all lay.
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

def plain_export(netG, inputs, path):
    """What torch.onnx.export gives of netG as it is."""
    example = {k: torch.from_numpy(v[:2]) for k, v in inputs.items()}
    dynamic = {k: {0: torch.export.Dim("N")} for k in example}
    torch.onnx.export(netG, (), str(path), kwargs=example, dynamo=True, dynamic_shapes=dynamic, external_data=False,
                      optimize=False, verbose=False, input_names=list(example), output_names=["images"])

def bf16(netG):
    """PyTorch at its best on a CPU: BatchNorm folded, channels_last, bfloat16."""
    net = export.fold_batchnorm(copy.deepcopy(netG)).to(memory_format=torch.channels_last)

    def run(*inputs):
        with torch.autocast("cpu", torch.bfloat16):
            return net(*inputs)

    return run

def cpu_tables(args, script, netG, files, folder):
    print(f"\n| images/s | file | {' | '.join(f'batch {n}' for n in BATCHES)} | PSNR against A |")
    print(f"|---|---|{'---|' * len(BATCHES)}---|")
    nets = {"A PyTorch eager fp32": netG, "C PyTorch bf16, folded, channels_last": bf16(netG)}
    # infer_ort's own session: what a user gets, threads and all.
    sessions = {"B plain ONNX export": files["plain"], "export.py fp32": files["fp32"],
                "export.py int8": files["int8"], "export.py int8 --uint8": files["uint8"]}
    sessions = {name: (path, infer_ort.open_session(path, "cpu")) for name, path in sessions.items()}
    results = {name: {} for name in (*nets, *sessions)}
    for n in BATCHES:
        inputs = export.draw(script, netG, 0, 0, n)
        tensors = [torch.from_numpy(v) for v in inputs.values()]
        variants = {name: functools.partial(net, *tensors) for name, net in nets.items()}
        variants |= {name: functools.partial(s.run, None, inputs) for name, (_, s) in sessions.items()}
        with torch.inference_mode():
            measure = functools.partial(rate, n=n, seconds=args.seconds)
            for name, values in in_turn(variants, args.rounds, measure).items():
                results[name][n] = values
    inputs = export.draw(script, netG, 0, 2**30, 256)
    with torch.inference_mode():
        want = netG(*map(torch.from_numpy, inputs.values())).numpy().astype(np.float64)
        got = {name: net(*map(torch.from_numpy, inputs.values())).float().numpy() for name, net in nets.items()}
    for name, (_, s) in sessions.items():
        x = s.run(None, inputs)[0]
        got[name] = (x.transpose(0, 3, 1, 2) - 127.5) / 127.5 if x.dtype == np.uint8 else x
    for name, row in results.items():
        size = f"{os.path.getsize(sessions[name][0]) / 1e6:.1f} MB" if name in sessions else ""
        error = np.square(got[name] - want).mean()
        quality = f"{10 * np.log10(4 / error):.1f} dB" if error else "equal"
        print(f"| {name} | {size} | {' | '.join(show(row[n]) for n in BATCHES)} | {quality} |")
    a, b, c = (next(v for k, v in results.items() if k[0] == letter) for letter in "ABC")
    print("\nRatios, medians of the rounds' own (1 is as fast):\n")
    for name, against, letter in (("export.py fp32", b, "B"), ("export.py fp32", a, "A"), ("export.py int8", b, "B"),
                                  ("export.py int8", c, "C")):
        ratios = [np.median(np.divide(results[name][n], against[n])) for n in BATCHES]
        print(f"- {name} / {letter}: " + ", ".join(f"{r:.2f} at batch {n}" for n, r in zip(BATCHES, ratios)))
    plain = os.path.getsize(files["plain"])
    print("- file size / B: " + ", ".join(f"{k} {os.path.getsize(files[k]) / plain:.3f}" for k in ("fp32", "int8")))
    programs(args, script, netG, files, folder)

def launch(argv):
    """(seconds, peak resident MB) of a program, as a user starts it."""
    begin, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile() as errors, subprocess.Popen(list(map(str, argv)), stdout=subprocess.DEVNULL,
                                                              stderr=errors) as process:
        while process.poll() is None:  # wait4's figure would be that of this process, from before exec
            found = re.search(r"VmHWM:\s*(\d+)", Path(f"/proc/{process.pid}/status").read_text())
            peak = max(peak, int(found.group(1)) if found else 0)
            time.sleep(0.02)
        seconds = time.perf_counter() - begin
        if process.returncode:
            errors.seek(0)
            sys.exit(f"{argv}: {errors.read().decode()}")
    return seconds, peak / 1000

def programs(args, script, netG, files, folder):
    """The two programs, end to end, against the bare session."""
    python = [sys.executable, ROOT / "infer_ort.py", "--provider", "cpu"]
    kinds = {"infer_ort.py": python} | ({"infer_ort.cpp": [args.cpp]} if args.cpp else {})
    print(f"\n| program, {args.n_samples} pictures | file | one picture, cold start | to an array file, images/s | "
          "to a folder of PNG, images/s | bare session, images/s | array / bare | peak resident |")
    print("|---|---|---|---|---|---|---|---|")
    for precision in ("fp32", "int8"):
        file, rounds = files[precision], (args.rounds + 1) // 2
        inputs = export.draw(script, netG, 0, 0, 64)
        session = infer_ort.open_session(file, "cpu")
        bare = {name: [] for name in kinds}
        rows = {name: {"cold": [], "array": [], "folder": [], "memory": []} for name in kinds}
        for _ in range(rounds):
            for name, program in kinds.items():
                array = folder / ("x.npz" if name.endswith("py") else "x.npy")
                bare[name].append(rate(functools.partial(session.run, None, inputs), 64, 3 * args.seconds))
                rows[name]["cold"].append(launch([*program, file, "--n_samples", 1, "--out", folder / "x.png"])[0])
                seconds, memory = launch([*program, file, "--n_samples", args.n_samples, "--out", array])
                rows[name]["array"].append(args.n_samples / seconds)
                rows[name]["memory"].append(memory)
                seconds, _ = launch([*program, file, "--n_samples", args.n_samples, "--out", f"{folder}/png/"])
                rows[name]["folder"].append(args.n_samples / seconds)
        for name, row in rows.items():
            share = np.median(np.divide(row["array"], bare[name]))
            print(f"| {name} | {precision} | {show(row['cold'], 2)} s | {show(row['array'])} | {show(row['folder'])} | "
                  f"{show(bare[name])} | {share:.2f} | {show(row['memory'])} MB |")

def gpu_table(args, script, netG, files):
    """fp16 through ONNX Runtime, several ways, against PyTorch; latents come from RAM, pixels go there."""
    device = torch.device("cuda")
    torch.backends.cudnn.benchmark = True  # as ONNX Runtime searches too
    eager = copy.deepcopy(netG).to(device)
    folded = export.fold_batchnorm(copy.deepcopy(netG)).to(device).half().to(memory_format=torch.channels_last)
    compiled = torch.compile(folded, dynamic=False)
    graphs = torch.compile(folded, dynamic=False, mode="reduce-overhead")

    def pytorch(net, half, inputs):
        tensors = [torch.from_numpy(v).to(device) for v in inputs.values()]
        tensors[0] = tensors[0].half() if half else tensors[0]
        return script.to_uint8(net(*tensors))

    results = {}
    for n in GPU_BATCHES:
        inputs = export.draw(script, netG, 0, 0, n)
        ways = {"infer_ort.py fp16": {}, "the same, prefer_nhwc": {"prefer_nhwc": "1"}}
        ours = {name: infer_ort.Generator(files["fp16"], n, provider="cuda", cuda_options=options)
                for name, options in ways.items()}
        variants = {
            "PyTorch eager fp32": functools.partial(pytorch, eager, False, inputs),
            "PyTorch eager fp16, folded, channels_last": functools.partial(pytorch, folded, True, inputs),
            "torch.compile of that": functools.partial(pytorch, compiled, True, inputs),
            "torch.compile of that, CUDA graph": functools.partial(pytorch, graphs, True, inputs),
            "ONNX Runtime fp16, session.run": functools.partial(ours["infer_ort.py fp16"].session.run, None, inputs),
        } | {name: functools.partial(gen, *inputs.values()) for name, gen in ours.items()}
        measure = functools.partial(rate, n=n, seconds=args.seconds, sync=torch.cuda.synchronize)
        with torch.inference_mode():
            for name, values in in_turn(variants, args.rounds, measure).items():
                results.setdefault(name, {})[n] = values
    print(f"\n{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}\n")
    print(f"| images/s, latents from and pixels to RAM | {' | '.join(f'batch {n}' for n in GPU_BATCHES)} |")
    print(f"|---|{'---|' * len(GPU_BATCHES)}")
    for name, row in results.items():
        print(f"| {name} | {' | '.join(show(row[n]) for n in GPU_BATCHES)} |")

def main():
    args = get_args()
    if args.gpu_only and not torch.cuda.is_available():
        sys.exit("inference.py: error: --gpu_only: PyTorch finds no GPU here; leave it out")
    logging.disable(logging.WARNING)  # of onnxruntime.quantization, about how it works inside
    cpu = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpu.read_text()).group(1) if cpu.exists() else platform.processor()
    script, netG, *_ = export.load(export.get_args([args.checkpoint]).checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        files = {name: folder / f"{name}.onnx" for name in ("plain", "fp32", "int8", "uint8", "fp16")}
        plain_export(netG, export.draw(script, netG, 0, 0, 2), files["plain"])
        flags = {"fp16": ["--precision", "fp16", "--uint8"]}
        if not args.gpu_only:
            flags |= {"fp32": [], "int8": ["--precision", "int8"], "uint8": ["--precision", "int8", "--uint8"]}
        for name, argv in flags.items():
            export.export(export.get_args([args.checkpoint, "-o", str(files[name]), *argv]))
        with torch.inference_mode():
            shape = tuple(netG(*map(torch.from_numpy, export.draw(script, netG, 0, 0, 1).values())).shape[1:])
        print(f"\n{script.SCRIPT} {shape}, {sum(p.numel() for p in netG.parameters()) / 1e6:.2f} M parameters; "
              f"{model}, {torch.get_num_threads()} threads; torch {torch.__version__}, onnxruntime {ort.__version__}; "
              f"images/s: median of {args.rounds} rounds in turn, and their range")
        if torch.cuda.is_available():
            gpu_table(args, script, netG, files)
        if not args.gpu_only:
            cpu_tables(args, script, netG, files, folder)

if __name__ == "__main__":
    main()
