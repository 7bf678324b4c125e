"""How good a generator's pictures are: distances to real ones, variety, classes, copies.

    python benchmarks/quality.py runs/dcgan-mnist --dataset mnist
    python benchmarks/quality.py runs/acgan-mnist int8.onnx samples.npz --dataset mnist
    python benchmarks/quality.py runs/dcgan-mnist --dataset mnist --each    # its best checkpoint
    python benchmarks/quality.py runs/dcgan-celeba --dataset celeba --inception # without labels

Three small classifiers of different build are trained once on the data set's training images (with
a fixed seed, some minutes on two cores, kept under --cache). Their 128 penultimate features are
compared, samples against test images. What one of them misses another may see: only where all
FIDs are lower are pictures better. The third, a residual net that saw images turned, scaled and
shifted, is the strictest. All else is by the first, where nothing is said.

- FID, FID 2, FID 3: Frechet distance of the features of each classifier (Heusel et al. 2017). Its
  scale is the classifier's: compare within one column, and with the floor, which is the distance of
  real training images from the test images.
- spread, spread 2, spread 3: variance of the features within a class, over that of the test images.
  Below 1: too typical.
- precision, recall (Kynkaanniemi et al. 2019), density, coverage (Naeem et al. 2020): how much of
  what is generated is like real images, and how much of the real is generated; 5 nearest neighbours.
- classes: e to the entropy of the classes found, 10.0 for ten equally frequent ones; few mean mode
  collapse.
- sure: share of pictures that the classifier gives a class at 0.8 or more.
- confidence: mean probability of the class that the third classifier finds.
- asked: share of pictures that show the class that was asked for (conditional generators).
- colour: mean saturation (a pixel's largest channel less its smallest) over that of the test
  images; RGB only. Below 1 the colours are washed out.
- copying: median distance of a sample from the nearest training image, over that of a test image.
  Far below 1: copies.

Data without a test split (a folder, a .zip) loses a fixed tenth of its images, at most 10,000, to
one; the generator has learnt from these too.
"""

import argparse
import hashlib
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import export
import gan

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("sources", nargs="+", metavar="SOURCE", help="checkpoints, run folders, .onnx, .npz of samples")
    add("--dataset", required=True, help="of the generators' training, as for the training scripts")
    add("--data_dir", default="./data", help="where data sets are found")
    add("--n_samples", type=int, default=10000, help="pictures of each generator")
    add("--seed", type=int, default=0, help="of the latents")
    add("--epochs", type=int, default=6, help="of the classifiers")
    add("--each", action="store_true",
        help="all checkpoints of the runs (see --keep_every), and the best")
    add("--cache", help="folder that keeps the classifiers (default: cache/ in --data_dir)")
    add("--inception", action="store_true",
        help="also Inception-FID and KID (pip install torch-fidelity, which downloads weights)")
    add("--neighbours", metavar="FILE.png", help="some samples, each beside its nearest training images")
    add("--json", metavar="FILE", help="write the scores there")
    args = p.parse_args(argv)
    args.cache = args.cache or Path(args.data_dir, "cache")
    return args

# ------------------------------------------------------------------------------------------------------- images

def samples_of(source, args):
    """uint8 (n, H, W, C) pictures, and the labels that were asked for (n) or None."""
    path = Path(source)
    if path.suffix == ".npz":
        return samples_of_array(path, args.n_samples)
    if path.suffix == ".onnx":
        return samples_of_onnx(path, args)
    script, netG, *_ = export.load(gan.last_checkpoint(source))
    inputs = export.draw(script, netG.to(DEVICE), args.seed, 0, args.n_samples)
    z, labels = inputs["z"], inputs.get("labels", np.zeros(args.n_samples, np.int64))
    images = [script.generate(netG, z[s], labels[s]) for s in progress(slices(len(z), 512), source)]
    return np.concatenate(images), inputs.get("labels")

def samples_of_array(path, n):
    try:
        with np.load(path) as z:
            images = z["arr_0"][:n]
            labels = z["labels"][:n] if "labels" in z else None
    except (OSError, ValueError, KeyError) as e:
        raise OSError(f"{path}: no .npz of samples with arr_0 in it ({e})") from e
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        found = f"{images.dtype} {images.shape}"
        raise OSError(f"{path}: arr_0 is {found}; it should be uint8 (n, H, W, 1 or 3)")
    return images, labels

def samples_of_onnx(path, args):
    import infer_ort

    netG = infer_ort.Generator(path)
    n, images = args.n_samples, []
    labels = np.arange(n) % netG.n_classes if netG.n_classes else None
    for s in progress(slices(n, 64), path):
        z = infer_ort.latents(args.seed, s.start, s.stop - s.start, netG.nz)
        images.append(netG(z, None if labels is None else labels[s]))
    return np.concatenate(images), labels

def slices(n, size):
    return [slice(i, min(i + size, n)) for i in range(0, n, size)]

def progress(items, what, total=None):
    return tqdm(items, desc=str(what)[-30:], total=total, leave=False, dynamic_ncols=True)

def real_images(args, img_size, nc):
    """((images, labels) of training, the same of test, class names); images uint8 (N, H, W, C),
    labels (N) or None."""
    flags = {"dataset": args.dataset, "data_dir": args.data_dir, "img_size": img_size, "nc": nc}
    argv = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    images, labels, classes = gan.load_data(gan.get_args(argv))
    labels = labels if classes else None
    if args.dataset == "digits":  # drawn as the training images are, and none of them
        items = range(10**6, 10**6 + 10000)
        test_labels = np.array(items) % 10
        pictures = (gan.draw_digit(i, img_size) for i in items)
    elif args.dataset in ("mnist", "fashion_mnist", "cifar10"):
        data = test_split(args)
        items, test_labels = np.asarray(data.data), np.asarray(data.targets)
        pictures = map(Image.fromarray, items)
    else:
        order = np.random.default_rng(0).permutation(len(images))
        n = min(10000, len(images) // 10)
        test, train = np.sort(order[:n]), np.sort(order[n:])
        parts = [(images[k], None if labels is None else labels[k]) for k in (train, test)]
        return *parts, classes
    pictures = progress(pictures, "test images", len(items))
    pixels = bytearray().join(gan.to_pixels(picture, img_size, nc) for picture in pictures)
    test_images = np.frombuffer(pixels, np.uint8).reshape(-1, img_size, img_size, nc)
    return (images, labels), (test_images, test_labels), classes

def test_split(args):
    """torchvision's."""
    from torchvision import datasets

    names = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10"}
    try:
        return getattr(datasets, names[args.dataset])(args.data_dir, train=False, download=True)
    except (OSError, RuntimeError) as e:
        raise OSError(f"--dataset {args.dataset}: no test split under {args.data_dir} ({e})") from e

# --------------------------------------------------------------------------------------------------- classifier

class Classifier(nn.Module):
    """(N, nc, H, W) in [-1, 1] -> (N, n_classes) logits; features(): (N, 128)."""

    smoothing = 0.05
    rate = 3e-3

    def __init__(self, nc, n_classes, img_size):
        super().__init__()

        def block(n_in, n_out, stride):
            conv = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False)
            return [conv, nn.BatchNorm2d(n_out), nn.ReLU(True)]

        self.body = nn.Sequential(
            *block(nc, 32, 1), *block(32, 64, 2), *block(64, 128, 2), *block(128, 128, 2),
            nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.2), nn.Linear(2048, 128), nn.ReLU(True),
        )
        self.head = nn.Linear(128, n_classes)

    def forward(self, x):
        return self.head(self.body(x))

    def augment(self, x):
        """Shifted by up to two pixels, a batch at a time."""
        height, width = x.shape[2:]
        top, left = torch.randint(5, (2,)).tolist()
        return F.pad(x, (2, 2, 2, 2), "replicate")[..., top:top + height, left:left + width]

class PlainClassifier(Classifier):
    """The same by LeCun's recipe of 1998: wide kernels, pooling, no BatchNorm; and hard labels, which
    leave more of what tells pictures of one class apart in the features."""

    smoothing = 0.0
    rate = 1e-3

    def __init__(self, nc, n_classes, img_size):
        nn.Module.__init__(self)
        self.body = nn.Sequential(
            nn.Conv2d(nc, 32, 5, padding=2), nn.ReLU(True), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(True), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * (img_size // 4) ** 2, 128), nn.ReLU(True),
        )
        self.head = nn.Linear(128, n_classes)

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

class ResidualClassifier(Classifier):
    """A residual net with a global mean in place of a linear layer; hard labels. It is trained on
    images each of which is turned, scaled and shifted, and so knows strokes, not places."""

    smoothing = 0.0

    def __init__(self, nc, n_classes, img_size):
        nn.Module.__init__(self)
        self.body = nn.Sequential(
            nn.Conv2d(nc, 32, 3, 1, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(True),
            Residual(32, 64), Residual(64, 128), Residual(128, 128),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )
        self.head = nn.Linear(128, n_classes)

    def augment(self, x):
        """Turned by up to 15 degrees, scaled by up to 15 %, shifted by up to 10 % of the side."""
        def between(low, high):
            return torch.empty(len(x), device=x.device).uniform_(low, high)

        angle, size = between(-15, 15).deg2rad(), between(0.85, 1.15)
        cos, sin = angle.cos() * size, angle.sin() * size
        rows = [cos, -sin, between(-0.2, 0.2), sin, cos, between(-0.2, 0.2)]  # of sides of length 2
        grid = F.affine_grid(torch.stack(rows, 1).view(-1, 2, 3), x.shape, align_corners=False)
        return F.grid_sample(x, grid, padding_mode="border", align_corners=False)

def to_float(images):
    """uint8 (n, H, W, C) array -> float (n, C, H, W) in [-1, 1] on the device, channels_last."""
    x = torch.from_numpy(images).to(DEVICE).permute(0, 3, 1, 2)
    return x.float().sub_(127.5).div_(127.5)

@torch.no_grad()
def features_of(net, images):
    """((n, 128) features, (n, n_classes) class probabilities) as float64 arrays."""
    net.eval()
    features, probabilities = [], []
    for i in range(0, len(images), 500):
        f = net.body(to_float(np.array(images[i:i + 500])))
        features.append(f.double().cpu())
        probabilities.append(net.head(f).softmax(1).double().cpu())
    return torch.cat(features).numpy(), torch.cat(probabilities).numpy()

def fast_bf16():
    """Whether bfloat16 is fast here, as the scripts decide it."""
    if DEVICE.type == "cuda":
        return torch.cuda.is_bf16_supported(False)
    return getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)

def classifier_file(kind, images, labels, n_classes, args):
    """Where this kind of classifier of these images is kept."""
    content = hashlib.sha256(repr((kind.__name__, images.shape, n_classes, args.epochs)).encode())
    some = images[:: max(1, len(images) // 1000)]
    for part in (np.ascontiguousarray(some), labels):
        content.update(part.tobytes())
    return Path(args.cache, f"classifier-{content.hexdigest()[:16]}.pt")

def train_classifier(net, images, labels, epochs):
    size = 128
    steps, bf16 = max(1, len(images) // size), fast_bf16()
    opt = torch.optim.AdamW(net.parameters(), net.rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, net.rate, total_steps=epochs * steps)
    bar = tqdm(total=epochs * steps, desc="classifier", unit="step", dynamic_ncols=True)
    for epoch in range(epochs):
        order = np.random.default_rng((0, epoch)).permutation(len(images))[:steps * size]
        for index in order.reshape(steps, -1):
            x = net.augment(to_float(images[index]))
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
                out = net(x)
            wanted = torch.from_numpy(labels[index]).to(DEVICE)
            loss = F.cross_entropy(out.float(), wanted, label_smoothing=net.smoothing)
            opt.zero_grad()
            loss.backward()
            opt.step()
            schedule.step()
            bar.update()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    bar.close()

def trained_classifier(kind, train, test, n_classes, args):
    """(Classifier of this kind, its accuracy on the test images); trained once, kept in --cache."""
    images, labels = train
    file = classifier_file(kind, images, labels, n_classes, args)
    torch.manual_seed(0)
    net = kind(images.shape[3], n_classes, images.shape[1])
    net.to(DEVICE, memory_format=torch.channels_last)
    if file.exists():
        net.load_state_dict(torch.load(file, map_location=DEVICE, weights_only=True))
    else:
        train_classifier(net, images, labels, args.epochs)
        with gan.atomic_write(file) as f:
            torch.save(net.state_dict(), f)
    _, p = features_of(net, test[0])
    return net, float((p.argmax(1) == test[1]).mean())

# ------------------------------------------------------------------------------------------------------- scores

def frechet(a, b):
    """Frechet distance of two sets of features (n, d), by torchmetrics in float64."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    extractor = nn.Identity()  # these are features already
    extractor.num_features = a.shape[1]
    fid = FrechetInceptionDistance(extractor).set_dtype(torch.float64)
    fid.update(torch.from_numpy(a), real=True)
    fid.update(torch.from_numpy(b), real=False)
    return float(fid.compute())

def nearest(a, b, k):
    """(n, k) distances of each of a (n, d) to its k nearest in b (m, d), and which they are."""
    a, b = to_device(a), to_device(b)
    found = [torch.cdist(part, b).topk(k, largest=False) for part in a.split(1000)]
    distances = torch.cat([f.values for f in found])
    return distances.cpu().numpy(), torch.cat([f.indices for f in found]).cpu().numpy()

def to_device(x):
    return torch.from_numpy(x).float().to(DEVICE)

def radii(x, k):
    """(n): distance of each of x (n, d) to its k-th neighbour, not counting itself."""
    return torch.cat([torch.cdist(part, x).kthvalue(k + 1).values for part in x.split(1000)])

def precision_recall(real, fake, k=5):
    """precision, recall (Kynkaanniemi et al. 2019, eq. 1 and 2); density, coverage (Naeem et al.
    2020, eq. 3 and 5)."""
    real, fake = to_device(real), to_device(fake)
    real_radius, fake_radius = radii(real, k), radii(fake, k)
    inside, recalled, covered = 0, [], []
    for part, radius in zip(real.split(1000), real_radius.split(1000)):
        d = torch.cdist(part, fake)  # (1000, number of fakes)
        inside = inside + (d < radius[:, None]).sum(0)
        recalled.append((d < fake_radius).any(1))
        covered.append(d.min(1).values < radius)
    return {
        "precision": (inside > 0).float().mean().item(),
        "recall": torch.cat(recalled).float().mean().item(),
        "density": (inside / k).mean().item(),
        "coverage": torch.cat(covered).float().mean().item(),
    }

def inception_scores(fake, test):
    """Inception-FID and KID, mean of torchmetrics' subsets."""
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance

        size = min(1000, len(fake), len(test))
        metrics = [FrechetInceptionDistance(normalize=False).to(DEVICE),
                   KernelInceptionDistance(subset_size=size, normalize=False).to(DEVICE)]
    except Exception as e:  # no torch-fidelity, no network, a damaged file: the way out is one
        raise OSError(f"--inception: Inception's weights cannot be had ({e}); run it "
                      "once with network: they are downloaded and kept") from e
    for images, real in ((test, True), (fake, False)):
        for i in progress(range(0, len(images), 100), "Inception"):
            x = torch.from_numpy(np.ascontiguousarray(images[i:i + 100])).permute(0, 3, 1, 2).to(DEVICE)
            for metric in metrics:
                metric.update(x.expand(-1, 3, -1, -1), real=real)
    return {"Inception-FID": float(metrics[0].compute()), "KID": float(metrics[1].compute()[0])}

def saturation(images):
    """Mean difference between the largest and the smallest channel of uint8 (n, H, W, 3) pixels."""
    parts = np.array_split(images, max(1, len(images) // 1000))
    return float(np.mean([np.ptp(part, axis=3).mean() for part in parts]))

def spread(features, found, test):
    """Variance of features (n, d) within the classes found (n), over that of the test images'
    ((m, d), (m))."""
    def within(x, y):
        return sum(x[y == c].var(0).sum() * np.mean(y == c) for c in np.unique(y))

    return float(within(features, found) / within(*test))

def score(images, labels, reference):
    """({column: value} of uint8 images (n, H, W, C), asked for as labels (n) or None; the first
    classifier's features (n, 128))."""
    seen = [features_of(net, images) for net in reference["nets"]]
    (features, p), (features2, p2), (features3, p3) = seen
    test, test2, test3 = reference["test"]
    found = p.argmax(1)
    share = np.bincount(found, minlength=p.shape[1]) / len(found)
    entropy = -sum(s * math.log(s) for s in share if s)
    row = {
        "FID": frechet(test[0], features),
        "FID 2": frechet(test2[0], features2),
        "FID 3": frechet(test3[0], features3),
        "spread": spread(features, found, test),
        "spread 2": spread(features2, p2.argmax(1), test2),
        "spread 3": spread(features3, p3.argmax(1), test3),
        **precision_recall(test[0], features),
        "classes": math.exp(entropy),
        "sure": float((p.max(1) >= 0.8).mean()),
        "confidence": float(p3.max(1).mean()),
    }
    if labels is not None:
        row["asked"] = float((found == labels).mean())
    if reference["saturation"]:
        row["colour"] = saturation(images) / reference["saturation"]
    distance, _ = nearest(features[:2000], reference["train"], 1)
    row["copying"] = float(np.median(distance) / reference["distance"])
    row["histogram"] = share.round(4).tolist()
    return row, features

def draw_neighbours(images, features, train, reference, path):
    """A picture: ten samples, each followed by the eight training images that are nearest to it."""
    _, index = nearest(features[:10], reference["train"], 8)
    rows = [np.concatenate((image[None], train[k])) for image, k in zip(images, index)]
    gan.save_grid(Path(path), np.concatenate(rows), 9)

def load_samples(args):
    """{source: (images, labels)}, all of one size."""
    if args.n_samples < 100:
        raise OSError(f"--n_samples {args.n_samples}: too few to judge; take 100 or more, 10000 to compare")
    sources = args.sources
    if args.each:
        sources = [str(f) for source in sources for f in sorted(Path(source).glob("checkpoint*.pt"))]
    loaded = {source: samples_of(source, args) for source in dict.fromkeys(sources)}
    if not loaded:
        raise OSError(f"--each: no checkpoint*.pt in {' '.join(args.sources)}")
    shapes = {images.shape[1:] for images, _ in loaded.values()}
    if len(shapes) > 1:
        raise OSError(f"{' '.join(args.sources)}: their pictures have different sizes, "
                      f"{sorted(shapes)}; score them one by one")
    return loaded

def make_reference(train, test, classes, args):
    """What samples are compared with, and the accuracy of each classifier."""
    begin = time.perf_counter()
    nets, accuracy = [], []
    for kind in (Classifier, PlainClassifier, ResidualClassifier):
        net, right = trained_classifier(kind, train, test, len(classes), args)
        nets.append(net)
        accuracy.append(right)
    right = ", ".join(f"{a:.2%}" for a in accuracy)
    seconds = time.perf_counter() - begin
    print(f"classifiers: {right} of {len(test[0])} test images right ({seconds:.0f} s)")
    seen = []
    for net in nets:
        features, p = features_of(net, test[0])
        seen.append((features, p.argmax(1)))
    reference = {"nets": nets, "test": seen, "train": features_of(nets[0], train[0])[0]}
    reference["saturation"] = saturation(test[0]) if test[0].shape[3] == 3 else None
    distance, _ = nearest(seen[0][0][:2000], reference["train"], 1)
    reference["distance"] = np.median(distance)
    return reference, accuracy

def measure(args):
    loaded = load_samples(args)
    images, _ = next(iter(loaded.values()))
    img_size, _, nc = images.shape[1:]
    train, test, classes = real_images(args, img_size, nc)
    has_labels = train[1] is not None
    if not has_labels and not args.inception:
        raise OSError(f"--dataset {args.dataset}: no labels, so no classifier; "
                      "--inception compares without")
    facts = {"dataset": args.dataset, "n_samples": args.n_samples, "n_test": len(test[0])}
    table = {}
    if has_labels:
        reference, accuracy = make_reference(train, test, classes, args)
        facts |= {"accuracy": accuracy, "classes": classes}
        some = np.random.default_rng(1).permutation(len(train[0]))[:args.n_samples]
        floor, _ = score(train[0][some], train[1][some], reference)
        del floor["copying"]  # they are the training images
        table["real training images"] = floor
    for source, (images, labels) in loaded.items():
        table[source] = {}
        if has_labels:
            table[source], features = score(images, labels, reference)
            if args.neighbours:
                draw_neighbours(images, features, train[0], reference, args.neighbours)
        if args.inception:
            table[source] |= inception_scores(images, test[0])
    show(table)
    if args.each:
        print(f"best: {best(table, loaded)}")
    if args.json:
        with gan.atomic_write(Path(args.json)) as f:
            f.write(json.dumps(facts | {"scores": table}, indent=1).encode())

def show(table):
    """As Markdown."""
    columns = dict.fromkeys(column for row in table.values() for column in row)
    columns.pop("histogram", None)  # for --json
    print("| | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for source, row in table.items():
        cells = []
        for column in columns:
            digits = 2 if column in ("FID", "FID 2", "FID 3", "classes") else 3
            cells.append(f"{row[column]:.{digits}f}" if column in row else "")
        print(f"| {source} | " + " | ".join(cells) + " |")

def best(table, sources):
    """The source whose ranks by the three FIDs have the least sum."""
    ranks = dict.fromkeys(sources, 0)
    for column in ("FID", "FID 2", "FID 3"):
        for rank, source in enumerate(sorted(sources, key=lambda source: table[source][column])):
            ranks[source] += rank
    return min(ranks, key=ranks.get)

def main():
    """One line for what the user can mend, as in the training scripts."""
    try:
        measure(get_args())
    except (OSError, MemoryError, KeyboardInterrupt) as e:
        sys.exit(f"quality.py: error: {' '.join(str(e).split()) or type(e).__name__}")

if __name__ == "__main__":
    main()
