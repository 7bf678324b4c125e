"""How good a generator's pictures are: their distance from real ones, their variety, their classes.

    python benchmarks/quality.py runs/dcgan-mnist --dataset mnist
    python benchmarks/quality.py runs/acgan-mnist int8.onnx samples.npy folder/ --dataset mnist
    python benchmarks/quality.py runs/dcgan-celeba --dataset celeba --inception   # without classes

A small residual net is trained once to tell the data set's classes (with a fixed seed, some minutes on
two cores, kept in cache/ below --data_dir), on images turned, scaled and shifted, so that it knows
strokes, not places. Its 128 penultimate features are compared, pictures against test images.

- FID: Frechet distance of the features (Heusel et al. 2017). Its scale is this net's: compare within the
  table, and with its first row, real training images.
- KID x 1000: their kernel distance (Binkowski et al. 2018), which needs fewer pictures.
- precision, recall (Kynkaanniemi et al. 2019): the share of pictures that are like real ones, and of
  real ones that are like pictures; 5 nearest neighbours.
- classes: e to the entropy of the classes found, 10.0 for ten equally frequent ones.
- confidence: mean probability of the class found.
- asked: share of pictures that show the class that was asked for.

With --inception FID and KID in Inception's features (pip install torch-fidelity). Data without a test
split, a folder, loses a fixed tenth of its images, at most 10,000, to one; the generator has learnt from
these, too.
"""

import argparse
import hashlib
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import export
import gan
import infer_ort

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

def get_args(argv=None):
    p = argparse.ArgumentParser("quality.py", description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("sources", nargs="+", metavar="SOURCE", help="a run, a checkpoint, an .onnx, an .npy, a folder of PNG files")
    add("--dataset", required=True, help="of the training, as for the scripts")
    add("--data_dir", default="./data", help="where data sets are found (./data)")
    add("--n_samples", type=int, default=10000, help="pictures of each source, where it has as many (10000)")
    add("--seed", type=int, default=0, help="of the latents (0)")
    add("--epochs", type=int, default=6, help="of the classifier (6)")
    add("--inception", action="store_true", help="Inception's features in place of the classifier's")
    return p.parse_args(argv)

# --------------------------------------------------------------------------------------- pictures

def samples_of(source, args):
    """uint8 (n, H, W, C) pictures, and the classes that were asked for, (n) or None."""
    path, n = Path(source), args.n_samples
    if path.is_dir() and not (path / "checkpoint.pt").exists():
        pictures = [np.asarray(Image.open(file)) for file in sorted(path.glob("*.png"))[:n]]
        images = np.stack(pictures or [np.zeros((0, 0))])
        return images.reshape(*images.shape[:3], -1) if pictures else images, None
    if path.suffix == ".npy":
        labels = path.with_stem(f"{path.stem}_labels")  # as infer_ort.py writes them
        asked = np.load(labels)[:n] if labels.exists() else None
        return np.load(path, mmap_mode="r")[:n], asked
    if path.suffix == ".onnx":
        gen = infer_ort.Generator(path)
        labels = np.arange(n) % gen.n_classes if gen.n_classes else None
        return gen(infer_ort.latents(args.seed, 0, n, gen.nz), labels), labels
    netG, *_ = export.load(gan.checkpoint_in(path))
    inputs = {"z": infer_ort.latents(args.seed, 0, n, netG.config["nz"])}
    if "n_classes" in netG.config:
        inputs["labels"] = np.arange(n) % netG.config["n_classes"]
    return gan.generate(netG.to(DEVICE), *inputs.values()), inputs.get("labels")

def real_images(args, img_size, nc):
    """((images, labels) of training, the same of test, number of classes); images uint8 (N, H, W, C)."""
    flags = gan.get_args(["--dataset", args.dataset, "--data_dir", args.data_dir, f"--img_size={img_size}", f"--nc={nc}"])
    images, labels, classes = gan.load_data(flags)
    images, labels = images.numpy(), labels.numpy()
    if args.dataset == "digits":  # drawn as the training images are, and none of them
        numbers = np.arange(10**6, 10**6 + 10000)
        pictures, test_labels = (gan.draw_digit(i, img_size) for i in numbers), numbers % 10
    elif args.dataset in ("mnist", "fashion_mnist", "cifar10"):
        from torchvision import datasets

        names = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10"}
        data = getattr(datasets, names[args.dataset])(args.data_dir, train=False, download=True)
        pictures, test_labels = (picture for picture, _ in data), np.asarray(data.targets)
    else:
        order = np.random.default_rng(0).permutation(len(images))
        n = min(10000, len(images) // 10)
        test, train = np.sort(order[:n]), np.sort(order[n:])
        return (images[train], labels[train]), (images[test], labels[test]), len(classes)
    pixels = b"".join(gan.to_pixels(picture, img_size, nc) for picture in pictures)
    test_images = np.frombuffer(pixels, np.uint8).reshape(-1, img_size, img_size, nc)
    return (images, labels), (test_images, test_labels), len(classes)

# ------------------------------------------------------------------------------------- classifier

class Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut (He et al. 2016): (N, n_in, H, W) -> half the size."""

    def __init__(self, n_in, n_out):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(n_in, n_out, 3, 2, 1, bias=False), nn.BatchNorm2d(n_out), nn.ReLU(True),
            nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False), nn.BatchNorm2d(n_out),
        )
        self.shortcut = nn.Conv2d(n_in, n_out, 1, 2, bias=False)

    def forward(self, x):
        return F.relu(self.body(x) + self.shortcut(x))

class Classifier(nn.Module):
    """(N, nc, H, W) in [-1, 1] -> (N, n_classes) logits; body(x): (N, 128) features."""

    def __init__(self, nc, n_classes):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(nc, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(True),
            Residual(32, 64), Residual(64, 128), Residual(128, 128),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )
        self.head = nn.Linear(128, n_classes)

    def forward(self, x):
        return self.head(self.body(x))

def augment(x):
    """Turned by up to 15 degrees, scaled by up to 15 %, shifted by up to 10 % of the side."""
    def between(low, high):
        return torch.empty(len(x), device=x.device).uniform_(low, high)

    angle, size = between(-15, 15).deg2rad(), between(0.85, 1.15)
    cos, sin = angle.cos() * size, angle.sin() * size
    rows = [cos, -sin, between(-0.2, 0.2), sin, cos, between(-0.2, 0.2)]  # of sides of length 2
    grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), x.shape, align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)

def to_float(images):
    """uint8 (n, H, W, C) array -> float (n, C, H, W) in [-1, 1] on the device."""
    x = torch.from_numpy(np.array(images)).to(DEVICE).permute(0, 3, 1, 2)
    return x.float().sub_(127.5).div_(127.5)

def trained_classifier(images, labels, n_classes, args):
    """A Classifier of these images; trained once, and kept."""
    some = np.ascontiguousarray(images[::max(1, len(images) // 1000)])
    made_of = repr((images.shape, n_classes, args.epochs)).encode() + some.tobytes() + labels.tobytes()
    file = Path(args.data_dir, "cache", f"classifier-{hashlib.sha256(made_of).hexdigest()[:16]}.pt")
    torch.manual_seed(0)
    net = Classifier(images.shape[3], n_classes).to(DEVICE, memory_format=torch.channels_last)
    if file.exists():
        net.load_state_dict(torch.load(file, map_location=DEVICE, weights_only=True))
        return net.eval()
    steps, rate = max(1, len(images) // 128), 3e-3
    optimizer = torch.optim.AdamW(net.parameters(), rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=args.epochs * steps)
    bf16 = DEVICE.type == "cuda" or torch.cpu.get_capabilities().get("avx512_bf16", False)
    for epoch in range(args.epochs):
        order = np.random.default_rng((0, epoch)).permutation(len(images))[:steps * 128]
        for index in tqdm(order.reshape(steps, -1), f"classifier, epoch {epoch + 1} of {args.epochs}"):
            x = augment(to_float(images[index]))
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
                logits = net(x)
            loss = F.cross_entropy(logits.float(), torch.from_numpy(labels[index]).to(DEVICE))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with gan.new_file(file) as f:
        torch.save(net.state_dict(), f)
    return net.eval()

@torch.no_grad()
def look(net, images):
    """(n, 128) features and (n, n_classes) probabilities, float64."""
    seen = [net.body(to_float(images[i:i + 500])) for i in range(0, len(images), 500)]
    features = torch.cat(seen)
    return features.double().cpu(), net.head(features).softmax(1).double().cpu()

# ----------------------------------------------------------------------------------------- scores

def distances(real, fake, feature):
    """FID and KID x 1000, by torchmetrics, of what `feature` makes of tensors (n, ...)."""
    size = min(1000, len(real), len(fake))
    fid = FrechetInceptionDistance(feature).set_dtype(torch.float64)
    kid = KernelInceptionDistance(feature, subset_size=size).set_dtype(torch.float64)
    torch.manual_seed(0)  # of KID's subsets
    for metric in (fid.to(DEVICE), kid.to(DEVICE)):
        for tensors, is_real in ((real, True), (fake, False)):
            for part in tensors.split(100):
                metric.update(part.to(DEVICE), real=is_real)
    return {"FID": float(fid.compute()), "KID x 1000": 1000 * float(kid.compute()[0])}

def precision_recall(real, fake, k=5):
    """Shares of fakes within a real one's distance to its k-th neighbour, and the other way round."""
    def share(inside, of):
        radius = torch.cat([torch.cdist(part, of).kthvalue(k + 1).values for part in of.split(1000)])
        return torch.cat([(torch.cdist(part, of) < radius).any(1) for part in inside.split(1000)]).double().mean()

    return {"precision": float(share(fake, real)), "recall": float(share(real, fake))}

def score(net, images, labels, test_features):
    """{column: value} of uint8 images (n, H, W, C), asked for as labels (n) or None."""
    features, p = look(net, images)
    found = p.argmax(1)
    shares = torch.bincount(found, minlength=p.shape[1]).double() / len(found)
    same = nn.Identity()  # these are features already
    same.num_features = features.shape[1]
    row = distances(test_features, features, same) | precision_recall(test_features, features)
    row |= {"classes": math.exp(torch.special.entr(shares).sum()), "confidence": float(p.max(1).values.mean())}
    if labels is not None:
        row["asked"] = float((found.numpy() == labels).mean())
    return row

def measure(args):
    """{source: {column: value}}, the floor first."""
    loaded = {source: samples_of(source, args) for source in dict.fromkeys(args.sources)}
    for source, (images, _) in loaded.items():
        if len(images) < 100 or images.dtype != np.uint8 or images.ndim != 4:
            raise infer_ort.InputError(f"{source}: {images.dtype} {images.shape}; 100 or more pictures are wanted, "
                                       "uint8 (n, H, W, C), as PNG files or an .npy")
    shapes = {images.shape[1:] for images, _ in loaded.values()}
    if len(shapes) > 1:
        raise infer_ort.InputError(f"{', '.join(loaded)}: of different sizes, {sorted(shapes)}: score them one by one")
    _, img_size, nc = shapes.pop()
    (images, labels), (test, test_labels), n_classes = real_images(args, img_size, nc)
    some = np.random.default_rng(1).permutation(len(images))[:args.n_samples]
    loaded = {"real training images": (images[some], labels[some])} | loaded
    if args.inception:
        def to_rgb(x):
            return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)

        scores = [distances(to_rgb(test), to_rgb(x), 2048) for x, _ in loaded.values()]
    elif n_classes < 2:
        raise infer_ort.InputError(f"--dataset {args.dataset}: no classes to tell; take --inception")
    else:
        net = trained_classifier(images, labels, n_classes, args)
        features, p = look(net, test)
        right = (p.argmax(1).numpy() == test_labels).mean()
        print(f"The classifier is right in {right:.2%} of {len(test)} test images.")
        scores = [score(net, *pair, features) for pair in loaded.values()]
    return {source: {"pictures": len(x)} | row for (source, (x, _)), row in zip(loaded.items(), scores)}

def main():
    """Prints the table, in Markdown. What the user can mend is one line."""
    try:
        table = measure(get_args())
    except (OSError, ValueError, ImportError) as e:  # files that are no pictures, or not these
        sys.exit(f"quality.py: error: {' '.join(str(e).split())}")
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    print("| | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for source, row in table.items():
        digits = {"pictures": 0, "FID": 2, "KID x 1000": 2, "classes": 2}
        cells = [f"{row[column]:.{digits.get(column, 3)}f}" if column in row else "" for column in columns]
        print(f"| {source} | " + " | ".join(cells) + " |")

if __name__ == "__main__":
    main()
