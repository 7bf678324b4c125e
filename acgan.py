"""ACGAN: Odena, Olah, Shlens 2017, "Conditional Image Synthesis with Auxiliary Classifier GANs", on DCGAN's nets.

netG makes pictures of a class that it is told; netD tells real from fake and, with a second head, the class. That head
has classes of its own for fakes (Hou et al. 2022, "Auxiliary Discriminative Classifier"), or pictures become alike.

    python acgan.py                                             # embedded digits, no download
    python acgan.py --dataset celeba --attr Smiling Male        # or mnist, cifar10, class folders in a folder or a .zip
    python acgan.py --resume                                    # go on where the newest run stopped, bit for bit on CPU
    python acgan.py --sample runs/acgan-digits --labels 3,7     # a grid of new pictures, a column for each class
    torchrun --nproc_per_node 2 acgan.py --dataset cifar10      # one process per GPU (or CPU socket)
MNIST in 344 s on one core of an AMD EPYC: FID 1.0, real images 0.4; 99 % show the class asked for.
"""

import argparse
import contextlib
import copy
import ctypes
import datetime
import functools
import gc
import glob
import hashlib
import io
import json
import math
import os
import signal
import sys
import tempfile
import time
import zipfile
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import spectral_norm
from tqdm import tqdm

CONDITIONAL = True  # for the plumbing: is netG told a class, netG(z, labels)?
RECIPES = {  # --recipe: defaults of any flags, on any data; "paper" where its authors chose otherwise
    "default": {
        "ngf": 64, "ndf": 32, "init": "dcgan", "dropout": 0.0, "ema": 0.999,
        "gp": "r1", "gp_weight": 0.9, "gp_every": 4, "batch_size": 32, "lr_g": 2e-3, "lr_d": 1e-3, "lr_decay": "linear",
        "aux": "adc", "aux_g": 1.0,
    },
    "paper": {"batch_size": 100, "lr_g": 2e-4, "lr_d": 2e-4, "lr_decay": "none", "dropout": 0.5, "ngf": 96, "ndf": 64,
              "aux": "acgan",  # Odena et al. 2017, appendix A (CIFAR-10's nets) and section 3 (losses)
              "gp": "none", "ema": 0.0},  # not known in its day
}

def add_method_flags(add):
    add("--img_size", type=int, choices=(16, 32, 64, 128, 256), default=64, help="height and width")
    add("--nz", type=positive, default=100, help="size of the latent vector")
    add("--ngf", type=positive, help="width of netG")
    add("--ndf", type=positive, help="width of netD")
    add("--init", choices=("dcgan", "he"), help="dcgan: N(0, 0.02)")
    add("--sn", action="store_true", help="spectral norm in netD, in place of its BatchNorm")
    add("--dropout", type=float, help="dropout probability in netD")
    add("--ema", type=float, help="decay of netG's average, which is sampled")
    add("--loss", choices=("bce", "hinge"), default="bce", help="bce: non-saturating cross-entropy")
    add("--real_label", type=float, default=1.0, help="bce: netD's target for real (0.9: smoothed)")
    add("--fake_label", type=float, default=0.0, help="bce: netD's target for fake (0.1: smoothed)")
    add("--gp", choices=("none", "r1", "interpolate"), help="gradient penalty on netD")
    add("--gp_weight", type=float, help="weight of --gp")
    add("--gp_every", type=positive, help="take --gp in every N-th step, N times as heavy")
    add("--d_steps", type=positive, default=1, help="netD steps, each on new images, per netG step")
    add("--aux", choices=("adc", "acgan"), help="acgan: the paper's class head; adc: fakes are classes of their own")
    add("--aux_g", type=float, help="weight of the class loss in netG's loss")
    add("--replay", type=float, default=0.0, help="share of netD's fakes that are old ones")

class Generator(nn.Module):
    """(N, nz) or (N, nz, 1, 1) latents ~ N(0, 1), (N) labels -> (N, nc, img_size, img_size) in [-1, 1]. As DCGAN's."""

    def __init__(self, nz=100, ngf=64, nc=3, img_size=64, n_classes=10):
        super().__init__()
        self.config = {"nz": nz, "ngf": ngf, "nc": nc, "img_size": img_size, "n_classes": n_classes}
        self.label_emb = nn.Embedding(n_classes, nz)
        n = ngf * img_size // 8
        layers = [nn.ConvTranspose2d(nz, n, 4, 1, 0, bias=False), nn.BatchNorm2d(n), nn.ReLU(True)]  # (ngf*8) x 4 x 4
        while n > ngf:  # (ngf*4) x 8 x 8, ... ngf x 32 x 32, for 64
            n //= 2
            layers += [nn.ConvTranspose2d(2 * n, n, 4, 2, 1, bias=False), nn.BatchNorm2d(n), nn.ReLU(True)]
        self.main = nn.Sequential(*layers, nn.ConvTranspose2d(ngf, nc, 4, 2, 1, bias=False), nn.Tanh())  # nc x 64 x 64

    def forward(self, z, labels):
        z = z.flatten(1) * self.label_emb(labels)  # the class, as most have it
        z = z[:, None, None].permute(0, 3, 1, 2)  # (N, nz, 1, 1)
        return self.main(z)

class Discriminator(nn.Module):
    """(N, nc, img_size, img_size) in [-1, 1] -> (N) logits that the image is real, (N, n_classes) of its class."""

    def __init__(self, nc=3, ndf=64, img_size=64, n_classes=10, sn=False, dropout=0.0):
        super().__init__()
        norm = spectral_norm if sn else lambda layer: layer  # Miyato et al. 2018, in place of BatchNorm
        n, layers = nc, []
        for k in range(int(math.log2(img_size)) - 2):  # ndf x 32 x 32, (ndf*2) x 16 x 16, ... (ndf*8) x 4 x 4, for 64
            layers += [norm(nn.Conv2d(n, ndf * 2**k, 4, 2, 1, bias=sn)),
                       nn.Identity() if sn or k == 0 else nn.BatchNorm2d(ndf * 2**k),
                       nn.LeakyReLU(0.2, True), nn.Dropout(dropout)]
            n = ndf * 2**k
        self.main = nn.Sequential(*layers)
        self.adv = norm(nn.Conv2d(n, 1, 4, 1, 0, bias=sn))  # 1 x 1 x 1
        self.aux = norm(nn.Conv2d(n, n_classes, 4, 1, 0))  # n_classes x 1 x 1

    def forward(self, x):
        x = self.main(x)
        return self.adv(x).flatten(), self.aux(x).flatten(1)

def config_of(state):
    """Generator's arguments, read off the tensors of somebody's state dict."""
    convs = [v for k, v in state.items() if k.startswith("main.") and v.ndim == 4]
    return {"nz": len(convs[0]), "ngf": len(convs[-1]), "nc": convs[-1].shape[1], "img_size": 2 ** (len(convs) + 1),
            "n_classes": len(state["label_emb.weight"])}

def weights_init(net, init="dcgan"):
    """dcgan: N(0, 0.02), BatchNorm scales N(1, 0.02) (Radford et al. 2016, section 4); or He's normal."""
    for m in net.modules():
        if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            for w in m.parameters():
                if w.ndim == 1:  # a bias
                    nn.init.zeros_(w)
                elif init == "dcgan":
                    nn.init.normal_(w, 0.0, 0.02)
                else:  # PyTorch swaps fan_in and fan_out of transposed convolutions
                    nn.init.kaiming_normal_(w, 0.2, "fan_out" if isinstance(m, nn.ConvTranspose2d) else "fan_in")
        elif isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.weight, 1.0, 0.02)

def d_loss(real, fake, args):
    """From netD's logits (N): -log D(x) - log(1 - D(G(z))), Goodfellow et al. 2014, eq. 1; or hinge, Miyato 2018."""
    if args.loss == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    return (F.binary_cross_entropy_with_logits(real, torch.full_like(real, args.real_label))
            + F.binary_cross_entropy_with_logits(fake, torch.full_like(fake, args.fake_label)))

def g_loss(fake, args):
    """From netD's logits (N): -log D(G(z)), the non-saturating loss of Goodfellow et al. 2014, section 3; or hinge."""
    return -fake.mean() if args.loss == "hinge" else F.binary_cross_entropy_with_logits(fake, torch.ones_like(fake))

def gradient_penalty(netD, real, fake, kind, labels, fakes):
    """r1: half netD's squared gradient at real (Mescheder et al. 2018), divided by nc, so that one weight does for grey
    and RGB. interpolate: the gradient's norm between real and fake, pulled to 1 (Gulrajani et al. 2017)."""
    x = real if kind == "r1" else torch.lerp(real, fake.float(), torch.rand(len(real), 1, 1, 1, device=real.device))
    x = x.detach().requires_grad_()
    out, class_out = netD.forward(x)  # never compiled, nor in bf16
    margin = F.cross_entropy(class_out, labels + fakes) - F.cross_entropy(class_out, labels)  # adc: what netG climbs
    (grad,) = torch.autograd.grad(out.sum() + len(x) * margin, x, create_graph=True)
    squared = grad.square().sum((1, 2, 3))
    return squared.mean() / (2 * x.shape[1]) if kind == "r1" else (squared.add(1e-12).sqrt() - 1).square().mean()

def train(args):
    run = Run(args)
    n = len(run.classes)
    fakes = n if args.aux == "adc" else 0  # adc: where netD's classes of fakes begin
    netG = Generator(args.nz, args.ngf, args.nc, args.img_size, n)
    netD = Discriminator(args.nc, args.ndf, args.img_size, n + fakes, args.sn, args.dropout)
    for net in (netG, netD):
        weights_init(net, args.init)
        net.to(run.device, memory_format=torch.channels_last)
    netG_ema = copy.deepcopy(netG).eval().requires_grad_(False)  # the average of netG's weights, which is sampled
    adam = functools.partial(torch.optim.Adam, betas=(args.beta1, args.beta2), fused=True)
    optimizer = adam if args.optim == "adam" else torch.optim.RMSprop
    optG, optD = optimizer(netG.parameters()), optimizer(netD.parameters())  # rates: in each step
    ddpG, ddpD = run.parallel(netG), run.parallel(netD)  # under torchrun gradients are averaged; --compile
    for step, real, labels in run.steps(netG=netG, netD=netD, netG_ema=netG_ema, optG=optG, optD=optD):
        decay = min(1, 2 - 2 * step / run.total) if args.lr_decay == "linear" else 1
        optG.param_groups[0]["lr"], optD.param_groups[0]["lr"] = decay * args.lr_g, decay * args.lr_d
        g_step = (step + 1) % args.d_steps == 0

        # D step: tell real from fake.
        z = torch.randn(len(real), args.nz, device=run.device)
        with run.autocast():
            with torch.set_grad_enabled(g_step):
                fake = ddpG(z, labels)
            out_real, class_real = (out.float() for out in ddpD(real))
            shown, shown_labels = run.replay(fake.detach(), labels)  # with --replay, old ones among them
            out_fake, class_fake = (out.float() for out in ddpD(shown))
        loss_d = d_loss(out_real, out_fake, args)
        loss_d += F.cross_entropy(class_real, labels) + F.cross_entropy(class_fake, shown_labels + fakes)
        run.log(**{"loss_d": loss_d, "D(x)": out_real.sigmoid(), "D(G(z))": out_fake.sigmoid()})
        run.log(acc_real=class_real.argmax(1) % n == labels, acc_fake=class_fake.argmax(1) % n == shown_labels)
        if args.gp != "none" and step % args.gp_every == 0:  # costly; now and then is enough: StyleGAN2, appendix B
            penalty = gradient_penalty(netD, real, fake, args.gp, labels, fakes)
            loss_d = loss_d + args.gp_every * args.gp_weight * penalty
        optD.zero_grad()
        loss_d.backward()
        optD.step()
        if not g_step:
            continue

        # G step: make the same fakes pass for real. netD is frozen: its weight gradients are not needed.
        netD.requires_grad_(False)
        with run.autocast():
            out, class_out = (out.float() for out in netD(fake))
        class_loss = F.cross_entropy(class_out, labels) - (F.cross_entropy(class_out, labels + fakes) if fakes else 0)
        loss_g = g_loss(out, args) + args.aux_g * class_loss
        optG.zero_grad()
        loss_g.backward()
        optG.step()
        netD.requires_grad_(True)
        run.log(loss_g=loss_g)
        with torch.no_grad():  # the average follows quickly at first
            new = 1 - min(args.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_([*netG_ema.parameters()], [*netG.parameters()], new)

# -------------------------------------------------------- PLUMBING: the same lines in gan.py, dcgan.py and acgan.py
# It needs from above: CONDITIONAL, RECIPES, flags (--nz, --img_size, --replay), a Generator that keeps its arguments in
# .config (n_classes, if it takes labels), config_of for other people's weights, and train, with netG_ema for run.steps.
SCRIPT = Path(__file__).stem
font = functools.cache(ImageFont.load_default)
DATASETS = {  # where their flags differ from those for your own images
    "digits": {"img_size": 32, "nc": 1, "max_steps": 4600},
    "mnist": {"img_size": 32, "nc": 1, "max_steps": 6000},
    "fashion_mnist": {"img_size": 32, "nc": 1, "max_steps": 6000},
    "cifar10": {"img_size": 32, "hflip": True},
    "celeba": {"hflip": True},
}

def positive(text):
    """argparse type: an integer of 1 or more."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return int(text)

def get_args(argv=None):
    """Command line -> argparse.Namespace. What is not typed is the recipe's or, with --resume, the checkpoint's."""
    p = argparse.ArgumentParser(f"{SCRIPT}.py", f"python {SCRIPT}.py [flags]", __doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False)
    add_method_flags(p.add_argument_group("method").add_argument)
    add, switch = p.add_argument_group("data").add_argument, argparse.BooleanOptionalAction
    add("--dataset", default="digits", help=f"{', '.join(DATASETS)}; a folder or .zip of images or class folders")
    add("--data_dir", default="./data", help="where data sets are found, downloaded and cached")
    add("--nc", type=int, choices=(1, 3), default=3, help="channels: 1 grey, 3 RGB")
    add("--hflip", action=switch, default=False, help="flip real images at random")
    add("--max_images", type=positive, help="a random subset of this many; digits: draw this many")
    add = p.add_argument_group("optimisation").add_argument
    add("--recipe", choices=RECIPES, default="default", help="paper: what its authors chose; other flags outrank it")
    add("--max_steps", type=positive, default=24000, help="length of the run, in steps of netD")
    add("--epochs", type=positive, help="length in passes over the data, in place of --max_steps")
    add("--batch_size", type=positive, help="images per process and step")
    add("--lr", type=float, help="learning rate of both nets, in place of --lr_g and --lr_d")
    add("--lr_g", type=float, help="learning rate of netG")
    add("--lr_d", type=float, help="learning rate of netD")
    add("--lr_decay", choices=("none", "linear"), help="linear: to 0 in the second half of the run")
    add("--optim", choices=("adam", "rmsprop"), default="adam", help="optimizer of both nets")
    add("--beta1", type=float, default=0.5, help="Adam's first-moment decay")
    add("--beta2", type=float, default=0.999, help="Adam's second-moment decay")
    add = p.add_argument_group("run").add_argument
    add("--seed", type=int, default=0, help="of training, and of the latents sampled")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 autocast where that is fast")
    add("--compile", action=switch, default=False, help="torch.compile both nets: for long runs")
    add("--out_dir", help=f"where the run is kept (a new folder runs/{SCRIPT}-DATASET)")
    add("--resume", nargs="?", const="", metavar="PATH", help="go on with a checkpoint or run (the newest one)")
    add("--save_interval", type=positive, metavar="STEPS", help="between checkpoints and grids (50 a run)")
    add("--keep_every", type=positive, metavar="EPOCHS", help="also keep numbered checkpoints")
    add("--log_interval", type=positive, default=50, metavar="STEPS", help="between lines of log.jsonl")
    add("--tensorboard", action=switch, default=False, help="scalars and grids for TensorBoard")
    add = p.add_argument_group("sampling").add_argument
    add("--sample", metavar="PATH", help="generate, from a checkpoint or a run's folder; needs no other flag")
    add("--n_samples", type=positive, help="pictures (a grid of 64, or of 10 of each class)")
    add("--out", metavar="FILE.png|FILE.npz|FILE.gif|FOLDER/", help="(beside the checkpoint)")
    add("--interpolate", type=positive, nargs="?", const=60, metavar="FRAMES", help="GIF of a walk in latents (60)")
    add("--walk_dim", type=int, metavar="D", help="sweep coordinate D of one latent, 0.01 a picture")
    if CONDITIONAL:
        add("--labels", help="classes in turn, by number or name: 0,3,7 or cat,dog (all)")
        add("--attr", nargs="+", metavar="NAME", help="classes of celeba: each combination of these attributes")
    typed, _ = p.parse_known_args(argv)  # a first time, to see which defaults the second time has
    p.set_defaults(**DATASETS.get(typed.dataset, {}) | RECIPES["default"] | RECIPES[typed.recipe])
    if typed.resume is not None:
        typed.resume = last_checkpoint(typed.resume or typed.out_dir or f"runs/{SCRIPT}-*")
        p.set_defaults(**load_checkpoint(typed.resume)["args"] | {"out_dir": str(Path(typed.resume).parent)})
    if typed.epochs:
        p.set_defaults(max_steps=None)
    if typed.lr is not None:
        p.set_defaults(lr_g=typed.lr, lr_d=typed.lr)
    for action in p._actions:
        if str(action.default) not in ("None", "False"):
            action.help += " (%(default)s)"
    p.add_argument("-h", "--help", action="help", help="print this, for the --dataset that is given")
    return argparse.Namespace(**vars(p.parse_args(argv)) | {"resume": typed.resume})

@contextlib.contextmanager
def atomic_write(path):
    """Opens a file in a temporary folder beside `path`, moved there when the block ends well: never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        with open(Path(folder, path.name), "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(f.name, path)

def draw_digit(i, size):
    """Picture i of the embedded data set: the digit i % 10 in grey, of varied weight, place and angle."""
    rng = np.random.default_rng(i)
    paper, ink = int(rng.integers(20)), int(rng.integers(200, 256))
    side = 2 * size  # reduced later, for smooth edges
    stroke = side * rng.uniform(1 / 64, 1 / 32)
    img = Image.new("L", (side, side), paper)
    middle = tuple(side * rng.uniform(0.47, 0.53, 2))
    ImageDraw.Draw(img).text(middle, str(i % 10), ink, font(side), "mm", stroke_width=stroke)
    return img.rotate(rng.uniform(-6, 6), Image.Resampling.BILINEAR, fillcolor=paper)

def find_images(args):
    """--dataset -> (names, open, labels, classes): open(name) is an image, classes[labels[i]] that of the i-th name."""
    path = Path(args.dataset)
    if args.dataset == "digits":
        n = args.max_images or 20000
        return range(n), lambda i: draw_digit(i, args.img_size), np.arange(n) % 10, list("0123456789")
    if args.dataset == "celeba":
        found = [p for p in Path(args.data_dir).rglob("img_align_celeba*") if p.suffix in ("", ".zip")]
        path = min(found, default=None) or Path(download(args).root, "celeba")
    elif args.dataset in DATASETS:
        data = download(args)
        return range(len(data)), lambda i: data[i][0], np.asarray(data.targets), data.classes
    archive = zipfile.ZipFile(path) if zipfile.is_zipfile(path) else None  # read as it is, never extracted
    stamps = ({info.filename: info.CRC for info in archive.infolist()} if archive else
              {p.relative_to(path).as_posix(): p.stat().st_mtime_ns for p in path.rglob("*.*")})
    known = tuple(Image.registered_extensions())
    names = {name: stamps[name] for name in sorted(stamps)  # a dict: the cache is named after the stamps, too
             if name.lower().endswith(known) and "/." not in f"/{name}" and "__MACOSX" not in name}
    if not names:
        raise OSError(f"--dataset {path}: no images there; give {', '.join(DATASETS)}, a folder or a .zip")
    folders = [name.split("/")[:-1] for name in names]
    depth = len(os.path.commonprefix(folders))  # a class is the first folder below what all share: x/cat/1, x/dog/2
    kinds = ["".join(folder[depth:depth + 1]) for folder in folders]
    if CONDITIONAL and args.attr:  # "Smiling + not Male", from the table beside CelebA's pictures
        data = Path(args.data_dir)
        table = min(data.rglob("list_attr_celeba.*"), default=data / "list_attr_celeba.txt")
        header, *rows = [row for line in table.open() if len(row := line.replace(",", " ").split()) > 1]
        if not set(args.attr) <= set(header):
            raise OSError(f"--attr {' '.join(args.attr)}: choose from {', '.join(header)}")
        columns = {name: header.index(name) - len(header) for name in args.attr}  # a row begins with the file's name
        shown = {row[0]: " + ".join("not " * (row[k] != "1") + name for name, k in columns.items()) for row in rows}
        kinds = [shown[name.split("/")[-1]] for name in names]
    classes, labels = np.unique(kinds, return_inverse=True)
    classes = classes.tolist() if all(classes) else []
    return names, lambda name: Image.open(archive.open(name) if archive else path / name), labels, classes

def download(args):
    """torchvision's data set of this name, which it downloads where it is not there yet."""
    from torchvision import datasets  # here and not above: --help need not wait for it
    name = next(name for name in datasets.__all__ if name.lower() == args.dataset.replace("_", ""))
    try:
        return getattr(datasets, name)(args.data_dir, download=True)
    except (Exception, SystemExit) as e:  # no network, Google's quota, damaged files: the way out is one
        files = {"CelebA": "img_align_celeba.zip", "CIFAR10": "cifar-10-python.tar.gz"}.get(name, f"{name}/raw/*.gz")
        raise OSError(f"--dataset {args.dataset}: put {files} into {args.data_dir} yourself; no download: {e}") from e

def to_pixels(img, size, nc):
    """PIL image of any kind -> bytes of size x size x nc: the short side resized, the centre cropped."""
    mode = "L" if nc == 1 else "RGB"
    img.draft(mode, (2 * size, 2 * size))  # JPEG: decode at reduced size
    img = ImageOps.exif_transpose(img)
    if img.mode.startswith("I"):  # 16 bits a pixel
        img = Image.fromarray((np.asarray(img).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if img.has_transparency_data:
        img = Image.alpha_composite(Image.new("RGBA", img.size, "white"), img.convert("RGBA"))
    return ImageOps.fit(img.convert(mode), (size, size), Image.Resampling.BICUBIC).tobytes()

def load_data(args):
    """--dataset -> images, uint8 (N, H, W, C); labels, int64 (N); names of classes. Decoded once, into a cache file."""
    names, open_image, labels, classes = find_images(args)
    if CONDITIONAL and not classes:
        raise OSError(f"--dataset {args.dataset}: no classes; it takes a folder for each class, or --attr for celeba")
    chosen = np.sort(np.random.default_rng(0).permutation(len(names))[:args.max_images])
    made_from = hashlib.sha256(repr((names, args.max_images)).encode()).hexdigest()[:16]
    name = f"{Path(args.dataset).resolve().stem}-{args.img_size}x{args.nc}-{made_from}.rows"
    cache = Path(args.data_dir, "cache", name)
    row = np.dtype([("index", np.int64), ("pixels", np.uint8, (args.img_size, args.img_size, args.nc))])
    names, failed = list(names), []

    def decode(i):
        try:
            return i.tobytes() + to_pixels(open_image(names[i]), args.img_size, args.nc)
        except Exception as e:  # noqa: BLE001  damaged files make Pillow and zipfile raise nearly anything
            failed.append(f"{names[i]}: {e}")
            return b""

    if not cache.exists():
        with atomic_write(cache) as f, ThreadPool() as pool:
            f.writelines(tqdm(pool.imap(decode, chosen, 64), "decoding", len(chosen), unit="img"))
            if len(failed) == len(chosen):
                raise OSError(f"--dataset {args.dataset}: no image can be read; the first: {failed[0]}")
    if failed:
        print(f"skipped {len(failed)} unreadable images:", *failed[:5], sep="\n  ", file=sys.stderr)
    rows = np.memmap(cache, row, "c")  # copy on write: torch warns of arrays that may only be read
    return rows["pixels"], labels[rows["index"]], classes

def latents(seed, start, n, nz):
    """Latents start, start + 1, ... of a seed: float32 (n, nz) ~ N(0, 1), by Philox and Box-Muller. infer_ort.py
    makes the same ones, to the bit, and says how."""
    blocks = -(-nz // 4)
    words = np.random.Philox(key=seed, counter=start * blocks).random_raw(4 * blocks * n).reshape(n, -1, 2)
    u = ((words >> np.uint64(11)) + 0.5) * 2.0**-53
    r, t = np.sqrt(-2 * np.log(u[..., 0])), 2 * np.pi * u[..., 1]
    return np.stack((r * np.cos(t), r * np.sin(t)), -1).reshape(n, -1)[:, :nz].astype(np.float32)

@torch.no_grad()
def generate(netG, z, labels, batch_size=64):
    """Latents (n, nz), labels (n) -> uint8 (n, H, W, C). Whole batches, the last one padded: n changes no picture."""
    device, images = next(netG.parameters()).device, []
    for i in range(0, len(z), batch_size):
        rows = np.arange(i, i + batch_size).clip(max=len(z) - 1)  # the last one again and again
        inputs = [torch.from_numpy(x[rows]).to(device) for x in ((z, labels) if CONDITIONAL else (z,))]
        images.append(to_uint8(netG(*inputs)))
    return np.concatenate(images)[:len(z)]

def to_uint8(images):
    """float (N, C, H, W) in [-1, 1] -> uint8 (N, H, W, C) array. The one conversion, also in export.py's graph."""
    return (images.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

def save_grid(path, frames, columns=None, duration=50):
    """Arrays uint8 (N, H, W, C) -> an image file, a grid; of several an animation, each for so many milliseconds."""
    from torchvision.utils import make_grid  # here and not above: --help need not wait for it
    columns = columns or math.ceil(math.sqrt(len(frames[0])))
    grids = [make_grid(torch.from_numpy(x.copy()).permute(0, 3, 1, 2), columns, pad_value=255) for x in frames]
    first, *others = [Image.fromarray(grid.permute(1, 2, 0).numpy()) for grid in grids]
    with atomic_write(path) as f:
        first.save(f, path.suffix[1:], save_all=True, append_images=others, loop=0, duration=duration)

def sample(args):
    """--sample: pictures of a checkpoint's generator, as a grid, an animation, an array or a folder."""
    path = last_checkpoint(args.sample)
    netG, classes = load_generator(path)
    netG.to(pick_device(args.device))
    out = Path(args.out or f"{os.path.splitext(path)[0]}_samples.{'gif' if args.interpolate else 'png'}")
    if out.suffix not in (".png", ".gif", ".npz", ""):
        raise OSError(f"--out {out}: give a .png, a .gif, an .npz or a folder")
    numbers = {str(k): k for k in range(len(classes))} | {name: k for k, name in enumerate(classes)}
    asked = args.labels.split(",") if CONDITIONAL and args.labels else classes
    if not set(asked) <= set(numbers):
        raise OSError(f"--labels {args.labels}: this generator's classes are {', '.join(numbers)}")
    n, nz = args.n_samples or 10 * len(asked) or 64, netG.config["nz"]
    z, others = np.split(latents(args.seed, 0, 2 * n, nz), 2)
    if args.walk_dim is not None:
        if not 0 <= args.walk_dim < nz:
            raise OSError(f"--walk_dim {args.walk_dim}: this generator's latents have coordinates 0 to {nz - 1}")
        z = z[:1].repeat(n, 0)
        z[:, args.walk_dim] += 0.01 * np.arange(n)
    # --interpolate: a great circle through two latents, closed, and every point on it again ~ N(0, 1); else t is 0
    t = np.linspace(0, 2 * np.pi, args.interpolate or 1, endpoint=False, dtype=np.float32)[:, None, None]
    z = (np.cos(t) * z + np.sin(t) * others).reshape(-1, nz)
    labels = np.tile(np.resize([numbers[name] for name in asked] or [0], n), len(t))
    images = generate(netG, z, labels, args.batch_size)
    if out.suffix == ".npz":
        with atomic_write(out) as f:
            np.savez(f, images, **({"labels": labels} if CONDITIONAL else {}))
    elif out.suffix:
        save_grid(out, images.reshape(len(t), n, *images.shape[1:]), len(asked))
    else:
        for i, image in enumerate(images):
            with atomic_write(out / f"{i:06d}.png") as f:
                Image.fromarray(image.squeeze()).save(f, "png")
    print(f"wrote {out}")

def last_checkpoint(path):
    """path; or where that is the folder of a run, or a pattern of such, the checkpoint that was last written there."""
    folder = glob.escape(path) if os.path.isdir(path) else path
    return max(glob.glob(f"{folder}/checkpoint*.pt"), key=os.path.getmtime, default=path)

def load_checkpoint(path, scripts=(SCRIPT,)):
    """What torch.save wrote, on the CPU. OSError if it is damaged or none of `scripts` wrote it (None: others)."""
    with open(path, "rb") as f:
        try:
            ckpt = torch.load(f, map_location="cpu", weights_only=True)  # tensors and containers: no file can run code
            wrote = ckpt.get("script")
        except Exception as e:  # damaged files make torch raise nearly anything
            raise OSError(f"{path}: damaged, or no dict of tensors; of a pickled net, save net.state_dict()") from e
    if wrote not in scripts:
        raise OSError(f"{path}: not for {SCRIPT}.py, it was written by {f'{wrote}.py' if wrote else 'something else'}")
    return ckpt

def load_generator(path):
    """(netG in eval mode, names of its classes) of this script's checkpoint, or of somebody else's state dict."""
    ckpt = load_checkpoint(path, (SCRIPT, None))
    keys = ("netG_ema", "g_model_state_dict", "generator", "netG", "state_dict", "model_state_dict")
    try:
        state = next((ckpt[key] for key in keys if key in ckpt), ckpt)
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
        config = ckpt.get("config") or config_of(state)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as e:
        raise OSError(f"{path}: no generator in it, at the top or under {', '.join(keys)}") from e
    netG = Generator(**config).eval()
    netG.load_state_dict(state)
    return netG, (ckpt.get("classes") or [str(k) for k in range(config["n_classes"])]) if CONDITIONAL else []

def pick_device(name):
    """torch.device of --device."""
    best = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    return torch.zeros(1, device=best if name == "auto" else name).device

class Run:
    """What surrounds the method: processes, data, log, pictures, checkpoints. It takes no gradient step."""

    def __init__(self, args):
        env = (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))  # torchrun sets them
        self.rank, local_rank, self.world = (int(os.environ.get(name, default)) for name, default in env)
        if self.world > 1:
            if torch.cuda.is_available():
                torch.cuda.set_device(local_rank)
            dist.init_process_group(timeout=datetime.timedelta(hours=6))
            if local_rank == 0:  # one process of a machine downloads and decodes, the others find what it has cached
                load_data(args)
            dist.barrier()
        self.args, self.device = args, pick_device(args.device)
        cuda = self.device.type == "cuda"
        fast = torch.cuda.is_bf16_supported(False) if cuda else torch.cpu.get_capabilities().get("avx512_bf16", False)
        bf16 = {"auto": fast, "bf16": True, "fp32": False}[args.precision]
        self.autocast = functools.partial(torch.autocast, self.device.type, torch.bfloat16, enabled=bf16)
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")  # on GPUs TF32, which convolutions have by default
        if sys.platform == "linux":  # glibc would give freed blocks back and page them in again: 2 to 5 % of a step
            ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        images, labels, self.classes = load_data(args)
        self.batch = args.batch_size * self.world  # of all processes together
        if self.batch > len(images):
            raise OSError(f"--batch_size {args.batch_size}: a step needs {self.batch} images, there are {len(images)}")
        self.epoch_size = len(images) // self.batch * self.batch  # what is left over fills no batch
        where = self.device if cuda and images.nbytes < torch.cuda.mem_get_info(self.device)[0] / 2 else "cpu"
        self.images, self.labels = torch.from_numpy(images).to(where), torch.from_numpy(labels).to(where)
        self.step = self.seen = self.signum = 0  # seen: images, by all processes
        self.old, self.values = [], {}  # fakes for --replay; what is to be logged
        self.order = None
        torch.manual_seed(args.seed)

    def parallel(self, net):
        """net, compiled with --compile; under torchrun in DistributedDataParallel, which averages gradients."""
        if self.args.compile:
            net.compile(dynamic=False)  # in place: names stay; forward() is as it was, for second derivatives
        if self.world > 1:
            net = DistributedDataParallel(net)
            net.broadcast_buffers = False  # a broadcast between netD's two forwards would spoil the backward
        return net

    def steps(self, **state):
        """Yields (step, real (N, nc, H, W) in [-1, 1], labels (N), numbers of self.classes) until the run is done.
        state: nets and optimizers, kept in checkpoints by these names, restored by --resume; netG_ema is sampled."""
        self.state = state
        if self.args.resume:
            ckpt = load_checkpoint(self.args.resume)
            for name, part in state.items():
                part.load_state_dict(ckpt[name])
            self.step, self.old = ckpt["step"], ckpt["old"]
            self.seen = ckpt["seen"] // self.batch * self.batch
        self.begin()
        last = False
        with tqdm(total=self.total, initial=self.step, unit="step", disable=self.rank > 0) as self.bar:
            while not last:
                yield self.step, *self.next_batch()
                self.step, self.seen = self.step + 1, self.seen + self.batch
                self.bar.update()
                stop = self.stop_signal()
                last = stop or self.step == self.total
                keep = self.args.keep_every and self.seen % (self.args.keep_every * self.epoch_size) == 0
                save = last or keep or self.step % self.interval == 0
                if save or self.step % self.args.log_interval == 0:
                    self.write_log()  # which checks the weights
                if save and self.rank == 0:
                    self.save(keep)
        if self.rank == 0:
            self.end()
        if self.step < self.total:
            sys.exit(128 + stop)

    def begin(self):
        """Whatever is done once, before the first step."""
        args, classes = self.args, len(self.classes) if CONDITIONAL else 0
        self.total = args.max_steps or self.step + (args.epochs * self.epoch_size - self.seen) // self.batch
        if self.step >= self.total:
            raise OSError(f"--resume: {args.resume} has done its {self.step} steps; give more --epochs or --max_steps")
        self.interval = args.save_interval or max(100, self.total // 50)
        self.inputs = latents(args.seed, 0, 512, args.nz), np.arange(512) % (classes or 1)
        self.columns, self.n_grid = min(classes, 100) or 8, 10 * classes or 64
        self.logged, self.log_time = self.step, time.perf_counter()
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, lambda signum, frame: setattr(self, "signum", signum))  # heeded after the step
        if self.rank > 0:
            return
        name = Path(args.out_dir or f"runs/{SCRIPT}-{Path(args.dataset).resolve().stem}")
        self.out_dir, number = name, 1
        while not args.resume and any(self.out_dir.glob("*")):  # a new run never goes over another one: -2, -3, ...
            number += 1
            self.out_dir = Path(f"{name}-{number}")
        some = np.random.default_rng(args.seed).permutation(len(self.images))[:64]
        save_grid(self.out_dir / "samples" / "real.png", [self.images[some].cpu().numpy()])
        print(f"{len(self.images)} images {args.img_size}x{args.img_size}x{args.nc}, {len(self.classes)} classes; "
              f"{self.world} x {self.device}; {self.total} steps -> {self.out_dir}", flush=True)
        if args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.writer = SummaryWriter(self.out_dir)

    def next_batch(self):
        """All of a step's randomness comes from (seed, step, rank): a resume needs no other random state."""
        args = self.args
        epoch, start = divmod(self.seen, self.epoch_size)
        if start == 0 or self.order is None:
            order = np.random.default_rng((args.seed, epoch)).permutation(len(self.images))
            self.order = torch.from_numpy(order).to(self.images.device)
        seed = int(np.random.SeedSequence((args.seed, self.step, self.rank)).generate_state(1)[0])
        # torch.manual_seed formats a stack trace even without a GPU: 6 % of gan.py's step.
        torch.default_generator.manual_seed(seed) if self.device.type == "cpu" else torch.manual_seed(seed)
        index = self.order[start + self.rank:start + self.batch:self.world]
        real = self.images[index]
        if self.device.type == "cuda" and not real.is_cuda:
            real = real.pin_memory()  # the GPU takes it when it gets there, and nobody waits
        real = real.to(self.device, non_blocking=True).permute(0, 3, 1, 2).float().sub_(127.5).div_(127.5)
        if args.hflip:
            real = torch.where(torch.rand(len(real), 1, 1, 1, device=self.device) < 0.5, real.flip(3), real)
        return real, self.labels[index].to(self.device, non_blocking=True)

    def replay(self, *new):
        """Fakes (N, ...) and their labels, some swapped for older ones (Shrivastava et al. 2017, section 2.3)."""
        k = round(self.args.replay * len(new[0]))
        if k:
            self.old = [torch.cat((o.to(n), n))[-8 * len(n):] for o, n in zip(self.old or new, new)]  # of eight steps
            pick = torch.randperm(len(self.old[0]), device=self.device)[:k]
            new = [torch.cat((n[k:], o[pick])) for o, n in zip(self.old, new)]
        return new

    def log(self, **values):
        """Tensors, whose means since the last line go to the log. Nobody waits for the GPU here."""
        for name, value in values.items():
            self.values.setdefault(name, []).append(value.detach())

    def write_log(self):
        """A line of log.jsonl, the bar and TensorBoard. Stops the run where losses or weights are not finite."""
        row = {name: torch.stack(values).float().mean().item() for name, values in self.values.items()}
        weights = [w for part in self.state.values() if isinstance(part, nn.Module) for w in part.parameters()]
        if not all(map(math.isfinite, (nn.utils.get_total_norm(weights).item(), *row.values()))):
            raise FloatingPointError(f"losses or weights are not finite at step {self.step}: try a lower --lr, --gp r1 "
                                     "or --precision fp32; the last checkpoint is good")
        now = time.perf_counter()
        row["images/s"] = (self.step - self.logged) * self.batch / (now - self.log_time)
        self.values, self.logged, self.log_time = {}, self.step, now
        self.bar.set_postfix(row)
        if self.rank > 0:
            return
        place = {"step": self.step, "epoch": self.seen / self.epoch_size, "time": time.time()}
        with open(self.out_dir / "log.jsonl", "a") as f:
            f.write(json.dumps(place | row) + "\n")
        if self.args.tensorboard:
            for name, value in row.items():
                self.writer.add_scalar(name, value, self.step)

    def save(self, keep):
        """A checkpoint and a grid. netG_ema gets BatchNorm statistics of its own (Izmailov et al. 2018, section 3)."""
        netG = self.state["netG_ema"].train()
        for layer in netG.modules():
            if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
                layer.reset_running_stats()
                layer.momentum = None  # the mean over batches
        generate(netG, *self.inputs)
        netG.eval()
        ckpt = {"script": SCRIPT, "args": vars(self.args), "config": netG.config, "classes": self.classes,
                "step": self.step, "seen": self.seen, "old": self.old}
        buffer = io.BytesIO()  # torch.save into a file hides why it fails
        torch.save(ckpt | {name: part.state_dict() for name, part in self.state.items()}, buffer)
        names = ["checkpoint.pt", f"checkpoint_epoch_{self.seen // self.epoch_size:04d}.pt"]
        for name in names if keep else names[:1]:
            with atomic_write(self.out_dir / name) as f:
                f.write(buffer.getbuffer())
        images = generate(netG, *(x[:self.n_grid] for x in self.inputs))
        save_grid(self.out_dir / "samples" / f"step_{self.step:08d}.png", [images], self.columns)
        if self.args.tensorboard:
            self.writer.add_images("samples", images, self.step, dataformats="NHWC")
            self.writer.flush()

    def stop_signal(self):
        """The signal, or 0, that all processes have agreed on: in every tenth step, for asking waits for the GPU."""
        if self.world == 1:
            return self.signum
        if self.step % 10:
            return 0
        signum = torch.tensor(self.signum, device=self.device)
        dist.all_reduce(signum, dist.ReduceOp.MAX)
        return int(signum)

    def end(self):
        """samples.gif, and what to do next."""
        if self.step < self.total:
            print(f"stopped at step {self.step}; go on with: python {SCRIPT}.py --resume {self.out_dir}")
            return
        files = sorted((self.out_dir / "samples").glob("step_*.png"))
        files = files[::-(len(files) // 100 + 1)][::-1]  # 100 are enough
        frames = [np.asarray(Image.open(file).convert("RGB"))[None] for file in files]
        save_grid(self.out_dir / "samples.gif", frames, 1, [200] * (len(frames) - 1) + [1000])
        print(f"done: {self.out_dir}; more pictures: python {SCRIPT}.py --sample {self.out_dir}")

def main():
    """One line, exit code 1, for what the user can mend: files, values, memory. All else keeps its traceback."""
    mendable = ("allocate", "Error(s) in loading state_dict", "CUDA enabled", "NVIDIA driver", "device string")
    try:
        args = get_args()
        sample(args) if args.sample else train(args)
    except (OSError, FloatingPointError, MemoryError, KeyboardInterrupt, RuntimeError, AssertionError) as e:
        if isinstance(e, (RuntimeError, AssertionError)) and not any(words in str(e) for words in mendable):
            raise
        sys.exit(f"{SCRIPT}.py: error: {' '.join(str(e).split()) or type(e).__name__}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
            gc.collect()  # gloo's threads must end before the interpreter does, or one exit in ten aborts

if __name__ == "__main__":
    main()
