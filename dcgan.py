"""DCGAN: Radford et al. 2016, "Unsupervised Representation Learning with Deep Convolutional GANs".

A generator (netG) of transposed convolutions and a discriminator (netD) of strided ones play a
game: netD learns to tell real pictures from netG's, netG to make those that netD takes for real.

    python dcgan.py                               # embedded digits, no download
    python dcgan.py --dataset celeba --ngf 128    # 64x64 RGB; or mnist, or a folder of images
    python dcgan.py --recipe paper                # nearly the paper's
    python dcgan.py --resume runs/dcgan-digits    # go on with a run that was stopped
    python dcgan.py --sample runs/dcgan-digits    # a grid of pictures; with --seed 1 others
    torchrun --nproc_per_node 2 dcgan.py          # one process for each GPU

The default is not the paper's: netD has a gradient penalty (R1), samples come from a moving average
of netG (EMA), nets and batches are smaller, and the learning rates are 10 times (netG) and 5 times
(netD) the paper's and fall to 0 in the second half of --max_steps. (On fewer than 9,000 images a
run ends sooner.) A folder of 64x64 faces (UTKFace) takes 122 minutes on one core of an AMD EPYC
with bfloat16 instructions; MNIST takes 7, and without them 20.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

METHOD = "dcgan"  # kept in checkpoints: those of another method are refused

# ------------------------------------------------------------------------------------------- flags

DATASETS = {  # defaults that --dataset changes
    "digits": {"img_size": 32, "nc": 1, "max_steps": 4600},
    "mnist": {"img_size": 32, "nc": 1, "max_steps": 6000},
    "fashion_mnist": {"img_size": 32, "nc": 1, "max_steps": 6000},
    "cifar10": {"img_size": 32, "hflip": True},
    "celeba": {"hflip": True},
}
# Defaults that --recipe paper changes, by section 4, figure 1 (netG) and the authors' code (netD).
# Not theirs: z is normal, not uniform; kernels are 4x4, not 5x5; cifar10 and celeba are flipped.
PAPER = {
    "ngf": 128, "ndf": 128, "batch_size": 128, "lr_g": 2e-4, "lr_d": 2e-4, "lr_decay": "none",
    "gp": "none", "ema": 0.0,
}

def add_method_flags(group):
    # number(int, 1) is an int from 1 on, number(float, 0, 1) a float from 0 to 1.
    flag, below_1 = group.add_argument, number(float, 0, 0.999999)
    flag("--img_size", type=int, choices=(16, 32, 64, 128, 256), default=64, help="height, width")
    flag("--nz", type=number(int, 1), default=100, help="size of the latent vector")
    flag("--ngf", type=number(int, 1), default=64, help="channels of netG's last hidden layer")
    flag("--ndf", type=number(int, 1), default=32, help="channels of netD's first layer")
    flag("--batch_size", type=number(int, 2), default=32, help="images per process and step")
    flag("--max_steps", type=number(int, 1), default=24000,
         help="length of a run in netD's steps; on few images it is shorter")
    flag("--lr_g", type=number(float, 0), default=2e-3, help="learning rate of netG")
    flag("--lr_d", type=number(float, 0), default=1e-3, help="learning rate of netD")
    flag("--lr_decay", choices=("none", "linear", "step"), default="linear",
         help="of both rates; linear: to 0 in the second half of --max_steps")
    flag("--beta1", type=below_1, default=0.5, help="Adam's decay of the gradient's mean")
    flag("--beta2", type=below_1, default=0.999, help="Adam's decay of its square")
    flag("--gp", choices=("none", "r1", "interpolate"), default="r1", help="gradient penalty")
    flag("--gp_weight", type=number(float, 0), default=0.3, help="for interpolate its paper has 10")
    flag("--gp_every", type=number(int, 1), default=4, metavar="N",
         help="penalty in every N-th step, N times as heavy")
    flag("--ema", type=below_1, default=0.999,
         help="decay of netG's average, which draws the samples; 0: no average")

    # Tricks that articles teach: none is on by default, and none needed to read on.
    flag("--loss", choices=("bce", "hinge"), default="bce", help="bce: cross-entropy")
    flag("--real_label", type=number(float, 0, 1), default=1.0, help="0.9: smoothed (bce)")
    flag("--fake_label", type=number(float, 0, 1), default=0.0, help="0.1: smoothed (bce)")
    flag("--sn", action="store_true", help="spectral norm in netD, in place of BatchNorm")
    flag("--dropout", type=below_1, default=0.0, help="dropout probability in netD")
    flag("--init", choices=("dcgan", "he", "xavier"), default="dcgan", help="dcgan: N(0, 0.02)")
    flag("--optim_g", choices=("adam", "rmsprop"), default="adam", help="optimizer of netG")
    flag("--optim_d", choices=("adam", "rmsprop"), default="adam", help="optimizer of netD")
    flag("--lr_step", type=number(int, 1), default=10, metavar="N",
         help="with --lr_decay step: halve the rates every N epochs")
    flag("--d_steps", type=number(int, 1), default=1, help="steps of netD for one of netG")
    flag("--pretrain_d", type=number(int, 0), default=0, metavar="STEPS",
         help="train netD alone first, on pictures of the untrained netG")
    flag("--replay", type=number(float, 0, 1), default=0.0, help="share of old fakes for netD")

# -------------------------------------------------------------------------------------------- nets

class Generator(nn.Module):
    """(N, nz) latents ~ N(0, 1) -> (N, nc, img_size, img_size) images in [-1, 1].

    Radford et al. 2016, figure 1, at img_size 64 and ngf 128, with kernels of 4x4, not 5x5. Names
    and order of the layers are those of pytorch/examples. No layer has more than 8 * ngf channels.
    """

    def __init__(self, nz, ngf, nc, img_size):
        super().__init__()
        self.config = {"nz": nz, "ngf": ngf, "nc": nc, "img_size": img_size}  # kept in checkpoints
        stages = int(math.log2(img_size)) - 3  # each doubles height and width; 3 at img_size 64
        channels = ngf * min(2**stages, 8)
        layers = [nn.ConvTranspose2d(nz, channels, 4, 1, 0, bias=False)]  # (ngf*8) x 4 x 4
        layers += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
        for k in reversed(range(stages)):  # (ngf*4) x 8 x 8, (ngf*2) x 16 x 16, ngf x 32 x 32
            out = ngf * min(2**k, 8)
            layers += [nn.ConvTranspose2d(channels, out, 4, 2, 1, bias=False)]
            layers += [nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
            channels = out
        layers += [nn.ConvTranspose2d(ngf, nc, 4, 2, 1, bias=False), nn.Tanh()]  # nc x 64 x 64
        self.main = nn.Sequential(*layers)

    def forward(self, z):
        z = z.view(-1, 1, 1, z.shape[1]).permute(0, 3, 1, 2)  # (N, nz, 1, 1), channels_last
        return self.main(z)

class Discriminator(nn.Module):
    """(N, nc, img_size, img_size) images in [-1, 1] -> (N) logits: real if positive."""

    def __init__(self, nc, ndf, img_size, sn=False, dropout=0.0):
        super().__init__()
        stages = int(math.log2(img_size)) - 2  # each halves height and width; 4 at img_size 64
        layers = []
        channels = nc
        for k in range(stages):  # ndf x 32 x 32, (ndf*2) x 16 x 16, (ndf*4) x 8 x 8, (ndf*8) x 4 x 4
            out = ndf * min(2**k, 8)
            layers += [nn.Conv2d(channels, out, 4, 2, 1, bias=sn)]
            if k > 0 and not sn:  # the paper has no BatchNorm on netD's first layer
                layers += [nn.BatchNorm2d(out)]
            layers += [nn.LeakyReLU(0.2, inplace=True), nn.Dropout(dropout)]
            channels = out
        layers += [nn.Conv2d(channels, 1, 4, 1, 0, bias=sn)]  # 1 x 1 x 1
        self.main = nn.Sequential(*layers)

    def forward(self, x):
        return self.main(x).flatten()

def weights_init(net, init="dcgan"):
    """N(0, 0.02), section 4; BatchNorm scales N(1, 0.02), their code. Or He's, or Xavier's."""
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.weight, 1.0, 0.02)
        if not isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
            continue
        if m.bias is not None:
            nn.init.zeros_(m.bias)
        if init == "dcgan":
            nn.init.normal_(m.weight, 0.0, 0.02)
        elif init == "xavier":
            nn.init.xavier_normal_(m.weight)
        elif isinstance(m, nn.ConvTranspose2d):  # fan_out, for its weight is (in, out, 4, 4)
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        else:
            nn.init.kaiming_normal_(m.weight, a=0.2)  # the slope of LeakyReLU

# ------------------------------------------------------------------------------------------ losses

def d_loss(real_logits, fake_logits, args):
    """-log D(x) - log(1 - D(G(z))): minus eq. 1 of Goodfellow 2014. Or hinge, Miyato 2018."""
    if args.loss == "hinge":
        return F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()
    real_target = torch.full_like(real_logits, args.real_label)
    fake_target = torch.full_like(fake_logits, args.fake_label)
    real_loss = F.binary_cross_entropy_with_logits(real_logits, real_target)
    fake_loss = F.binary_cross_entropy_with_logits(fake_logits, fake_target)
    return real_loss + fake_loss

def g_loss(fake_logits, args):
    """-log D(G(z)), the non-saturating loss of Goodfellow et al. 2014, section 3; or hinge."""
    if args.loss == "hinge":
        return -fake_logits.mean()
    return F.binary_cross_entropy_with_logits(fake_logits, torch.ones_like(fake_logits))

def gradient_penalty(netD, real, fake, kind):
    """How steep netD is. r1: |grad|^2 / 2 at real images (Mescheder et al. 2018, eq. 9), here also
    divided by nc, by which one --gp_weight suits grey and RGB (measured). interpolate:
    (|grad| - 1)^2 between real and fake (Gulrajani et al. 2017, eq. 3: WGAN-GP, whose netD has no
    BatchNorm). With BatchNorm a picture's gradient also depends, a little, on its batch."""
    x = real
    if kind == "interpolate":
        a = torch.rand(len(real), 1, 1, 1, device=real.device)
        x = a * fake + (1 - a) * real
    x = x.detach().requires_grad_()
    logits = netD.forward(x)  # .forward goes around --compile, which has no second derivatives
    (grad,) = torch.autograd.grad(logits, x, torch.ones_like(logits), create_graph=True)
    squared = grad.square().sum((1, 2, 3))
    if kind == "interpolate":
        norm = (squared + 1e-12).sqrt()
        return (norm - 1).square().mean()
    nc = x.shape[1]
    return squared.mean() / 2 / nc

# ---------------------------------------------------------------------------------------- training

class Replay:
    """--replay: netD sees some fakes of the last eight steps again (Shrivastava et al. 2017)."""

    def __init__(self, share):
        self.share = share
        self.old = None  # fakes of the last eight calls

    def __call__(self, fake):
        """(N, nc, H, W) fakes -> as many; the first `share` of them are old ones."""
        if self.share == 0:
            return fake
        if self.old is None:
            self.old = fake
            return fake
        old = self.old.to(fake)  # from a checkpoint it is on the CPU
        pick = torch.randperm(len(old), device=fake.device)[:round(self.share * len(fake))]
        self.old = torch.cat((old[-7 * len(fake):], fake))
        return torch.cat((old[pick], fake[len(pick):]))

    def state_dict(self):
        return {"old": self.old}

    def load_state_dict(self, state):
        self.old = state["old"]

def make_optimizer(name, net, lr, args):
    if name == "rmsprop":
        return torch.optim.RMSprop(net.parameters(), lr)
    return torch.optim.Adam(net.parameters(), lr, (args.beta1, args.beta2), fused=True)

def lr_factor(args, run):
    """The factor on both learning rates, by --lr_decay."""
    if args.lr_decay == "linear":  # 1 in the first half, then a line to 0 at --max_steps
        return min(1, 2 - 2 * run.done)
    if args.lr_decay == "step":
        return 0.5 ** (run.epoch // args.lr_step)
    return 1

def train(args):
    # Run is the plumbing, below: devices, data, log, pictures, checkpoints. Used here:
    #   run.done            the share of --max_steps that is done
    #   run.epoch           how often the data was seen, with a fraction
    #   run.autocast()      bfloat16 where it is fast, else float32
    #   run.log({...})      tensors, whose means go to the next row of the log
    #   run.parallel(net)   net itself; under torchrun net in DDP, which averages gradients
    #   run.steps(...)      batches, until the run is done; in between it logs, draws and saves
    run = Run(args)
    netG = Generator(args.nz, args.ngf, args.nc, args.img_size)
    netD = Discriminator(args.nc, args.ndf, args.img_size, args.sn, args.dropout)
    for net in (netG, netD):
        weights_init(net, args.init)
        net.to(run.device, memory_format=run.memory_format)
    if args.sn:  # Miyato et al. 2018; after weights_init, for it renames the weights
        for m in netD.main:
            if isinstance(m, nn.Conv2d):
                spectral_norm(m)

    netG_ema = copy.deepcopy(netG).eval().requires_grad_(False)  # draws the samples
    optG = make_optimizer(args.optim_g, netG, args.lr_g, args)
    optD = make_optimizer(args.optim_d, netD, args.lr_d, args)
    replay = Replay(args.replay)
    ddpG, ddpD = run.parallel(netG), run.parallel(netD)

    # step counts from 0, after --resume from where the run stopped; real (N, nc, H, W) in [-1, 1];
    # labels (N), unused. Checkpoints keep what is given here, by name; netG_ema draws the pictures.
    for step, real, _ in run.steps(netG=netG, netD=netD, netG_ema=netG_ema, optG=optG, optD=optD,
                                   replay=replay):
        factor = lr_factor(args, run)
        optG.param_groups[0]["lr"] = factor * args.lr_g
        optD.param_groups[0]["lr"] = factor * args.lr_d
        # netD learns in every step, netG in every --d_steps-th, and not while netD is pretrained.
        train_g = step >= args.pretrain_d and (step + 1) % args.d_steps == 0

        # D step: tell real from fake. In two passes, for BatchNorm must not mix real and fake.
        z = torch.randn(len(real), args.nz, device=run.device)
        with run.autocast():
            with torch.set_grad_enabled(train_g):  # the G step, if there is one, uses fake again
                fake = ddpG(z)
            real_logits = ddpD(real).float()
            fake_logits = ddpD(replay(fake.detach())).float()
        loss_d = d_loss(real_logits, fake_logits, args)
        # D = sigmoid(netD), with bce. The log has loss_d without the penalty.
        run.log({"loss_d": loss_d, "D(x)": real_logits.sigmoid(), "D(G(z))": fake_logits.sigmoid()})
        if args.gp != "none" and step % args.gp_every == 0:  # "lazy": StyleGAN2, appendix B
            # netD, not ddpD, which cannot do torch.autograd.grad; it averages these gradients, too.
            penalty = gradient_penalty(netD, real, fake, args.gp)
            loss_d = loss_d + args.gp_every * args.gp_weight * penalty
        optD.zero_grad()
        loss_d.backward()
        optD.step()
        if not train_g:
            continue

        # G step: make the same fakes pass for real. Only netG learns.
        netD.requires_grad_(False)
        with run.autocast():
            fake_logits = netD(fake).float()  # not ddpD: netD's weights get no gradients here
        loss_g = g_loss(fake_logits, args)
        run.log({"loss_g": loss_g})
        optG.zero_grad()
        loss_g.backward()
        optG.step()
        netD.requires_grad_(True)

        # The moving average of netG and of its BatchNorm's statistics. Its decay is low at first,
        # so that it soon forgets the untrained net.
        decay = min(args.ema, (1 + step) / (10 + step))
        for average, w in zip(netG_ema.state_dict().values(), netG.state_dict().values()):
            if w.is_floating_point():  # all but BatchNorm's counts of batches
                average.lerp_(w, 1 - decay)  # decay * average + (1 - decay) * w

# ---------------------------------------------------------------------------------------- PLUMBING
# The same lines in gan.py, dcgan.py and acgan.py. They need METHOD, DATASETS, PAPER, train,
# add_method_flags, and Generator, with its arguments in netG.config: nz, nc and img_size. A net
# with classes has n_classes, too, and is called as netG(z, labels).

import argparse
import collections
import contextlib
import functools
import gc
import glob
import hashlib
import inspect
import io
import json
import os
import shlex
import signal
import sys
import tempfile
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

# Which process this is, and of how many: torchrun says so.
RANK, WORLD_SIZE = int(os.getenv("RANK", "0")), int(os.getenv("WORLD_SIZE", "1"))

def fail(text):
    """Ends the program with one line, for what the user can mend. A bug keeps its traceback."""
    sys.exit(f"{os.path.basename(sys.argv[0])}: error: {' '.join(text.split())}")

@contextlib.contextmanager
def new_file(path):
    """Opens a file that gets its name when the block ends well: nobody ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as folder:
        with open(Path(folder, path.name), "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(f.name, path)

# ------------------------------------------------------------------------------------------- flags

def number(kind, low, high=2**31 - 1):
    """argparse type: an int or a float, as `kind` says, from low to high."""
    def parse(text):
        if not low <= kind(text) <= high:  # nor NaN
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return kind(text)
    parse.__name__ = kind.__name__  # for argparse's own messages
    return parse

class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the lines of the docstring, and shows defaults."""

def make_parser():
    parser = argparse.ArgumentParser(usage="%(prog)s [flags]", description=__doc__,
                                     formatter_class=HelpFormatter, allow_abbrev=False)
    switch = argparse.BooleanOptionalAction
    add_method_flags(parser.add_argument_group("method"))

    flag = parser.add_argument_group("data").add_argument
    flag("--dataset", default="digits", help=f"{', '.join(DATASETS)}, or a folder of images")
    flag("--data_dir", default="./data", help="where data sets are found, downloaded and cached")
    flag("--nc", type=int, choices=(1, 3), default=3, help="channels: 1 grey, 3 RGB")
    flag("--hflip", action=switch, default=False, help="flip real images at random")
    flag("--max_images", type=number(int, 1), help="a random subset of this many")

    group = parser.add_argument_group("run")
    flag = group.add_mutually_exclusive_group().add_argument
    flag("--recipe", choices=("default", "paper"), default="default",
         help="paper: nearly what its authors chose")
    flag("--resume", metavar="RUN", help="go on with the run in this folder, or from a checkpoint")
    flag("--sample", metavar="RUN", help="draw pictures, from a run's folder or a checkpoint")
    flag = group.add_argument
    flag("--epochs", type=number(int, 1), default=250,
         help="length in passes over the data, in place of --max_steps")
    flag("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of training and of latents")
    flag("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    flag("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 if fast")
    flag("--compile", action=switch, default=False, help="torch.compile both nets: for long runs")
    flag("--out_dir", help=f"for the run (runs/{METHOD}-DATASET); another run's: -2, ...")
    flag("--save_interval", type=number(int, 1), metavar="STEPS", help="if none, some 50 saves")
    flag("--keep_every", type=number(int, 1), metavar="EPOCHS", help="keep a checkpoint that often")
    flag("--log_interval", type=number(int, 1), default=50, metavar="STEPS", help="of log.jsonl")
    flag("--tensorboard", action=switch, default=False, help="scalars and grids for TensorBoard")

    flag = parser.add_argument_group("sampling").add_argument
    flag("--n_samples", type=number(int, 1), help="pictures; if none, 64, or 10 of each class")
    flag("--out", metavar="FILE.png|FOLDER/", help="if none, a grid beside the checkpoint")
    flag("--labels", help="classes in turn, by name or number: cat,dog or 0,3,7; if none, all")
    flag("--walk_dim", type=number(int, 0), metavar="D", help="move one coordinate of a latent")
    return parser

def get_args(argv=None):
    """The flags. A later layer wins: default=, DATASETS, PAPER, a resumed run's, what is typed."""
    argv = sys.argv[1:] if argv is None else argv
    typed = {word.split("=")[0] for word in argv if word.startswith("--")}
    parser = make_parser()
    # Parsed twice: first for --dataset, --recipe and --resume, which change defaults.
    args = parser.parse_args([word for word in argv if word not in ("-h", "--help")])
    values = DATASETS.get(args.dataset, {}) | (PAPER if args.recipe == "paper" else {})
    if not values.keys() <= vars(args).keys():
        raise ValueError(f"no flags: {values.keys() - vars(args).keys()}, in DATASETS or PAPER")
    if args.resume is not None:
        path = checkpoint_in(args.resume)
        saved = load_checkpoint(path)["args"] | {"out_dir": str(path.parent)}
        values = {name: saved[name] for name in saved.keys() & vars(args).keys()}
    if "--max_steps" in typed:  # a length that is typed takes the place of both defaults
        values["epochs"] = None
    if "--epochs" in typed:
        values["max_steps"] = None
    parser.set_defaults(**values)
    args = parser.parse_args(argv)

    of_sampling = {"--n_samples", "--out", "--labels", "--walk_dim"}
    if args.sample is None:
        useless, when = typed & of_sampling, "without --sample"
    else:
        useless, when = typed - of_sampling - {"--sample", "--seed", "--device"}, "with --sample"
    if {"--max_steps", "--epochs"} <= typed:
        useless, when = {"--max_steps"}, "with --epochs: type one of them"
    if useless:
        parser.error(f"{min(useless)} does nothing {when}")
    return args

# -------------------------------------------------------------------------------------------- data

def find_images(args):
    """--dataset -> names of its images; open_image(name) -> PIL image; labels (N), -1 for none;
    names of the classes; a stamp that changes with any image; [(reason, name)] of what is left out.
    """
    if args.dataset == "digits":
        names = range(args.max_images or 20000)
        draw = functools.partial(draw_digit, size=args.img_size)
        return names, draw, np.array(names) % 10, list("0123456789"), "", []
    if args.dataset == "celeba":
        pattern = f"{glob.escape(args.data_dir)}/**/img_align_celeba"
        if not glob.glob(pattern, recursive=True):
            download("CelebA", args)
        return list_folder(min(glob.glob(pattern, recursive=True)))
    kinds = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10"}
    if args.dataset in kinds:
        data = download(kinds[args.dataset], args)
        stamp = hashlib.sha256(np.ascontiguousarray(data.data)).hexdigest()
        labels = np.asarray(data.targets)
        return range(len(data)), lambda i: data[i][0], labels, data.classes, stamp, []
    return list_folder(args.dataset)

def download(kind, args):
    """torchvision's data set, downloaded if it is not there yet, but not by several processes."""
    from torchvision import datasets  # here and not above: --help need not wait for it
    try:
        return getattr(datasets, kind)(args.data_dir, download=WORLD_SIZE == 1)
    except Exception as e:  # noqa: BLE001  no network, a quota, damaged files: one way out of all
        fail(f"--dataset {args.dataset}: no download (under torchrun there is none); put its files "
             f"into {args.data_dir}, of celeba the folder img_align_celeba: {e}")

def list_folder(folder):
    """find_images of a folder, behind links too. The folder that an image lies in is its class."""
    stamps, left_out, entered = {}, [], set()

    def no_entry(e):
        left_out.append((e.strerror, e.filename))

    for place, subfolders, files in os.walk(folder, onerror=no_entry, followlinks=True):
        real = os.path.realpath(place)
        if real in entered or "checkpoint.pt" in files:
            why_not = "listed already" if real in entered else "a run's folder"
            left_out.append((why_not, place))
            subfolders.clear()
            continue
        entered.add(real)
        subfolders[:] = [name for name in sorted(subfolders) if not name.startswith(".")]
        for file in files:
            path = Path(place, file)
            name = os.path.relpath(path, folder)
            if path.suffix.lower() in Image.registered_extensions() and path.exists():
                stat = path.stat()  # ctime, for after mv another file may have the same mtime
                stamps[name] = stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns
            else:
                why_not = "no image, by its name" if path.exists() else "a link to nothing"
                left_out.append((why_not, name))
    names = sorted(stamps)
    if not names:
        fail(f"--dataset {folder}: no folder with images; unpack archives; {summary(left_out)}")
    parents = [Path(name).parent.name for name in names]
    classes = sorted(set(parents) - {""})
    number_of = {name: k for k, name in enumerate(classes)}
    labels = np.array([number_of.get(parent, -1) for parent in parents])
    stamp = os.path.realpath(folder), sorted(stamps.items())
    return names, lambda name: Image.open(Path(folder, name)), labels, classes, stamp, left_out

def summary(left_out):
    """[(reason, name)] -> how many files are left out, why, and one of each kind."""
    counts = collections.Counter(reason for reason, name in left_out).most_common(8)
    some = [f"{n} {reason} ({dict(left_out)[reason]})" for reason, n in counts]
    return f"left out {len(left_out)}: {', '.join(some) or 'nothing'}"

font = functools.cache(ImageFont.load_default)

def draw_digit(i, size):
    """The embedded data set: the digit i % 10 in grey, of varied weight, place and angle."""
    rng = np.random.default_rng(i)
    paper, ink = int(rng.integers(20)), int(rng.integers(200, 256))
    side = 2 * size  # reduced later, for smooth edges
    stroke = side * rng.uniform(1 / 64, 1 / 32)
    img = Image.new("L", (side, side), paper)
    middle = tuple(side * rng.uniform(0.47, 0.53, 2))
    ImageDraw.Draw(img).text(middle, str(i % 10), ink, font(side), "mm", stroke_width=stroke)
    return img.rotate(rng.uniform(-6, 6), Image.Resampling.BILINEAR, fillcolor=paper)

def to_pixels(img, size, nc):
    """PIL image -> bytes (size, size, nc): upright, its middle, resized, on white."""
    mode = "L" if nc == 1 else "RGB"
    if img.mode[0] in "IF":
        raise ValueError("with more than 8 bits a channel: convert them")
    img.draft(mode, (2 * size, 2 * size))  # JPEG: decode at reduced size
    with contextlib.suppress(Exception):  # EXIF may be damaged where the pixels are not
        ImageOps.exif_transpose(img, in_place=True)
    if img.has_transparency_data:
        img = Image.alpha_composite(Image.new("RGBA", img.size, "white"), img.convert("RGBA"))
    return ImageOps.fit(img.convert(mode), (size, size), Image.Resampling.BICUBIC).tobytes()

def load_data(args, labelled=False):
    """--dataset -> uint8 images (N, H, W, C); int64 labels (N), -1 for none; names of the classes.
    Under torchrun this process's share of them. labelled: only images that have a class."""
    names, open_image, labels, classes, stamp, left_out = find_images(args)
    chosen = np.arange(len(names))
    if labelled:
        if len(classes) < 2:
            fail(f"--dataset {args.dataset}: no classes; give one with a folder for each class")
        chosen = chosen[labels >= 0]
        left_out += [("in no class's folder", names[i]) for i in np.flatnonzero(labels < 0)]
    some = np.random.default_rng(0).permutation(len(chosen))[:args.max_images]  # None: all
    chosen = chosen[np.sort(some[RANK::WORLD_SIZE])]

    # Decoded once, into a file that is mapped to memory. Its name changes with any image, and with
    # any edit of the two functions that make pixels.
    code = inspect.getsource(to_pixels) + inspect.getsource(draw_digit)
    made_of = repr((stamp, args.img_size, args.nc, code)).encode()
    key = hashlib.sha256(made_of + chosen.tobytes()).hexdigest()[:16]
    cache = Path(args.data_dir, "cache", f"{Path(args.dataset).resolve().name}-{key}")
    if not cache.exists():
        decode(names, open_image, chosen, args, cache)
    data = np.memmap(cache, mode="c")  # "c", for torch warns of arrays that may only be read
    end = len(data) - 8 - int.from_bytes(data[-8:].tobytes())
    readable, unreadable = json.loads(data[end:-8].tobytes())
    images = torch.from_numpy(data[:end].reshape(-1, args.img_size, args.img_size, args.nc))
    left_out += map(tuple, unreadable)
    if left_out:
        print(summary(left_out), file=sys.stderr)
    if np.ptp(images[::len(images) // 100 + 1].numpy(), 0).mean() < 3:
        print("warning: the images hardly differ (transparent parts are white)", file=sys.stderr)
    return images, torch.from_numpy(labels[readable]), classes

def decode(names, open_image, chosen, args, cache):
    """Writes the pixels of all images that can be read; then, in JSON, which of the names they are,
    and why others are left out; then, in 8 bytes, how long the JSON is."""
    def read(i):
        try:
            img = open_image(names[i])
            frames = 1 if img.format == "MPO" else getattr(img, "n_frames", 1)  # MPO: a small copy
            return to_pixels(img, args.img_size, args.nc), frames, ""
        except Exception as e:  # noqa: BLE001  damaged files make Pillow raise nearly anything
            return b"", 0, str(e).split(" '")[0] or type(e).__name__  # without the file's name

    readable, left_out = [], []
    with new_file(cache) as f, ThreadPool() as pool:
        bar = tqdm(pool.imap(read, chosen, 64), "decoding", len(chosen), disable=RANK > 0)
        for (pixels, frames, why_not), i in zip(bar, chosen.tolist()):
            f.write(pixels)
            if why_not:
                left_out.append((why_not, str(names[i])))
            else:
                readable.append(i)
                left_out += [("pages or frames after the first", names[i])] * (frames - 1)
        if not readable:
            fail(f"--dataset {args.dataset}: no image can be read; {summary(left_out)}")
        about = json.dumps([readable, left_out]).encode()
        f.write(about + len(about).to_bytes(8))

# ---------------------------------------------------------------------------------------- sampling

def latents(seed, n, nz):
    """The first n latents of a seed: float32 (n, nz) ~ N(0, 1), by Philox and Box-Muller, so that
    every language can make the same ones. infer_ort.py says how."""
    words = np.random.Philox(key=seed).random_raw(n * math.ceil(nz / 4) * 4).reshape(n, -1, 2)
    u = ((words >> np.uint64(11)) + 0.5) * 2.0**-53  # two uniform numbers make two normal ones
    r = np.sqrt(-2 * np.log(u[..., 0]))
    t = 2 * np.pi * u[..., 1]
    return np.stack((r * np.cos(t), r * np.sin(t)), -1).reshape(n, -1)[:, :nz].astype(np.float32)

@torch.no_grad()
def generate(netG, *inputs):
    """Latents (n, nz), for a net with classes labels (n), too -> uint8 (n, H, W, C)."""
    device = next(netG.parameters()).device
    n = len(inputs[0])
    pictures = []
    for i in range(0, n, 64):
        # Always 64, the last one repeated: in another batch a picture may differ in its last bit.
        rows = np.arange(i, i + 64).clip(max=n - 1)
        x = netG(*(torch.from_numpy(array[rows]).to(device) for array in inputs))
        pixels = (x.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)  # 127.5 + 0.5: rounded
        pictures.append(pixels.permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(pictures)[:n]

def save_grid(path, images, columns):
    """uint8 (N, H, W, C) -> a PNG file, `columns` pictures in a row."""
    from torchvision.utils import make_grid  # here and not above: --help need not wait for it
    grid = make_grid(torch.tensor(images).permute(0, 3, 1, 2), columns, pad_value=255)
    with new_file(path) as f:
        Image.fromarray(grid.permute(1, 2, 0).numpy()).save(f, "png")

def sample(args):
    """--sample: pictures of a checkpoint's netG, as a grid or as PNG files in a folder."""
    path = checkpoint_in(args.sample)
    ckpt = load_checkpoint(path)
    netG = load_generator(ckpt).to(pick_device(args.device))
    nz, classes = netG.config["nz"], ckpt["classes"][:netG.config.get("n_classes", 0)]
    number_of = {str(k): k for k in range(len(classes))}
    number_of |= {name: k for k, name in enumerate(classes)}  # a name comes before a number
    asked = classes if args.labels is None else [name.strip() for name in args.labels.split(",")]
    if not set(asked) <= number_of.keys():
        fail(f"--labels {args.labels}: choose from {', '.join(classes) or 'none: no classes'}")
    out = args.out or f"{path.with_suffix('')}_samples.png"
    if Path(out).suffix not in ("", ".png") and not out.endswith("/"):
        fail(f"--out {out}: give a .png file or a folder/")
    if args.walk_dim is not None and args.walk_dim >= nz:
        fail(f"--walk_dim {args.walk_dim}: the coordinates are 0 to {nz - 1}")

    n = args.n_samples or 10 * len(asked) or 64
    inputs = [latents(args.seed, n, nz)]
    if args.walk_dim is not None:
        inputs[0][:] = inputs[0][0]
        inputs[0][:, args.walk_dim] += 0.01 * np.arange(n)
    if classes:
        inputs.append(np.resize([number_of[name] for name in asked], n))
    if out.endswith(".png"):
        save_grid(Path(out), generate(netG, *inputs), len(asked) or math.ceil(math.sqrt(n)))
    else:
        Path(out).mkdir(parents=True, exist_ok=True)
        for i in tqdm(range(0, n, 64), "sampling", delay=2):
            for k, image in enumerate(generate(netG, *(array[i:i + 64] for array in inputs)), i):
                Image.fromarray(image.squeeze()).save(Path(out, f"{k:06d}.png"))
    print(f"wrote {out}")

# ------------------------------------------------------------------------------------- checkpoints

def checkpoint_in(path):
    """A run's folder -> its checkpoint. A checkpoint -> itself."""
    return Path(path, "checkpoint.pt") if os.path.isdir(path) else Path(path)

def load_checkpoint(path):
    """What a run of this method saved, on the CPU."""
    with open(path, "rb") as f:
        try:
            ckpt = torch.load(f, map_location="cpu", weights_only=True)  # which runs no code
            method = ckpt["script"]
        except Exception:  # noqa: BLE001  damaged files make torch raise nearly anything
            fail(f"{path}: damaged, or no checkpoint of these scripts (export.py takes others)")
    if method != METHOD:
        fail(f"{path} is of {method}.py")
    return ckpt

def load_generator(ckpt):
    """netG_ema of a checkpoint, in eval mode."""
    ckpt["config"].pop("widest", None)  # which older runs have
    netG = Generator(**ckpt["config"])
    netG.load_state_dict(ckpt["netG_ema"])
    return netG.eval()

# --------------------------------------------------------------------------------------------- run

def pick_device(name):
    """torch.device of --device, with its number: under torchrun each process has its own GPU."""
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        name = found.type if found else "cpu"
    if name == "cuda":
        name = f"cuda:{os.getenv('LOCAL_RANK', '0')}"
    try:
        return torch.zeros(1, device=name).device
    except (AssertionError, RuntimeError) as e:
        fail(f"--device {name}: {str(e).splitlines()[0]}")

class Run:
    """What surrounds the method: processes, data, log, pictures, checkpoints."""

    def __init__(self, args, labelled=False):
        """labelled: train only on images that have a class."""
        self.args = args
        self.step = self.seen = 0  # seen: images, by all processes
        self.signum = 0  # the signal that ends the run
        self.device = pick_device(args.device)
        kind = self.device.type
        if kind == "cuda":
            torch.cuda.set_device(self.device)
        if WORLD_SIZE > 1:
            dist.init_process_group("nccl" if kind == "cuda" else "gloo")
        fast = kind == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)
        if kind == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        bf16 = args.precision == "bf16" or (args.precision == "auto" and fast)
        self.autocast = functools.partial(torch.autocast, kind, torch.bfloat16, enabled=bf16)
        self.memory_format = torch.channels_last
        if kind == "mps":  # its gradients are wrong for channels_last: pytorch#175189
            self.memory_format = torch.contiguous_format
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")  # TF32 for nn.Linear, as convolutions have it

        self.images, self.labels, self.classes = load_data(args, labelled)
        n = self.agree(len(self.images), dist.ReduceOp.MIN)  # processes may differ by one
        if n < args.batch_size:
            fail(f"--batch_size {args.batch_size}: more than the {n} images of a process")
        self.batch = args.batch_size * WORLD_SIZE  # of all processes together
        self.epoch_size = n // args.batch_size * self.batch  # the rest fills no batch
        if kind == "cuda" and self.images.nbytes < torch.cuda.mem_get_info()[0] / 2:
            self.images, self.labels = self.images.to(self.device), self.labels.to(self.device)
        torch.manual_seed(args.seed)  # for the nets that train() makes next
        torch.empty(2**25 - 2**16, dtype=torch.uint8)  # freed: glibc then keeps blocks this large

    def agree(self, number, operation):
        """The least or the greatest of the processes' numbers: dist.ReduceOp.MIN or MAX."""
        if WORLD_SIZE == 1:
            return number
        number = torch.tensor(number, device=self.device)
        dist.all_reduce(number, operation)
        return int(number)

    def parallel(self, net):
        """net, compiled with --compile; under torchrun one that averages gradients."""
        if self.args.compile:
            net.compile(dynamic=False)  # in place: names stay, and forward() is as it was
        if WORLD_SIZE > 1:
            net = DistributedDataParallel(net)
            # As an argument it warns. A broadcast between netD's two passes spoils the backward.
            net.broadcast_buffers = False
        return net

    def steps(self, **state):
        """Yields (step, real (N, nc, H, W) in [-1, 1], labels (N)) until the run is done.
        state: what checkpoints keep by name and --resume restores. netG_ema is what is sampled."""
        args, self.state = self.args, state
        if args.resume is not None:
            self.restore()
        self.plan()
        self.begin()
        stop = 0
        while self.step < self.total and not stop:
            self.done = self.step / (args.max_steps or self.total)  # few images end a run below 1
            self.epoch = self.seen / self.epoch_size  # with a fraction
            yield self.step, *self.next_batch()
            self.step += 1
            self.seen += self.batch
            self.bar.update()
            if WORLD_SIZE == 1 or self.step % 10 == 0:  # asking the other processes takes time
                stop = self.agree(self.signum, dist.ReduceOp.MAX)
            keep = bool(args.keep_every) and self.seen % (args.keep_every * self.epoch_size) == 0
            save = keep or stop or self.step == self.total or self.step % self.interval == 0
            if save or self.step % args.log_interval == 0:
                self.write_log()
            if save and RANK == 0:
                self.save(*self.pack(), keep)
        self.end(stop)

    def restore(self):
        """Takes step and state from the checkpoint of --resume."""
        path, args = checkpoint_in(self.args.resume), vars(self.args)
        ckpt = load_checkpoint(path)
        if "n_classes" in ckpt["config"] and ckpt["classes"] != self.classes:
            fail(f"--resume: {path} has the classes {', '.join(ckpt['classes'])}; "
                 f"--dataset {args['dataset']} has {', '.join(self.classes)}")
        try:
            for name, part in self.state.items():
                saved = ckpt[name]
                if isinstance(part, torch.optim.Optimizer):  # its moments; options are today's
                    groups = part.state_dict()["param_groups"]
                    if ("betas" in groups[0]) != ("betas" in saved["param_groups"][0]):
                        raise ValueError("Adam is not RMSprop")
                    saved = saved | {"param_groups": groups}
                part.load_state_dict(saved)
        except (KeyError, RuntimeError, ValueError):
            changed = [f"--{name} {args[name]} (it was {old})" for name, old in ckpt["args"].items()
                       if name in args.keys() - {"resume", "out_dir"} and args[name] != old]
            if not changed:  # then somebody edited the nets
                raise
            fail(f"--resume: nets and optimizers cannot change; take back {', '.join(changed)}")
        self.step = ckpt["step"]
        self.seen = ckpt["seen"] // self.batch * self.batch  # --batch_size may be another now

    def plan(self):
        """How long the run is, how often it saves, and what its grids show."""
        args, n = self.args, self.epoch_size
        if args.epochs is None:  # --max_steps was typed
            self.total = args.max_steps
        else:
            self.total = self.step + (args.epochs * n - self.seen) // self.batch
        if args.epochs and args.max_steps:  # neither was typed
            # netD learns few images by heart, and then pictures get worse again: so 250 passes or
            # 250 * sqrt(n) steps at most (measured: benchmarks/RESULTS.md).
            self.total = min(self.total, args.max_steps, int(args.epochs * math.sqrt(n)))
        if self.step >= self.total:
            fail(f"--resume: its {self.step} steps are done; give more --max_steps or --epochs")
        self.interval = args.save_interval or max(100, self.total // 50)
        n_classes = self.state["netG_ema"].config.get("n_classes", 0)
        self.columns = n_classes or 8
        n = min(10 * n_classes, 500) or 64
        self.inputs = [latents(args.seed, n, args.nz)]
        if n_classes:
            self.inputs.append(np.arange(n) % n_classes)

    def begin(self):
        """Saves the state before the first step: what an edit has made impossible shows here."""
        signal.signal(signal.SIGINT, self.note_signal)
        signal.signal(signal.SIGTERM, self.note_signal)
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
            signal.signal(signal.SIGHUP, self.note_signal)
        if RANK == 0:
            packed, pictures = self.pack()
            self.take_folder()
            self.save(packed, pictures)
        self.bar = tqdm(total=self.total, initial=self.step, unit="step", disable=RANK > 0)
        self.to_log, self.logged, self.log_time = {}, self.step, time.perf_counter()

    def note_signal(self, signum, frame):
        """Ends the run after its step. The same signal again ends it at once."""
        self.signum = signum
        signal.signal(signum, signal.default_int_handler)  # which raises KeyboardInterrupt

    def take_folder(self):
        """Sets out_dir: that of --resume; or a new one, whose owner is who makes samples/ in it."""
        args = self.args
        name = str(Path(args.out_dir or f"runs/{METHOD}-{Path(args.dataset).resolve().name}"))
        own = Path(name, "checkpoint.pt")  # from a numbered one on, it is another run
        goes_on = args.resume is not None and checkpoint_in(args.resume) == own
        for suffix in ("", *(f"-{k}" for k in range(2, 1000))):
            self.out_dir = Path(name + suffix)
            try:
                (self.out_dir / "samples").mkdir(parents=True, exist_ok=goes_on)
                break
            except FileExistsError:  # another run's
                continue
        else:
            fail(f"--out_dir {name}: there are runs up to {self.out_dir}")
        log = self.out_dir / "log.jsonl"
        if log.exists():  # a kill may have come long after the last save
            rows = [row for row in log.read_text().splitlines() if row.endswith("}")]
            rows = [row + "\n" for row in rows if json.loads(row)["step"] <= self.step]
            with new_file(log) as f:
                f.write("".join(rows).encode())
        if args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.writer = SummaryWriter(self.out_dir, purge_step=self.step + 1)
        some = np.random.default_rng(args.seed).permutation(len(self.images))[:64]
        save_grid(self.out_dir / "samples" / "real.png", self.images[some].cpu().numpy(), 8)
        print(f"{len(self.images)} images {args.img_size}x{args.img_size}x{args.nc}, "
              f"{len(self.classes)} classes: {', '.join(self.classes[:10]) or 'none'}\n"
              f"{WORLD_SIZE} x {self.device}, {self.total} steps -> {self.out_dir}", flush=True)

    def next_batch(self):
        """The order comes from (seed, epoch), all other randomness from (seed, step, rank): a
        resume needs no random state."""
        args, device = self.args, self.device
        epoch, start = divmod(self.seen, self.epoch_size)
        if start == 0 or not hasattr(self, "order"):
            order = np.random.default_rng((args.seed, epoch)).permutation(len(self.images))
            self.order = torch.from_numpy(order).to(self.images.device)
        seed = np.random.SeedSequence((args.seed, self.step, RANK)).generate_state(1)[0]
        # Not torch.manual_seed, which seeds all devices and takes 6 % of gan.py's step.
        here = torch.default_generator if device.type == "cpu" else torch.get_device_module(device)
        here.manual_seed(int(seed))
        index = self.order[start // WORLD_SIZE:][:args.batch_size]
        real, labels = self.images[index], self.labels[index]
        real = real.to(device).permute(0, 3, 1, 2).float().sub_(127.5).div_(127.5)
        if args.hflip:
            flip = torch.rand(len(real), 1, 1, 1, device=device) < 0.5
            real = torch.where(flip, real.flip(3), real)
        return real.contiguous(memory_format=self.memory_format), labels.to(device)

    def log(self, values):
        """{name: tensor}: means go to the next row of the log. Nobody waits for the GPU here."""
        for name, value in values.items():
            self.to_log.setdefault(name, []).append(value.detach())

    def write_log(self):
        """A row of log.jsonl, the bar and TensorBoard. Ends a run that is not finite any more."""
        row = {name: torch.stack(some).float().mean().item() for name, some in self.to_log.items()}
        nets = [part for part in self.state.values() if isinstance(part, nn.Module)]
        norm = nn.utils.get_total_norm([w for net in nets for w in net.parameters()]).item()
        if not all(map(math.isfinite, (norm, *row.values()))):
            fail(f"losses or weights are not finite at step {self.step}, and not saved; try lower "
                 "--lr_g and --lr_d, more --gp_weight or --precision fp32")
        now = time.perf_counter()
        row["images/s"] = (self.step - self.logged) * self.batch / (now - self.log_time)
        self.to_log, self.logged, self.log_time = {}, self.step, now
        self.bar.set_postfix(row)
        if RANK == 0:
            place = {"step": self.step, "epoch": self.seen / self.epoch_size, "time": time.time()}
            with open(self.out_dir / "log.jsonl", "a") as f:
                f.write(json.dumps(place | row) + "\n")
        if RANK == 0 and self.args.tensorboard:
            for name, value in row.items():
                self.writer.add_scalar(name, value, self.step)

    def pack(self):
        """A checkpoint's bytes, and a grid's pictures, drawn from them as --sample would."""
        ckpt = {name: part.state_dict() for name, part in self.state.items()}
        ckpt |= {"script": METHOD, "args": vars(self.args), "config": self.state["netG_ema"].config,
                 "classes": self.classes, "step": self.step, "seen": self.seen}
        packed = io.BytesIO()  # torch.save into a file would not say that the disk is full
        torch.save(ckpt, packed)
        packed.seek(0)
        netG = load_generator(torch.load(packed, map_location="cpu", weights_only=True))
        return packed.getbuffer(), generate(netG.to(self.device), *self.inputs)

    def save(self, packed, pictures, keep=False):
        """Writes what pack() made; with `keep` a numbered checkpoint, too."""
        numbered = f"checkpoint_epoch_{self.seen // self.epoch_size:04d}.pt"
        for name in ["checkpoint.pt", numbered] if keep else ["checkpoint.pt"]:
            with new_file(self.out_dir / name) as f:
                f.write(packed)
        save_grid(self.out_dir / "samples" / f"step_{self.step:08d}.png", pictures, self.columns)
        if self.args.tensorboard:
            self.writer.add_images("samples", pictures, self.step, dataformats="NHWC")
            self.writer.flush()

    def end(self, stop):
        """Says how to go on. After a signal the program ends, with its exit code."""
        self.bar.close()
        finished = self.step == self.total
        if RANK == 0 and finished:
            files = sorted((self.out_dir / "samples").glob("step_*.png"))
            files = files[::-1][::len(files) // 100 + 1][::-1]  # the last one always
            first, *others = [Image.open(file).convert("RGB") for file in files]
            with new_file(self.out_dir / "samples.gif") as f:  # how the grids came about
                first.save(f, "gif", save_all=True, append_images=others, loop=0, duration=200)
        if RANK == 0:
            if self.args.tensorboard:
                self.writer.close()
            flag = "--sample" if finished else "--resume"
            command = shlex.join(["python", sys.argv[0], flag, str(self.out_dir)])
            print(f"{self.step} of {self.total} steps are done; go on with: {command}", flush=True)
        if WORLD_SIZE > 1:
            dist.destroy_process_group()
            gc.collect()  # gloo's threads must end first, or one exit in ten aborts
        if not finished:
            sys.exit(128 + stop)

# ----------------------------------------------------------------------------------------- program

def keep_going(stream):
    """stdout or stderr, for a run goes on where nobody reads it: after Ctrl-C in `| tee`, say."""
    stream = stream or open(os.devnull, "w")  # noqa: SIM115  None: closed by who started us
    stream.reconfigure(errors="backslashreplace")  # for names that a terminal cannot show
    write = stream.write

    def write_or_not(text):
        try:
            write(text)
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

    stream.write = write_or_not
    return stream

def main():
    """What the user can mend, a full disk say, is one line; a bug keeps its traceback."""
    sys.stdout, sys.stderr = keep_going(sys.stdout), keep_going(sys.stderr)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or unfinished files would stay
    try:
        args = get_args()
        if args.sample is None:
            train(args)
        else:
            sample(args)
    except (OSError, MemoryError, torch.OutOfMemoryError, KeyboardInterrupt) as e:
        fail(str(e) or type(e).__name__)

if __name__ == "__main__":
    main()
