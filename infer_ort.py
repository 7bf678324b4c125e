"""Pictures from an ONNX file that export.py wrote, through ONNX Runtime, without PyTorch.

    python infer_ort.py model.onnx                                       # a grid, beside the model
    python infer_ort.py model.onnx --n_samples 50000 --out folder/       # PNG files, as FID tools read them
    python infer_ort.py model.onnx --n_samples 50000 --out samples.npy   # uint8 (N, H, W, C)
    python infer_ort.py model.onnx --labels cat,dog --out folder/        # of two classes, in turn
    python infer_ort.py model.onnx --interpolate 60                      # a GIF of a walk
    python infer_ort.py model.onnx --benchmark                           # images/s and latencies

    torchrun --nproc_per_node 8 infer_ort.py model.onnx --n_samples 1000000 --out folder/

Picture i of a seed is the one that --sample of the training scripts makes, whatever the batch size, the
provider or the number of processes, which each take a part of the range. (Sums in another order may
change a pixel by one level.)
"""

import argparse
import contextlib
import ctypes
import json
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

class InputError(ValueError):
    """What the user can mend: main() makes one line of it."""

def get_args(argv=None):
    p = argparse.ArgumentParser("infer_ort.py", usage="%(prog)s model.onnx [flags]", description=__doc__,
                                allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("model", help="ONNX file that export.py wrote")
    add("--n_samples", type=int, help="pictures (64, or 10 of each class)")
    add("--batch_size", type=int, default=64, help="pictures at a time (64)")
    add("--seed", type=int, default=0, help="of the latents (0)")
    add("--start", type=int, default=0, help="number of the first picture (0)")
    add("--labels", help="classes in turn, by name or number: cat,dog or 0,3,7 (all)")
    add("--out", metavar="FILE.png|FILE.npy|FILE.gif|FOLDER/",
        help="a grid, an array, an animation, or numbered PNG files (a grid beside the model)")
    add("--interpolate", type=int, nargs="?", const=60, metavar="FRAMES", help="GIF of a walk (60)")
    add("--walk_dim", type=int, metavar="D", help="move coordinate D of one latent, 0.01 a picture")
    add("--provider", choices=("auto", *PROVIDERS), default="auto",
        help="auto: CUDA where it works, for files that are not int8 (auto)")
    add("--device_id", type=int, default=int(os.getenv("LOCAL_RANK", "0")), help="GPU (the local rank, or 0)")
    add("--threads", type=int, default=0, help="on the CPU (0: one for each core)")
    add("--benchmark", action="store_true", help="measure batches of 1 to 256, write nothing")
    args = p.parse_args(argv)
    if args.n_samples is not None and args.n_samples < 1 or args.batch_size < 1:
        p.error("--n_samples and --batch_size are at least 1")
    if args.start < 0 or not 0 <= args.seed < 2**63:
        p.error("--start is at least 0, --seed 0 to 2**63 - 1")
    suffixes = (".gif",) if args.interpolate else (".png", ".npy", "")
    args.out = args.out or f"{os.path.splitext(args.model)[0]}_samples{suffixes[0]}"
    args.suffix = "" if args.out.endswith("/") else Path(args.out).suffix
    if args.suffix not in suffixes:
        p.error(f"--out {args.out}: give a .png, an .npy or a folder/; with --interpolate a .gif")
    return args

# ---------------------------------------------------------------------------------------- latents

def latents(seed, start, n, nz):
    """Latents start to start + n - 1 of a seed: float32 (n, nz) ~ N(0, 1).

    Latent i depends on seed, i and nz alone. NumPy's Philox4x64-10 has key (seed, 0); latent i takes the
    ceil(nz / 4) blocks of four 64-bit words from counter 1 + i * ceil(nz / 4) on (NumPy counts before it
    draws). The upper 53 bits of a word, plus a half, over 2**53 are a uniform u in (0, 1). Box-Muller makes
    of each pair r cos t and r sin t, r = sqrt(-2 ln u1), t = 2 pi u2 (float64).
    """
    blocks = math.ceil(nz / 4)
    generator = np.random.Philox(key=seed, counter=start * blocks)
    words = generator.random_raw(4 * blocks * n).reshape(n, 2 * blocks, 2)
    u = ((words >> np.uint64(11)) + 0.5) * 2.0**-53
    r = np.sqrt(-2 * np.log(u[..., 0]))
    t = 2 * np.pi * u[..., 1]
    pairs = np.stack((r * np.cos(t), r * np.sin(t)), -1)
    return pairs.reshape(n, 4 * blocks)[:, :nz].astype(np.float32)

def walk(seed, n, nz, frames):
    """Latents (frames, n, nz): a great circle through latents i and n + i, all ~ N(0, 1)."""
    t = np.linspace(0, 2 * np.pi, frames, endpoint=False, dtype=np.float32)[:, None, None]
    z = latents(seed, 0, 2 * n, nz)
    return np.cos(t) * z[:n] + np.sin(t) * z[n:]

# -------------------------------------------------------------------------------------- generator

PROVIDERS = {"cpu": [], "cuda": ["CUDA"], "tensorrt": ["Tensorrt", "CUDA"]}

def open_session(path, provider, device_id=0, threads=0):
    """onnxruntime.InferenceSession on this provider; or an exception that says why not."""
    import onnxruntime as ort

    ort.set_default_logger_severity(4)  # what matters is said by us, in one line
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    if threads == 0 and hasattr(os, "sched_getaffinity"):
        # ONNX Runtime would take all cores: it does not know of taskset, cgroups or srun.
        options.intra_op_num_threads = len(os.sched_getaffinity(0))
    gpu = {"device_id": device_id}
    providers = [(f"{name}ExecutionProvider", gpu) for name in PROVIDERS[provider]]
    providers.append(("CPUExecutionProvider", {}))
    with contextlib.redirect_stdout(None):
        if provider != "cpu":
            ort.preload_dlls()  # CUDA and cuDNN from their pip packages
        # Without fallback: it would go on with the CPU where a GPU fails, and hardly say so.
        session = ort.InferenceSession(str(path), options, providers=providers, enable_fallback=0)
    session.disable_fallback()
    if session.get_providers()[0] != providers[0][0]:
        raise InputError(f"onnxruntime {ort.__version__} cannot use {provider}: it takes an NVIDIA GPU, its "
                         "driver, and pip install 'onnxruntime-gpu[cuda,cudnn]' (tensorrt: 'tensorrt<11', too)")
    return session

class Generator:
    """A file that export.py wrote: float (n, nz) latents, for a file with classes also int (n) labels
    -> uint8 (n, H, W, C) pictures. Thread-safe.

    provider: cpu, cuda, tensorrt, or auto, which takes CUDA where it works, but for int8 files. Raises
    InputError for another file, or a provider or latents or labels that it cannot use.
    """

    def __init__(self, path, batch_size=64, provider="auto", device_id=0, threads=0):
        self.path, self.batch_size = path, batch_size
        try:  # on the CPU first: what fails here is the file's fault, not the GPU's
            self.session = open_session(path, "cpu", threads=threads)
        except Exception as e:  # ONNX Runtime has exceptions without a common name
            raise InputError(f"{path}: no ONNX file of export.py: {e}") from e
        self.meta = self.session.get_modelmeta().custom_metadata_map
        if self.meta.get("format_version") != "1":
            raise InputError(f"{path}: not a file of export.py, which makes one of your checkpoint")
        self.nz, self.n_classes = int(self.meta["nz"]), int(self.meta["n_classes"])
        self.classes = json.loads(self.meta["classes"])
        self.why = self.choose(provider, device_id, threads)
        self.provider = self.session.get_providers()[0]

    def choose(self, provider, device_id, threads):
        """Opens a session on the GPU if it is to have one. Returns why the provider is what it is."""
        if provider == "cpu":
            return "as asked"
        if provider == "auto" and self.meta["precision"] == "int8":
            return "int8 is for CPUs"
        try:
            ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")  # NVIDIA's driver
            name = "cuda" if provider == "auto" else provider
            self.session = open_session(self.path, name, device_id, threads)
            return "it works"
        except Exception as e:
            if provider != "auto":
                raise InputError(f"--provider {provider}: {e}; or take --provider cpu") from e
            return f"no GPU: {e}"

    def labels(self, text=None):
        """int (k): the classes that --labels names, or all; None where the generator takes none."""
        numbers = {str(k): k for k in range(self.n_classes)}
        numbers |= {name: k for k, name in enumerate(self.classes)}  # a name comes before a number
        asked = self.classes if text is None else [name.strip() for name in text.split(",")]
        if not set(asked) <= set(numbers):
            wanted = ", ".join(self.classes) or "none: it has no classes"
            raise InputError(f"--labels {text}: choose from {wanted}")
        return np.array([numbers[name] for name in asked]) if self.n_classes else None

    def __call__(self, z, labels=None):
        """float (n, nz), int (n) -> uint8 (n, H, W, C)."""
        feed = {"z": np.asarray(z, np.float32)}
        if feed["z"].shape[1:] != (self.nz,):
            raise InputError(f"{self.path}: latents (n, {self.nz}) are wanted, not {feed['z'].shape}")
        if self.n_classes:
            labels = np.asarray(labels)
            right = labels.dtype.kind in "iu" and labels.shape == (len(z),)
            if not right or labels.min() < 0 or labels.max() >= self.n_classes:
                raise InputError(f"{self.path}: labels (n) are wanted, integers, 0 to {self.n_classes - 1}")
            feed["labels"] = labels.astype(np.int64)
        images = []
        for i in range(0, len(z), self.batch_size):
            x = self.run({name: array[i:i + self.batch_size] for name, array in feed.items()})
            if x.dtype != np.uint8:
                x = (x * 127.5 + 128).clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
            images.append(x)
        return np.concatenate(images)

    def run(self, feed):
        """One batch, as the file makes it. On a GPU it is filled up, for there a new shape costs time."""
        n = len(feed["z"])
        if self.provider != "CPUExecutionProvider":
            rows = np.arange(self.batch_size).clip(max=n - 1)  # the last one again and again
            feed = {name: array[rows] for name, array in feed.items()}
        try:
            return self.session.run(None, feed)[0][:n]
        except Exception as e:
            way_out = "try a smaller --batch_size or --provider cpu"
            raise InputError(f"{self.path}: {self.provider} failed; {way_out}: {e}") from e

# ----------------------------------------------------------------------------------------- output

def to_image(pixels):
    """uint8 (H, W, C) -> PIL image."""
    from PIL import Image

    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)

def make_grid(images, columns):
    """uint8 (N, H, W, C) -> PIL image like torchvision's, `columns` pictures in a row."""
    from PIL import Image

    n, h, w, c = images.shape
    columns = min(columns, n)
    gap = 2 if n > 1 else 0
    size = columns * (w + gap) + gap, math.ceil(n / columns) * (h + gap) + gap
    grid = Image.new("L" if c == 1 else "RGB", size, "white")
    for i, image in enumerate(images):
        grid.paste(to_image(image), (gap + i % columns * (w + gap), gap + i // columns * (h + gap)))
    return grid

def write_folder(folder, batches, start):
    """PNG files, numbered from `start` on."""
    os.makedirs(folder, exist_ok=True)

    def write(i, image):
        to_image(image).save(Path(folder, f"{i:06d}.png"), compress_level=1)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for images in batches:
            list(pool.map(write, range(start, start + len(images)), images))
            start += len(images)

def write_array(path, batches, n):
    """A .npy file of n pictures, written as they come. NumPy refuses half of one."""
    with open(path, "wb") as f:
        for images in batches:
            if f.tell() == 0:
                header = {"descr": "|u1", "fortran_order": False, "shape": (n, *images.shape[1:])}
                np.lib.format.write_array_header_1_0(f, header)
            f.write(np.ascontiguousarray(images))

def batches_of(gen, args, choice, start, n):
    """Yields the n pictures from `start` on, uint8 (k, H, W, C); with --interpolate n of each frame."""
    from tqdm import tqdm

    frames = args.interpolate or 1
    numbers = np.tile(np.arange(start, start + n), frames)
    if args.interpolate:
        walks = walk(args.seed, n, gen.nz, frames).reshape(-1, gen.nz)
    for i in tqdm(range(0, len(numbers), gen.batch_size), unit="batch", delay=2):
        some = numbers[i:i + gen.batch_size]
        if args.interpolate:
            z = walks[i:i + len(some)]
        elif args.walk_dim is not None:
            z = latents(args.seed, args.start, 1, gen.nz).repeat(len(some), 0)
            z[:, args.walk_dim] += 0.01 * (some - args.start)
        else:
            z = latents(args.seed, some[0], len(some), gen.nz)
        yield gen(z, None if choice is None else choice[some % len(choice)])

def generate(args):
    """What the command line asks for; under torchrun this process's part of it."""
    gen = Generator(args.model, args.batch_size, args.provider, args.device_id, args.threads)
    choice = gen.labels(args.labels)
    print(f"{args.model}: {gen.meta['precision']}, {gen.provider}: {gen.why}", flush=True)
    if args.benchmark:
        return benchmark(gen, choice)
    if args.walk_dim is not None and not 0 <= args.walk_dim < gen.nz:
        raise InputError(f"--walk_dim {args.walk_dim}: a latent has coordinates 0 to {gen.nz - 1}")
    n = args.n_samples or (64 if choice is None else 10 * len(choice))
    rank, world = int(os.getenv("RANK", "0")), int(os.getenv("WORLD_SIZE", "1"))
    first, end = n * rank // world, n * (rank + 1) // world
    start, n = args.start + first, end - first
    out = Path(args.out)
    if world > 1 and args.suffix:  # a file for each process; in a folder numbers tell pictures apart
        out = out.with_stem(f"{out.stem}_{rank}")

    batches = batches_of(gen, args, choice, start, n)
    if args.suffix == "":
        write_folder(out, batches, start)
        others = len(list(out.glob("*.png"))) - n
        if others and world == 1:
            print(f"{out}: {others} other PNG files lie there, too", file=sys.stderr)
    elif args.suffix == ".npy":
        write_array(out, batches, n)
        if choice is not None:
            labels = choice[np.arange(start, start + n) % len(choice)]
            np.save(out.with_stem(f"{out.stem}_labels"), labels)
    else:
        images = np.concatenate(list(batches))
        columns = math.ceil(math.sqrt(n)) if choice is None else len(choice)
        frames = images.reshape(-1, n, *images.shape[1:])
        grids = [make_grid(frame, columns) for frame in frames]
        animation = {"save_all": True, "append_images": grids[1:], "loop": 0, "duration": 50}
        grids[0].save(out, **(animation if args.interpolate else {}))
    print(f"wrote {out}")

def benchmark(gen, choice, seconds=2):
    """Prints images/s and latencies of batches."""
    print(f"{'batch':>5} {'images/s':>9} {'p50 ms':>9} {'p95 ms':>9} {'p99 ms':>9}")
    for n in (1, 4, 16, 64, 256):
        gen.batch_size = n
        z = latents(0, 0, n, gen.nz)
        labels = None if choice is None else np.resize(choice, n)
        times = []
        while len(times) < 23 or sum(times) < seconds:
            begin = time.perf_counter()
            gen(z, labels)
            times.append(time.perf_counter() - begin)
        times = times[3:]  # warm-up
        p50, p95, p99 = np.percentile(times, (50, 95, 99)) * 1000
        print(f"{n:5} {n * len(times) / sum(times):9.1f} {p50:9.3f} {p95:9.3f} {p99:9.3f}", flush=True)

def main():
    """One line for what the user can mend; a bug keeps its traceback."""
    try:
        generate(get_args())
    except (InputError, OSError, MemoryError, KeyboardInterrupt) as e:
        sys.exit(f"infer_ort.py: error: {' '.join(str(e).split()) or type(e).__name__}")

if __name__ == "__main__":
    main()
