"""Training speed as a user feels it: our scripts, a plain baseline of the same nets, and any peer, in turn.

    python benchmarks/training.py --data_dir data                       # MNIST: dcgan 64x64, acgan 32x32, gan 28x28
    python benchmarks/training.py --runs dcgan --dataset images.zip --img_size 32 --steps 200
    python benchmarks/training.py --runs dcgan --peer "main.py --dataset mnist --niter 1" --peer_images 60000

Each run is a process of its own. images/s: from the first step after the warm-up to the last; "from launch" counts
everything, until the process has ended. The baseline trains our nets in the way that most scripts do: a DataLoader that
transforms every image every epoch, float32, contiguous tensors, the default Adam, losses read off every step.
"""

import argparse
import importlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SIZES = {"gan": 28, "dcgan": 64, "acgan": 32}
STEPS = {"gan": 2000, "dcgan": 60, "acgan": 200}  # some half a minute each


def get_args():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--runs", nargs="+", choices=SIZES, default=["dcgan", "acgan", "gan"], help="scripts to measure")
    p.add_argument("--dataset", default="mnist", help="mnist, or a folder or .zip that the baseline reads as a folder")
    p.add_argument("--data_dir", default="data", help="where mnist is")
    p.add_argument("--img_size", type=int, help="(default: 64 for dcgan, 32 for acgan, 28 for gan)")
    p.add_argument("--nc", type=int, choices=(1, 3), default=1, help="channels")
    p.add_argument("--ngf", type=int, default=64, help="width of both nets")
    p.add_argument("--batch_size", type=int, default=64, help="images per step")
    p.add_argument("--steps", type=int, help="measured steps (default: by script)")
    p.add_argument("--warmup", type=int, default=20, help="steps before them")
    p.add_argument("--rounds", type=int, default=3, help="how often each is run")
    p.add_argument("--precisions", nargs="+", default=["auto", "fp32"], help="of our scripts")
    p.add_argument("--no-baseline", dest="baseline", action="store_false", help="ours alone")
    p.add_argument("--peer", help="another script and its arguments")
    p.add_argument("--peer_images", type=int, help="how many images --peer trains on")
    p.add_argument("--as_baseline", choices=SIZES, help=argparse.SUPPRESS)  # what the baseline's process is started with
    return p.parse_args()


def baseline(args):
    """The plain loop. Prints step and time as JSON lines."""
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    name = args.as_baseline
    script = importlib.import_module(name)
    size = args.img_size or SIZES[name]
    transform = transforms.Compose([transforms.Grayscale(args.nc), transforms.Resize(size), transforms.CenterCrop(size),
                                    transforms.ToTensor(), transforms.Normalize([0.5] * args.nc, [0.5] * args.nc)])
    if args.dataset == "mnist":
        data = datasets.MNIST(args.data_dir, transform=transform, download=True)
    else:
        data = datasets.ImageFolder(args.dataset, transform)
    loader = DataLoader(data, args.batch_size, shuffle=True, num_workers=2, drop_last=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    conditional = {"n_classes": 10} if name == "acgan" else {}
    netG = script.Generator(nz=100, ngf=args.ngf, nc=args.nc, img_size=size, **conditional).to(device)
    netD = script.Discriminator(nc=args.nc, ndf=args.ngf, img_size=size, **conditional).to(device)
    script.weights_init(netG)
    script.weights_init(netD)
    optG = torch.optim.Adam(netG.parameters(), 2e-4, (0.5, 0.999))
    optD = torch.optim.Adam(netD.parameters(), 2e-4, (0.5, 0.999))

    def loss(out, target, labels):
        if not conditional:
            return F.binary_cross_entropy_with_logits(out, torch.full_like(out, target))
        out, classes = out
        return F.binary_cross_entropy_with_logits(out, torch.full_like(out, target)) + F.cross_entropy(classes, labels)

    step = 0
    while True:
        for real, labels in loader:
            real, labels = real.to(device), labels.to(device)
            netD.zero_grad()
            loss_real = loss(netD(real), 1.0, labels)
            loss_real.backward()
            z = torch.randn(len(real), 100, device=device)
            fake = netG(z, labels) if conditional else netG(z)
            loss_fake = loss(netD(fake.detach()), 0.0, labels)
            loss_fake.backward()
            optD.step()
            netG.zero_grad()
            loss_g = loss(netD(fake), 1.0, labels)
            loss_g.backward()
            optG.step()
            step += 1
            row = {"step": step, "time": time.time(), "loss_d": loss_real.item() + loss_fake.item(),
                   "loss_g": loss_g.item()}
            print(json.dumps(row), flush=True)
            if step == args.warmup + args.steps:
                return


def memory(pid):
    """Anonymous resident MB of a process and its children: mapped files, such as our cache, do not count."""
    total, pids = 0, [pid]
    while pids:
        pid = pids.pop()
        try:
            found = re.search(r"RssAnon:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())
            total += int(found.group(1)) if found else 0
            for task in Path(f"/proc/{pid}/task").iterdir():
                pids += map(int, (task / "children").read_text().split())
        except OSError:  # it has just ended
            continue
    return total / 1000


def run(argv, output):
    """(seconds from launch to end, peak MB) of a process, its standard output in a file."""
    begin, peak = time.perf_counter(), 0
    with open(output, "wb") as out, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(list(map(str, argv)), stdout=out, stderr=errors)
        while process.poll() is None:
            peak = max(peak, memory(process.pid))
            time.sleep(0.2)
        seconds = time.perf_counter() - begin
        if process.returncode:
            errors.seek(0)
            sys.exit(f"{shlex.join(map(str, argv))}:\n{errors.read().decode()[-3000:]}")
    return seconds, peak


def images_per_second(log, args):
    """From lines of JSON with step and time."""
    rows = [json.loads(line) for line in Path(log).read_text().splitlines() if line.startswith("{")]
    first, last = next(r for r in rows if r["step"] >= args.warmup), rows[-1]
    return (last["step"] - first["step"]) * args.batch_size / (last["time"] - first["time"])


def flop_per_image(script, args, size):
    """Floating-point operations of one training step for one image, counted by PyTorch."""
    from torch.utils.flop_counter import FlopCounterMode

    n, conditional = 4, {"n_classes": 10} if script.SCRIPT == "acgan" else {}
    netG = script.Generator(nz=100, ngf=args.ngf, nc=args.nc, img_size=size, **conditional)
    netD = script.Discriminator(nc=args.nc, ndf=args.ngf, img_size=size, **conditional)
    labels = [torch.zeros(n, dtype=torch.long)] if conditional else []

    def total(out):
        return sum(t.sum() for t in out) if conditional else out.sum()

    with FlopCounterMode(display=False) as counter:
        fake = netG(torch.randn(n, 100), *labels)
        (total(netD(torch.randn(n, args.nc, size, size))) + total(netD(fake.detach()))).backward()
        netD.requires_grad_(False)
        total(netD(fake)).backward()
    return counter.get_total_flops() / n


def convolution_peak(dtype):
    """FLOP/s of a convolution that suits the machine: 3x3, 256 to 256 channels, 32x32, batch 8, channels_last."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    conv = torch.nn.Conv2d(256, 256, 3, padding=1, bias=False).to(device, dtype, memory_format=torch.channels_last)
    x = torch.randn(8, 256, 32, 32, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    flop, best = 2 * 8 * 32 * 32 * 256 * 256 * 9, 0
    with torch.no_grad():
        for _ in range(5):
            begin = time.perf_counter()
            for _ in range(4):
                conv(x)
            if device == "cuda":
                torch.cuda.synchronize()
            best = max(best, 4 * flop / (time.perf_counter() - begin))
    return best


def show(values, digits=0):
    low, middle, high = min(values), float(np.median(values)), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def measure(name, args, folder):
    script, size = importlib.import_module(name), args.img_size or SIZES[name]
    args.steps = args.steps or STEPS[name]
    common = ["--dataset", args.dataset, "--data_dir", args.data_dir, "--img_size", size, "--nc", args.nc,
              "--batch_size", args.batch_size, "--ngf", args.ngf]
    rows = {f"{name}.py --precision {p}": [] for p in args.precisions}
    rows |= {"plain baseline": []} if args.baseline else {}
    rows |= {f"peer: {args.peer}": []} if args.peer else {}
    peaks = {p: [] for p in args.precisions}
    for r in range(args.rounds):
        for row in rows:
            log = folder / f"{r}.log"
            if row.startswith(name):
                precision = row.split()[-1]
                out = folder / f"{name}-{precision}-{r}"
                bf16 = script.use_bf16(precision, script.pick_device("auto"))
                peaks[precision].append(convolution_peak(torch.bfloat16 if bf16 else torch.float32))
                seconds, peak = run([sys.executable, ROOT / f"{name}.py", *common, "--ndf", args.ngf, "--max_steps",
                                     args.warmup + args.steps, "--epochs", 10**6, "--log_interval", 10,
                                     "--precision", precision, "--out_dir", out], log)
                speed = images_per_second(out / "log.jsonl", args)
            elif row == "plain baseline":
                seconds, peak = run([sys.executable, __file__, *common, "--as_baseline", name, "--steps", args.steps,
                                     "--warmup", args.warmup], log)
                speed = images_per_second(log, args)
            else:
                seconds, peak = run([sys.executable, *shlex.split(args.peer)], log)
                speed = args.peer_images / seconds
            rows[row].append((speed, seconds, peak))
            print(f"round {r + 1}: {row}: {speed:.0f} images/s, {seconds:.1f} s, {peak:.0f} MB", file=sys.stderr)
    flop = flop_per_image(script, args, size)
    print(f"\n### {name}, {size}x{size}, {args.nc} channel(s), ngf = ndf = {args.ngf}, batch {args.batch_size}, "
          f"{args.steps} steps, {flop / 1e9:.3g} GFLOP an image\n")
    print("| | images/s | times the baseline | from launch, s | memory, MB | of the convolution peak |\n"
          "|---|---|---|---|---|---|")
    for row, values in rows.items():
        speed, seconds, peak = zip(*values)
        ratio = share = ""
        if args.baseline and row != "plain baseline":
            ratio = show(np.divide(speed, [v[0] for v in rows["plain baseline"]]), 2)
        if row.startswith(name):
            tops = peaks[row.split()[-1]]
            share = f"{np.median(np.multiply(speed, flop) / tops):.0%} of {np.median(tops) / 1e9:.0f} GFLOP/s"
        print(f"| {row} | {show(speed)} | {ratio} | {show(seconds, 1)} | {np.median(peak):.0f} | {share} |", flush=True)
    args.steps = None


def main():
    args = get_args()
    if args.as_baseline:
        baseline(args)
        return
    cpu = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpu.read_text()).group(1) if cpu.exists() else platform.processor()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    print(f"{model}, {os.cpu_count()} cores{gpu}; torch {torch.__version__}; medians of {args.rounds} rounds in turn, and "
          f"their range; {args.dataset}")
    with tempfile.TemporaryDirectory() as folder:
        for name in args.runs:
            measure(name, args, Path(folder))


if __name__ == "__main__":
    main()
