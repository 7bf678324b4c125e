"""Training speed as a user feels it: our scripts, a plain baseline of the same nets, and any peer.

    python benchmarks/training.py --data_dir data
        # MNIST: dcgan 64x64, acgan 32x32, gan 28x28
    python benchmarks/training.py --runs dcgan --dataset images.zip --img_size 32 --nc 3 --steps 200
    python benchmarks/training.py --runs gan acgan --pytorch_gan
        # beside PyTorch-GAN's nets in its loop, too
    python benchmarks/training.py --runs dcgan --peer "main.py --niter 1" --peer_images 60000
    python benchmarks/training.py --startup --data_dir data
        # --help; MNIST from launch to the first step
    python benchmarks/training.py --made_up 200000
        # memory beside a data set of so many images
    python benchmarks/training.py --runs dcgan --img_size 32 --train_baseline plain.npz --seconds 240
    python benchmarks/training.py --runs dcgan --img_size 32 --train_baseline plain.npz --steps 1000
        # pictures of the plain loop, for quality.py, after the same time as ours, or steps

On a GPU gpu.py measures more. Each run is a process of its own, and they take turns. images/s: from
the first step after the warm-up to the last; "from launch" counts everything, until the process has
ended. The baseline trains our nets in the way that most scripts do: a DataLoader that transforms
every image every epoch, float32, contiguous tensors, the default Adam, losses read off every step.
A --peer counts from its launch to its end, for nothing is known of its warm-up: let it run for long.
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
    add = p.add_argument
    add("--runs", nargs="+", choices=SIZES, default=["dcgan", "acgan", "gan"], help="scripts")
    add("--dataset", default="mnist", help="mnist, or a folder or .zip of class folders")
    add("--data_dir", default="data", help="where mnist is")
    add("--img_size", type=int, help="(default: 64 for dcgan, 32 for acgan, 28 for gan)")
    add("--nc", type=int, choices=(1, 3), default=1, help="channels")
    add("--ngf", type=int, default=64, help="width of both nets")
    add("--batch_size", type=int, default=64, help="images per step")
    add("--steps", type=int, help="measured steps (default: by script)")
    add("--warmup", type=int, default=20, help="steps before them")
    add("--rounds", type=int, default=3, help="how often each is run")
    add("--variants", nargs="+", default=["--precision auto", "--precision fp32"], metavar="FLAGS",
        help="flags of our scripts, each a row")
    add("--in_memory", action="store_true",
        help="a row for the plain loop with the data on the device already")
    add("--no-baseline", dest="baseline", action="store_false", help="ours alone")
    add("--pytorch_gan", action="store_true",
        help="a row for the plain loop with PyTorch-GAN's nets and loader")
    add("--peer", help="another script and its arguments")
    add("--peer_images", type=int, help="how many images --peer trains on, in all its epochs")
    add("--startup", action="store_true",
        help="measure seconds until --help and until the first step, alone")
    add("--made_up", type=int, metavar="N",
        help="measure memory while training on N made-up images, alone")
    add("--train_baseline", metavar="FILE.npz",
        help="train the baseline of --runs alone, and write 10,000 pictures")
    add("--seconds", type=float, default=240, help="of --train_baseline, without --steps")
    add("--seed", type=int, default=0, help="of --train_baseline")
    add("--as_baseline", choices=SIZES, help=argparse.SUPPRESS)  # what its process is started with
    args = p.parse_args()
    if args.peer and not args.peer_images:
        p.error("--peer: say with --peer_images how many images it trains on")
    if args.dataset != "mnist" and not Path(args.dataset).exists():
        p.error(f"--dataset {args.dataset}: neither mnist, nor a folder or .zip of class folders")
    return args

class PeerG(nn.Module):
    """PyTorch-GAN's netG, (N, nz) -> images: dense layers for gan; upsampling and 3x3 convolutions
    for dcgan and acgan."""

    def __init__(self, name, nc, size):
        super().__init__()
        self.label_emb = nn.Embedding(10, 100) if name == "acgan" else None
        if name == "gan":
            widths, layers = (100, 128, 256, 512, 1024), []
            for a, b in itertools.pairwise(widths):
                norm = [nn.BatchNorm1d(b)] if a > 100 else []
                layers += [nn.Linear(a, b), *norm, nn.LeakyReLU(0.2, True)]
            layers += [nn.Linear(1024, nc * size**2), nn.Unflatten(1, (nc, size, size))]
        else:
            side = size // 4
            layers = [nn.Linear(100, 128 * side**2), nn.Unflatten(1, (128, side, side)), nn.BatchNorm2d(128)]
            for a, b in ((128, 128), (128, 64)):
                layers += [nn.Upsample(scale_factor=2), nn.Conv2d(a, b, 3, 1, 1)]
                layers += [nn.BatchNorm2d(b), nn.LeakyReLU(0.2, True)]
            layers.append(nn.Conv2d(64, nc, 3, 1, 1))
        self.main = nn.Sequential(*layers, nn.Tanh())

    def forward(self, z, labels=None):
        return self.main(z if labels is None else self.label_emb(labels) * z)

class PeerD(nn.Module):
    """PyTorch-GAN's netD: images -> (N) logits, and for acgan (N, 10) of the classes."""

    def __init__(self, name, nc, size):
        super().__init__()
        if name == "gan":
            self.main = nn.Sequential(
                nn.Flatten(), nn.Linear(nc * size**2, 512), nn.LeakyReLU(0.2, True),
                nn.Linear(512, 256), nn.LeakyReLU(0.2, True),
            )
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
    """Where a folder or .zip has one folder for each class; a .zip is extracted to `folder`."""
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
    """PIL image -> (nc, size, size) in [-1, 1]: of a square one what our scripts train on."""
    from torchvision import transforms

    channels = [transforms.Grayscale(nc)] if nc == 1 or grey else []  # ImageFolder's are RGB
    resize = transforms.Resize(size, transforms.InterpolationMode.BICUBIC)
    normalize = transforms.Normalize([0.5] * nc, [0.5] * nc)
    steps = [*channels, resize, transforms.CenterCrop(size), transforms.ToTensor(), normalize]
    return transforms.Compose(steps)

def baseline_data(args, size, device):
    """Batches (images, labels) of an epoch, again and again."""
    from torch.utils.data import DataLoader
    from torchvision import datasets

    transform = plain_transform(args.nc, size, grey=args.dataset == "mnist")
    if args.dataset == "mnist":
        data = datasets.MNIST(args.data_dir, transform=transform, download=True)
    else:
        data = datasets.ImageFolder(args.dataset, transform)
    torch.manual_seed(args.seed)
    workers = 0 if args.pytorch_gan else 2
    loader = DataLoader(data, args.batch_size, shuffle=True, num_workers=workers, drop_last=True)
    if args.in_memory:
        n = min(len(data) // args.batch_size, 100)
        return [(x.to(device), y.to(device)) for (x, y), _ in zip(loader, range(n))]
    return loader

def baseline_nets(args, size, device):
    script = importlib.import_module(args.as_baseline)
    if args.pytorch_gan:
        netG = PeerG(args.as_baseline, args.nc, size)
        netD = PeerD(args.as_baseline, args.nc, size)
    else:
        classes = [10] if args.as_baseline == "acgan" else []
        netG = script.Generator(100, args.ngf, args.nc, size, *classes)
        netD = script.Discriminator(args.nc, args.ngf, size, *classes)
    netG.to(device)
    netD.to(device)
    script.weights_init(netG)
    script.weights_init(netD)
    return netG, netD

def baseline(args):
    """The plain loop. Prints step and time as JSON lines."""
    size = args.img_size or SIZES[args.as_baseline]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loader = baseline_data(args, size, device)
    netG, netD = baseline_nets(args, size, device)
    conditional = args.as_baseline == "acgan"
    optG = torch.optim.Adam(netG.parameters(), 2e-4, (0.5, 0.999))
    optD = torch.optim.Adam(netD.parameters(), 2e-4, (0.5, 0.999))

    def loss(out, target, labels):
        if not conditional:
            return F.binary_cross_entropy_with_logits(out, torch.full_like(out, target))
        out, classes = out
        adversarial = F.binary_cross_entropy_with_logits(out, torch.full_like(out, target))
        return adversarial + F.cross_entropy(classes, labels)

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
            row = {"step": step, "time": time.time(),
                   "loss_d": loss_real.item() + loss_fake.item(), "loss_g": loss_g.item()}
            print(json.dumps(row), flush=True)
            if not args.train_baseline:
                if step == args.warmup + args.steps:
                    return
            elif step == args.steps or (not args.steps and time.time() - begin > args.seconds):
                labels = torch.arange(10000, device=device) % 10
                keep(args.train_baseline, netG, labels if conditional else None, device)
                return

@torch.no_grad()
def keep(path, netG, labels, device):
    """10,000 pictures, labels (10000) or None, in a .npz that quality.py reads."""
    netG.eval()
    z = torch.randn(10000, 100, generator=torch.Generator().manual_seed(0)).to(device)
    parts = []
    for i in range(0, 10000, 100):
        inputs = [z[i:i + 100]] if labels is None else [z[i:i + 100], labels[i:i + 100]]
        parts.append(netG(*inputs))
    pixels = (torch.cat(parts) * 127.5 + 127.5).round().to(torch.uint8)
    arrays = {} if labels is None else {"labels": labels.cpu().numpy()}
    np.savez(path, pixels.permute(0, 2, 3, 1).cpu().numpy(), **arrays)

def memory(pid):
    """Anonymous resident MB of a process and its children: mapped files, as our cache, do not count."""
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

    n, classes = 4, [10] if script.SCRIPT == "acgan" else []
    netG = script.Generator(100, ngf, nc, size, *classes)
    netD = script.Discriminator(nc, ndf, size, *classes)
    labels = [torch.zeros(n, dtype=torch.long)] if classes else []

    def total(out):
        return sum(t.sum() for t in out) if classes else out.sum()

    with FlopCounterMode(display=False) as counter:
        fake = netG(torch.randn(n, 100), *labels)
        (total(netD(torch.randn(n, nc, size, size))) + total(netD(fake.detach()))).backward()
        netD.requires_grad_(False)
        total(netD(fake)).backward()
    return counter.get_total_flops() / n

def use_bf16(precision):
    """Whether the scripts autocast to bfloat16, as they decide it."""
    if precision != "auto":
        return precision == "bf16"
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(False)
    return getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)

def convolution_peak(dtype):
    """FLOP/s of a convolution that suits the machine: 3x3, 256 to 256 channels, 32x32."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    n, times = (256, 50) if device == "cuda" else (8, 4)  # on a GPU: what hides launches and waiting
    torch.backends.cudnn.benchmark = True
    conv = torch.nn.Conv2d(256, 256, 3, padding=1, bias=False)
    conv.to(device, dtype, memory_format=torch.channels_last)
    x = torch.randn(n, 256, 32, 32, device=device, dtype=dtype)
    x = x.to(memory_format=torch.channels_last)
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

PLAIN, IN_MEMORY = "plain baseline", "plain baseline, data in memory"
PYTORCH_GAN = "PyTorch-GAN's nets and loop"

def run_ours(row, name, common, args, folder):
    """(images/s, seconds, MB, FLOP/s of a convolution) of our script with a variant's flags."""
    variant = shlex.split(row)[1:]
    precision = "auto"
    if "--precision" in variant:
        precision = variant[variant.index("--precision") + 1]
    peak = convolution_peak(torch.bfloat16 if use_bf16(precision) else torch.float32)
    out = Path(tempfile.mkdtemp(dir=folder), "run")
    argv = [sys.executable, ROOT / f"{name}.py", *common, "--ndf", args.ngf,
            "--max_steps", args.warmup + args.steps, "--log_interval", 10,
            "--save_interval", 10**9, *variant, "--out_dir", out]
    seconds, memory = run(argv, os.devnull)
    return images_per_second(out / "log.jsonl", args), seconds, memory, peak

def run_baseline(row, name, common, args, folder):
    """(images/s, seconds, MB, None) of the plain loop."""
    log = folder / "baseline.log"
    argv = [sys.executable, __file__, *common, "--as_baseline", name,
            "--steps", args.steps, "--warmup", args.warmup]
    if row == IN_MEMORY:
        argv.append("--in_memory")
    if row == PYTORCH_GAN:
        argv.append("--pytorch_gan")
    seconds, memory = run(argv, log)
    return images_per_second(log, args), seconds, memory, None

def measure(name, args, folder):
    """A table for one of our scripts."""
    size = args.img_size or SIZES[name]
    common = ["--dataset", args.dataset, "--data_dir", args.data_dir, "--img_size", size,
              "--nc", args.nc, "--batch_size", args.batch_size, "--ngf", args.ngf]
    plain = common
    if args.dataset != "mnist":
        plain = [*common, "--dataset", class_folders(args.dataset, folder / "extracted")]
    ours = [f"{name}.py {variant}" for variant in args.variants]
    plains = [PLAIN] * args.baseline + [IN_MEMORY] * args.in_memory
    others = [PYTORCH_GAN] * args.pytorch_gan + ([f"peer: {args.peer}"] if args.peer else [])
    rows = {row: [] for row in (*ours, *plains, *others)}
    for r in range(args.rounds):
        for row, values in rows.items():
            if row in ours:
                value = run_ours(row, name, common, args, folder)
            elif row in (*plains, PYTORCH_GAN):
                value = run_baseline(row, name, plain, args, folder)
            else:
                seconds, memory = run([sys.executable, *shlex.split(args.peer)], os.devnull)
                value = args.peer_images / seconds, seconds, memory, None
            values.append(value)
            print(f"round {r + 1}: {row}: {value[0]:.0f} images/s, {value[1]:.1f} s, "
                  f"{value[2]:.0f} MB", file=sys.stderr)
    tables(name, size, rows, ours, others, args)

def tables(name, size, rows, ours, others, args):
    """Prints what the rounds have given."""
    script = importlib.import_module(name)
    flop = flop_per_image(script, args.nc, size, args.ngf, args.ngf)
    print(f"\n### {name}, {size}x{size}, {args.nc} channel(s), ngf = ndf = {args.ngf}, "
          f"batch {args.batch_size}, {args.steps} steps, {flop / 1e9:.3g} GFLOP an image\n")
    print("| | images/s | times the baseline | from launch, s | memory, MB | "
          "of the convolution peak |\n|---|---|---|---|---|---|")
    speeds = {row: np.array([value[0] for value in values]) for row, values in rows.items()}
    for row, values in rows.items():
        _, seconds, memory, peaks = zip(*values)
        ratio = share = ""
        if args.baseline and row != PLAIN:
            ratio = show(speeds[row] / speeds[PLAIN], 2)
        if row in ours:
            width = ["--ngf", str(args.ngf), "--ndf", str(args.ngf)]
            flags = script.get_args([*width, *shlex.split(row)[1:]])
            flop = flop_per_image(script, args.nc, size, flags.ngf, flags.ndf)
            used = np.median(speeds[row] * flop / peaks)
            share = f"{used:.0%} of {np.median(peaks) / 1e9:.0f} GFLOP/s"
        print(f"| {row} | {show(speeds[row])} | {ratio} | {show(seconds, 1)} | "
              f"{np.median(memory):.0f} | {share} |", flush=True)
    for row, peer in itertools.product(ours, others):
        print(f"\n{row} / {peer}: {show(speeds[row] / speeds[peer], 2)}", flush=True)

def first_step(name, *argv, folder):
    """Seconds from launch until the first step is done and logged."""
    out = folder / f"{name}-{time.time()}"
    begin = time.time()
    one_step = ["--max_steps", 1, "--log_interval", 1, "--out_dir", out]
    run([sys.executable, ROOT / f"{name}.py", *argv, *one_step], os.devnull)
    first = json.loads((out / "log.jsonl").read_text().splitlines()[0])
    return first["time"] - begin

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

def made_up_zip(path, n):
    """n pictures of 16 coloured squares, 64x64, in ten class folders; a hundred different ones."""
    encoded, rng = [], np.random.default_rng(0)
    for _ in range(100):
        colours = rng.integers(0, 256, (4, 4, 3), np.uint8)
        squares = np.kron(colours, np.ones((16, 16, 1), np.uint8))
        file = io.BytesIO()
        Image.fromarray(squares).save(file, "png")
        encoded.append(file.getvalue())
    with zipfile.ZipFile(path, "w") as z:
        for i in range(n):
            z.writestr(f"{i % 10}/{i}.png", encoded[i % 100])

def made_up(args, folder):
    """Anonymous memory of training on many 64x64 RGB images in a zip, next to that on few."""
    name = args.runs[0]
    print(f"| {name}.py, 64x64 RGB | cache, MB | seconds until the first step | memory, MB |\n"
          "|---|---|---|---|")
    for n in (max(100, args.made_up // 100), args.made_up):
        made_up_zip(folder / f"{n}.zip", n)
        common = ["--dataset", folder / f"{n}.zip", "--data_dir", folder / "data",
                  "--img_size", 64, "--ngf", 16, "--ndf", 16, "--batch_size", 32]
        seconds = first_step(name, *common, folder=folder)
        some_steps = ["--max_steps", 100, "--out_dir", folder / f"{n}-run"]
        _, peak = run([sys.executable, ROOT / f"{name}.py", *common, *some_steps], os.devnull)
        cache = max(f.stat().st_size for f in (folder / "data" / "cache").iterdir())
        print(f"| {n} images | {cache / 1e6:.0f} | {seconds:.1f} | {peak:.0f} |", flush=True)

def processor():
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found.group(1) if found else platform.processor()

def main():
    args = get_args()
    if args.as_baseline or args.train_baseline:
        args.as_baseline = args.as_baseline or args.runs[0]
        with tempfile.TemporaryDirectory() as folder:
            if args.dataset != "mnist":
                args.dataset = class_folders(args.dataset, folder)
            baseline(args)
        return
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    print(f"{processor()}, {os.cpu_count()} cores{gpu}; torch {torch.__version__}; "
          f"medians of {args.rounds} rounds in turn, and their range; {args.dataset}")
    with tempfile.TemporaryDirectory() as folder:
        if args.startup:
            startup(args, Path(folder))
        elif args.made_up:
            made_up(args, Path(folder))
        else:
            given = args.steps
            for name in args.runs:
                args.steps = given or STEPS[name]
                measure(name, args, Path(folder))

if __name__ == "__main__":
    main()
