"""DCGAN: Radford et al. 2016, "Unsupervised Representation Learning with Deep Convolutional GANs".

A generator (netG) of transposed convolutions and a discriminator (netD) of strided ones play a
game: netD learns to tell real pictures from netG's, netG to make those that netD takes for real.

    python dcgan.py                               # embedded digits, no download
    python dcgan.py --dataset celeba --ngf 128    # 64x64 RGB; or mnist, a folder, a .zip
    python dcgan.py --recipe paper                # nearly the paper's (see RECIPES)
    python dcgan.py --resume                      # go on with the last run that was stopped
    python dcgan.py --sample runs/dcgan-digits    # a grid of new pictures
    torchrun --nproc_per_node 2 dcgan.py          # one process for each GPU

The default is not the paper's: it has a gradient penalty (R1), an average of netG's weights,
smaller nets and batches, and learning rates 10 (netG) and 5 (netD) times the paper's, which fall to
0. 64x64 faces (UTKFace) take 122 minutes on one core of an AMD EPYC, MNIST takes 7
(benchmarks/RESULTS.md).
"""

# The method needs copy, math, torch, F, nn, spectral_norm. The rest is for the lower part of the file.
import argparse
import contextlib
import copy
import datetime
import functools
import gc
import glob
import hashlib
import io
import itertools
import json
import math
import os
import re
import shlex
import signal
import sys
import tempfile
import threading
import time
import zipfile
from collections import Counter
from multiprocessing.pool import ThreadPool
from pathlib import Path, PurePosixPath

import numpy as np
import PIL
import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock, Timeout
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import spectral_norm
from tqdm import tqdm

METHOD = "dcgan"  # kept in checkpoints; a copy of this file for another method needs its own

# ------------------------------------------------------------------------------------------- flags

# Default values, written as flags. "paper" overrides "default" in the flags that it lists, and only
# there. --batch_size (for each process), --lr_g, --lr_d and more flags that all scripts have are
# defined in the lower part of the file, in make_parser, all others just below.
RECIPES = {
    "default": "--ngf 64 --ndf 32 --batch_size 32 --lr_g 2e-3 --lr_d 1e-3 --lr_decay linear"
               " --gp r1 --gp_weight 0.3 --ema 0.999",
    # Section 4; figure 1 for netG, the authors' code for netD. Not theirs: z is normal, not uniform;
    # kernels are 4x4, not 5x5; --dataset celeba and cifar10 flip images.
    "paper": "--ngf 128 --ndf 128 --batch_size 128 --lr_g 2e-4 --lr_d 2e-4 --lr_decay none"
             " --gp none --ema 0",
}

def add_method_flags(group):
    # Where there is no default=, it is in RECIPES. The types, made in the lower part: positive is
    # an int >= 1, count an int >= 0, not_negative a float >= 0, fraction a float with 0 <= x <= 1,
    # below_1 a float with 0 <= x < 1.
    flag = group.add_argument
    flag("--img_size", type=int, choices=(16, 32, 64, 128, 256), default=64, help="height and width")
    flag("--nz", type=positive, default=100, help="size of the latent vector")
    flag("--ngf", type=positive, help="channels of netG's last hidden layer")
    flag("--ndf", type=positive, help="channels of netD's first layer")
    flag("--init", choices=("dcgan", "he", "xavier"), default="dcgan", help="dcgan: N(0, 0.02)")
    flag("--sn", action=argparse.BooleanOptionalAction, default=False,
         help="spectral norm in netD, in place of BatchNorm")
    flag("--dropout", type=below_1, default=0.0, help="dropout probability in netD")
    flag("--loss", choices=("bce", "hinge"), default="bce", help="bce: cross-entropy")
    flag("--real_label", type=fraction, default=1.0, help="bce: target for real (0.9: smoothed)")
    flag("--fake_label", type=fraction, default=0.0, help="bce: target for fake (0.1: smoothed)")
    flag("--gp", choices=("none", "r1", "interpolate"), help="gradient penalty on netD")
    flag("--gp_weight", type=not_negative, help="weight of --gp; interpolate: 10 in its paper")
    flag("--gp_every", type=positive, default=4, help="penalty every N-th step, multiplied by N")
    flag("--ema", type=below_1, help="decay of netG's average, which draws the samples; 0: none")
    flag("--d_steps", type=positive, default=1, help="netD steps, on new images, for one of netG")
    flag("--pretrain_d", type=count, default=0,
         metavar="STEPS", help="train netD first, on pictures of the untrained netG")
    flag("--replay", type=fraction, default=0.0, help="share of netD's fakes that are old ones")
    flag("--optim_g", choices=("adam", "rmsprop"), default="adam", help="optimizer of netG")
    flag("--optim_d", choices=("adam", "rmsprop"), default="adam", help="optimizer of netD")
    flag("--lr_decay", choices=("none", "linear", "step"), help="linear: to 0 in the run's second half")
    flag("--lr_step", type=positive, default=10, metavar="N", help="step: halve every N epochs")

# -------------------------------------------------------------------------------------------- nets

class Generator(nn.Module):
    """(N, nz) latents ~ N(0, 1) -> (N, nc, img_size, img_size) images in [-1, 1].

    Radford et al. 2016, figure 1, at img_size 64 and ngf 128, with kernels of 4x4, not 5x5. Names
    and order of the layers are those of pytorch/examples, so that its state dicts load. No layer
    has more than widest * ngf channels; with ngf 64 these are 512, StyleGAN's bound. widest is 8
    but for files of others, in which config_of may find more.
    """

    def __init__(self, nz=100, ngf=64, nc=3, img_size=64, widest=8):
        super().__init__()
        # Kept in checkpoints.
        self.config = {"nz": nz, "ngf": ngf, "nc": nc, "img_size": img_size, "widest": widest}
        stages = int(math.log2(img_size)) - 3  # each doubles height and width; 3 at img_size 64
        channels = ngf * min(2**stages, widest)
        layers = [nn.ConvTranspose2d(nz, channels, 4, 1, 0, bias=False)]  # (ngf*8) x 4 x 4
        layers += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
        for k in reversed(range(stages)):  # (ngf*4) x 8 x 8, (ngf*2) x 16 x 16, ngf x 32 x 32
            out = ngf * min(2**k, widest)
            layers += [nn.ConvTranspose2d(channels, out, 4, 2, 1, bias=False)]
            layers += [nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
            channels = out
        layers += [nn.ConvTranspose2d(ngf, nc, 4, 2, 1, bias=False), nn.Tanh()]  # nc x 64 x 64
        self.main = nn.Sequential(*layers)

    def forward(self, z, labels=None):  # sampling passes labels, for nets with classes
        z = z.flatten(1)
        if z.is_cuda:  # the same, strided as channels_last: else --compile fails (pytorch#171622)
            return self.main(z[:, None, None].permute(0, 3, 1, 2))  # (N, 1, 1, nz) -> (N, nz, 1, 1)
        return self.main(z[:, :, None, None])  # (N, nz, 1, 1)

class Discriminator(nn.Module):
    """(N, nc, img_size, img_size) images in [-1, 1] -> (N) logits: real if positive."""

    def __init__(self, nc=3, ndf=64, img_size=64, sn=False, dropout=0.0):
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
        if sn:  # Miyato et al. 2018, in place of BatchNorm
            layers = [spectral_norm(m) if isinstance(m, nn.Conv2d) else m for m in layers]
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
        for w in m.parameters():  # not m.weight: with spectral norm it has another name
            if w.ndim == 1:  # a bias
                nn.init.zeros_(w)
            elif init == "dcgan":
                nn.init.normal_(w, 0.0, 0.02)
            elif init == "xavier":
                nn.init.xavier_normal_(w)
            elif isinstance(m, nn.ConvTranspose2d):  # w is (in, out, 4, 4): fan_out counts inputs
                nn.init.kaiming_normal_(w, mode="fan_out", nonlinearity="relu")
            else:
                nn.init.kaiming_normal_(w, a=0.2, mode="fan_in")  # the slope of LeakyReLU

def config_of(state):
    """Generator's arguments, read off its weights: for --sample on a file with weights alone.

    Change it when you change Generator's layers.
    """
    convs = [w for name, w in state.items() if name.startswith("main.") and w.ndim == 4]
    nz = convs[0].shape[0]  # a ConvTranspose2d's weight is (in, out, 4, 4)
    ngf, nc = convs[-1].shape[:2]
    widest = convs[0].shape[1] // ngf
    img_size = 2 ** (len(convs) + 1)  # 5 layers at 64
    return {"nz": nz, "ngf": ngf, "nc": nc, "img_size": img_size, "widest": widest}

# ------------------------------------------------------------------------------------------ losses

def d_loss(real_logits, fake_logits, args):
    """-log D(x) - log(1 - D(G(z))): minus eq. 1 of Goodfellow et al. 2014. Or hinge, Miyato 2018."""
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
    """r1: Mescheder et al. 2018, eq. 9. interpolate: Gulrajani et al. 2017, eq. 3. Not in bf16.

    r1 is |grad|^2 / (2 nc), so that one --gp_weight suits grey and RGB: Mescheder's gamma divided by
    nc. With BatchNorm in netD an image's gradient also goes through the others of its batch.
    """
    if kind == "r1":
        x = real
    else:
        a = torch.rand(len(real), 1, 1, 1, device=real.device)
        x = a * fake + (1 - a) * real
    x = x.detach().requires_grad_()
    logits = netD.forward(x)  # .forward skips --compile, which has no second derivative
    (grad,) = torch.autograd.grad(logits, x, torch.ones_like(logits), create_graph=True)
    squared = grad.square().sum((1, 2, 3))
    nc = x.shape[1]
    if kind == "r1":
        return squared.mean() / 2 / nc
    norm = (squared + 1e-12).sqrt()
    return (norm - 1).square().mean()

# ---------------------------------------------------------------------------------------- training

class Replay:
    """Shows netD some fakes of the last steps again (Shrivastava et al. 2017, section 2.3)."""

    def __init__(self, share):
        self.share = share
        self.old = None

    def __call__(self, fake):
        """(N, nc, H, W) fakes -> as many, a share of them from those of the eight calls before."""
        if self.share == 0:
            return fake
        old = fake if self.old is None else self.old.to(fake)  # from a checkpoint it is on the CPU
        self.old = torch.cat((old, fake))[-8 * len(fake):]
        pick = torch.randperm(len(old), device=fake.device)[:round(self.share * len(fake))]
        return torch.cat((fake[len(pick):], old[pick]))

    def state_dict(self):
        return {"old": self.old}

    def load_state_dict(self, state):
        self.old = state["old"]

def make_optimizer(name, net, lr, args):
    if name == "rmsprop":
        return torch.optim.RMSprop(net.parameters(), lr)
    return torch.optim.Adam(net.parameters(), lr, (args.beta1, args.beta2), fused=True)

def lr_factor(args, run):
    """The factor on both learning rates. run.done goes from 0 to 1; few images end a run earlier."""
    if args.lr_decay == "linear":  # 1 in the first half, then a straight line to 0
        return min(1, 2 - 2 * run.done)
    if args.lr_decay == "step":
        return 0.5 ** (run.epoch // args.lr_step)
    return 1

def train(args):
    # Run, further down, is the plumbing: devices, data, log, checkpoints. Used here:
    #   run.done          the share of --max_steps that is done
    #   run.autocast()    bfloat16 where it is fast; bfloat16 needs no GradScaler
    #   run.log({...})    a line of the log has the mean of all values since the line before
    #   run.epoch         how often the data was seen
    run = Run(args)
    netG = Generator(args.nz, args.ngf, args.nc, args.img_size)
    netD = Discriminator(args.nc, args.ndf, args.img_size, args.sn, args.dropout)
    for net in (netG, netD):
        weights_init(net, args.init)
        net.to(run.device, memory_format=run.memory_format)

    # Samples come from this moving average of netG's weights, updated after each G step. Statistics
    # of BatchNorm are not averaged: before each save the plumbing measures them, on 512 latents.
    netG_ema = copy.deepcopy(netG).eval().requires_grad_(False)
    optG = make_optimizer(args.optim_g, netG, args.lr_g, args)
    optD = make_optimizer(args.optim_d, netD, args.lr_d, args)
    replay = Replay(args.replay)

    # Under torchrun run.parallel(net) is DistributedDataParallel(net), which averages gradients
    # over the processes; otherwise it is net. With --compile it also calls net.compile().
    ddpG = run.parallel(netG)
    ddpD = run.parallel(netD)

    # run.steps yields (step, images in [-1, 1], labels) until the run is done. Steps count from 0,
    # and --resume goes on counting. Checkpoints keep the arguments of run.steps under these names.
    # run.steps logs, saves and draws between steps, also after a `continue`.
    for step, real, _ in run.steps(netG=netG, netD=netD, netG_ema=netG_ema, optG=optG, optD=optD,
                                   replay=replay):
        factor = lr_factor(args, run)
        optG.param_groups[0]["lr"] = factor * args.lr_g
        optD.param_groups[0]["lr"] = factor * args.lr_d
        train_g = step >= args.pretrain_d and (step + 1) % args.d_steps == 0

        # D step: tell real from fake. In two passes, for BatchNorm must not mix real and fake.
        z = torch.randn(len(real), args.nz, device=run.device)
        with run.autocast():
            with torch.set_grad_enabled(train_g):  # only a G step needs fake's graph
                fake = ddpG(z)
            real_logits = ddpD(real).float()
            fake_logits = ddpD(replay(fake.detach())).float()
        loss_d = d_loss(real_logits, fake_logits, args)
        # The log has loss_d without the penalty. D is the sigmoid of netD: with bce a probability.
        run.log({"loss_d": loss_d, "D(x)": real_logits.sigmoid(), "D(G(z))": fake_logits.sigmoid()})
        if args.gp != "none" and step % args.gp_every == 0:  # "lazy": StyleGAN2, appendix B
            # Not ddpD: DistributedDataParallel does not support autograd.grad. The weights are
            # ddpD's, so loss_d.backward() averages the penalty's gradients, too.
            penalty = gradient_penalty(netD, real, fake, args.gp)
            loss_d = loss_d + args.gp_every * args.gp_weight * penalty
        optD.zero_grad()
        loss_d.backward()
        optD.step()
        if not train_g:
            continue

        # G step: make the same fakes pass for real. netD is frozen: the gradient only goes through
        # it, to netG. Not ddpD: DistributedDataParallel would wait for gradients of netD's weights.
        netD.requires_grad_(False)
        with run.autocast():
            fake_logits = netD(fake).float()
        loss_g = g_loss(fake_logits, args)
        run.log({"loss_g": loss_g})
        optG.zero_grad()
        loss_g.backward()
        optG.step()
        netD.requires_grad_(True)

        # decay rises from 0.1 at step 0 to args.ema. With --ema 0 the average is netG's weights.
        decay = min(args.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for average, w in zip(netG_ema.parameters(), netG.parameters()):
                average.lerp_(w, 1 - decay)  # decay * average + (1 - decay) * w

# ---------------------------------------------------------------------------------------- PLUMBING
# The same lines in gan.py, dcgan.py and acgan.py. They need from above:
# - METHOD, another one in a copy that is another method; add_method_flags, with --nz, --img_size and
#   --d_steps; RECIPES, with --batch_size, --lr_g, --lr_d and each method flag that has no default
# - Generator, called as netG(z, labels), with exactly its arguments in .config: nz, nc, img_size, and
#   n_classes if it takes labels, which are int64 and, for a net without classes, all 0. Latents
#   are always N(0, 1): it turns them into whatever else it needs
# - config_of, its arguments read off somebody's state dict
# - train(args), which makes nets and optimizers, and gives them to run.steps, netG_ema among them
# They give Run(args), or Run(args, labelled=True) for images with a class only: .device, .classes,
# .memory_format, .autocast(), .parallel(net), .steps(...), .log({name: tensor}), and .done and .epoch,
# how much of the run is over and how often the data was seen. A step is one pass of the loop.

SCRIPT = Path(globals().get("__file__", METHOD)).stem  # in names and messages; a notebook has no file
SIGHUP = getattr(signal, "SIGHUP", None)  # a lost terminal; Windows has none
DATASETS = {  # what changes the defaults for a data set
    "digits": "--img_size 32 --nc 1 --max_steps 4600",
    "mnist": "--img_size 32 --nc 1 --max_steps 6000",
    "fashion_mnist": "--img_size 32 --nc 1 --max_steps 6000",
    "cifar10": "--img_size 32 --hflip",
    "celeba": "--hflip",
}

# Of n images a default run takes at most 250 passes and 250 * sqrt(n) steps: few images are known by
# heart then, and pictures get worse again.
MAX_EPOCHS = 250

class UserError(Exception):
    """An error that the user can mend: main() makes one line of it, without a traceback."""

def say(text):
    """A line on stderr, from one process of a run."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{SCRIPT}.py: {text}", file=sys.stderr)

# ------------------------------------------------------------------------------------------- flags

def number(kind, low, high, text):
    """argparse type, by functools.partial: an int or a float from low to high."""
    try:
        value = kind(text)
    except ValueError:
        value = math.nan  # which is in no range
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"{text} is not a valid {kind.__name__} from {low} to {high}")
    return value

positive = functools.partial(number, int, 1, 2**31 - 1)
count = functools.partial(number, int, 0, 2**31 - 1)
at_least_2 = functools.partial(number, int, 2, 2**31 - 1)
seed = functools.partial(number, int, 0, 2**63 - 1)
not_negative = functools.partial(number, float, 0, 1e38)
fraction = functools.partial(number, float, 0, 1)
below_1 = functools.partial(number, float, 0, 0.999999)

class Length(argparse.Action):
    """--max_steps or --epochs: the last one that is given counts, and unsets the other."""

    def __call__(self, parser, args, value, flag=None):
        args.max_steps = args.epochs = None
        setattr(args, self.dest, value)

class BothRates(argparse.Action):
    """--lr sets --lr_g and --lr_d; there is no args.lr."""

    def __call__(self, parser, args, value, flag=None):
        args.lr_g = args.lr_d = value

class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the lines of the docstring, and shows defaults."""

def make_parser():
    parser = argparse.ArgumentParser(
        prog=f"{SCRIPT}.py",
        usage=f"python {SCRIPT}.py [flags]",
        description=__doc__,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
        add_help=False,  # comes last, in get_args, when the defaults are known
    )
    switch = argparse.BooleanOptionalAction
    add_method_flags(parser.add_argument_group("method"))

    flag = parser.add_argument_group("data").add_argument
    flag("--dataset", default="digits", help=f"{', '.join(DATASETS)}; a folder or .zip of images")
    flag("--data_dir", default="./data", help="where data sets are found, downloaded and cached")
    flag("--nc", type=int, choices=(1, 3), default=3, help="channels: 1 grey, 3 RGB")
    flag("--hflip", action=switch, default=False, help="flip real images at random")
    flag("--max_images", type=positive, help="a random subset of this many; digits: draw this many")

    flag = parser.add_argument_group("optimisation").add_argument
    flag("--recipe", choices=RECIPES, default="default", help="paper: what its authors chose")
    flag("--max_steps", type=positive, action=Length, help="length of the run, in steps of netD")
    flag("--epochs", type=positive, action=Length, help="or in passes over the data; the last given counts")
    flag("--batch_size", type=at_least_2, help="images per process and step")
    flag("--lr", type=not_negative, action=BothRates, default=argparse.SUPPRESS, help="both rates")
    flag("--lr_g", type=not_negative, help="learning rate of netG")
    flag("--lr_d", type=not_negative, help="learning rate of netD")
    flag("--beta1", type=below_1, default=0.5, help="Adam's first-moment decay")
    flag("--beta2", type=below_1, default=0.999, help="Adam's second-moment decay")

    flag = parser.add_argument_group("run").add_argument
    flag("--seed", type=seed, default=0, help="of training and of latents")
    flag("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    flag("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 if fast")
    flag("--compile", action=switch, default=False, help="torch.compile both nets: for long runs")
    flag("--out_dir", help=f"for the run; if none, runs/{SCRIPT}-DATASET; -2, ... if not empty")
    flag("--resume", nargs="?", const=True, metavar="PATH", help="go on with the last stopped run, or PATH")
    flag("--save_interval", type=positive, metavar="STEPS", help="if none, 50 saves a run, or fewer")
    flag("--keep_every", type=positive, metavar="EPOCHS", help="also keep numbered checkpoints")
    flag("--log_interval", type=positive, default=50, metavar="STEPS", help="between lines of the log")
    flag("--tensorboard", action=switch, default=False, help="scalars and grids for TensorBoard")

    flag = parser.add_argument_group("sampling").add_argument
    flag("--sample", metavar="PATH", help="generate, from a checkpoint or a run's folder")
    flag("--n_samples", type=positive, help="pictures; if none, 64, or 10 of each class")
    flag("--out", metavar="FILE.png|FILE.npz|FOLDER/", help="if none, a grid beside the checkpoint")
    flag("--labels", help="classes in turn, by number or name: 0,3,7 or cat,dog; if none, all")
    flag("--walk_dim", type=count, metavar="D", help="move coordinate D of a latent, 0.01 a picture")
    return parser

def get_args(argv=None):
    """Command line -> argparse.Namespace. A later layer wins: data set, recipe, checkpoint, typed."""
    parser = make_parser()
    parser.prog = f"{SCRIPT}.py, in DATASETS or RECIPES"  # where a mistake is said to be
    for words in [*DATASETS.values(), *RECIPES.values()]:
        parser.parse_args(words.split())  # only to check them
    parser.prog = f"{SCRIPT}.py"
    typed = typed_flags(parser, argv)
    refuse_useless(parser, typed)
    layers = [
        "--max_steps 24000",
        DATASETS.get(typed.get("dataset", "digits"), ""),
        RECIPES["default"],
        RECIPES[typed.get("recipe", "default")],
    ]
    values = vars(parser.parse_args(" ".join(layers).split()))
    method = argparse.ArgumentParser()
    add_method_flags(method)
    for name in ("batch_size", "lr_g", "lr_d", *vars(method.parse_args([]))):
        if values[name] is None:
            raise ValueError(f"--{name} has no default: write one into RECIPES")
    if values["epochs"] is None:  # no data set has --epochs above
        values["epochs"] = MAX_EPOCHS  # or --max_steps, whichever is over first
    path = None
    if "resume" in typed:
        given = typed["resume"]
        if given is True:  # without PATH
            given = typed.get("out_dir") or newest_stopped_run()
        path = last_checkpoint(given)
        saved = load_checkpoint(path)["args"]
        values |= {name: saved[name] for name in values.keys() & saved.keys()}  # those still there
        values["out_dir"] = str(Path(path).parent)
    parser.set_defaults(**values)
    parser.add_argument("-h", "--help", action="help", help="print this, for the --dataset given")
    args = parser.parse_args(argv)  # the last layer: what was typed
    args.resume = path
    return args

def typed_flags(parser, argv):
    """{flag: value} of the command line, without defaults."""
    blank = dict.fromkeys(vars(parser.parse_args([])))  # all None. argparse leaves what is set
    args, _ = parser.parse_known_args(argv, argparse.Namespace(**blank))
    return {name: value for name, value in vars(args).items() if value is not None}

def refuse_useless(parser, typed):
    """Ends the program at a flag that would do nothing: with --sample, or only without it."""
    for_sampling = {"n_samples", "out", "labels", "walk_dim"}
    if "sample" in typed:
        useless = typed.keys() - for_sampling - {"sample", "seed", "device", "batch_size"}
        said = "with"
    else:
        useless = typed.keys() & for_sampling
        said = "without"
    if useless:
        parser.error(f"--{min(useless)} {said} --sample would do nothing")
    if "resume" in typed and "recipe" in typed:
        parser.error("--recipe with --resume: give the flags of the recipe that are to change")
    if typed.get("resume") is True and "dataset" in typed and "out_dir" not in typed:
        parser.error("--dataset with --resume: name the run, too, as in --resume RUN")

# -------------------------------------------------------------------------------------------- data

@contextlib.contextmanager
def atomic_write(path):
    """Opens a file in a temporary folder beside `path`, moved there when the block ends well. The
    folder is deleted in any case."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        with open(Path(folder, path.name), "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(f.name, path)

def find_images(args):
    """--dataset -> (names, open_image(i), labels, classes, stamp).
    labels: int64 (N), -1 without a class. stamp: a text that changes with any image."""
    if not args.dataset:
        raise UserError("--dataset: its value is empty")
    path = Path(args.dataset)
    if args.dataset in DATASETS and path.is_dir():
        say(f"--dataset {path} is the data set of that name; for the folder, write ./{path}")
    if args.dataset == "digits":
        return draw_digits(args)
    if args.dataset == "celeba":
        return open_files(find_celeba(args))
    if args.dataset in DATASETS:
        data = download(args)
        stamp = hashlib.sha256(np.ascontiguousarray(np.asarray(data.data))).hexdigest()
        return range(len(data)), lambda i: data[i][0], np.asarray(data.targets), data.classes, stamp
    return open_files(path)

def draw_digits(args):
    """find_images of the embedded data set."""
    names = range(args.max_images or 20000)
    labels = np.array(names) % 10
    classes = [str(k) for k in range(10)]
    return names, lambda i: draw_digit(i, args.img_size), labels, classes, f"digits {args.img_size}"

font = functools.cache(ImageFont.load_default)

def draw_digit(i, size):
    """The digit i % 10 in grey, of varied weight, place and angle."""
    rng = np.random.default_rng(i)
    paper, ink = int(rng.integers(20)), int(rng.integers(200, 256))
    side = 2 * size  # reduced later, for smooth edges
    stroke = side * rng.uniform(1 / 64, 1 / 32)
    img = Image.new("L", (side, side), paper)
    middle = tuple(side * rng.uniform(0.47, 0.53, 2))
    ImageDraw.Draw(img).text(middle, str(i % 10), ink, font(side), "mm", stroke_width=stroke)
    return img.rotate(rng.uniform(-6, 6), Image.Resampling.BILINEAR, fillcolor=paper)

def find_celeba(args):
    """CelebA's folder or .zip, wherever it lies below --data_dir; or torchvision's download."""
    pattern = os.path.join(glob.escape(args.data_dir), "**", "img_align_celeba*")
    for found in sorted(glob.glob(pattern, recursive=True)):
        if os.path.isdir(found) or found.endswith(".zip"):
            return Path(found)
    return Path(download(args).root, "celeba", "img_align_celeba")  # as it is found the next time

def download(args):
    """torchvision's data set of this name, which it downloads where it is not there yet."""
    from torchvision import datasets  # here and not above: --help need not wait for it
    kind, files = {
        "mnist": (datasets.MNIST, "MNIST/raw/*.gz"),
        "fashion_mnist": (datasets.FashionMNIST, "FashionMNIST/raw/*.gz"),
        "cifar10": (datasets.CIFAR10, "cifar-10-python.tar.gz"),
        "celeba": (datasets.CelebA, "img_align_celeba.zip"),
    }[args.dataset]
    try:
        return kind(args.data_dir, download=True)
    except (Exception, SystemExit) as e:  # no network, a quota, damaged files: one way out of all
        place = f"put {files} into {args.data_dir}"
        raise UserError(f"--dataset {args.dataset}: {place}; no download: {e}") from e

def list_folder(path):
    """{name: stamp} of all files below a folder, behind links too. Says which cannot be read."""
    stamps = {}
    entered = set()

    def left_out(error):
        say(f"left out {error.filename}: {error.strerror}")

    for folder, subfolders, files in os.walk(path, onerror=left_out, followlinks=True):
        real = os.path.realpath(folder)
        if real in entered:  # links in circles would never end
            say(f"left out {folder}: it is {real}, which is listed already")
            subfolders.clear()
            continue
        entered.add(real)
        subfolders.sort()
        for name in files:
            file = Path(folder, name)
            try:
                stat = file.stat()
            except OSError as e:
                left_out(e)
                continue
            # ctime, too: after cp -p or mv another file may have the same mtime.
            times = stat.st_mtime_ns, stat.st_ctime_ns
            stamps[file.relative_to(path).as_posix()] = stat.st_size, *times
    return stamps

def open_files(path):
    """find_images of a folder, or of a .zip, which is read as it is and never extracted."""
    if zipfile.is_zipfile(path):
        archive = zipfile.ZipFile(path)
        entries = {info.filename.replace("\\", "/"): info for info in archive.infolist()}
        stamps = {name: info.CRC for name, info in entries.items() if not info.is_dir()}
        stamp = ""
        open_name = lambda name: Image.open(archive.open(entries[name]))
    elif path.is_file():
        raise UserError(f"--dataset {path}: neither a folder nor a .zip, or an incomplete one")
    else:
        stamps = list_folder(path)
        stamp = str(path.resolve())
        open_name = lambda name: Image.open(path / name)
    names = choose_images(stamps)
    if not names:
        raise UserError(f"--dataset {path}: no images; give {', '.join(DATASETS)}, a folder or a .zip")
    labels, classes = find_classes(names)
    stamp += repr([(name, stamps[name]) for name in names])
    return names, lambda i: open_name(names[i]), labels, classes, stamp

def choose_images(names):
    """The names that are of images, sorted. Says what others there are."""
    images, others = [], Counter()
    for name in sorted(names):
        suffix = PurePosixPath(name).suffix.lower()
        hidden = re.search(r"(^|/)(\.|__MACOSX/)", name)
        if suffix in Image.registered_extensions() and not hidden:
            images.append(name)
        elif not hidden:
            others[suffix or "without a suffix"] += 1
        elif suffix in Image.registered_extensions() and "__MACOSX" not in name:
            others["hidden images"] += 1
    if others:
        text = ", ".join(f"{n} {what}" for what, n in others.items())
        way_out = "; save .heic as .jpg" if ".heic" in others else ""
        say(f"left out {text}{way_out}")
    return images

def find_classes(names):
    """Labels and classes, by the first folders of which there are several: x/cat/1, x/dog/2. Or -1 and none."""
    folders = [name.split("/")[:-1] for name in names]
    for depth in range(max(map(len, folders))):
        kinds = [folder[depth] if len(folder) > depth else None for folder in folders]
        classes = sorted(set(kinds) - {None})
        if len(classes) > 1:
            number_of = {name: k for k, name in enumerate(classes)} | {None: -1}
            return np.array([number_of[kind] for kind in kinds]), classes
    return np.full(len(names), -1), []

def is_deep(img):
    """Whether an image has 16 or 32 bits or floats: Pillow's modes I;16, I and F."""
    return img.mode[0] in "IF"

def find_limits(open_image, chosen):
    """(black, white) of deep images: the range of all their values."""
    lows, highs = [0.0], [0.0]

    def look(i):
        with contextlib.suppress(Exception):  # damaged ones are named later
            img = open_image(i)
            if is_deep(img):
                values = np.asarray(img)
                values = values[np.isfinite(values)]
                lows.append(float(values.min()))
                highs.append(float(values.max()))

    with ThreadPool() as pool:
        pool.map(look, chosen)
    if len(lows) == 1:  # none is deep, and nobody will ask
        return 0, 65535
    low, high = min(lows), max(highs)
    if low == 0:  # up to a number of bits, or to 1; resizing may have gone beyond it a little
        high = next((top for top in (1, 255, 1023, 4095, 16383, 65535) if high <= 1.05 * top), high)
    say(f"in images of more than 8 bits {low:g} is taken for black, {high:g} for white")
    return low, high

def to_pixels(img, size, nc, limits=(0, 65535)):
    """PIL image of any kind -> bytes of size x size x nc: short side resized, centre cropped."""
    mode = "L" if nc == 1 else "RGB"
    img.draft(mode, (2 * size, 2 * size))  # JPEG: decode at reduced size
    img = ImageOps.exif_transpose(img)
    if is_deep(img):
        black, white = limits
        pixels = (np.asarray(img).astype(np.float64) - black) / (white - black) * 255
        img = Image.fromarray(np.nan_to_num(pixels).round().clip(0, 255).astype(np.uint8))
    if img.has_transparency_data:
        img = Image.alpha_composite(Image.new("RGBA", img.size, "white"), img.convert("RGBA"))
    return ImageOps.fit(img.convert(mode), (size, size), Image.Resampling.BICUBIC).tobytes()

def load_data(args, labelled=False):
    """--dataset -> images, uint8 (N, H, W, C); labels, int64 (N); names of classes.
    Decoded once, into a cache file. labelled: only images that have a class."""
    names, open_image, labels, classes, stamp = find_images(args)
    size, nc = args.img_size, args.nc
    chosen = np.arange(len(names))
    if labelled:
        if not classes:
            raise UserError(f"--dataset {args.dataset}: no classes; give a folder for each class")
        chosen = chosen[labels >= 0]
        if len(chosen) < len(names):
            say(f"left out {len(names) - len(chosen)} images that are in none of the class folders")
    some = np.random.default_rng(0).permutation(len(chosen))[:args.max_images]  # None: all
    chosen = chosen[np.sort(some)]
    made_of = [stamp, chosen.tobytes(), PIL.__version__]
    for code in (draw_digit.__code__, to_pixels.__code__):  # an edit of these makes another cache
        made_of += [code.co_code, code.co_consts, code.co_names]
    key = hashlib.sha256(repr(made_of).encode(errors="surrogatepass")).hexdigest()[:16]
    cache = cache_file(args, f"{Path(args.dataset).resolve().stem}-{size}x{nc}-{key}.rows")
    if not cache.exists():
        decode(args, names, open_image, chosen, cache)
    row = np.dtype([("index", np.int64), ("pixels", np.uint8, (size, size, nc))])  # as decode writes
    rows = np.memmap(cache, row, "c")  # copy on write: torch warns of arrays that may only be read
    unreadable = [str(names[i]) for i in np.setdiff1d(chosen, rows["index"])]
    if unreadable:
        some = ", ".join(unreadable[:5])
        say(f"left out {len(unreadable)} images that cannot be read: {some}")
    brightest = rows["pixels"][:100].max()
    if brightest < 64:
        say(f"warning: these images are dark: no value of the first 100 is above {brightest} of 255")
    labels = labels[rows["index"]]
    found = set(labels.tolist())
    empty = [name for k, name in enumerate(classes) if k not in found]
    if labelled and empty:
        say(f"warning: there is no image of {', '.join(empty)}")
    return rows["pixels"], labels, classes

def cache_file(args, name):
    """Where a cache is, or can be written: below --data_dir, or else in the user's own folder."""
    places = [Path(args.data_dir, "cache", name), Path.home() / ".cache" / "gan" / name]
    for place in places:
        if place.exists():
            return place
    for place in places:
        there = next(parent for parent in place.parents if parent.exists())
        if os.access(there, os.W_OK):
            return place
    raise UserError(f"--data_dir {args.data_dir}: it may not be written to, nor may {places[1].parent}")

def decode(args, names, open_image, chosen, cache):
    """Writes the cache: for each image that can be read a row, its index and its pixels."""
    limits = find_limits(open_image, chosen)
    failed = []

    def row(i):
        try:
            pixels = to_pixels(open_image(i), args.img_size, args.nc, limits)
            return i.tobytes() + pixels  # i is an np.int64
        except Exception as e:  # noqa: BLE001  damaged files make Pillow raise nearly anything
            failed.append(f"{names[i]}: {e}")
            return b""

    with atomic_write(cache) as f, ThreadPool() as pool:
        f.writelines(tqdm(pool.imap(row, chosen, 64), "decoding", len(chosen), unit="img"))
        if len(failed) == len(chosen):
            raise UserError(f"--dataset {args.dataset}: no image can be read: {failed[0]}")

# ---------------------------------------------------------------------------------------- sampling

def latents(seed, start, n, nz):
    """Latents start, start + 1, ... of a seed: float32 (n, nz) ~ N(0, 1), by Philox and Box-Muller, as
    infer_ort.py makes them."""
    blocks = math.ceil(nz / 4)  # for each latent, of four words; two words make two normals
    philox = np.random.Philox(key=seed, counter=start * blocks)
    words = philox.random_raw(4 * blocks * n).reshape(n, -1, 2)
    u = ((words >> np.uint64(11)) + 0.5) * 2.0**-53
    r = np.sqrt(-2 * np.log(u[..., 0]))
    t = 2 * np.pi * u[..., 1]
    return np.stack((r * np.cos(t), r * np.sin(t)), -1).reshape(n, -1)[:, :nz].astype(np.float32)

@torch.no_grad()
def generate(netG, z, labels, batch_size=64):
    """Latents (n, nz), labels (n) -> uint8 (n, H, W, C). The last batch is padded: in one of another
    size a picture may differ in its last bit."""
    device = next(netG.parameters()).device
    images = []
    for i in range(0, len(z), batch_size):
        rows = np.arange(i, i + batch_size).clip(max=len(z) - 1)  # the last one again and again
        z_batch = torch.from_numpy(z[rows]).to(device)
        labels_batch = torch.from_numpy(labels[rows]).to(device)
        images.append(to_uint8(netG(z_batch, labels_batch)))
    return np.concatenate(images)[:len(z)]

def to_uint8(images):
    """float (N, C, H, W) in [-1, 1] -> uint8 (N, H, W, C) array, as in export.py."""
    pixels = (images.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)  # 127.5 + 0.5, to round
    return pixels.permute(0, 2, 3, 1).cpu().numpy()

def save_grid(path, images, columns):
    """uint8 (N, H, W, C) -> a PNG file, `columns` pictures in a row."""
    from torchvision.utils import make_grid  # here and not above: --help need not wait for it
    grid = make_grid(torch.from_numpy(images.copy()).permute(0, 3, 1, 2), columns, pad_value=255)
    with atomic_write(path) as f:
        Image.fromarray(grid.permute(1, 2, 0).numpy()).save(f, "png")

def save_npz(path, batches, shape, labels):
    """arr_0: uint8 of this shape, written as the batches come. labels: int64 (N), or None."""
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    with atomic_write(path) as f, zipfile.ZipFile(f, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as entry:
            np.lib.format.write_array_header_1_0(entry, header)
            for images in batches:
                entry.write(images.tobytes())
        if labels is not None:
            with archive.open("labels.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, labels)

def choose_labels(text, classes):
    """--labels -> numbers of classes, all if there is no text."""
    numbers = {str(k): k for k in range(len(classes))}
    numbers |= {name: k for k, name in enumerate(classes)}  # a name comes before a number
    asked = classes if text is None else [name.strip() for name in text.split(",")]
    if not set(asked) <= set(numbers):
        raise UserError(f"--labels {text}: choose from {', '.join(numbers) or 'none'}")
    return [numbers[name] for name in asked]

def sample(args):
    """--sample: pictures of a checkpoint's generator, as a grid, an array or a folder."""
    path = last_checkpoint(args.sample)
    netG, classes = load_generator(path)
    netG.to(pick_device(args.device))
    nz, size, nc = (netG.config[name] for name in ("nz", "img_size", "nc"))
    out = args.out or f"{os.path.splitext(path)[0]}_samples.png"
    suffix = "" if out.endswith(("/", os.sep)) else Path(out).suffix
    if suffix not in (".png", ".npz", ""):
        raise UserError(f"--out {out}: give a .png, an .npz or a folder/")
    if args.walk_dim is not None and args.walk_dim >= nz:
        raise UserError(f"--walk_dim {args.walk_dim}: the coordinates are 0 to {nz - 1}")
    if suffix != ".npz" and nc > 4:
        raise UserError(f"--out {out}: pictures of {nc} channels: give an .npz")
    asked = choose_labels(args.labels, classes)
    n = args.n_samples or 10 * len(asked) or 64
    batch_size = min(args.batch_size, max(n, 64))  # not smaller: see generate
    labels = np.resize(asked or [0], n).astype(np.int64)

    def batches():
        for i in tqdm(range(0, n, batch_size), "sampling", unit="batch", delay=2):
            k = min(batch_size, n - i)
            z = latents(args.seed, i, k, nz)
            if args.walk_dim is not None:
                z[:] = latents(args.seed, 0, 1, nz)
                z[:, args.walk_dim] += 0.01 * np.arange(i, i + k)
            yield generate(netG, z, labels[i:i + k], batch_size)

    if suffix == ".npz":
        save_npz(Path(out), batches(), (n, size, size, nc), labels if classes else None)
    elif suffix == ".png":
        save_grid(Path(out), np.concatenate(list(batches())), len(asked) or math.ceil(math.sqrt(n)))
    else:
        for i, image in enumerate(itertools.chain.from_iterable(batches())):
            with atomic_write(Path(out, f"{i:06d}.png")) as f:
                Image.fromarray(image.squeeze()).save(f, "png")
    print(f"wrote {out}")

# ------------------------------------------------------------------------------------- checkpoints

def last_checkpoint(path):
    """path; or, of a run's folder, the last checkpoint: by name, for copying changes times."""
    if not os.path.isdir(path):
        return str(path)
    numbered = sorted(Path(path).glob("checkpoint_epoch_*.pt"), reverse=True)
    found = [*Path(path).glob("checkpoint.pt"), *numbered]
    if not found:
        raise UserError(f"{path}: there is no checkpoint.pt in this folder")
    return str(found[0])

def newest_stopped_run():
    """The checkpoint, of this script's runs that have steps left, that was written last."""
    stopped = []
    for path in glob.glob(f"runs/{SCRIPT}-*/checkpoint.pt"):
        try:
            ckpt = load_checkpoint(path)
            if ckpt["step"] < ckpt["total"]:
                stopped.append((ckpt["time"], path))
        except (KeyError, UserError) as e:
            say(f"left out {path}, damaged or of an older {SCRIPT}.py: {e}")
    if not stopped:
        raise UserError(f"--resume: no run in runs/{SCRIPT}-* has steps left; give one, and --max_steps")
    return max(stopped)[1]

def load_checkpoint(path, methods=(METHOD,)):
    """What torch.save wrote, on the CPU. UserError if it is damaged or of none of the methods.
    None among these: a file without a method, somebody else's."""
    with open(path, "rb") as f:
        try:
            ckpt = torch.load(f, map_location="cpu", weights_only=True)  # which runs no code
            wrote = ckpt.get("script")
        except Exception as e:  # damaged files make torch raise nearly anything
            said = "damaged, or more than a dict of tensors, as net.state_dict() is"
            raise UserError(f"{path}: {said}") from e
    if wrote not in methods:
        known = ", ".join(filter(None, methods))
        raise UserError(f"{path}: its METHOD is {wrote}, known here: {known}")
    return ckpt

def load_generator(path):
    """(netG in eval mode, names of its classes), of this method's checkpoint or somebody else's."""
    ckpt = load_checkpoint(path, (METHOD, None))
    if ckpt.get("script"):
        try:
            netG = Generator(**ckpt["config"])
            load_state(netG, ckpt["netG_ema"], path)
            classes = ckpt["classes"]
        except (KeyError, TypeError) as e:
            raise UserError(f"{path}: damaged, or of another {SCRIPT}.py: {e!r}") from e
    else:
        netG = find_generator(ckpt, path)
        classes = [str(k) for k in range(netG.config.get("n_classes", 0))]
    n_classes = netG.config.get("n_classes", 0)  # without it the data's classes mean nothing
    return netG.eval(), classes[:n_classes]

def find_generator(ckpt, path):
    """The first state dict in somebody's checkpoint that fits Generator, whatever it is called."""
    dicts = [ckpt]
    for state in dicts:
        for value in state.values():
            if isinstance(value, dict) and not any(value is other for other in dicts):
                dicts.append(value)  # the loop gets there
        names = [name for name in state if isinstance(name, str)]
        prefixes = {name.partition("main.0.")[0] for name in names if "main.0." in name}
        for prefix in sorted(prefixes):  # "", "module.", "netG.", ...
            part = {name.removeprefix(prefix): state[name] for name in names if name.startswith(prefix)}
            with contextlib.suppress(Exception):  # another net, perhaps netD
                netG = Generator(**config_of(part))
                netG.load_state_dict(part)
                return netG
    raise UserError(f"{path}: no state dict in it fits the Generator of {SCRIPT}.py")

def load_state(part, state, path):
    """part.load_state_dict(state). An optimizer keeps today's options, such as betas, which
    load_state_dict would put the saved ones in place of."""
    groups = getattr(part, "param_groups", None)
    try:
        if groups and ("betas" in groups[0]) != ("betas" in state["param_groups"][0]):
            raise ValueError("Adam is not RMSprop")
        part.load_state_dict(state)
    except (KeyError, RuntimeError, ValueError) as e:
        raise UserError(f"{path}: of other nets or optimizers than asked for: {e}") from e
    if groups:
        part.param_groups = groups

# --------------------------------------------------------------------------------------------- run

def pick_device(name):
    """torch.device of --device, with its number. UserError if it cannot be used."""
    try:
        if name == "auto":
            name = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        return torch.zeros(1, device=name).device
    except (AssertionError, RuntimeError) as e:
        raise UserError(f"--device {name}: {e}") from e

@torch.no_grad()
def measure_batchnorm(netG, z, labels):
    """Gives averaged weights BatchNorm statistics of their own (Izmailov et al. 2018, 3.1)."""
    for layer in netG.modules():
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            layer.reset_running_stats()
            layer.momentum = None  # the mean over all batches
    netG.train()
    generate(netG, z, labels)
    netG.eval()

class Run:
    """What surrounds the method: processes, data, log, pictures, checkpoints."""

    def __init__(self, args, labelled=False):
        """labelled: train only on images that have a class."""
        self.args = args
        self.labelled = labelled
        self.start_processes()  # sets rank, local_rank, world, device
        self.set_precision()  # autocast, memory_format
        self.load_images(labelled)  # images, labels, classes, batch, epoch_size
        self.step = self.seen = 0  # seen: images, by all processes
        self.signum = 0
        self.to_log = {}
        self.order = None
        torch.manual_seed(args.seed)

    @property
    def done(self):
        """The share of --max_steps that is done. Where MAX_EPOCHS ends a run it stays below 1."""
        return self.step / (self.args.max_steps or self.total)

    @property
    def epoch(self):
        """How many times the data has been seen, with a fraction."""
        return self.seen / self.epoch_size

    def start_processes(self):
        """torchrun says which process of how many this is; on GPUs each has its own."""
        self.rank, self.local_rank, self.world = 0, 0, 1
        if os.environ.get("WORLD_SIZE", "1") == "1":
            self.device = pick_device(self.args.device)
            return
        numbers = []
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):  # the port only for the check
            numbers.append(os.environ.get(name, ""))
        if "MASTER_ADDR" not in os.environ or not all(map(str.isdecimal, numbers)):
            raise UserError("WORLD_SIZE is set, but not all that torchrun sets: use it, or unset WORLD_SIZE")
        self.rank, self.local_rank, self.world = map(int, numbers[:3])
        name = self.args.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"  # gloo cannot exchange on MPS
        if name == "cuda":
            gpus = torch.cuda.device_count()
            if self.local_rank >= gpus:
                raise UserError(f"--nproc_per_node: there are {gpus} GPUs; start fewer, or --device cpu")
            torch.cuda.set_device(self.local_rank)
        self.device = pick_device(name)
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        hours = datetime.timedelta(hours=6)  # for which one may decode, and the others wait
        dist.init_process_group(backend, timeout=hours)

    def set_precision(self):
        """bf16 where it is fast, TF32 on GPUs, and the order of dimensions in memory."""
        args, kind = self.args, self.device.type
        if kind == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = kind == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)
        bf16 = fast if args.precision == "auto" else args.precision == "bf16"
        self.autocast = functools.partial(torch.autocast, kind, torch.bfloat16, enabled=bf16)
        self.memory_format = torch.channels_last
        if kind == "mps":
            self.memory_format = torch.contiguous_format  # pytorch#175189
            if args.compile or self.world > 1:
                raise UserError("--device mps: without --compile, and in one process")
            say("MPS is untested here, and has known faults before PyTorch 2.14; --device cpu is safe")
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")  # TF32, which convolutions have by default

    def load_images(self, labelled):
        """One process of a machine decodes, the others find its cache. On the GPU if they fit."""
        if self.local_rank > 0:
            dist.barrier()  # until the other barrier
        images, labels, self.classes = load_data(self.args, labelled)
        if self.local_rank == 0 and self.world > 1:
            dist.barrier()
        self.batch = self.args.batch_size * self.world  # of all processes together
        if self.batch > len(images):
            said = f"a step takes {self.batch} images, there are {len(images)}"
            fits = len(images) // self.world
            way_out = f"give --batch_size {fits} or less" if fits > 1 else "give more images"
            raise UserError(f"--batch_size: {said}; {way_out}")
        self.epoch_size = len(images) // self.batch * self.batch  # the rest fills no batch
        self.images, self.labels = torch.from_numpy(images), torch.from_numpy(labels)
        if self.device.type != "cuda":
            return
        free, _ = torch.cuda.mem_get_info(self.device)
        if images.nbytes < free / 2:
            on_gpu = torch.empty(images.shape, dtype=torch.uint8, device=self.device)
            for i in range(0, len(images), 4096):  # all at once would be copied in host memory, too
                on_gpu[i:i + 4096] = self.images[i:i + 4096]
            self.images, self.labels = on_gpu, self.labels.to(self.device)

    def parallel(self, net):
        """net, compiled with --compile; under torchrun one that averages gradients."""
        if self.args.compile:
            net.compile(dynamic=False)  # in place: names stay, and forward() is as it was
        if self.world > 1:
            net = DistributedDataParallel(net)
            # As an argument it warns. A broadcast between netD's two passes spoils the backward.
            net.broadcast_buffers = False
        return net

    def steps(self, *, netG_ema, **state):
        """Yields (step, real (N, nc, H, W) in [-1, 1], labels (N)) until the run is done.
        netG_ema: what is sampled. state: what else checkpoints keep by name and --resume restores."""
        self.state = {"netG_ema": netG_ema, **state}
        if self.args.resume:
            self.restore()
        self.plan()
        self.check_generator()
        bar = tqdm(total=self.total, initial=self.step, unit="step", disable=self.rank > 0)
        with self.claim_folder(), self.heed_signals(), bar as self.bar:
            if self.rank == 0:
                self.begin()
            self.logged, self.log_time = self.step, time.perf_counter()
            stop = 0
            while self.step < self.total and not stop:
                yield self.step, *self.next_batch()
                stop = self.after_step()
            if self.rank == 0 and self.step == self.total:
                self.save_gif()
        finished = self.step == self.total
        if self.rank == 0 and finished:
            print(f"done: {self.out_dir}; more pictures: {self.command('--sample')}")
        elif self.rank == 0 and stop != SIGHUP:  # after which there is no terminal to print to
            print(f"stopped at step {self.step}; go on with: {self.command('--resume')}")
        if not finished:
            sys.exit(128 + stop)

    def after_step(self):
        """Counts, logs and saves. Returns the signal that ends the run, or 0."""
        self.step += 1
        self.seen += self.batch
        self.bar.update()
        stop = self.agreed_signal()
        every = self.args.keep_every
        keep = bool(every) and self.seen % (every * self.epoch_size) == 0
        save = keep or stop or self.step == self.total or self.step % self.interval == 0
        if save or self.step % self.args.log_interval == 0:
            self.write_log()
        if save and self.rank == 0:
            self.save(keep)
            self.draw()
        return stop

    def command(self, flag):
        """What to type to go on with this run, or to sample from it."""
        return f"python {SCRIPT}.py {flag} {shlex.quote(str(self.out_dir))}"

    def restore(self):
        """Takes everything in self.state from the checkpoint of --resume."""
        path = self.args.resume
        ckpt = load_checkpoint(path)
        # Only to a net that takes labels does it matter which class has which number.
        if "n_classes" in ckpt["config"] and ckpt["classes"] != self.classes:
            raise UserError(f"--resume: {path} has the classes {', '.join(ckpt['classes'])}; "
                            f"--dataset {self.args.dataset} has {', '.join(self.classes)}")
        for name, part in self.state.items():
            load_state(part, ckpt.get(name, {}), path)
        self.step = ckpt["step"]
        self.seen = ckpt["seen"] // self.batch * self.batch  # --batch_size may be another now

    def plan(self):
        """How long the run is, how often it saves, and what its grids show."""
        args = self.args
        self.total = args.max_steps or sys.maxsize
        if args.epochs:
            left = (args.epochs * self.epoch_size - self.seen) // self.batch
            self.total = min(self.total, self.step + left)
        if args.epochs and args.max_steps:  # the default; a length that is given unsets the other
            self.total = min(self.total, int(args.epochs * math.sqrt(self.epoch_size)))
        if self.step >= self.total:
            done = f"{args.resume} has done its {self.step} steps"
            raise UserError(f"--resume: {done}; give more --max_steps or --epochs")
        self.interval = args.save_interval or max(100, self.total // 50)
        n_classes = self.state["netG_ema"].config.get("n_classes", 0)
        # The first of these are for grids, all of them for measure_batchnorm.
        self.inputs = latents(args.seed, 0, 512, args.nz), np.arange(512) % max(1, n_classes)
        self.columns, self.n_grid = 8, 64
        if n_classes:
            self.columns, self.n_grid = min(n_classes, 100), min(10 * n_classes, 512)

    def check_generator(self):
        """Fails before the first step where pictures or checkpoints could not be made, or read."""
        args, netG = self.args, self.state["netG_ema"]
        if netG.training:
            raise ValueError("netG_ema has to be a copy of netG: copy.deepcopy(netG).eval()")
        if "n_classes" in netG.config and self.labels.min() < 0:
            raise ValueError("netG takes labels, and images have none: Run(args, labelled=True)")
        for name in ("nz", "nc", "img_size"):
            if netG.config[name] != getattr(args, name):
                raise ValueError(f"netG.config has {name} {netG.config[name]}, not --{name}")
        z, labels = self.inputs
        shape = generate(netG, z[:1], labels[:1]).shape
        wanted = (1, args.img_size, args.img_size, args.nc)
        if shape != wanted:
            raise ValueError(f"netG makes pictures of shape {shape}, the images have {wanted}")
        if self.labelled and "n_classes" not in netG.config:
            raise ValueError("netG.config has no n_classes: only class 0 would be drawn")
        ckpt = torch.load(io.BytesIO(self.pack()), weights_only=True)  # fails for other than plain values
        try:
            Generator(**ckpt["config"]).load_state_dict(ckpt["netG_ema"])  # as --sample will
        except (RuntimeError, TypeError) as e:
            raise ValueError(f"Generator(**netG.config) is not netG: {e}") from e

    @contextlib.contextmanager
    def claim_folder(self):
        """A folder for this process alone. A new run takes the next free name: -2, -3, ..."""
        args = self.args
        if self.rank > 0:  # the first process writes
            yield
            return
        name = Path(args.out_dir or f"runs/{SCRIPT}-{Path(args.dataset).resolve().stem}")
        own = (name / "checkpoint.pt").resolve()  # from a numbered one on it is another run
        goes_on = args.resume and Path(args.resume).resolve() == own
        if name.name in ("", ".."):
            raise UserError(f"--out_dir {name}: give a folder's name")
        self.out_dir = name
        for number in itertools.count(2):
            self.out_dir.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.out_dir / ".lock", timeout=0)
            empty = set(os.listdir(self.out_dir)) <= {".lock"}
            try:
                if goes_on or empty:
                    lock.acquire()
                    break
            except Timeout:  # another process has this folder
                if goes_on:
                    said = f"another process is training in {name}; name another run"
                    raise UserError(f"--resume: {said}") from None
            self.out_dir = name.with_name(f"{name.name}-{number}")
        try:
            yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def heed_signals(self):
        """Inside, SIGINT, SIGTERM and (but for nohup) SIGHUP end the run after its step."""
        def note(signum, frame):
            self.signum = signum

        wanted = [signal.SIGINT, signal.SIGTERM]
        if SIGHUP and signal.getsignal(SIGHUP) != signal.SIG_IGN:
            wanted.append(SIGHUP)
        before = {}
        if threading.current_thread() is threading.main_thread():  # only it may set handlers
            before = {signum: signal.signal(signum, note) for signum in wanted}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def begin(self):
        """Prints the plan; draws real images, and what netG makes so far."""
        args = self.args
        some = np.random.default_rng(args.seed).permutation(len(self.images))[:64]
        save_grid(self.out_dir / "samples" / "real.png", self.images[some].cpu().numpy(), 8)
        before = min(self.total, vars(args).get("pretrain_d", 0))  # a flag that some scripts have
        g_steps = self.total // args.d_steps - before // args.d_steps  # one at each multiple of d_steps
        length = f"{self.total} steps"
        if g_steps != self.total:
            length = f"{self.total} netD steps, {g_steps} netG steps"
        if g_steps == 0:
            say("warning: in so few steps netG takes none: more --max_steps")
        images = f"{len(self.images)} images {args.img_size}x{args.img_size}x{args.nc}"
        names = ", ".join(self.classes[:10]) + ", ..." * (len(self.classes) > 10)
        print(f"{images}; {len(self.classes)} classes: {names or 'none'}")
        print(f"{self.world} x {self.device}; {length} -> {self.out_dir}", flush=True)
        if args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.writer = SummaryWriter(self.out_dir)
        self.draw()

    def next_batch(self):
        """The order comes from (seed, epoch), all other randomness from (seed, step, rank): a resume
        needs no random state."""
        args, device = self.args, self.device
        epoch, start = divmod(self.seen, self.epoch_size)
        if start == 0 or self.order is None:
            order = np.random.default_rng((args.seed, epoch)).permutation(len(self.images))
            self.order = torch.from_numpy(order).to(self.images.device)
        seed = int(np.random.SeedSequence((args.seed, self.step, self.rank)).generate_state(1)[0])
        cuda = device.type == "cuda"
        if cuda:  # not torch.manual_seed, which seeds all devices: 6 % of gan.py's step
            torch.cuda.default_generators[device.index].manual_seed(seed)
        elif device.type == "cpu":
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)
        index = self.order[start + self.rank:start + self.batch:self.world]  # each process its own
        real, labels = self.images[index], self.labels[index]
        if cuda and not real.is_cuda:  # pinned, so that nobody waits until the GPU takes them
            real, labels = real.pin_memory(), labels.pin_memory()
        real, labels = real.to(device, non_blocking=cuda), labels.to(device, non_blocking=cuda)
        real = real.permute(0, 3, 1, 2).float().sub_(127.5).div_(127.5)
        if device.type == "mps":
            real = real.clone(memory_format=torch.contiguous_format)  # pytorch#175189
        if args.hflip:
            flip = torch.rand(len(real), 1, 1, 1, device=device) < 0.5
            real = torch.where(flip, real.flip(3), real)
        return real, labels

    def log(self, values):
        """{name: tensor}: means go to the next line of the log. Nobody waits for the GPU here."""
        for name, value in values.items():
            self.to_log.setdefault(name, []).append(value.detach())

    def write_log(self):
        """A line of log.jsonl, the bar and TensorBoard."""
        row = {}
        for name, values in self.to_log.items():
            row[name] = torch.stack(values).float().mean().item()
        self.check_finite(row)
        now = time.perf_counter()
        row["images/s"] = (self.step - self.logged) * self.batch / (now - self.log_time)
        self.to_log, self.logged, self.log_time = {}, self.step, now
        self.bar.set_postfix(row)
        if self.rank > 0:
            return
        place = {"step": self.step, "epoch": self.epoch, "time": time.time()}
        with open(self.out_dir / "log.jsonl", "a") as f:
            f.write(json.dumps(place | row) + "\n")
        if self.args.tensorboard:
            for name, value in row.items():
                self.writer.add_scalar(name, value, self.step)

    def check_finite(self, row):
        """Stops the run where losses or weights are not finite, so that none are saved."""
        nets = [part for part in self.state.values() if isinstance(part, nn.Module)]
        norm = nn.utils.get_total_norm([w for net in nets for w in net.parameters()]).item()
        if not all(math.isfinite(value) for value in (norm, *row.values())):
            said = f"losses or weights are not finite at step {self.step}, and not saved"
            raise FloatingPointError(f"{said}; try a lower --lr, more --gp_weight or --precision fp32")

    def save(self, keep):
        """A checkpoint; keep: a numbered one too."""
        measure_batchnorm(self.state["netG_ema"], *self.inputs)
        names = ["checkpoint.pt"]
        if keep:
            names.append(f"checkpoint_epoch_{int(self.epoch):04d}.pt")
        packed = self.pack()
        for name in names:
            with atomic_write(self.out_dir / name) as f:
                f.write(packed)

    def pack(self):
        """The bytes of a checkpoint."""
        ckpt = {name: part.state_dict() for name, part in self.state.items()}
        ckpt |= {"script": METHOD, "args": vars(self.args), "config": self.state["netG_ema"].config}
        ckpt |= {"classes": self.classes, "step": self.step, "total": self.total}
        ckpt |= {"seen": self.seen, "time": time.time()}
        buffer = io.BytesIO()  # torch.save into a file does not say that the disk is full
        torch.save(ckpt, buffer)
        return buffer.getbuffer()

    def draw(self):
        """A grid of netG_ema's pictures, of the same latents all the time."""
        z, labels = self.inputs
        images = generate(self.state["netG_ema"], z[:self.n_grid], labels[:self.n_grid])
        save_grid(self.out_dir / "samples" / f"step_{self.step:08d}.png", images, self.columns)
        if self.args.tensorboard:
            self.writer.add_images("samples", images, self.step, dataformats="NHWC")
            self.writer.flush()

    def agreed_signal(self):
        """The signal that all processes know of, or 0: in every tenth step, for asking takes time."""
        if self.world == 1:
            return self.signum
        if self.step % 10:
            return 0
        signum = torch.tensor(self.signum, device=self.device)
        dist.all_reduce(signum, dist.ReduceOp.MAX)
        return int(signum)

    def save_gif(self):
        """samples.gif: how the grids came about, in at most 100 frames."""
        files = sorted((self.out_dir / "samples").glob("step_*.png"))
        every = len(files) // 99 + 1
        frames = [Image.open(file).convert("RGB") for file in files[:-1:every] + files[-1:]]
        times = [200] * (len(frames) - 1) + [1000]
        with atomic_write(self.out_dir / "samples.gif") as f:
            frames[0].save(f, "gif", save_all=True, append_images=frames[1:], loop=0, duration=times)

def main():
    """One line and exit code 1 for what the user can mend. All else keeps its traceback."""
    memory = MemoryError, torch.OutOfMemoryError
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed by who started us
        stream.reconfigure(errors="backslashreplace")  # for names that a terminal cannot show
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or temporary files would stay
    try:
        args = get_args()
        if args.sample is not None:
            sample(args)
        else:
            train(args)
    except (UserError, OSError, FloatingPointError, KeyboardInterrupt, *memory) as e:
        sys.exit(f"{SCRIPT}.py: error: {' '.join(str(e).split()) or type(e).__name__}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
            gc.collect()  # gloo's threads must end first, or one exit in ten aborts

if __name__ == "__main__" and "__file__" in globals():  # a notebook has no command line
    main()
