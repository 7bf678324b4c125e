"""What there is to measure on one GPU, in nine minutes, by calling the programs as a user would.

    python benchmarks/gpu.py --out gpu.md
    python benchmarks/gpu.py --quick        # does it run? Its figures mean nothing

MNIST is looked for in --data_dir; without it the embedded digits stand in. Each program has a limit of
time; one that fails, or has none left, is a line of its reason in the tables.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import onnxruntime
import torch

ROOT = Path(__file__).resolve().parent.parent
TRAINING = [  # flags of dcgan.py at 64x64 RGB, the most important first
    "--ngf 64", "--ngf 128 --ndf 128 --batch_size 128", "--ngf 128 --ndf 128 --batch_size 512",
    "--ngf 64 --compile", "--ngf 128 --ndf 128 --batch_size 128 --compile", "--ngf 64 --batch_size 512",
    "--ngf 64 --precision fp32", "--ngf 128 --ndf 128 --batch_size 128 --precision fp32",
]
GENERATION = ["--precision fp32", "--precision fp16", "--precision fp16 --uint8", "--precision int8 --uint8"]

def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--minutes", type=float, default=9, help="for everything (9)")
    add("--data_dir", default=os.environ.get("GAN_DATA_DIR", "data"), help="where MNIST is, if it is")
    add("--device", default="cuda", help="cpu: to try this program (cuda)")
    add("--quick", action="store_true", help="few steps")
    add("--out", metavar="FILE.md", help="write the tables there, too, after each program")
    return p.parse_args(argv)

class Report:
    """Markdown that is printed as it comes, and written to a file."""

    def __init__(self, args):
        self.args, self.text = args, ""
        self.end = time.monotonic() + 60 * args.minutes

    def __call__(self, line):
        print(line, flush=True)
        self.text += f"{line}\n"
        if self.args.out:
            Path(self.args.out).write_text(self.text)

    def run(self, command, most):
        """What a program prints, or None with its reason in the report. most: seconds, if they are left."""
        limit = min(most, self.end - time.monotonic())
        argv = [sys.executable, *shlex.split(command)]
        try:
            done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=max(limit, 0.1), check=False)
        except subprocess.TimeoutExpired:
            self(f"\n`{command}` was not done in {limit:.0f} s.\n")
            return None
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
            self(f"\n`{command}` failed: {last[0][-300:]}\n")
            return None
        return done.stdout

def machine(report):
    card = "no GPU"
    if torch.cuda.is_available():
        card = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    report(f"{card}; {os.cpu_count()} cores; Python {platform.python_version()}, torch {torch.__version__}, "
           f"onnxruntime {onnxruntime.__version__}; {time.strftime('%Y-%m-%d')}")

def training(report, folder):
    """images/s of the rows of log.jsonl after the first three, which hold the warm-up."""
    report("\n| `python dcgan.py --img_size 64 --nc 3` | images/s | lowest to highest |\n|---|---|---|")
    args = report.args
    steps = 12 if args.quick else 800
    for k, flags in enumerate(TRAINING):
        command = (f"dcgan.py --img_size 64 --nc 3 {flags} --max_images 4000 --data_dir {folder}/data --device {args.device} "
                   f"--max_steps {steps} --save_interval {10 * steps} --log_interval {steps // 12} --out_dir {folder}/{k}")
        if report.run(command, 120) is None:
            continue
        rows = [json.loads(line) for line in Path(folder, str(k), "log.jsonl").read_text().splitlines()]
        speeds = [row["images/s"] for row in rows[3:]]
        report(f"| `{flags}` | {statistics.median(speeds):.0f} | {min(speeds):.0f} to {max(speeds):.0f} |")

def generation(report, folder):
    """infer_ort.py's own tables, of the net with --ngf 128."""
    provider = "cuda" if report.args.device == "cuda" else "cpu"
    for flags in GENERATION:
        if report.run(f"export.py {folder}/1 {flags} -o {folder}/net.onnx", 120) is None:
            continue
        said = report.run(f"infer_ort.py {folder}/net.onnx --benchmark --provider {provider}", 120)
        if said:
            report(f"\n`export.py {flags}`, 64x64 RGB, ngf 128\n\n```\n{said.strip()}\n```")

def quality(report, folder):
    """MNIST, or digits, by default flags to the end; its time and its scores."""
    args = report.args
    dataset = "mnist" if Path(args.data_dir, "MNIST").exists() else "digits"
    data = Path(folder, "data")
    if dataset == "mnist":  # the cache is written beside it
        data.mkdir(exist_ok=True)
        (data / "MNIST").symlink_to(Path(args.data_dir, "MNIST").resolve())
    few = "--max_images 2000 --max_steps 20" if args.quick else ""
    begin = time.monotonic()
    if report.run(f"dcgan.py --dataset {dataset} --data_dir {data} --device {args.device} {few} --out_dir {folder}/mnist", 240) is None:
        return
    report(f"\n`python dcgan.py --dataset {dataset}`: {time.monotonic() - begin:.0f} s from launch to end\n")
    few = "--n_samples 200 --epochs 1" if args.quick else ""
    said = report.run(f"benchmarks/quality.py {folder}/mnist --dataset {dataset} --data_dir {data} {few}", 240)
    report(said.replace(f"{folder}/", "") if said else "")

def main():
    report = Report(get_args())
    with tempfile.TemporaryDirectory() as folder:
        machine(report)
        training(report, folder)
        generation(report, folder)
        quality(report, folder)

if __name__ == "__main__":
    main()
