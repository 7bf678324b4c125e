"""DCGAN: Radford, Metz, Chintala 2016, "Unsupervised Representation Learning with Deep Convolutional GANs".

A generator of transposed convolutions and a discriminator of strided convolutions play Goodfellow's game: netD learns
to tell real pictures from netG's, netG learns to make pictures that netD takes for real.

    python dcgan.py                                             # embedded digits, no download
    python dcgan.py --dataset celeba --ngf 128                  # 64x64 RGB; or mnist, cifar10, a folder, a .zip
    python dcgan.py --resume                                    # go on where the newest run stopped, bit for bit on CPU
    python dcgan.py --sample runs/dcgan-digits/checkpoint.pt    # a grid of new pictures
    torchrun --nproc_per_node 2 dcgan.py --dataset cifar10      # one process per GPU (or CPU socket)
"""

import argparse
import contextlib
import copy
import ctypes
import datetime
import errno
import functools
import gc
import hashlib
import io
import json
import math
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import spectral_norm
from tqdm import tqdm

SCRIPT = "dcgan"
NEEDS_LABELS = False
# name: (image size, channels, horizontal flips)
DATASETS = {
    "digits": (32, 1, False),
    "mnist": (32, 1, False),
    "fashion_mnist": (32, 1, False),
    "cifar10": (32, 3, True),
    "celeba": (64, 3, True),
}
# By data set: epochs, rates of netG and netD, netD's width, where they are not 5, the papers' 2e-4 and 64. They
# give the best pictures after minutes on two cores (benchmarks/RESULTS.md).
EPOCHS = {"digits": 8}
LR = {"digits": (4e-3, 1e-3), "mnist": (1e-3, 5e-4), "fashion_mnist": (1e-3, 5e-4)}
NDF = {"digits": 32, "mnist": 32, "fashion_mnist": 32}
CHECKPOINT_KEYS = {"script": str, "args": dict, "config": dict, "classes": list, "netG": dict, "netD": dict,
                   "netG_ema": dict, "optG": dict, "optD": dict, "replay": (list, type(None)), "epoch": int,
                   "position": int, "step": int}
# What --resume cannot change.
FIXED_BY_CHECKPOINT = ("nz", "ngf", "ndf", "nc", "img_size", "sn", "optim_g", "optim_d", "beta1", "beta2")


def one_line(e):
    """The first line of an exception's text, or its name."""
    return next((line.strip()[:160] for line in str(e).splitlines() if line.strip()), type(e).__name__)


def fail(message):
    """Ends the program with one line for the user: exit code 2 if the message begins with a flag, 1 otherwise."""
    print(f"{SCRIPT}.py: error: {' '.join(message.splitlines())}", file=sys.stderr)  # a file's name may hold a newline
    sys.exit(2 if message.startswith("--") else 1)


# ---------------------------------------------------------------------------------------------------- arguments


class ArgumentParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (--help lists the flags)\n")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):  # "(default: None)" helps nobody
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def number(kind, low, high=math.inf):
    """argparse type: a number of `kind` (int or float) in [low, high]."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            wanted = f"{low} or more" if high == math.inf else f"between {low} and {high}"
            raise argparse.ArgumentTypeError(f"{text} is not {wanted}")
        return value

    parse.__name__ = kind.__name__
    return parse


def as_flags(p, saved):
    """The command line that stands for a checkpoint's arguments: what was tampered with is refused as if typed."""
    flags = []
    for name, value in saved.items():
        if value is True or (value is False and f"--no-{name}" in p.format_help()):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        elif value is not None and value is not False:
            flags.append(f"--{name}={value}")
    return flags


def get_args(argv=None):
    """Command line -> argparse.Namespace. With --resume, the flags of the checkpoint are the defaults."""
    p = ArgumentParser(prog=f"{SCRIPT}.py", description=__doc__.split("\n")[0], formatter_class=HelpFormatter,
                       allow_abbrev=False)

    g = p.add_argument_group("data")
    g.add_argument("--dataset", default="digits",
                   help=f"{', '.join(DATASETS)}, or a folder or .zip of images, flat or in class folders")
    g.add_argument("--data_dir", default="./data", help="where data sets are found, downloaded and cached")
    g.add_argument("--img_size", type=int, help="height and width of the pictures (default: by data set)")
    g.add_argument("--nc", type=int, choices=(1, 3), help="channels: 1 grey, 3 RGB (default: by data set)")
    g.add_argument("--max_images", type=number(int, 1), help="a random subset of this many; digits: draw this many")
    g.add_argument("--hflip", action=argparse.BooleanOptionalAction,
                   help="flip real images at random (default: for celeba and cifar10)")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    g.add_argument("--workers", type=number(int, 0), default=min(8, cores), help="decoding processes")

    g = p.add_argument_group("model")
    g.add_argument("--nz", type=number(int, 1), default=100, help="size of the latent vector")
    g.add_argument("--ngf", type=number(int, 1), default=64, help="width of netG")
    g.add_argument("--ndf", type=number(int, 1), help="width of netD (default: 64, or by data set)")
    g.add_argument("--init", choices=("dcgan", "he", "xavier"), default="dcgan", help="dcgan: N(0, 0.02)")
    g.add_argument("--sn", action="store_true", help="spectral norm in netD, in place of its BatchNorm")
    g.add_argument("--dropout", type=number(float, 0, 0.99), default=0.0, help="dropout probability in netD")
    g.add_argument("--ema", type=number(float, 0, 1), default=0.999, help="decay of netG's average, which is sampled")

    g = p.add_argument_group("optimisation")
    g.add_argument("--epochs", type=number(int, 1),
                   help="passes over the data (default: 5, or what data set or --max_steps take)")
    g.add_argument("--max_steps", type=number(int, 1), help="stop after this many steps, wherever the epoch is")
    g.add_argument("--batch_size", type=number(int, 1), default=64, help="images per process and step")
    g.add_argument("--loss", choices=("bce", "hinge"), default="bce", help="bce: non-saturating cross-entropy")
    g.add_argument("--lr", type=number(float, 0), help="learning rate of both nets (default: 2e-4, or by data set)")
    g.add_argument("--lr_g", type=number(float, 0), help="learning rate of netG (default: --lr, or by data set)")
    g.add_argument("--lr_d", type=number(float, 0), help="learning rate of netD (default: --lr, or by data set)")
    g.add_argument("--beta1", type=number(float, 0, 0.9999), default=0.5, help="Adam's first-moment decay")
    g.add_argument("--beta2", type=number(float, 0, 0.9999), default=0.999, help="Adam's second-moment decay")
    g.add_argument("--optim_g", choices=("adam", "rmsprop"), default="adam", help="optimizer of netG")
    g.add_argument("--optim_d", choices=("adam", "rmsprop"), default="adam", help="optimizer of netD")
    g.add_argument("--lr_decay", choices=("none", "linear", "step"), default="none",
                   help="over --epochs; linear: to 0; step: halved after each quarter")
    g.add_argument("--real_label", type=number(float, 0, 1), default=1.0, help="netD's target for real (0.9: smoothed)")
    g.add_argument("--fake_label", type=number(float, 0, 1), default=0.0, help="netD's target for fake (0.1: smoothed)")
    g.add_argument("--d_steps", type=number(int, 1), default=1, help="netD steps, each on new images, for a netG step")
    g.add_argument("--gp", choices=("none", "r1", "interpolate"), default="none", help="gradient penalty on netD")
    g.add_argument("--gp_weight", type=number(float, 0), default=10.0, help="weight of --gp")
    g.add_argument("--gp_every", type=number(int, 1), default=1, help="steps between two of --gp, each as much heavier")
    g.add_argument("--replay", type=number(float, 0, 1), default=0.0, help="share of netD's fakes that are old ones")
    g.add_argument("--pretrain_d", type=number(int, 0), default=0, metavar="STEPS",
                   help="first steps that train netD alone, against the untrained netG")

    g = p.add_argument_group("run")
    g.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of training, and of the latents sampled")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    g.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto",
                   help="bf16: autocast; auto takes it where the hardware is fast at it")
    g.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False,
                   help="torch.compile both nets: a minute or more, for long runs")
    g.add_argument("--out_dir", help=f"where the run is kept (default: a new folder runs/{SCRIPT}-DATASET)")
    g.add_argument("--resume", nargs="?", const="newest", metavar="PATH",
                   help="go on from a checkpoint; without PATH from the newest of --out_dir")
    g.add_argument("--sample_interval", type=number(int, 0), default=0, help="steps; 0: each epoch, at most 1000 steps")
    g.add_argument("--save_interval", type=number(int, 0), default=0, help="steps; 0: once a minute")
    g.add_argument("--keep_every", type=number(int, 0), default=0, metavar="EPOCHS",
                   help="also keep a numbered checkpoint every so many epochs")
    g.add_argument("--log_interval", type=number(int, 1), default=50, help="steps")
    g.add_argument("--tensorboard", action=argparse.BooleanOptionalAction, default=False,
                   help="write scalars and grids for TensorBoard too")

    g = p.add_argument_group("sampling")
    g.add_argument("--sample", metavar="CHECKPOINT", help="generate instead of training; needs no other flag")
    g.add_argument("--n_samples", type=number(int, 1), help="pictures (default: a grid of 64)")
    g.add_argument("--out", metavar="FILE.png|FILE.npz|FILE.gif|FOLDER/", help="(default: beside the checkpoint)")
    g.add_argument("--weights", choices=("ema", "raw"), default="ema", help="the average of netG, or its last state")
    g.add_argument("--interpolate", type=number(int, 2), nargs="?", const=60, metavar="FRAMES",
                   help="GIF of a closed spherical walk between latents (60 frames)")
    g.add_argument("--walk_dim", type=number(int, 0), metavar="D", help="sweep coordinate D of one latent")
    g.add_argument("--walk_step", type=number(float, -1e6, 1e6), help="from picture to picture of --walk_dim (default: 0.01)")

    args = p.parse_args(argv)
    for flag in ("sample", "resume"):  # a run's folder stands for its last checkpoint
        if getattr(args, flag) and Path(getattr(args, flag), "checkpoint.pt").exists():
            setattr(args, flag, str(Path(getattr(args, flag), "checkpoint.pt")))
    if args.sample and args.resume:
        p.error("--sample generates and --resume trains; choose one")
    for flag in ("n_samples", "out", "interpolate", "walk_dim"):
        if getattr(args, flag) is not None and not args.sample:
            p.error(f"--{flag} goes with --sample CHECKPOINT")
    if args.walk_step is not None and args.walk_dim is None:
        p.error("--walk_step goes with --walk_dim D")
    if args.resume:
        path = newest_checkpoint(args.out_dir) if args.resume == "newest" else args.resume
        saved = load_checkpoint(path, SCRIPT)["args"]
        others = ("resume", "out_dir") + (("lr_g", "lr_d") if args.lr is not None else ())
        others += ("max_steps",) if args.epochs or saved.get("epochs") else ()  # it stays where it sets the epochs
        saved = {k: saved.get(k) for k in vars(args) if k not in others}
        args = p.parse_args([*as_flags(p, saved), *(sys.argv[1:] if argv is None else argv)])
        args.resume, args.out_dir = path, args.out_dir or str(Path(path).parent)
        for flag in FIXED_BY_CHECKPOINT:
            if getattr(args, flag) != saved.get(flag):
                p.error(f"--{flag} {getattr(args, flag)}: {path} was trained with {saved.get(flag)}, "
                        f"and --resume cannot change it; leave --{flag} out, or start a new run")
    args.ndf = args.ndf or NDF.get(args.dataset, 64)
    if args.loss == "hinge" and (args.real_label, args.fake_label) != (1, 0):
        p.error("--real_label and --fake_label are targets of --loss bce; the hinge loss has none")
    if args.interpolate and args.walk_dim is not None:
        p.error("--interpolate and --walk_dim are two walks; choose one")
    if args.compile and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        p.error("--compile: needs a C++ compiler, such as g++; install one, or give --no-compile")
    return args


# ------------------------------------------------------------------------------------------------------- models


def check_img_size(img_size, asked_by="--img_size"):
    """Exits unless the nets can make this size. asked_by: the flag or file that a message names."""
    if img_size not in (16, 32, 64, 128, 256):
        fail(f"{asked_by} {img_size}: DCGAN's nets make 16, 32, 64, 128 or 256")


class Generator(nn.Module):
    """(N, nz) or (N, nz, 1, 1) latents ~ N(0, 1) -> (N, nc, img_size, img_size) in [-1, 1].

    Radford et al. 2016, figure 1, at img_size 64; one stage more or fewer for each factor of 2. The names and order of
    the layers are those of pytorch/examples, so that its state dicts load.
    """

    def __init__(self, nz=100, ngf=64, nc=3, img_size=64):
        super().__init__()
        self.nz = nz
        mult = img_size // 8
        layers = [nn.ConvTranspose2d(nz, ngf * mult, 4, 1, 0, bias=False),
                  nn.BatchNorm2d(ngf * mult), nn.ReLU(True)]  # (ngf*8) x 4 x 4, for 64
        while mult > 1:
            layers += [nn.ConvTranspose2d(ngf * mult, ngf * mult // 2, 4, 2, 1, bias=False),
                       nn.BatchNorm2d(ngf * mult // 2), nn.ReLU(True)]  # (ngf*4) x 8 x 8, ... ngf x 32 x 32
            mult //= 2
        self.main = nn.Sequential(*layers, nn.ConvTranspose2d(ngf, nc, 4, 2, 1, bias=False), nn.Tanh())  # nc x 64 x 64

    def forward(self, z):
        return self.main(z.flatten(1)[:, :, None, None])


class Discriminator(nn.Module):
    """(N, nc, img_size, img_size) in [-1, 1] -> (N) logits that the image is real.

    sn: spectral norm (Miyato et al. 2018) on every layer, and no BatchNorm.
    """

    def __init__(self, nc=3, ndf=64, img_size=64, sn=False, dropout=0.0):
        super().__init__()
        norm = spectral_norm if sn else lambda layer: layer

        def block(n_in, n_out, bn):
            # No layer without parameters may shift the numbering of pytorch/examples: dropout shares LeakyReLU's place.
            act = nn.LeakyReLU(0.2, True)
            return [norm(nn.Conv2d(n_in, n_out, 4, 2, 1, bias=sn)),
                    *([nn.Identity() if sn else nn.BatchNorm2d(n_out)] if bn else []),
                    nn.Sequential(act, nn.Dropout(dropout)) if dropout else act]

        mult = 1
        layers = block(nc, ndf, bn=False)  # ndf x 32 x 32, for 64
        while mult < img_size // 8:
            layers += block(ndf * mult, ndf * mult * 2, bn=True)  # (ndf*2) x 16 x 16, ... (ndf*8) x 4 x 4
            mult *= 2
        self.main = nn.Sequential(*layers, norm(nn.Conv2d(ndf * mult, 1, 4, 1, 0, bias=sn)))  # 1 x 1 x 1

    def forward(self, x):
        return self.main(x).flatten()


def weights_init(net, init="dcgan"):
    """dcgan: N(0, 0.02), BatchNorm scales N(1, 0.02) (Radford et al. 2016, section 4); or He's or Xavier's normal."""
    for m in net.modules():
        if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            weight = m.parametrizations.weight.original if hasattr(m, "parametrizations") else m.weight
            if init == "he":  # PyTorch confuses the fans of a transposed convolution
                fan = "fan_out" if isinstance(m, nn.ConvTranspose2d) else "fan_in"
                nn.init.kaiming_normal_(weight, a=0.2, mode=fan)
            elif init == "xavier":
                nn.init.xavier_normal_(weight)
            else:
                nn.init.normal_(weight, 0.0, 0.02)
            if m.bias is not None:
                nn.init.zeros_(m.bias)
        elif isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.weight, 1.0, 0.02)
            nn.init.zeros_(m.bias)


def config_of(state):
    """Generator's arguments, read off the tensors of a state dict."""
    convs = [v for k, v in state.items() if k.startswith("main.") and v.ndim == 4]
    return {"nz": convs[0].shape[0], "ngf": convs[-1].shape[0], "nc": convs[-1].shape[1],
            "img_size": 2 ** (len(convs) + 1)}


# ------------------------------------------------------------------------------------------------------- losses


def d_loss(real, fake, loss="bce", real_label=1.0, fake_label=0.0):
    """netD's loss from its logits (N): Goodfellow et al. 2014, eq. 1, or hinge (Miyato et al. 2018, eq. 16)."""
    real, fake = real.float(), fake.float()
    if loss == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    return (F.binary_cross_entropy_with_logits(real, torch.full_like(real, real_label))
            + F.binary_cross_entropy_with_logits(fake, torch.full_like(fake, fake_label)))


def g_loss(fake, loss="bce"):
    """netG's loss from netD's logits (N): non-saturating (Goodfellow et al. 2014, section 3), or hinge."""
    fake = fake.float()
    return -fake.mean() if loss == "hinge" else F.binary_cross_entropy_with_logits(fake, torch.ones_like(fake))


def gradient_penalty(netD, real, fake, kind):
    """r1: half the squared gradient at real images (Mescheder et al. 2018); interpolate: of Gulrajani et al. 2017.

    In float32: second derivatives in bf16 are mostly noise.
    """
    x = real
    if kind == "interpolate":
        x = torch.lerp(real, fake.detach().float(), torch.rand(len(real), 1, 1, 1, device=real.device))
    x = x.detach().requires_grad_()
    with torch.autocast(x.device.type, enabled=False):
        (grad,) = torch.autograd.grad(netD(x).sum(), x, create_graph=True)
    squared = grad.square().sum((1, 2, 3))
    return squared.mean() / 2 if kind == "r1" else (squared.add(1e-12).sqrt() - 1).square().mean()


class Replay:
    """History of netG's images: netD meets old fakes again (Shrivastava et al. 2017, section 2.3)."""

    def __init__(self, size, fraction):
        self.size, self.fraction, self.store = size, fraction, None

    def mix(self, *batch):
        """batch: tensors (N, ...), the fakes first. The same, `fraction` of them swapped for older ones."""
        if self.fraction == 0:
            return batch
        batch = [t.detach() for t in batch]
        if self.store is None or len(self.store[0]) < self.size:
            # Not begun with empty tensors: those have no memory format to keep.
            joined = [torch.cat((s, t)) for s, t in zip(self.store, batch)] if self.store else batch
            self.store = [t[:self.size] for t in joined]
            return batch
        k = round(self.fraction * len(batch[0]))
        pick = torch.randperm(self.size, device=batch[0].device)[:k]
        mixed = [torch.cat((s[pick].to(t.device, t.dtype), t[k:])) for s, t in zip(self.store, batch)]
        for s, t in zip(self.store, batch):
            s[pick] = t[:k].to(s.dtype)
        return mixed


# --------------------------------------------------------------------------------------------------------- data


@contextlib.contextmanager
def atomic_write(path):
    """Opens a temporary file beside `path`, moved there when the block ends well: nobody ever sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(tmp, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


@functools.lru_cache
def open_zip(path, pid):  # one handle per process: forked workers would share its file position
    return zipfile.ZipFile(path)


@functools.lru_cache
def digit_font(size):
    return ImageFont.load_default(size)


def draw_digit(i, size, seed=0):
    """Picture i of the embedded data set: the digit i % 10 in grey, turned, sheared, scaled, thickened and shifted."""
    rng = np.random.default_rng((seed, i))
    s = 2 * size  # drawn at twice the size and reduced later, for smooth edges
    paper, ink = int(rng.uniform(0, 20)), int(rng.uniform(200, 256))
    img = Image.new("L", (s, s), paper)
    ImageDraw.Draw(img).text((s / 2, s / 2), str(i % 10), ink, digit_font(s), anchor="mm",
                             stroke_width=rng.uniform(s / 64, s / 32))
    turn, shear, scale = rng.uniform(-0.06, 0.06), rng.uniform(-0.08, 0.08), rng.uniform(0.94, 1.02)
    dx, dy = rng.uniform(-0.015, 0.015, 2) * s
    cos, sin = math.cos(turn) / scale, math.sin(turn) / scale
    a, b, d, e = cos, cos * shear + sin, -sin, cos - sin * shear  # output pixel -> input pixel
    c, f = s / 2 - a * (s / 2 + dx) - b * (s / 2 + dy), s / 2 - d * (s / 2 + dx) - e * (s / 2 + dy)
    return img.transform((s, s), Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BICUBIC, fillcolor=paper)


class ImageSource(torch.utils.data.Dataset):
    """A data set before decoding. Item k: the pixels of pictures 256k to 256k + 255, and which of them failed and why.

    The pixels, uint8 (n, size, size, nc), are bytes: tensors would go through /dev/shm, which is small in containers.

    items: file paths, names inside the zip `archive`, uint8 arrays (H, W) or (H, W, 3), or numbers of digits to draw.
    key: changes when the content does.
    """

    def __init__(self, items, labels, classes, key, archive=None):
        self.items, self.labels, self.classes, self.key, self.archive = items, labels, classes, key, archive
        self.size = self.nc = None

    def open(self, i):
        item = self.items[i]
        if isinstance(item, int):
            return draw_digit(item, self.size)
        if isinstance(item, np.ndarray):
            return Image.fromarray(item)
        return Image.open(io.BytesIO(open_zip(self.archive, os.getpid()).read(item)) if self.archive else item)

    def decode(self, i):
        img = self.open(i)
        img.draft("L" if self.nc == 1 else "RGB", (2 * self.size, 2 * self.size))  # JPEG: decode at reduced size
        img = ImageOps.exif_transpose(img)
        if img.mode.startswith("I"):  # 16 bits a pixel
            img = Image.fromarray((np.asarray(img).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
        if "A" in img.getbands() or "transparency" in img.info:
            img = img.convert("RGBA")
            img = Image.alpha_composite(Image.new("RGBA", img.size, "white"), img)
        img = ImageOps.fit(img.convert("L" if self.nc == 1 else "RGB"), (self.size, self.size),
                           Image.Resampling.BICUBIC)  # resizes the short side, crops the centre
        return np.asarray(img).reshape(self.size, self.size, self.nc)

    def __len__(self):
        return math.ceil(len(self.items) / 256)

    def __getitem__(self, k):
        pixels, failed = [], {}
        for i in range(256 * k, min(256 * k + 256, len(self.items))):
            try:
                pixels.append(self.decode(i).tobytes())
            except Exception as e:  # noqa: BLE001  damaged files make Pillow and zipfile raise nearly anything
                failed[i] = f"{self.items[i]}: {one_line(e)}"
        return b"".join(pixels), len(pixels), failed


def folder_source(path):
    """ImageSource of a folder or .zip, read and never extracted. Class: the first folder below what all paths share."""
    if path.is_dir():
        files = {}
        for root, _, names in os.walk(path):
            for name in names:
                file = Path(root, name)
                if file.is_file():
                    files[file.relative_to(path).as_posix()] = (file.stat().st_size, file.stat().st_mtime_ns)
    else:
        try:
            infos = open_zip(path, os.getpid()).infolist()
        except (zipfile.BadZipFile, OSError) as e:
            fail(f"--dataset {path}: cannot be read as a zip file ({e}); give a folder or a .zip of images")
        files = {i.filename: (i.file_size, i.CRC) for i in infos}
    Image.init()
    known = {ext for ext, fmt in Image.EXTENSION.items() if fmt in Image.OPEN}
    names = sorted(n for n in files if PurePosixPath(n).suffix.lower() in known
                   and not any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(n).parts))
    if not names:
        fail(f"--dataset {path}: no images in it (.jpg, .png and whatever else Pillow reads)")
    parts = [PurePosixPath(n.lstrip("/")).parts for n in names]
    depth = len(os.path.commonprefix([part[:-1] for part in parts]))  # of lists: of whole folder names
    tops = [part[depth:] for part in parts]
    classes = sorted({t[0] for t in tops}) if all(len(t) > 1 for t in tops) else []
    number_of = {c: i for i, c in enumerate(classes)}
    labels = [number_of[t[0]] for t in tops] if classes else None
    key = hashlib.sha256(repr([(n, files[n]) for n in names]).encode()).hexdigest()
    if path.is_dir():
        return ImageSource([str(path / n) for n in names], labels, classes, key)
    return ImageSource(names, labels, classes, key, archive=path)


def find_below(folder, names):
    """The first file or folder with one of these names in `folder` or up to three levels below it, or None."""
    folder = Path(folder)
    if folder.name in names:
        return folder
    for root, dirs, files in os.walk(folder):
        dirs.sort()
        found = [n for n in names if n in dirs or n in files]
        if found:
            return Path(root, found[0])
        if len(Path(root).relative_to(folder).parts) == 3:
            dirs.clear()
    return None


def celeba_source(data_dir, attrs=None):
    """ImageSource of CelebA, from what is under data_dir or from torchvision's download. attrs: name the classes."""
    names = ["img_align_celeba", "img_align_celeba.zip"]
    path = find_below(data_dir, names)
    if path is None:
        from torchvision.datasets import CelebA

        try:
            CelebA(data_dir, split="all", download=True)
        except (Exception, SystemExit) as e:  # noqa: BLE001  no network, no gdown, Google's quota: the way out is one
            fail(f"--dataset celeba: neither img_align_celeba.zip nor img_align_celeba/ is under {data_dir}, and the "
                 f"download failed ({one_line(e)}); get img_align_celeba.zip from the CelebA site with a browser and "
                 f"put it into {data_dir}")
        path = find_below(data_dir, names)
    source = folder_source(path)
    source.labels, source.classes = None, []
    if attrs:
        file = find_below(data_dir, ["list_attr_celeba.txt", "list_attr_celeba.csv"])
        if file is None:
            fail(f"--attr: no list_attr_celeba.txt under {data_dir}; it comes with CelebA, put it there")
        try:
            rows = [line.replace(",", " ").split() for line in file.read_text().splitlines() if line.strip()]
            rows = rows[1:] if len(rows[0]) == 1 else rows  # the .txt begins with the number of images
            header = [name for name in rows[0] if name != "image_id"]
            values = {row[0]: [int(v) > 0 for v in row[1:len(header) + 1]] for row in rows[1:]}
        except (IndexError, ValueError) as e:
            fail(f"--attr: {file} is not CelebA's table of attributes ({one_line(e)}); get it again")
        unknown = [a for a in attrs if a not in header]
        if unknown:
            fail(f"--attr {' '.join(unknown)}: not in {file}; it has {', '.join(header)}")
        missing = [n for n in source.items if PurePosixPath(n).name not in values]
        if missing:
            fail(f"--attr: {file} says nothing of {missing[0]} and {len(missing) - 1} others")
        source.labels = [sum(values[PurePosixPath(n).name][header.index(a)] << k for k, a in enumerate(attrs))
                         for n in source.items]
        source.classes = [" + ".join(("" if c >> k & 1 else "not ") + a for k, a in enumerate(attrs))
                          for c in range(2 ** len(attrs))]
    return source


def find_source(args):
    """ImageSource of --dataset, cut to --max_images. Exits where there is none."""
    name, path = args.dataset, Path(args.dataset)
    if name == "digits":
        n = args.max_images or 20000
        return ImageSource(list(range(n)), [i % 10 for i in range(n)], [str(d) for d in range(10)], f"digits 2, {n}")
    if name == "celeba":
        source = celeba_source(args.data_dir, getattr(args, "attr", None))
    elif name in DATASETS:
        from torchvision import datasets  # here and not above: --help need not wait for it

        cls = {"mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10}[name]
        try:
            data = cls(args.data_dir, train=True, download=True)
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as e:
            where = "cifar-10-python.tar.gz" if name == "cifar10" else f"its four *-ubyte.gz as {cls.__name__}/raw/*"
            fail(f"--dataset {name}: missing or damaged under {args.data_dir}, and the download failed "
                 f"({one_line(e)}); put {where} there, or name another --data_dir")
        items = np.ascontiguousarray(data.data)
        key = f"{name} {zlib.crc32(items)} {zlib.crc32(np.asarray(data.targets))}"
        source = ImageSource(items, [int(t) for t in data.targets], list(map(str, data.classes)), key)
    elif name and path.exists():
        source = folder_source(path)
    else:
        fail(f"--dataset {name}: no such folder or .zip, and not one of {', '.join(DATASETS)}")
    n = len(source.items)
    if args.max_images and args.max_images < n:
        keep = sorted(np.random.default_rng(0).permutation(n)[:args.max_images].tolist())
        source.items = [source.items[k] for k in keep]
        source.labels = source.labels and [source.labels[k] for k in keep]
        source.key += f", {args.max_images} of {n}"
    return source


def look_at(source):
    """(size, nc) that suit a folder: the power of two up to 64 next to their median side; grey if all are."""
    sides, nc = [], 1
    for i in np.random.default_rng(0).permutation(len(source.items))[:64].tolist():
        with contextlib.suppress(Exception):  # they are named and counted when everything is decoded
            img = source.open(i)
            sides.append(min(img.size))
            nc = nc if img.mode in ("1", "L", "LA", "I;16", "I") else 3
    side = sorted(sides)[len(sides) // 2] if sides else 64
    return min(64, max(16, 2 ** round(math.log2(side)))), nc


def open_cache(file, key):
    """(images, skipped) of a cache file, memory-mapped; None unless it is whole and made from what `key` stands for.

    The file: the pixels, a JSON text that describes them, and the length of that text in 8 bytes.
    """
    try:
        with open(file, "rb") as f:
            f.seek(-8, os.SEEK_END)
            length = int.from_bytes(f.read(8), "little")
            f.seek(-8 - length, os.SEEK_END)
            meta = json.loads(f.read(length))
        if meta["key"] != key:
            return None
        images, crc = np.memmap(file, np.uint8, "r", shape=tuple(meta["shape"])), 0
        for i in range(0, len(images), 4096):
            crc = zlib.crc32(images[i:i + 4096], crc)
        return (images, meta["skipped"]) if crc == meta["crc"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_cache(f, source, key, workers, quiet):
    """Decodes `source` into the open file `f`. Returns (shape, what was skipped); exits if none can be read."""
    loader = torch.utils.data.DataLoader(source, batch_size=None, num_workers=workers if len(source) > 4 else 0)
    n, failed, crc = 0, {}, 0
    with tqdm(total=len(source.items), desc="decoding", unit="img", unit_scale=True, disable=quiet,
              dynamic_ncols=True) as bar:
        for pixels, good, bad in loader:
            f.write(pixels)
            crc, n, failed = zlib.crc32(pixels, crc), n + good, failed | bad
            bar.update(good + len(bad))
    why = list(failed.values())
    if not n:
        fail(f"--dataset: none of {len(why)} images can be read; the first: {why[0]}")
    if why:
        more = f"\n  ... and {len(why) - 5} more" if len(why) > 5 else ""
        print(f"skipped {len(why)} unreadable images:\n  " + "\n  ".join(why[:5]) + more, file=sys.stderr)
    shape, skipped = [n, source.size, source.size, source.nc], list(failed)
    text = json.dumps({"key": key, "shape": shape, "crc": crc, "skipped": skipped}).encode()
    f.write(text + len(text).to_bytes(8, "little"))
    return shape, skipped


def load_data(args, quiet=False):
    """Decodes --dataset once. Fills in args.img_size, args.nc and args.hflip where they are None.

    Returns images, uint8 (N, H, W, C), memory-mapped; labels, int64 (N) or None; and the names of the classes.
    """
    if args.img_size is not None:
        check_img_size(args.img_size)
    source = find_source(args)
    if NEEDS_LABELS and not source.labels:
        fail(f"--dataset {args.dataset}: no labels in it, and {SCRIPT}.py learns from them; "
             "put the images into one folder per class, or give celeba's --attr")
    size, nc, hflip = DATASETS.get(args.dataset) or (*look_at(source), False)
    args.img_size = source.size = size if args.img_size is None else args.img_size
    args.nc = source.nc = args.nc or nc
    args.hflip = hflip if args.hflip is None else args.hflip
    key = f"{source.key}, {args.img_size}x{args.nc}, format 2"
    place = args.dataset if args.dataset in DATASETS else str(Path(args.dataset).resolve())
    identity = zlib.crc32(os.fsencode(f"{place} {Path(args.data_dir).resolve()} {args.max_images}"))
    name = f"{Path(place).stem}-{args.img_size}x{args.nc}-{identity:08x}.cache"
    user = os.getuid() if hasattr(os, "getuid") else os.environ.get("USERNAME", "")
    folders = [Path(args.data_dir, "cache"), Path(tempfile.gettempdir(), f"gan-cache-{user}")]
    found = next((c for c in (open_cache(f / name, key) for f in folders) if c), None)
    for folder in folders:
        parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        if found or not parent.stat().st_mode & 0o222:  # root can write even where nobody is meant to
            continue
        try:
            with atomic_write(folder / name) as f:
                write_cache(f, source, key, args.workers, quiet)
            found = open_cache(folder / name, key)
        except OSError as e:
            print(f"no cache in {folder} ({e.strerror or e})", file=sys.stderr)
    if not found:  # no place on disk takes it
        buffer = io.BytesIO()
        shape, skipped = write_cache(buffer, source, key, args.workers, quiet)
        found = np.frombuffer(buffer.getbuffer(), np.uint8, math.prod(shape)).reshape(shape), skipped
    images, skipped = found
    return images, np.delete(np.array(source.labels, np.int64), skipped) if source.labels else None, source.classes


def to_device(t, device):
    """t on the device. A GPU takes it from pinned memory when it gets there, and nobody waits."""
    if device.type != "cuda":
        return t.to(device)
    return (t if t.is_cuda else t.pin_memory()).to(device, non_blocking=True)


def to_float(images, device):
    """uint8 (N, H, W, C) tensor -> float (N, C, H, W) in [-1, 1], channels_last in memory."""
    return to_device(images, device).permute(0, 3, 1, 2).float().sub_(127.5).div_(127.5)


def to_uint8(images):
    """float (N, C, H, W) in [-1, 1] -> uint8 (N, H, W, C) array. The one conversion, also in export.py's graph."""
    return (images.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


# ----------------------------------------------------------------------------------------------------- sampling


def latents(seed, start, n, nz):
    """Latents start to start + n - 1 of a seed: float32 (n, nz) ~ N(0, 1); latent i depends on seed, i and nz alone.

    NumPy's Philox4x64-10 with key (seed, 0): latent i takes the ceil(nz / 4) blocks of four 64-bit words from counter
    1 + i * ceil(nz / 4) on (NumPy counts before it draws). The upper 53 bits of a word, plus a half, over 2**53 is a
    uniform u in (0, 1); Box-Muller makes of each pair r cos t, r sin t with r = sqrt(-2 ln u1), t = 2 pi u2 (float64).
    """
    blocks = -(-nz // 4)
    words = np.random.Philox(key=seed, counter=start * blocks).random_raw(4 * blocks * n).reshape(n, -1, 2)
    u = ((words >> np.uint64(11)) + 0.5) * 2.0**-53
    r, t = np.sqrt(-2 * np.log(u[..., 0])), 2 * np.pi * u[..., 1]
    return np.stack((r * np.cos(t), r * np.sin(t)), -1).reshape(n, -1)[:, :nz].astype(np.float32)


def walk(seed, n, nz, frames, keys=4):
    """Latents (frames, n, nz) of n closed spherical walks (Shoemake 1985), each through `keys` latents of the seed."""
    key = latents(seed, 0, n * keys, nz).reshape(keys, n, nz).astype(np.float64)
    out = []
    for x in np.arange(frames) * keys / frames:
        a, b, t = key[int(x)], key[(int(x) + 1) % keys], x % 1
        cosine = (a * b).sum(-1, keepdims=True) / np.linalg.norm(a, axis=-1, keepdims=True)
        omega = np.arccos(np.clip(cosine / np.linalg.norm(b, axis=-1, keepdims=True), -0.9999, 0.9999))
        out.append((np.sin((1 - t) * omega) * a + np.sin(t * omega) * b) / np.sin(omega))
    return np.stack(out).astype(np.float32)


@torch.no_grad()
def generate(netG, inputs, batch_size=64):
    """inputs: netG's, arrays (n, ...) -> uint8 (n, H, W, C). Whole batches, the last padded: n changes no picture."""
    device, n, out = next(netG.parameters()).device, len(inputs[0]), []
    for i in range(0, n, batch_size):
        rows = np.arange(i, i + batch_size).clip(max=n - 1)
        out.append(to_uint8(netG(*(torch.from_numpy(x[rows]).to(device) for x in inputs))))
    return np.concatenate(out)[:n]


@torch.no_grad()
def update_bn(netG, inputs, batch_size=64):
    """Gives netG's BatchNorm the statistics of its own activations over inputs, arrays (n, ...): averaged weights come
    with none (Izmailov et al. 2018, section 3.2). Weights and inputs alone decide them. A net
    without BatchNorm, such as gan.py's, stays as it is."""
    layers = [m for m in netG.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the mean over batches
    device, n = next(netG.parameters()).device, len(inputs[0]) if layers else 0
    netG.train()
    for i in range(0, n, batch_size):
        netG(*(torch.from_numpy(x[i:i + batch_size]).to(device) for x in inputs))
    netG.eval()


def make_grid(images, labels=None):
    """uint8 (N, H, W, C) -> one PIL image: nearly a square, or with labels (N) a row for each class."""
    from torchvision.utils import make_grid  # torchvision is slow to import; --help does without

    nrow = math.ceil(math.sqrt(len(images)))
    if labels is not None:
        nrow, blank = int(np.bincount(labels).max()), np.full_like(images, 255)
        rows = [images[labels == k] for k in np.unique(labels)]
        images = np.concatenate([part for row in rows for part in (row, blank[:nrow - len(row)])])
    grid = make_grid(torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2), nrow, pad_value=255)
    return Image.fromarray(grid.permute(1, 2, 0).numpy())


def save_image(img, path, **kwargs):
    with atomic_write(path) as f:
        img.save(f, format=Path(path).suffix[1:], **kwargs)


def save_gif(frames, path, ms, last):
    """PIL images -> looping GIF that shows each for `ms` milliseconds, the last for `last`."""
    save_image(frames[0], path, save_all=True, append_images=frames[1:], loop=0,
               duration=[ms] * (len(frames) - 1) + [last])


def save_samples(images, out, labels=None):
    """Writes uint8 (N, H, W, C) as a .png grid, an .npz (arr_0 and labels) or a folder of numbered PNG files."""
    if Path(out).suffix == ".png":
        save_image(make_grid(images, labels), out)
    elif Path(out).suffix == ".npz":
        with atomic_write(out) as f:
            np.savez(f, images, **({} if labels is None else {"labels": labels}))
    else:
        for i, image in enumerate(tqdm(images, desc="writing", unit="img")):
            save_image(Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image), Path(out, f"{i:06d}.png"))


def sample(args):
    """--sample: pictures of a checkpoint's generator, as a grid, an array, a folder or an animation."""
    netG, _ = load_generator(args.sample, args.weights)
    netG.to(pick_device(args.device))
    name = "samples.png" if args.walk_dim is None else f"walk_{args.walk_dim}.png"
    name = "walk.gif" if args.interpolate else name
    out = args.out or f"{Path(args.sample).with_suffix('')}_{name}"
    suffix = "" if out.endswith(("/", os.sep)) else Path(out).suffix
    if suffix not in ((".gif",) if args.interpolate else (".png", ".npz", "")):
        fail(f"--out {out}: give {'a .gif' if args.interpolate else 'a .png, an .npz or a folder/'}")
    if args.walk_dim is not None and args.walk_dim >= netG.nz:
        fail(f"--walk_dim {args.walk_dim}: this generator's latents have coordinates 0 to {netG.nz - 1}")
    n = args.n_samples or (16 if args.interpolate else 64)
    z = latents(args.seed, 0, n, netG.nz)
    if args.interpolate:
        z = walk(args.seed, n, netG.nz, args.interpolate).reshape(-1, netG.nz)
    elif args.walk_dim is not None:
        z = z[:1].repeat(n, 0)
        z[:, args.walk_dim] += (0.01 if args.walk_step is None else args.walk_step) * np.arange(n)
    images = generate(netG, [z], args.batch_size)
    try:
        if args.interpolate:
            save_gif([make_grid(frame) for frame in images.reshape(-1, n, *images.shape[1:])], out, ms=50, last=50)
        else:
            save_samples(images, out)
    except OSError as e:
        fail(f"--out {out}: cannot be written ({e.strerror or e})")
    print(f"wrote {out}")


# -------------------------------------------------------------------------------------------------- checkpoints


def newest_checkpoint(out_dir):
    """The checkpoint last written in out_dir, or in any of this script's own folders under runs/."""
    found = list(Path(out_dir).glob("checkpoint*.pt") if out_dir else Path("runs").glob(f"{SCRIPT}-*/checkpoint*.pt"))
    if not found:
        fail(f"--resume: no checkpoint in {out_dir or f'runs/{SCRIPT}-*'}; name one, or its --out_dir")
    return str(max(found, key=lambda p: p.stat().st_mtime_ns))


def load_checkpoint(path, script=None):
    """What torch.save wrote at `path`, on the CPU; plain tensors and containers only, so no file can run code.

    script: exits unless that script wrote it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ckpt = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        fail(f"{path}: no such file")
    except pickle.UnpicklingError:
        if Path(path).suffix == ".onnx":
            fail(f"{path}: is no checkpoint but an ONNX file; python infer_ort.py {path} samples from it")
        fail(f"{path}: refused, it is damaged or holds Python objects that could run code when loaded; what can be "
             "loaded is a state dict: torch.save(netG.state_dict(), FILE)")
    except Exception as e:  # noqa: BLE001  damaged files make torch raise nearly anything
        if "TorchScript" in str(e):
            fail(f"{path}: is a TorchScript program; save its state dict: "
                 "torch.save(torch.jit.load(PROGRAM).state_dict(), FILE)")
        fail(f"{path}: cannot be read, truncated or not a PyTorch checkpoint ({one_line(e)})")
    if isinstance(ckpt, dict) and "script" in ckpt:
        wrong = [k for k, kind in CHECKPOINT_KEYS.items() if not isinstance(ckpt.get(k, NotImplemented), kind)
                 or (kind is int and ckpt[k] < 0)]
        if wrong:
            fail(f"{path}: incomplete or tampered with, {', '.join(wrong)} missing or not what this script wrote")
    if script and not (isinstance(ckpt, dict) and ckpt.get("script") == script):
        fail(f"{path}: {script}.py cannot go on from it, "
             + (f"{ckpt['script']}.py wrote it" if isinstance(ckpt, dict) and "script" in ckpt else "it holds no run"))
    return ckpt


def load_generator(path, weights="ema"):
    """(netG in eval mode, checkpoint) from a checkpoint of this script or somebody's state dict of the architecture.

    The state dict may be bare or under a key, with DataParallel's "module." or without; its tensors tell the sizes.
    """
    ckpt = load_checkpoint(path)
    if isinstance(ckpt, dict) and "script" in ckpt:
        if ckpt["script"] != SCRIPT:
            fail(f"{path}: written by {ckpt['script']}.py; use that script")
        config, state = ckpt["config"], ckpt["netG_ema" if weights == "ema" else "netG"]
    else:
        keys = ("g_model_state_dict", "generator", "netG", "state_dict", "model_state_dict")
        state = next((ckpt[k] for k in keys if k in ckpt), ckpt) if isinstance(ckpt, dict) else {}
        state = {str(k).removeprefix("module."): v for k, v in state.items()} if isinstance(state, dict) else {}
        state = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
        try:
            config = config_of(state)
        except (IndexError, KeyError, ValueError):
            fail(f"{path}: no generator of {SCRIPT}.py in it; looked at the top and under {', '.join(keys)}")
    try:
        check_img_size(config["img_size"], f"{path}: its size")
        with torch.device("meta"):  # no memory yet: a file can claim any size
            netG = Generator(**config)
        netG.load_state_dict(state, assign=True)
        netG.float()
    except (RuntimeError, TypeError, KeyError, AttributeError, ValueError, OverflowError) as e:
        reason = str(e).rpartition(":\n")[2]  # PyTorch's first line only says that something is wrong
        fail(f"{path}: its tensors do not fit {SCRIPT}.py's generator: {one_line(reason)}")
    if not all(t.isfinite().all() for t in netG.state_dict().values()):
        fail(f"{path}: holds weights that are not finite; its training diverged, take an earlier checkpoint")
    return netG.eval(), ckpt


# ----------------------------------------------------------------------------------------------------- training


def pick_device(name, local_rank=0):
    """torch.device for --device; exits if it cannot be used here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{local_rank}" if name == "cuda" else name)
        torch.zeros(1, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as e:
        fail(f"--device {name}: cannot be used here ({one_line(e)}); choose auto, cpu, cuda, cuda:N or mps")
    return device


def use_bf16(precision, device):
    """Whether to autocast to bfloat16; auto: where the hardware multiplies it faster than float32."""
    if precision == "auto" and device.type == "cpu":
        cpu = getattr(torch.cpu, "get_capabilities", dict)()
        return bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16"))
    if precision == "auto":
        return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return precision == "bf16"


def keep_freed_memory():
    """glibc gives large blocks back to the system at once; each step would page them in again, 6 % of its time here."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, 2**30) or mallopt(M_MMAP_THRESHOLD, 2**25)  # older ones take at most 32 MiB


def make_optimizer(net, kind, lr, betas, device):
    if kind == "rmsprop":
        return torch.optim.RMSprop(net.parameters(), lr)
    return torch.optim.Adam(net.parameters(), lr, betas, fused=device.type in ("cpu", "cuda"))


def learning_rates(args):
    """Of netG and netD: --lr_g and --lr_d, else --lr, else what suits the data set."""
    default = LR.get(args.dataset, (2e-4, 2e-4))
    given = ((args.lr_g, args.lr, default[0]), (args.lr_d, args.lr, default[1]))
    return [next(lr for lr in rates if lr is not None) for rates in given]


def load_optimizer(opt, saved):
    """The moments of a checkpoint; rates and the rest come from the flags."""
    opt.load_state_dict({"state": saved["state"], "param_groups": opt.state_dict()["param_groups"]})
    for weight, state in opt.state.items():
        if any(t.shape not in ((), weight.shape) for t in state.values()):
            raise ValueError(f"its optimizer's state is not that of a weight {tuple(weight.shape)}")


def lr_factor(kind, progress):
    """What the learning rate is multiplied by; progress: share of the run that is done, in [0, 1]."""
    return {"none": 1.0, "linear": 1.0 - progress, "step": 0.5 ** int(4 * progress)}[kind]


def new_out_dir(args):
    """Where a new run goes: never over an old one."""
    if args.out_dir:
        out = Path(args.out_dir)
        if list(out.glob("checkpoint*.pt")) and not (args.resume and out.samefile(Path(args.resume).parent)):
            fail(f"--out_dir {out}: there is a run in it; go on with it by --resume, or name another folder")
        return out
    base, n = Path("runs", f"{SCRIPT}-{Path(args.dataset).resolve().stem}"), 1
    while (out := base if n == 1 else base.with_name(f"{base.name}-{n}")).exists():
        n += 1
    return out


def lock(out_dir):
    """A file that keeps other processes from training into the folder until it is closed or this process ends."""
    f = open(out_dir / ".lock", "w")  # noqa: SIM115
    with contextlib.suppress(ImportError):
        import fcntl  # not on Windows

        try:
            fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"--out_dir {out_dir}: another run is writing into it; stop that one, or name another folder")
    return f


def train(args):
    """Trains until --epochs, --max_steps or a signal; everything is in args.out_dir afterwards."""
    # torchrun sets these; one process otherwise.
    try:
        rank, local_rank, world = (int(os.environ.get(k, d)) for k, d in
                                   (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")))
    except ValueError:
        rank, local_rank, world = 0, 0, 0
    if not 0 <= rank < world or (world > 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()):
        fail("RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment do not fit together; "
             "unset them, or start with torchrun")
    device = pick_device(args.device, local_rank)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=6))
    bf16 = use_bf16(args.precision, device)

    torch.backends.cudnn.benchmark = True
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, which convolutions have by default
    keep_freed_memory()
    out_dir = new_out_dir(args)

    # One process downloads and decodes; then one on each other machine; the rest find what those have cached.
    for turn in range(3):
        if turn == (0 if rank == 0 else 1 if local_rank == 0 else 2):
            images, _, classes = load_data(args, quiet=rank > 0)
        if world > 1:
            dist.barrier()
    batch = args.batch_size * world  # of all processes together
    steps_per_epoch = len(images) // batch
    if batch > len(images):
        fail(f"--batch_size {args.batch_size}: {world} process(es) need {batch} images a step, "
             f"there are {len(images)}; take it smaller")
    epochs = args.epochs or max(EPOCHS.get(args.dataset, 5), math.ceil((args.max_steps or 0) / steps_per_epoch))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mapped file is read-only; nobody writes
        data = torch.from_numpy(images)
    if device.type == "cuda" and data.nbytes < torch.cuda.mem_get_info(device)[0] / 2:
        data = data.to(device)

    torch.manual_seed(args.seed)
    config = {"nz": args.nz, "ngf": args.ngf, "nc": args.nc, "img_size": args.img_size}
    netG = Generator(**config)
    netD = Discriminator(args.nc, args.ndf, args.img_size, args.sn, args.dropout)
    weights_init(netG, args.init)
    weights_init(netD, args.init)
    netG.to(device, memory_format=torch.channels_last)
    netD.to(device, memory_format=torch.channels_last)
    netG_ema = copy.deepcopy(netG).eval().requires_grad_(False)
    betas = (args.beta1, args.beta2)
    lr_g, lr_d = learning_rates(args)
    optG = make_optimizer(netG, args.optim_g, lr_g, betas, device)
    optD = make_optimizer(netD, args.optim_d, lr_d, betas, device)
    replay = Replay(8 * args.batch_size, args.replay)
    epoch = position = step = 0  # position: images of this epoch that are done, over all processes

    if args.resume:
        ckpt = load_checkpoint(args.resume, SCRIPT)
        if NEEDS_LABELS and ckpt["classes"] != classes:
            fail(f"--dataset {args.dataset}: its classes {classes} are not those of {args.resume}, {ckpt['classes']}")
        try:
            netG.load_state_dict(ckpt["netG"])
            netD.load_state_dict(ckpt["netD"])
            netG_ema.load_state_dict(ckpt["netG_ema"])
            load_optimizer(optG, ckpt["optG"])
            load_optimizer(optD, ckpt["optD"])
            epoch, position, step = ckpt["epoch"], ckpt["position"], ckpt["step"]
            replay.store = ckpt["replay"] and [t.to(device) for t in ckpt["replay"]]
            if replay.store and replay.store[0].shape[1:] != (args.nc, args.img_size, args.img_size):
                raise ValueError(f"its old fakes are {tuple(replay.store[0].shape)}")
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError, IndexError) as e:
            reason = str(e).rpartition(":\n")[2]
            fail(f"{args.resume}: does not fit this run: {one_line(reason)}")
        if epoch >= epochs:
            fail(f"--epochs {epochs}: {args.resume} has done {epoch}; go on with --epochs {epoch + 10}, say")
        if step >= (args.max_steps or math.inf):
            fail(f"--max_steps {args.max_steps}: {args.resume} is at step {step}; name more")

    if args.compile:  # in place: names and what is saved stay; forward() is as it was, for second derivatives
        netG.compile(dynamic=False)
        netD.compile(dynamic=False)
    # DDP adds up the gradients; everything else uses the raw modules. Buffers stay each process's own: sent at every
    # forward, they would change under netD's two forwards before one backward.
    ddpG, ddpD = (DistributedDataParallel(net) if world > 1 else net for net in (netG, netD))
    if world > 1:
        # DDP takes the strides of a dimension of 1, grey images' channel, for a matter of layout.
        warnings.filterwarnings("ignore", message="Grad strides do not match")
        ddpG.broadcast_buffers = ddpD.broadcast_buffers = False  # the argument has another name from torch 2.15 on
    # Detached: else each step's average would hold on to the graph of the one before.
    ema_weights, netG_weights = ([w.detach() for w in net.parameters()] for net in (netG_ema, netG))

    sample_interval = args.sample_interval or min(steps_per_epoch, 1000)
    total = step + max(0, len(images) - position) // batch + (epochs - epoch - 1) * steps_per_epoch
    total = min(total, args.max_steps or total)
    inputs_fixed = [latents(args.seed, 0, 64, args.nz)]
    inputs_bn = [latents(args.seed, 0, 512, args.nz)]
    writer = None
    if rank == 0:
        try:
            out_dir.mkdir(parents=True, exist_ok=True)
            lock_file = lock(out_dir)
            for leftover in out_dir.glob(".*.tmp"):  # of a run that was killed while saving
                leftover.unlink()
            some = np.random.default_rng(args.seed).permutation(len(images))[:64]
            save_image(make_grid(images[some]), out_dir / "samples" / "real.png")
        except OSError as e:
            fail(f"--out_dir {out_dir}: cannot be written ({e.strerror or e})")
        if args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(out_dir)
        sizes = [sum(t.numel() for t in net.parameters()) / 1e6 for net in (netG, netD)]
        print(f"{args.dataset}: {len(images)} images {args.img_size}x{args.img_size}x{args.nc}"
              + (f", {len(classes)} classes" if classes else "")
              + f"; netG {sizes[0]:.2f} M, netD {sizes[1]:.2f} M parameters; {world} x {device.type}, "
              + f"{'bf16' if bf16 else 'fp32'}, rates {lr_g:g} and {lr_d:g}, seed {args.seed}; "
              + f"{total - step} steps -> {out_dir}", flush=True)

    def save(name="checkpoint.pt"):
        weights = [*netG.parameters(), *netD.parameters()]
        if not torch.stack(torch._foreach_norm(weights)).isfinite().all():
            diverged()
        ckpt = {"script": SCRIPT, "args": vars(args), "config": config, "classes": classes,
                "netG": netG.state_dict(), "netD": netD.state_dict(), "netG_ema": netG_ema.state_dict(),
                "optG": optG.state_dict(), "optD": optD.state_dict(), "replay": replay.store,
                "epoch": epoch, "position": position, "step": step}
        try:
            with atomic_write(out_dir / name) as f:
                torch.save(ckpt, f)
        except (OSError, RuntimeError) as e:  # torch wraps what write() raises
            bar.close()
            fail(f"{out_dir / name}: cannot be saved ({one_line(e)}); what was saved before is intact, "
                 "and --resume goes on from it")

    def diverged():
        last = out_dir / "checkpoint.pt"
        bar.close()
        fail(f"losses or weights are not finite at step {step}: try a lower --lr, --sn, --gp r1 or --precision fp32"
             + (f"; the last good state is {last}" if last.exists() else ""))

    def save_grid():
        grid = make_grid(generate(netG_ema, inputs_fixed))
        save_image(grid, out_dir / "samples" / f"step_{step:08d}.png")
        if writer:
            writer.add_image("samples", np.asarray(grid), step, dataformats="HWC")

    stop = []  # signals received

    def on_signal(signum, frame):
        stop.append(signum)
        if world == 1:  # a second one ends at once, but one Ctrl-C reaches torchrun's processes twice
            signal.signal(signum, signal.SIG_DFL)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, on_signal)

    def should_stop():
        """Whether any process got a signal. Asking the others waits for the GPU, so those ask only now and then."""
        if world == 1:
            return bool(stop)
        if device.type != "cpu" and step % 10:
            return False
        flag = torch.tensor(float(bool(stop)), device=device)
        dist.all_reduce(flag)
        agreed = flag.item() > 0  # and not stop itself: a signal may have come since
        if agreed and not stop:
            stop.append(signal.SIGTERM)
        return agreed

    totals, n_totals, last_log, last_save = torch.zeros(4, device=device), 0, time.perf_counter(), time.perf_counter()
    loss_g = torch.zeros((), device=device)
    bar = tqdm(total=total, initial=step, unit="step", dynamic_ncols=True, disable=rank > 0)
    done, order = False, None
    # torch.manual_seed formats a stack trace for GPUs that there may be: 0.4 ms, 6 % of gan.py's step.
    set_seed = torch.default_generator.manual_seed if device.type == "cpu" else torch.manual_seed
    while epoch < epochs and not done:
        if position + batch > len(images):  # what is left of the epoch fills no batch
            epoch, position, order = epoch + 1, 0, None
            continue
        if order is None:
            bar.set_description(f"epoch {epoch + 1}/{epochs}")
            order = torch.from_numpy(np.random.default_rng((args.seed, epoch)).permutation(len(images))).to(data.device)
        # All of a step's randomness comes from (seed, step, rank): a resume needs no other random state.
        set_seed(int(np.random.SeedSequence((args.seed, step, rank)).generate_state(1)[0]))
        index = order[position + rank:position + batch:world]
        real = to_float(data[index], device)
        if args.hflip:
            real = torch.where(torch.rand(len(real), 1, 1, 1, device=device) < 0.5, real.flip(3), real)
        factor = lr_factor(args.lr_decay, (epoch + position / len(images)) / epochs)
        optG.param_groups[0]["lr"], optD.param_groups[0]["lr"] = factor * lr_g, factor * lr_d
        g_step = step >= args.pretrain_d and (step + 1) % args.d_steps == 0

        # D step: tell real from fake.
        z = torch.randn(len(real), args.nz, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            with torch.set_grad_enabled(g_step):
                fake = (ddpG if g_step else netG)(z)
            out_real = ddpD(real)
            (shown,) = replay.mix(fake.detach())
            out_fake = ddpD(shown)
        loss_d = d_loss(out_real, out_fake, args.loss, args.real_label, args.fake_label)
        penalty = 0
        if args.gp != "none" and step % args.gp_every == 0:  # Karras et al. 2020, "lazy regularization"
            penalty = args.gp_every * args.gp_weight * gradient_penalty(netD.forward, real, fake, args.gp)
        optD.zero_grad()
        (loss_d + penalty).backward()
        optD.step()

        # G step: make the same fakes pass for real. netD is frozen, its weight gradients are not needed.
        if g_step:
            netD.requires_grad_(False)
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                out = netD(fake)
            loss_g = g_loss(out, args.loss)
            optG.zero_grad()
            loss_g.backward()
            optG.step()
            netD.requires_grad_(True)
            decay = min(args.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(ema_weights, netG_weights, 1 - decay)

        with torch.no_grad():
            totals += torch.stack((loss_d.detach(), loss_g.detach(), out_real.float().sigmoid().mean(),
                                   out_fake.float().sigmoid().mean()))
        step, position, n_totals = step + 1, position + batch, n_totals + 1
        done = step >= total or should_stop()
        bar.update()
        if step % args.log_interval == 0 or done:
            means, now = (totals / n_totals).tolist(), time.perf_counter()
            if not all(map(math.isfinite, means)):
                diverged()
            row = dict(zip(("loss_d", "loss_g", "D(x)", "D(G(z))"), means))
            row["images/s"] = n_totals * batch / (now - last_log)
            totals, n_totals, last_log = torch.zeros_like(totals), 0, now
            bar.set_postfix({k: f"{v:.3g}" for k, v in row.items()})
            if rank == 0:
                place = {"step": step, "epoch": epoch + position / len(images), "time": time.time(),
                         "lr_g": optG.param_groups[0]["lr"], "lr_d": optD.param_groups[0]["lr"]}
                out_dir.mkdir(parents=True, exist_ok=True)  # somebody may have moved it away
                with open(out_dir / "log.jsonl", "a") as log:
                    log.write(json.dumps(place | row) + "\n")
            for k, v in row.items() if writer else ():
                writer.add_scalar(k, v, step)
        if position + batch > len(images):
            epoch, position, order = epoch + 1, 0, None
        if rank == 0:
            show = step % sample_interval == 0 or step == total
            minute = time.perf_counter() - last_save > 60
            keep = done or (step % args.save_interval == 0 if args.save_interval else minute)
            keep_epoch = args.keep_every and position == 0 and epoch % args.keep_every == 0
            if show or keep or keep_epoch:
                update_bn(netG_ema, inputs_bn)
            if show:
                save_grid()
            if keep:
                save()
                last_save = time.perf_counter()
            if keep_epoch:
                save(f"checkpoint_epoch_{epoch:04d}.pt")
    bar.close()
    if rank == 0:
        frames = sorted((out_dir / "samples").glob("step_*.png"))
        if not stop and frames:
            frames = frames[::-(-len(frames) // 100)][:-1] + frames[-1:]
            save_gif([Image.open(f).convert("RGB") for f in frames], out_dir / "samples.gif", ms=200, last=1000)
        if writer:
            writer.close()
        lock_file.close()
        last = out_dir / "checkpoint.pt"
        print(f"stopped at step {step}; go on with: python {SCRIPT}.py --resume {last}" if stop else
              f"done: {last}, {out_dir / 'samples.gif'}; more pictures: python {SCRIPT}.py --sample {last}")
    if world > 1:
        dist.destroy_process_group()
        del ddpG, ddpD
        gc.collect()  # gloo's threads must end before the interpreter does, or one exit in ten aborts
    if stop:
        sys.exit(128 + stop[0])


def main():
    if sys.stdout:  # not where it is closed
        sys.stdout.reconfigure(errors="backslashreplace")  # the name of a file need not be text
    args = get_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until train() has its own
    try:
        sample(args) if args.sample else train(args)
    except KeyboardInterrupt:
        fail("interrupted, nothing to save")
    except (RuntimeError, MemoryError) as e:
        if ("memory" not in str(e) or "illegal memory" in str(e)) and not isinstance(e, MemoryError):
            raise
        fail(f"not enough memory ({one_line(e)}); lower --batch_size, --img_size, --ngf or --ndf")
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        fail(f"{e.filename or 'writing'}: {e.strerror}; make room, then --resume goes on from the last checkpoint")


if __name__ == "__main__":
    main()
