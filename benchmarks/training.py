"""Training speed as a user feels it: our scripts, a plain baseline of the same nets, and any peer, in turn.

    python benchmarks/training.py --data_dir data                       # MNIST: dcgan 64x64, acgan 32x32, gan 28x28
    python benchmarks/training.py --runs dcgan --dataset images.zip --img_size 32 --nc 3 --steps 200
    python benchmarks/training.py --runs gan acgan --pytorch_gan        # beside PyTorch-GAN's nets in its loop, too
    python benchmarks/training.py --runs dcgan --peer "main.py --dataset mnist --niter 1" --peer_images 60000
    python benchmarks/training.py --runs dcgan --nc 3 --ngf 128 --batch_size 128 --steps 500 --warmup 100 --in_memory \\
        --variants "--precision auto" "--precision auto --compile" "--precision fp32"       # what to run on a GPU
    python benchmarks/training.py --startup --data_dir data             # --help; MNIST from launch to the first step
    python benchmarks/training.py --made_up 200000                      # memory beside a data set of so many images
    python benchmarks/training.py --runs dcgan --img_size 32 --train_baseline plain.npz --seconds 240
    python benchmarks/training.py --runs dcgan --img_size 32 --train_baseline plain.npz --steps 1000 --seed 1
                # pictures of the plain loop, to be scored by quality.py beside ours after the same time, or steps

Each run is a process of its own. images/s: from the first step after the warm-up to the last; "from launch" counts
everything, until the process has ended. The baseline trains our nets in the way that most scripts do: a DataLoader that
transforms every image every epoch, float32, contiguous tensors, the default Adam, losses read off every step. A --peer
counts from its launch to its end, for nothing is known of its warm-up: let it run for long.
"""

import argparse
import contextlib
import importlib
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

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
    p.add_argument("--variants", nargs="+", default=["--precision auto", "--precision fp32"], metavar="FLAGS",
                   help="flags of our scripts, each a row")
    p.add_argument("--in_memory", action="store_true", help="a row for the plain loop with the data on the device already")
    p.add_argument("--no-baseline", dest="baseline", action="store_false", help="ours alone")
    p.add_argument("--pytorch_gan", action="store_true", help="a row for the plain loop with PyTorch-GAN's nets and loader")
    p.add_argument("--peer", help="another script and its arguments")
    p.add_argument("--peer_images", type=int, help="how many images --peer trains on, all its epochs together")
    p.add_argument("--startup", action="store_true", help="measure seconds until --help and until the first step, alone")
    p.add_argument("--made_up", type=int, metavar="N", help="measure memory while training on N made-up images, alone")
    p.add_argument("--train_baseline", metavar="FILE.npz", help="train the baseline of --runs alone, and write 10,000 pictures")
    p.add_argument("--seconds", type=float, default=240, help="how long --train_baseline trains, without --steps")
    p.add_argument("--seed", type=int, default=0, help="of --train_baseline")
    p.add_argument("--as_baseline", choices=SIZES, help=argparse.SUPPRESS)  # what the baseline's process is started with
    args = p.parse_args()
    if args.peer and not args.peer_images:
        p.error("--peer: say with --peer_images how many images it trains on")
    if args.dataset != "mnist" and not Path(args.dataset).exists():
        p.error(f"--dataset {args.dataset}: neither mnist, nor a folder or .zip of images in class folders")
    return args

class PeerG(nn.Module):
    """PyTorch-GAN's netG: dense layers for gan; upsampling and 3x3 convolutions for dcgan and acgan. (N, nz) -> images."""

    def __init__(self, name, nc, size):
        super().__init__()
        self.label_emb = nn.Embedding(10, 100) if name == "acgan" else None
        if name == "gan":
            widths, layers = (100, 128, 256, 512, 1024), []
            for a, b in itertools.pairwise(widths):
                layers += [nn.Linear(a, b), *([nn.BatchNorm1d(b)] if a > 100 else []), nn.LeakyReLU(0.2, True)]
            layers += [nn.Linear(1024, nc * size**2), nn.Unflatten(1, (nc, size, size))]
        else:
            layers = [nn.Linear(100, 128 * (size // 4) ** 2), nn.Unflatten(1, (128, size // 4, size // 4)), nn.BatchNorm2d(128)]
            for a, b in ((128, 128), (128, 64)):
                layers += [nn.Upsample(scale_factor=2), nn.Conv2d(a, b, 3, 1, 1), nn.BatchNorm2d(b), nn.LeakyReLU(0.2, True)]
            layers.append(nn.Conv2d(64, nc, 3, 1, 1))
        self.main = nn.Sequential(*layers, nn.Tanh())

    def forward(self, z, labels=None):
        return self.main(z if labels is None else self.label_emb(labels) * z)

class PeerD(nn.Module):
    """PyTorch-GAN's netD: images -> (N) logits, and for acgan (N, 10) of the classes."""

    def __init__(self, name, nc, size):
        super().__init__()
        if name == "gan":
            self.main = nn.Sequential(nn.Flatten(), nn.Linear(nc * size**2, 512), nn.LeakyReLU(0.2, True),
                                      nn.Linear(512, 256), nn.LeakyReLU(0.2, True))
        else:
            widths, layers = (nc, 16, 32, 64, 128), []
            for a, b in itertools.pairwise(widths):
                layers += [nn.Conv2d(a, b, 3, 2, 1), nn.LeakyReLU(0.2, True), nn.Dropout2d(0.25),
                           *([nn.BatchNorm2d(b)] if b > 16 else [])]
            self.main = nn.Sequential(*layers, nn.Flatten())
        n = 256 if name == "gan" else 128 * math.ceil(size / 16) ** 2
        self.adv, self.aux = nn.Linear(n, 1), nn.Linear(n, 10) if name == "acgan" else None

    def forward(self, x):
        x = self.main(x)
        return self.adv(x).flatten() if self.aux is None else (self.adv(x).flatten(), self.aux(x))

def class_folders(path, folder):
    """The folder in which a folder or .zip has one folder for each class; a .zip is extracted to `folder`."""
    path = Path(path)
    if path.is_file():
        with zipfile.ZipFile(path) as z:
            z.extractall(folder)  # which keeps what it writes below `folder`
        path = folder
    below = list(path.iterdir())
    while len(below) == 1 and below[0].is_dir():
        path, below = below[0], list(below[0].iterdir())
    return path

def plain_transform(nc, size, grey):
    """PIL image -> (nc, size, size) in [-1, 1]: of square ones the very picture that our scripts train on."""
    from torchvision import transforms

    channels = [transforms.Grayscale(nc)] if nc == 1 or grey else []  # ImageFolder's are RGB
    resize = transforms.Resize(size, transforms.InterpolationMode.BICUBIC)
    return transforms.Compose([*channels, resize, transforms.CenterCrop(size), transforms.ToTensor(),
                               transforms.Normalize([0.5] * nc, [0.5] * nc)])

def baseline(args):
    """The plain loop. Prints step and time as JSON lines."""
    from torch.utils.data import DataLoader
    from torchvision import datasets

    name = args.as_baseline
    script = importlib.import_module(name)
    size = args.img_size or SIZES[name]
    transform = plain_transform(args.nc, size, grey=args.dataset == "mnist")
    if args.dataset == "mnist":
        data = datasets.MNIST(args.data_dir, transform=transform, download=True)
    else:
        data = datasets.ImageFolder(args.dataset, transform)
    torch.manual_seed(args.seed)
    loader = DataLoader(data, args.batch_size, shuffle=True, num_workers=0 if args.pytorch_gan else 2, drop_last=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.in_memory:
        n = min(len(data) // args.batch_size, 100)
        loader = [(x.to(device), y.to(device)) for (x, y), _ in zip(loader, range(n))]
    conditional = {"n_classes": 10} if name == "acgan" else {}
    if args.pytorch_gan:
        netG, netD = PeerG(name, args.nc, size).to(device), PeerD(name, args.nc, size).to(device)
    else:
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

    step, begin = 0, time.time()
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
            if args.train_baseline and (step == args.steps if args.steps else time.time() - begin > args.seconds):
                labels = torch.arange(10000, device=device) % 10
                keep(args.train_baseline, netG, labels if conditional else None, device)
                return
            if not args.train_baseline and step == args.warmup + args.steps:
                return

@torch.no_grad()
def keep(path, netG, labels, device):
    """10,000 pictures, labels (10000) or None, in a .npz that quality.py reads."""
    netG.eval()
    z = torch.randn(10000, 100, generator=torch.Generator().manual_seed(0)).to(device)
    parts = [netG(z[i:i + 100], *([] if labels is None else [labels[i:i + 100]])) for i in range(0, 10000, 100)]
    images = (torch.cat(parts) * 127.5 + 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    np.savez(path, images, **({} if labels is None else {"labels": labels.cpu().numpy()}))

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
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.2)  # and not sleep: that would round the seconds up
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

def flop_per_image(script, nc, size, ngf, ndf):
    """Floating-point operations of one training step for one image, counted by PyTorch."""
    from torch.utils.flop_counter import FlopCounterMode

    n, conditional = 4, {"n_classes": 10} if script.SCRIPT == "acgan" else {}
    netG = script.Generator(nz=100, ngf=ngf, nc=nc, img_size=size, **conditional)
    netD = script.Discriminator(nc=nc, ndf=ndf, img_size=size, **conditional)
    labels = [torch.zeros(n, dtype=torch.long)] if conditional else []

    def total(out):
        return sum(t.sum() for t in out) if conditional else out.sum()

    with FlopCounterMode(display=False) as counter:
        fake = netG(torch.randn(n, 100), *labels)
        (total(netD(torch.randn(n, nc, size, size))) + total(netD(fake.detach()))).backward()
        netD.requires_grad_(False)
        total(netD(fake)).backward()
    return counter.get_total_flops() / n

def use_bf16(precision):
    """Whether the scripts autocast to bfloat16, as they decide it."""
    cuda = torch.cuda.is_available()
    cpu = getattr(torch.cpu, "get_capabilities", dict)()
    fast = torch.cuda.is_bf16_supported(False) if cuda else cpu.get("avx512_bf16", False)
    return precision == "bf16" or (precision == "auto" and fast)

def convolution_peak(dtype):
    """FLOP/s of a convolution that suits the machine: 3x3, 256 to 256 channels, 32x32, channels_last."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    n, times = (256, 50) if device == "cuda" else (8, 4)  # for a GPU, what hides launching and waiting
    torch.backends.cudnn.benchmark = True
    conv = torch.nn.Conv2d(256, 256, 3, padding=1, bias=False).to(device, dtype, memory_format=torch.channels_last)
    x = torch.randn(n, 256, 32, 32, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    flop, best = times * 2 * n * 32 * 32 * 256 * 256 * 9, 0
    with torch.no_grad():
        for _ in range(5):
            begin = time.perf_counter()
            for _ in range(times):
                conv(x)
            if device == "cuda":
                torch.cuda.synchronize()
            best = max(best, flop / (time.perf_counter() - begin))
    return best

def show(values, digits=0):
    low, middle, high = min(values), float(np.median(values)), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"

def measure(name, args, folder):
    script, size = importlib.import_module(name), args.img_size or SIZES[name]
    args.steps = args.steps or STEPS[name]
    common = ["--dataset", args.dataset, "--data_dir", args.data_dir, "--img_size", size, "--nc", args.nc,
              "--batch_size", args.batch_size, "--ngf", args.ngf]
    plain = common
    if args.dataset != "mnist":
        plain = [*common, "--dataset", class_folders(args.dataset, folder / "extracted")]
    rows = {f"{name}.py {variant}": [] for variant in args.variants}
    rows |= {"plain baseline": []} if args.baseline else {}
    rows |= {"plain baseline, data in memory": []} if args.in_memory else {}
    rows |= {"PyTorch-GAN's nets and loop": []} if args.pytorch_gan else {}
    rows |= {f"peer: {args.peer}": []} if args.peer else {}
    peaks = {row: [] for row in rows}
    for r in range(args.rounds):
        for row in rows:
            log = folder / f"{r}.log"
            if row.startswith(name):
                variant = shlex.split(row)[1:]
                out = folder / f"{name}-{len(peaks[row])}-{list(rows).index(row)}"
                precision = variant[variant.index("--precision") + 1] if "--precision" in variant else "auto"
                peaks[row].append(convolution_peak(torch.bfloat16 if use_bf16(precision) else torch.float32))
                seconds, peak = run([sys.executable, ROOT / f"{name}.py", *common, "--ndf", args.ngf, "--max_steps",
                                     args.warmup + args.steps, "--log_interval", 10, "--save_interval", 10**9,
                                     *variant, "--out_dir", out], log)
                speed = images_per_second(out / "log.jsonl", args)
            elif row.startswith(("plain baseline", "PyTorch-GAN")):
                seconds, peak = run([sys.executable, __file__, *plain, "--as_baseline", name, "--steps", args.steps,
                                     "--warmup", args.warmup, *["--in_memory"] * row.endswith("memory"),
                                     *["--pytorch_gan"] * row.startswith("PyTorch-GAN")], log)
                speed = images_per_second(log, args)
            else:
                seconds, peak = run([sys.executable, *shlex.split(args.peer)], log)
                speed = args.peer_images / seconds
            rows[row].append((speed, seconds, peak))
            print(f"round {r + 1}: {row}: {speed:.0f} images/s, {seconds:.1f} s, {peak:.0f} MB", file=sys.stderr)
    flop = flop_per_image(script, args.nc, size, args.ngf, args.ngf)
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
            tops = peaks[row]
            flags = script.get_args(["--ngf", str(args.ngf), "--ndf", str(args.ngf), *shlex.split(row)[1:]])
            flop = flop_per_image(script, args.nc, size, flags.ngf, flags.ndf)
            share = f"{np.median(np.multiply(speed, flop) / tops):.0%} of {np.median(tops) / 1e9:.0f} GFLOP/s"
        print(f"| {row} | {show(speed)} | {ratio} | {show(seconds, 1)} | {np.median(peak):.0f} | {share} |", flush=True)
    for row in (row for row in rows if row.startswith(name)):
        for peer in (peer for peer in rows if peer.startswith(("PyTorch-GAN", "peer"))):
            times = np.divide([v[0] for v in rows[row]], [v[0] for v in rows[peer]])
            print(f"\n{row} / {peer}: {show(times, 2)}", flush=True)
    args.steps = None

def first_step(name, *argv, folder):
    """Seconds from launch until the first step is done and logged."""
    out = folder / f"{name}-{time.time()}"
    begin = time.time()
    run([sys.executable, ROOT / f"{name}.py", *argv, "--max_steps", 1, "--log_interval", 1, "--out_dir", out], os.devnull)
    return json.loads((out / "log.jsonl").read_text().splitlines()[0])["time"] - begin

def startup(args, folder):
    """Programs in turn, so that the machine's moods meet all of them."""
    rows = {}
    data = folder / "data"
    data.mkdir()
    (data / "MNIST").symlink_to(Path(args.data_dir, "MNIST").resolve())
    for _ in range(args.rounds):
        for name in ("gan", "dcgan", "acgan", "export", "infer_ort"):
            seconds, _ = run([sys.executable, ROOT / f"{name}.py", "--help"], os.devnull)
            rows.setdefault(f"{name}.py --help", []).append(seconds)
        for name in args.runs:
            shutil.rmtree(data / "cache", ignore_errors=True)
            for state in ("not decoded yet", "decoded before"):
                seconds = first_step(name, "--dataset", "mnist", "--data_dir", data, folder=folder)
                rows.setdefault(f"{name}.py, MNIST, first step, {state}", []).append(seconds)
    print("| | s |\n|---|---|")
    for row, values in rows.items():
        print(f"| {row} | {show(values, 2)} |")

def made_up(args, folder):
    """Anonymous memory of training on many 64x64 RGB images, which lie in a zip, next to that on few."""
    print(f"| {args.runs[0]}.py, 64x64 RGB | cache, MB | seconds until the first step | memory, MB |\n|---|---|---|---|")
    for n in (max(100, args.made_up // 100), args.made_up):
        encoded, rng = [], np.random.default_rng(0)
        for _ in range(100):
            file = io.BytesIO()
            Image.fromarray(np.kron(rng.integers(0, 256, (4, 4, 3), np.uint8), np.ones((16, 16, 1), np.uint8))).save(file, "png")
            encoded.append(file.getvalue())
        with zipfile.ZipFile(folder / f"{n}.zip", "w") as z:
            for i in range(n):
                z.writestr(f"{i % 10}/{i}.png", encoded[i % 100])
        common = ["--dataset", folder / f"{n}.zip", "--img_size", 64, "--data_dir", folder / "data", "--ngf", 16, "--ndf", 16]
        seconds = first_step(args.runs[0], *common, folder=folder)
        _, peak = run([sys.executable, ROOT / f"{args.runs[0]}.py", *common, "--max_steps", 100, "--out_dir",
                       folder / f"{n}-run"], os.devnull)
        cache = max(f.stat().st_size for f in (folder / "data" / "cache").iterdir())
        print(f"| {n} images | {cache / 1e6:.0f} | {seconds:.1f} | {peak:.0f} |", flush=True)

def main():
    args = get_args()
    if args.as_baseline or args.train_baseline:
        args.as_baseline = args.as_baseline or args.runs[0]
        with tempfile.TemporaryDirectory() as folder:
            if args.dataset != "mnist":
                args.dataset = class_folders(args.dataset, folder)
            baseline(args)
        return
    cpu = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpu.read_text()).group(1) if cpu.exists() else platform.processor()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    print(f"{model}, {os.cpu_count()} cores{gpu}; torch {torch.__version__}; medians of {args.rounds} rounds in turn, and "
          f"their range; {args.dataset}")
    with tempfile.TemporaryDirectory() as folder:
        if args.startup:
            startup(args, Path(folder))
        elif args.made_up:
            made_up(args, Path(folder))
        else:
            for name in args.runs:
                measure(name, args, Path(folder))

if __name__ == "__main__":
    main()
