"""Pictures from an ONNX generator, export.py's or anybody's, through ONNX Runtime, without PyTorch.

    python infer_ort.py model.onnx                                       # a grid, beside the model
    python infer_ort.py model.onnx --n_samples 50000 --out folder/       # PNG files, as FID tools read them
    python infer_ort.py model.onnx --n_samples 50000 --out samples.npz   # arr_0: uint8 (N, H, W, C)
    python infer_ort.py model.onnx --labels 3,7 --out folder/            # of two classes
    python infer_ort.py model.onnx --interpolate 60 --out walk.gif
    python infer_ort.py model.onnx --benchmark
    torchrun --nproc_per_node 8 infer_ort.py model.onnx --n_samples 1000000 --out folder/

Picture i of a seed is the one that --sample of the training scripts makes, whatever the batch size,
provider or number of processes (by torchrun, srun or mpirun), which each take a part of the range and write
files of their own.
"""

import argparse
import contextlib
import ctypes
import functools
import itertools
import json
import math
import os
import re
import signal
import sys
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

# Which ONNX Runtime was the first to read an IR version and an opset (1.15 to 1.32 were tried).
NEEDED = {
    "IR version: ": {10: "1.18", 11: "1.23", 12: "1.24", 13: "1.24", 14: "1.32"},
    "Opset ": {20: "1.17", 21: "1.18", 22: "1.21", 23: "1.23", 24: "1.24", 25: "1.24", 26: "1.25",
               27: "1.32", 28: "1.32"},
}

def number(kind, low, high, text):
    """argparse type, by functools.partial: an int or a float (kind) from low to high."""
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:  # nor NaN
        raise argparse.ArgumentTypeError(f"{text} is not a number from {low} to {high}")
    return value

def make_parser():
    p = argparse.ArgumentParser(
        "infer_ort.py", "python infer_ort.py MODEL.onnx [flags]", __doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    integer = functools.partial(functools.partial, number, int)
    many = 2**53
    add = p.add_argument
    add("model", help="ONNX file of a generator")
    add("--n_samples", type=integer(1, many), help="pictures (64, or 10 of each class)")
    add("--batch_size", type=integer(1, many), default=64, help="changes no picture (64)")
    add("--seed", type=integer(0, 2**63 - 1), default=0, help="of the latents (0)")
    add("--start", type=integer(0, many), default=0, help="number of the first picture (0)")
    add("--labels", help="classes in turn, by number or name: 0,3,7 or cat,dog (all)")
    add("--out", metavar="FILE.png|FILE.npz|FILE.gif|FOLDER/",
        help="a grid, an array, an animation, or numbered PNG files (a grid beside the model)")
    add("--interpolate", type=integer(2, many), nargs="?", const=60, metavar="FRAMES",
        help="GIF of a walk (60)")
    add("--walk_dim", type=integer(0, many), metavar="D",
        help="sweep coordinate D of one latent, 0.01 a picture")
    add("--provider", choices=("auto", "cpu", "cuda", "tensorrt"), default="auto",
        help="what computes; auto: a GPU if there is one, but for int8 (auto)")
    add("--device_id", type=integer(0, many), help="GPU (by the process's local rank)")
    add("--threads", type=integer(0, 1024), default=0, help="on the CPU (0: one for each core)")
    add("--benchmark", action="store_true", help="measure batches of 1 to 256, write nothing")
    return p

def get_args(argv=None):
    p = make_parser()
    args = p.parse_args(argv)
    suffixes = (".png", ".npz", "")
    name = "samples.png"
    if args.interpolate:
        if args.start or args.walk_dim is not None:
            p.error("--interpolate walks between first latents: leave --start and --walk_dim away")
        suffixes = (".gif",)
        name = "walk.gif"
    elif args.walk_dim is not None:
        name = f"walk_{args.walk_dim}.png"
    if not args.out:
        args.out = f"{os.path.splitext(args.model)[0]}_{name}"
    args.suffix = "" if args.out.endswith(("/", os.sep)) else Path(args.out).suffix
    if args.suffix not in suffixes:
        p.error(f"--out {args.out}: give a .png, an .npz or a folder/; with --interpolate a .gif")
    return args

def process():
    """(rank, world size, local rank) as torchrun, mpirun or srun tell; (0, 1, 0) without them."""
    launchers = (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),  # STEP: only where srun started us
    )
    for names in launchers:
        if os.environ.get(names[0]) and os.environ.get(names[1]):
            return tuple(int(os.environ.get(name, "0")) for name in names)
    return 0, 1, 0

def warn(text):
    print(f"infer_ort.py: warning: {text}", file=sys.stderr)

# ---------------------------------------------------------------------------------------- latents

def latents(seed, start, n, nz):
    """Latents start to start + n - 1 of a seed: float32 (n, nz) ~ N(0, 1).

    Latent i depends on seed, i and nz alone. NumPy's Philox4x64-10 has key (seed, 0); latent i takes the
    ceil(nz / 4) blocks of four 64-bit words from counter 1 + i * ceil(nz / 4) on (NumPy counts before it
    draws). The upper 53 bits of a word, plus a half, over 2**53 are a uniform u in (0, 1). Box-Muller makes
    of each pair r cos t and r sin t, r = sqrt(-2 ln u1), t = 2 pi u2 (float64).
    """
    blocks = math.ceil(nz / 4)
    generator = np.random.Philox(key=seed, counter=int(start) * blocks)
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

# --------------------------------------------------------------------------------------- sessions

def gpu_count():
    """How many NVIDIA GPUs the driver has; 0 without a driver."""
    n = ctypes.c_int(0)
    with contextlib.suppress(OSError):
        cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        if cuda.cuInit(0) == 0:
            cuda.cuDeviceGetCount(ctypes.byref(n))
    return n.value

def open_session(path, provider="auto", device_id=0, threads=0, cuda_options=None):
    """onnxruntime.InferenceSession of a file. OSError if it or the provider cannot be used.

    auto: the GPU if there is one; the CPU for int8, which CUDA has no kernels for, and, with a warning,
    where the GPU fails.
    """
    gpus = gpu_count()
    if provider != "cpu" and device_id >= max(1, gpus):
        raise OSError(f"--device_id {device_id}: GPUs here: {gpus}, numbered from 0")
    try:  # on the CPU first: what fails here is the file's fault, not the GPU's
        session = new_session(path, "cpu", threads=threads)
        precision = session.get_modelmeta().custom_metadata_map.get("precision")
    except Exception as e:  # ONNX Runtime has exceptions without a common name
        said = f"{path}: cannot be loaded: {reason(e)}"
        if not str(path).endswith(".onnx"):
            said += "; python export.py makes a .onnx of a checkpoint"
        raise OSError(said) from e
    if provider == "cpu":
        return session
    if provider == "auto" and (gpus == 0 or precision == "int8"):
        return session
    try:
        wanted = "cuda" if provider == "auto" else provider
        return new_session(path, wanted, device_id, threads, cuda_options)
    except Exception as e:
        said = reason(e)
        if provider == "tensorrt":
            said += "; it takes pip install 'tensorrt<11'"
        if provider != "auto":
            raise OSError(f"--provider {provider}: {said}; or take --provider cpu") from e
        warn(f"there is a GPU, but the CPU is used: {said}")
        return session

def new_session(path, provider, device_id=0, threads=0, cuda_options=None):
    """onnxruntime.InferenceSession on this provider, or the exception that says why not."""
    import onnxruntime as ort

    ort.set_default_logger_severity(4)  # what matters is said by us, in one line
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    if threads == 0 and hasattr(os, "sched_getaffinity"):
        # ONNX Runtime would take all physical cores: it does not know of taskset, cgroups or srun.
        allowed = len(os.sched_getaffinity(0))
        if allowed < os.cpu_count():
            options.intra_op_num_threads = allowed
    providers = [("CPUExecutionProvider", {})]
    if provider != "cpu":
        # cuDNN's heuristics choose an algorithm. Since ONNX Runtime 1.20 nothing is measured, not even
        # with EXHAUSTIVE, and DEFAULT is slow.
        cuda = {"device_id": device_id, "cudnn_conv_algo_search": "HEURISTIC"}
        providers.insert(0, ("CUDAExecutionProvider", cuda | (cuda_options or {})))
    if provider == "tensorrt":
        providers.insert(0, ("TensorrtExecutionProvider", {"device_id": device_id}))
    # Without leave ONNX Runtime would go on with the CPU where the GPU fails, and say so on stdout.
    with contextlib.redirect_stdout(None), warnings.catch_warnings(action="ignore"):
        if provider != "cpu" and hasattr(ort, "preload_dlls"):
            ort.preload_dlls()  # CUDA and cuDNN from their pip packages
        session = ort.InferenceSession(str(path), options, providers=providers, enable_fallback=0)
    session.disable_fallback()
    if session.get_providers()[0] != providers[0][0]:
        if gpu_count() == 0:
            raise OSError("there is no NVIDIA GPU with a driver")
        package = "onnxruntime-gpu[cuda,cudnn]"
        raise OSError(f"this onnxruntime ({ort.__version__}) cannot use it: pip install '{package}'")
    return session

def reason(error):
    """Why ONNX Runtime failed: the end of its message, and the version that a newer file takes."""
    import onnxruntime as ort

    said = " ".join(str(error).split())
    said = said.split(" ; GPU=")[0]  # where in its source
    for before in ("Status Message: ", "failed:"):
        said = said.split(before)[-1]
    said = said.rstrip(".")
    versions = []
    for words, first in NEEDED.items():
        found = re.search(words + r"(\d+)", said)
        if found:
            version = first.get(int(found[1]))
            versions.append(f"onnxruntime {version} or later" if version else "a newer onnxruntime")
    if len(said) > 160:
        said = "..." + said[-160:].split(" ", 1)[-1]
    if versions:
        said += f"; it takes {versions[0]}; this is {ort.__version__}"
    return said

# -------------------------------------------------------------------------------------- generator

class Generator:
    """An ONNX generator: (n, nz) latents -> uint8 (n, H, W, C) pictures.

    Inputs: z, float (N, nz) or (N, nz, 1, 1), and perhaps labels, integer (N). Output: pictures, NCHW or
    NHWC, uint8 or float in [-1, 1]; in somebody else's file also in [0, 1] or [0, 255]. Works in batches of
    `batch_size`, or of what the file is made for; a rest is filled up, for a new shape costs time on a GPU.
    `provider` is then what computes: with "auto" the CPU goes on where a GPU fails. OSError if the file is
    no generator.
    """

    def __init__(self, path, batch_size=64, provider="auto", threads=0, **gpu):
        self.path, self.asked, self.threads = path, provider, threads
        self.use(open_session(path, provider, threads=threads, **gpu))  # gpu: device_id, cuda_options
        inputs = self.session.get_inputs()
        inputs.sort(key=lambda v: "int" in v.type)  # z, and perhaps labels
        output = self.session.get_outputs()[0]
        z_shape, shape = inputs[0].shape if inputs else [], output.shape
        channels = [axis for axis in (1, 3) if len(shape) == 4 and shape[axis] in (1, 3)]
        is_latent = len(z_shape) in (2, 4) and isinstance(z_shape[1], int) and z_shape[2:] in ([], [1, 1])
        if not channels or not is_latent or 0 in z_shape or len(inputs) > 2:
            values = [f"{v.name} {v.type[7:-1]} {tuple(v.shape)}" for v in (*inputs, output)]
            found = "; ".join(values)
            raise OSError(f"{path}: no generator; it has {found}, and should have z (N, nz) in and "
                          "pictures of 1 or 3 channels out, (N, C, H, W) or (N, H, W, C)")
        self.nz, self.z_shape = z_shape[1], z_shape[1:]
        self.fixed = isinstance(z_shape[0], int)
        self.batch_size = z_shape[0] if self.fixed else batch_size
        self.read_metadata()
        others = {"tensor(float16)": np.float16, "tensor(int32)": np.int32, "tensor(int64)": np.int64}
        self.inputs = [(v.name, others.get(v.type, np.float32)) for v in inputs]
        self.nhwc = self.meta.get("layout", "NHWC" if channels == [3] else "NCHW") == "NHWC"
        if (3 if self.nhwc else 1) not in channels:
            raise OSError(f"{path}: damaged: its metadata says layout {self.meta['layout']}, its shape not")
        self.scale, self.shift = 127.5, 128  # pixels of [-1, 1]
        if "value_range" not in self.meta and output.type != "tensor(uint8)":
            self.find_range()

    def use(self, session):
        self.session = session
        self.provider = session.get_providers()[0]

    def read_metadata(self):
        try:
            self.meta = self.session.get_modelmeta().custom_metadata_map
            self.n_classes = int(self.meta.get("n_classes", 0))  # 0 too where a file does not say
            self.classes = [str(name) for name in json.loads(self.meta.get("classes", "[]"))]
            if self.meta.get("format_version", "1") != "1" or not 0 <= self.n_classes <= 10**6:
                raise ValueError("format_version or n_classes")
        except (TypeError, ValueError, RecursionError) as e:
            raise OSError(f"{self.path}: damaged, or for another infer_ort.py; metadata: {e}") from e

    def find_range(self):
        """Somebody else's file does not say what its values mean: the first 16 pictures tell."""
        labels = np.zeros(16, int) if len(self.inputs) == 2 else None
        size = self.batch_size if self.fixed else 16
        found = list(self.batches(latents(0, 0, 16, self.nz), labels, size))
        low, high = float(np.min(found)), float(np.max(found))
        if low >= -0.001 and high <= 1.001:
            self.scale, self.shift = 255, 0.5
            warn(f"{self.path}: its pictures are in [0, 1], and taken so")
        elif low >= -0.001 and 32 <= high <= 255.5:
            self.scale, self.shift = 1, 0.5
            warn(f"{self.path}: its pictures are in [0, 255], and taken so")
        elif low < -1.05 or high > 1.05:
            warn(f"{self.path}: its values go from {low:.3g} to {high:.3g}: cut off at [-1, 1]")

    def labels(self, text=None):
        """int (k): the classes that --labels names, or all; None where the generator takes none."""
        takes_labels = len(self.inputs) == 2
        everything = text is None or (text == "all" and "all" not in self.classes)
        if everything and not takes_labels:
            return None
        if everything and self.n_classes:
            return np.arange(self.n_classes)
        asked = [name.strip() for name in (text or "").split(",")]
        numbers = {str(k): k for k in range(self.n_classes)}
        numbers |= {name: k for k, name in enumerate(self.classes)}
        if takes_labels and self.n_classes == 0:  # somebody's file, which does not say
            numbers = {name: int(name) for name in asked if name.isdecimal() and len(name) < 10}
        if not set(asked) <= set(numbers):
            known = ", ".join(numbers)
            if not known:
                known = "classes, and not which" if takes_labels else "no classes"
            raise OSError(f"--labels {text or ''}: {self.path} knows {known}")
        return np.array([numbers[name] for name in asked])

    def __call__(self, z, labels=None):
        """float (n, nz), int (n) -> uint8 (n, H, W, C)."""
        out = []
        for x in self.batches(z, labels, self.batch_size):
            if x.dtype != np.uint8:
                x = x.astype(np.float32) * self.scale + self.shift
                x = x.clip(0, 255).astype(np.uint8)
            out.append(x if self.nhwc else x.transpose(0, 2, 3, 1))
        images = out[0] if len(out) == 1 else np.concatenate(out)
        return images[:len(z)]

    def batches(self, z, labels, size):
        """What the file makes of them, in batches of exactly `size`, the last one filled up."""
        for i in range(0, len(z), size):
            rows = np.arange(i, i + size).clip(max=len(z) - 1)  # the last one again and again
            yield self.run(z[rows], None if labels is None else labels[rows])

    def run(self, z, labels):
        """One batch, as the file makes it. Where a GPU fails: OSError; with auto the CPU instead."""
        feed = {}
        for x, (name, dtype) in zip((z.reshape(len(z), *self.z_shape), labels), self.inputs):
            feed[name] = np.ascontiguousarray(x, dtype)
        try:
            x = self.session.run(None, feed)[0]
        except Exception as e:  # without a common name
            if self.provider == "CPUExecutionProvider":
                raise OSError(
                    f"{self.path}: cannot be run on {len(z)} latents: {reason(e)}; too little memory "
                    "(try --batch_size 16), or a class that it does not know") from e
            if self.asked != "auto":
                raise OSError(
                    f"{self.path}: --provider {self.asked} failed: {reason(e)}; take --provider cpu, "
                    "a file of export.py --precision fp16, or a smaller --batch_size") from e
            warn(f"{self.path}: the GPU failed, the CPU goes on: {reason(e)}")
            self.use(new_session(self.path, "cpu", threads=self.threads))
            return self.run(z, labels)
        if len(x) != len(z):
            raise OSError(f"{self.path}: no generator: it makes {len(x)} pictures of {len(z)} latents")
        if x.dtype != np.uint8 and not np.isfinite(x).all():
            raise OSError(f"{self.path}: its pictures are not finite; damaged, or its training diverged")
        return x

# ----------------------------------------------------------------------------------------- output

@contextlib.contextmanager
def atomic_write(path):
    """Opens a temporary file, moved to `path` when the block ends well: nobody sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(tmp, "wb") as f:
            yield f
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)

def to_image(pixels):
    """uint8 (H, W, C) -> PIL image."""
    from PIL import Image

    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)

def make_grid(images, columns=None):
    """uint8 (N, H, W, C) -> PIL image like torchvision's: nearly a square, or of so many columns."""
    n, h, w, c = images.shape
    columns = min(columns or math.ceil(math.sqrt(n)), n)
    rows = math.ceil(n / columns)
    gap = 2 if n > 1 else 0
    grid = np.full((rows, h + gap, columns, w + gap, c), 255, np.uint8)
    for i, image in enumerate(images):
        grid[i // columns, gap:, i % columns, gap:] = image
    grid = grid.reshape(rows * (h + gap), columns * (w + gap), c)
    return to_image(np.pad(grid, ((0, gap), (0, gap), (0, 0)), constant_values=255))

def write_npz(path, parts, n, labels):
    """arr_0: the parts, uint8 (k, H, W, C), n pictures in all, streamed; labels: int (n), or None."""
    first = next(parts)
    header = {"descr": "|u1", "fortran_order": False, "shape": (n, *first.shape[1:])}
    with atomic_write(path) as f, zipfile.ZipFile(f, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as entry:
            np.lib.format.write_array_header_1_0(entry, header)
            for images in itertools.chain([first], parts):
                entry.write(np.ascontiguousarray(images))
        if labels is not None:
            with archive.open("labels.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, labels)

def write_folder(folder, parts, start):
    """PNG files, numbered from `start` on, encoded by threads while the next pictures are made."""
    def write(i, image):
        with atomic_write(Path(folder, f"{i:06d}.png")) as f:
            to_image(image).save(f, "png", compress_level=1)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        writing = ()
        for images in parts:
            list(writing)  # waits for the part before this one
            numbers = range(start, start + len(images))
            writing = pool.map(write, numbers, images)
            start += len(images)
        list(writing)

def write_grids(path, images, columns, duration=50):
    """uint8 (frames, N, H, W, C) -> a grid; of several an animation, `duration` ms each."""
    first, *others = [make_grid(frame, columns) for frame in images]
    animation = {}
    if others:
        animation = {"save_all": True, "append_images": others, "loop": 0, "duration": duration}
    with atomic_write(path) as f:
        first.save(f, Path(path).suffix[1:], **animation)

def pictures(gen, args, choice, start, n):
    """Yields pictures start to start + n - 1, uint8 (k, H, W, C); with --interpolate n of each frame."""
    from tqdm import tqdm

    total = n
    if args.interpolate:
        total = n * args.interpolate
        walks = walk(args.seed, n, gen.nz, args.interpolate).reshape(-1, gen.nz)
    with tqdm(total=total, unit="img", unit_scale=True, delay=2, disable=process()[0] > 0) as bar:
        for i in range(0, total, gen.batch_size):
            k = min(gen.batch_size, total - i)
            number = start + np.arange(i, i + k) % n  # of each picture
            if args.interpolate:
                z = walks[i:i + k]
            elif args.walk_dim is not None:
                z = latents(args.seed, args.start, 1, gen.nz).repeat(k, 0)
                z[:, args.walk_dim] += 0.01 * (number - args.start)
            else:
                z = latents(args.seed, start + i, k, gen.nz)
            yield gen(z, labels_of(choice, number))
            bar.update(k)

def labels_of(choice, number):
    """int (n), classes in turn by the numbers of pictures; None where the generator takes none."""
    return None if choice is None else choice[number % len(choice)]

def write(gen, args, choice, start, n, out):
    """Pictures start to start + n - 1, into `out`."""
    if not gen.fixed:  # fewer pictures than a batch
        gen.batch_size = min(gen.batch_size, n * (args.interpolate or 1))
    parts = pictures(gen, args, choice, start, n)
    try:
        if args.suffix == ".npz":
            write_npz(out, parts, n, labels_of(choice, start + np.arange(n)))
        elif args.suffix == "":
            write_folder(out, parts, start)
        else:
            images = np.concatenate(list(parts))
            columns = 0 if choice is None else len(choice)
            write_grids(out, images.reshape(-1, n, *images.shape[1:]), columns)
    except OSError as e:
        if e.errno:  # the system's; ours have none
            raise OSError(f"--out {out}: {e.strerror}") from e
        raise
    print(f"wrote {out}")

def generate(args):
    """What the command line asks for, or this process's part of it."""
    rank, world, local_rank = process()
    gpu = args.device_id
    if gpu is None:
        gpu = local_rank % max(1, gpu_count())
    gen = Generator(args.model, args.batch_size, args.provider, args.threads, device_id=gpu)
    choice = gen.labels(args.labels)
    if args.walk_dim is not None and args.walk_dim >= gen.nz:
        raise OSError(f"--walk_dim {args.walk_dim}: a latent has coordinates 0 to {gen.nz - 1}")
    if args.benchmark:
        benchmark(gen, choice, args)
        return
    n = args.n_samples
    if n is None:
        n = 64 if choice is None else 10 * len(choice)
    start, out = args.start, args.out
    if world > 1:
        if n < world or args.interpolate:
            raise OSError(f"--n_samples {n}: too few for {world} processes; --interpolate is for one")
        first, end = n * rank // world, n * (rank + 1) // world
        start += first
        n = end - first
        if args.suffix:  # a file for each process; in a folder the numbers tell them apart
            out = Path(out)
            out = out.with_name(f"{out.stem}_{start:09d}-{start + n - 1:09d}{args.suffix}")
        print(f"process {rank} of {world}: pictures {start} to {start + n - 1} -> {out}", flush=True)
    write(gen, args, choice, start, n, out)

def measure(gen, z, labels):
    """Seconds of each of at least 20 runs on one provider, after three to warm up."""
    for _ in range(3):
        gen(z, labels)
    provider = gen.provider
    times = []
    while len(times) < 20 or sum(times) < 2:
        begin = time.perf_counter()
        gen(z, labels)
        times.append(time.perf_counter() - begin)
        if gen.provider != provider:  # the GPU has failed
            return measure(gen, z, labels)
    return times

def benchmark(gen, choice, args):
    """Prints images/s and latencies of batches, with what they were measured on."""
    import onnxruntime as ort

    options = gen.session.get_session_options()
    threads = args.threads or options.intra_op_num_threads or os.cpu_count()
    told = None
    for n in [gen.batch_size] if gen.fixed else (1, 4, 16, 64, 256):
        gen.batch_size = n
        z = latents(args.seed, args.start, n, gen.nz)
        labels = None if choice is None else np.resize(choice, n)
        times = measure(gen, z, labels)
        if gen.provider != told:  # also where the CPU has to go on
            told = gen.provider
            precision = gen.meta.get("precision", "unknown precision")
            print(f"{args.model}: {precision}, {told}, {threads} CPU threads, onnxruntime "
                  f"{ort.__version__}, numpy {np.__version__}, Python {sys.version.split()[0]}")
            print(f"{'batch':>5} {'images/s':>9} {'p50 ms':>9} {'p95 ms':>9} {'p99 ms':>9}")
        speed = n * len(times) / sum(times)
        p50, p95, p99 = np.percentile(times, (50, 95, 99)) * 1000
        print(f"{n:5} {speed:9.1f} {p50:9.3f} {p95:9.3f} {p99:9.3f}", flush=True)

def main():
    """One line, exit code 1, for what the user can mend. All else keeps its traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that cannot show a file's name
            stream.reconfigure(errors="backslashreplace")
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.default_int_handler)
    try:
        generate(get_args())
    except KeyboardInterrupt:
        sys.exit("infer_ort.py: error: interrupted; no file is half written")
    except (OSError, MemoryError, ModuleNotFoundError) as e:
        sys.exit(f"infer_ort.py: error: {' '.join(str(e).split()) or type(e).__name__}")

if __name__ == "__main__":
    main()
