"""Pictures from an ONNX generator that export.py wrote, or anybody's, through ONNX Runtime; PyTorch is not needed.

    python infer_ort.py model.onnx                                              # a grid, beside the model
    python infer_ort.py model.onnx --n_samples 50000 --out folder/              # PNG files, which FID tools read
    python infer_ort.py model.onnx --n_samples 50000 --out samples.npz          # one array, arr_0: uint8 (N, H, W, C)
    python infer_ort.py model.onnx --n_samples 1000 --labels 3,7 --out folder/  # of two classes
    python infer_ort.py model.onnx --interpolate 60 --out walk.gif
    python infer_ort.py model.onnx --benchmark
    torchrun --nproc_per_node 8 infer_ort.py model.onnx --n_samples 1000000 --out folder/        # or srun, mpirun

Picture i of a seed is the one that --sample of the training scripts makes, whatever the batch size, provider or number
of processes, which each take a part of the range and write files of their own.
"""

import argparse
import contextlib
import ctypes
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

# Which ONNX Runtime was the first to read an IR version and an opset (tried, 1.15 to 1.32; all read IR 9, opset 19).
NEEDED = {"IR version: ": {10: "1.18", 11: "1.23", 12: "1.24", 13: "1.24", 14: "1.32"},
          "Opset ": {20: "1.17", 21: "1.18", 22: "1.21", 23: "1.23", 24: "1.24", 25: "1.24", 26: "1.25", 27: "1.32",
                     28: "1.32"}}

def within(low, high):
    """argparse type: an integer from low to high."""
    def integer(text):
        if not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return int(text)

    return integer

def get_args(argv=None):
    p = argparse.ArgumentParser("infer_ort.py", "python infer_ort.py MODEL.onnx [flags]", __doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    add, many = p.add_argument, 2**53
    add("model", help="ONNX file of a generator")
    add("--n_samples", type=within(1, many), help="pictures (a grid of 64, or of 10 of each class)")
    add("--batch_size", type=within(1, many), default=64, help="pictures at a time; changes no picture (64)")
    add("--seed", type=within(0, 2**63 - 1), default=0, help="of the latents (0)")
    add("--start", type=within(0, many), default=0, help="number of the first picture (0)")
    add("--labels", help="classes in turn, by number or name: 0,3,7 or cat,dog (all)")
    add("--out", metavar="FILE.png|FILE.npz|FILE.gif|FOLDER/",
        help="a grid, an array, an animation, or numbered PNG files, as FID tools want them (a grid beside the model)")
    add("--interpolate", type=within(2, many), nargs="?", const=60, metavar="FRAMES", help="GIF of a walk (60)")
    add("--walk_dim", type=within(0, many), metavar="D", help="sweep coordinate D of one latent, 0.01 a picture")
    add("--provider", choices=("auto", "cpu", "cuda", "tensorrt"), default="auto", help="what computes (auto)")
    add("--device_id", type=within(0, many), help="GPU (by the process's local rank)")
    add("--threads", type=within(0, 1024), default=0, help="on the CPU (0: one for each core)")
    add("--benchmark", action="store_true", help="measure batches of 1 to 256, write nothing")
    args = p.parse_args(argv)
    if args.interpolate and (args.start or args.walk_dim is not None):
        p.error("--interpolate goes with neither --start nor --walk_dim: it walks between a seed's first latents")
    name = "walk.gif" if args.interpolate else "samples.png" if args.walk_dim is None else f"walk_{args.walk_dim}.png"
    args.out = args.out or f"{Path(args.model).with_suffix('')}_{name}"
    args.suffix = "" if args.out.endswith(("/", os.sep)) else Path(args.out).suffix
    if args.suffix not in ((".gif",) if args.interpolate else (".png", ".npz", "")):
        other = "a .gif" if args.interpolate else "a .png, an .npz, a folder/ or, with --interpolate, a .gif"
        p.error(f"--out {args.out}: give {other}")
    return args

def process():
    """(rank, world size, local rank) as torchrun, mpirun or srun tell; (0, 1, 0) without them."""
    launchers = (("RANK", "WORLD_SIZE", "LOCAL_RANK"),
                 ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
                 ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"))  # STEP: only in what srun started
    for names in launchers:
        if names[0] in os.environ and names[1] in os.environ:
            return tuple(int(os.environ.get(name, "0")) for name in names)
    return 0, 1, 0

# ------------------------------------------------------------------------------------------------------ latents

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

def walk(seed, n, nz, frames):
    """Latents (frames, n, nz): a great circle through latents i and n + i, closed, and all of it as likely as those."""
    t = np.linspace(0, 2 * np.pi, frames, endpoint=False, dtype=np.float32)[:, None, None]
    z = latents(seed, 0, 2 * n, nz)
    return np.cos(t) * z[:n] + np.sin(t) * z[n:]

# ---------------------------------------------------------------------------------------------------- generator

def gpu_count():
    """How many NVIDIA GPUs the driver has; 0 without a driver."""
    n = ctypes.c_int(0)
    with contextlib.suppress(OSError):
        cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        if cuda.cuInit(0) == 0:
            cuda.cuDeviceGetCount(ctypes.byref(n))
    return n.value

def open_session(path, provider="auto", device_id=0, threads=0, cuda_options=None):
    """onnxruntime.InferenceSession of a file. OSError if it or the provider cannot be used; warns of a lost GPU."""
    import onnxruntime as ort

    ort.set_default_logger_severity(4)  # what matters is said below, in one line
    options = ort.SessionOptions()
    options.log_severity_level = 4
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # ONNX Runtime's own choice, one for each physical core, does not know of taskset, cgroups or srun.
    options.intra_op_num_threads = threads or (allowed if allowed < os.cpu_count() else 0)
    providers = ["CPUExecutionProvider"]
    if provider in ("cuda", "tensorrt") or (provider == "auto" and gpu_count() > 0):
        # An exhaustive search for algorithms would be repeated for each new shape: chunks have one.
        cuda = {"device_id": device_id, "cudnn_conv_algo_search": "EXHAUSTIVE"} | (cuda_options or {})
        providers.insert(0, ("CUDAExecutionProvider", cuda))
    if provider == "tensorrt":
        providers.insert(0, ("TensorrtExecutionProvider", {"device_id": device_id}))
    try:
        with contextlib.redirect_stdout(None), warnings.catch_warnings(action="ignore"):  # of how it falls back
            if len(providers) > 1 and hasattr(ort, "preload_dlls"):
                ort.preload_dlls()  # CUDA and cuDNN from their pip packages
            session = ort.InferenceSession(str(path), options, providers=providers)
    except Exception as e:  # ONNX Runtime has exceptions without a common name
        hint = "" if str(path).endswith(".onnx") else "; python export.py makes a .onnx of a checkpoint"
        raise OSError(f"{path}: cannot be loaded: {reason(e)}{hint}") from e
    if len(providers) > 1 and session.get_providers()[0] != providers[0][0]:
        package = "tensorrt<11" if provider == "tensorrt" else "onnxruntime-gpu[cuda,cudnn]"
        said = f"this onnxruntime ({ort.__version__}) cannot use it; pip install '{package}'"
        if provider != "auto":
            raise OSError(f"--provider {provider}: {said}, or --provider cpu")
        print(f"infer_ort.py: warning: there is a GPU, but the CPU is used: {said}", file=sys.stderr)
    return session

def reason(error):
    """The end of ONNX Runtime's message, which says why, and which ONNX Runtime it takes where this one is too old."""
    import onnxruntime as ort

    said = " ".join(str(error).split()).split("failed:")[-1].rstrip(".")
    new = next(filter(None, (re.search(kind + r"(\d+)", said) for kind in NEEDED)), None)
    if len(said) > 160:
        said = "..." + said[-160:].split(" ", 1)[-1]
    if new:
        version = NEEDED[new[0].removesuffix(new[1])].get(int(new[1]))
        wanted = f"onnxruntime {version} or later" if version else "a newer onnxruntime"
        said += f"; it takes {wanted}; this is {ort.__version__}"
    return said

class Generator:
    """An ONNX generator: (n, nz) latents -> uint8 (n, H, W, C) pictures.

    Inputs: z, float (N, nz) or (N, nz, 1, 1), and perhaps labels, integer (N). Output: pictures, NCHW or NHWC, uint8 or
    float in [-1, 1]. Works in batches of `batch_size`, or of what the file is made for; a rest is filled up, for every
    new shape costs time on a GPU. OSError if the file is no generator.
    """

    def __init__(self, path, batch_size=64, **session):
        self.path, self.session = path, open_session(path, **session)
        inputs, output = self.session.get_inputs(), self.session.get_outputs()[0]
        inputs.sort(key=lambda v: "int" in v.type)  # z, and perhaps labels
        z_shape, shape = inputs[0].shape, output.shape
        channels = [axis for axis in (1, 3) if len(shape) == 4 and shape[axis] in (1, 3)]
        one_size = len(z_shape) in (2, 4) and isinstance(z_shape[1], int) and z_shape[2:] in ([], [1, 1])
        if not channels or not one_size or len(inputs) > 2:
            found = "; ".join(f"{v.name} {v.type[7:-1]} {tuple(v.shape)}" for v in (*inputs, output))
            raise OSError(f"{path}: no generator; it has {found}, and should have z (N, nz) in and pictures of 1 or 3 "
                          "channels out, (N, C, H, W) or (N, H, W, C)")
        self.nz, self.z_shape, self.fixed = z_shape[1], z_shape[1:], isinstance(z_shape[0], int)
        self.batch_size = z_shape[0] if self.fixed else batch_size
        dtypes = {"tensor(float16)": np.float16, "tensor(int32)": np.int32, "tensor(int64)": np.int64}
        try:
            self.inputs = [(v.name, dtypes.get(v.type, np.float32)) for v in inputs]
            self.meta = self.session.get_modelmeta().custom_metadata_map
            self.n_classes = int(self.meta.get("n_classes", 0))  # 0 too where a file does not say
            self.classes = [str(name) for name in json.loads(self.meta.get("classes", "[]"))]
            if self.meta.get("format_version", "1") != "1" or self.n_classes < 0:
                raise ValueError("format_version or n_classes")
        except (TypeError, ValueError) as e:
            raise OSError(f"{path}: damaged, or for another infer_ort.py; its metadata cannot be read ({e})") from e
        self.nhwc = self.meta.get("layout", "NHWC" if channels == [3] else "NCHW") == "NHWC"
        self.provider = self.session.get_providers()[0]

    def labels(self, text=None):
        """int (k): the classes that --labels names, or all; None where the generator takes none."""
        if text in (None, "all") and len(self.inputs) == 1:
            return None
        if text in (None, "all") and self.n_classes:
            return np.arange(self.n_classes)
        asked = [name.strip() for name in (text or "").split(",")]
        numbers = {str(k): k for k in range(self.n_classes)} | {name: k for k, name in enumerate(self.classes)}
        if len(self.inputs) == 2 and self.n_classes == 0:  # somebody's file, which does not say what it knows
            numbers = {name: int(name) for name in asked if name.isdecimal()}
        if not set(asked) <= set(numbers):
            known = ", ".join(numbers) or ("no classes" if len(self.inputs) == 1 else "classes, and not which")
            raise OSError(f"--labels {text or ''}: {self.path} knows {known}")
        return np.array([numbers[name] for name in asked])

    def __call__(self, z, labels=None):
        """float (n, nz), int (n) -> uint8 (n, H, W, C)."""
        n, out = len(z), []
        for i in range(0, n, self.batch_size):
            rows = np.arange(i, i + self.batch_size).clip(max=n - 1)  # the last one again and again
            out.append(self.run(z[rows], None if labels is None else labels[rows]))
        return out[0][:n] if len(out) == 1 else np.concatenate(out)[:n]

    def run(self, z, labels=None):
        """One batch of exactly batch_size."""
        arrays = (z.reshape(-1, *self.z_shape), labels)
        feed = {name: np.ascontiguousarray(x, dtype) for x, (name, dtype) in zip(arrays, self.inputs)}
        try:
            x = self.session.run(None, feed)[0]
        except Exception as e:  # without a common name
            raise OSError(f"{self.path}: cannot be run on {len(z)} latents: {reason(e)}; too little "
                          "memory (try --batch_size 16), or a class that it does not know") from e
        if x.dtype != np.uint8:
            if not np.isfinite(x).all():
                raise OSError(f"{self.path}: makes pictures that are not finite; damaged, or its training diverged")
            x = (x.astype(np.float32) * 127.5 + 128).clip(0, 255).astype(np.uint8)
        return x if self.nhwc else x.transpose(0, 2, 3, 1)

# ------------------------------------------------------------------------------------------------------- output

@contextlib.contextmanager
def atomic_write(path):
    """Opens a temporary file beside `path`, moved there when the block ends well: nobody ever sees half a file."""
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
    gap = 2 if n > 1 else 0
    grid = np.full((-(-n // columns), h + gap, columns, w + gap, c), 255, np.uint8)
    for i, image in enumerate(images):
        grid[i // columns, gap:, i % columns, gap:] = image
    grid = grid.reshape(grid.shape[0] * (h + gap), columns * (w + gap), c)
    return to_image(np.pad(grid, ((0, gap), (0, gap), (0, 0)), constant_values=255))

def write_npz(path, parts, n, labels):
    """arr_0: the parts, uint8 (k, H, W, C), n pictures together, streamed; labels: int (n), or None."""
    first = next(parts)
    with atomic_write(path) as f, zipfile.ZipFile(f, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as entry:
            header = {"descr": "|u1", "fortran_order": False, "shape": (n, *first.shape[1:])}
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
            writing = pool.map(write, range(start, start + len(images)), images)
            start += len(images)
        list(writing)

def write_grids(path, images, columns, duration=50):
    """uint8 (frames, N, H, W, C) -> an image file, a grid; of several an animation, each for so many milliseconds."""
    first, *others = [make_grid(frame, columns) for frame in images]
    animation = {"save_all": True, "append_images": others, "loop": 0, "duration": duration} if others else {}
    with atomic_write(path) as f:
        first.save(f, Path(path).suffix[1:], **animation)

def pictures(gen, args, choice, start, n):
    """uint8 (k, H, W, C), k at a time: pictures start to start + n - 1, with --interpolate n of each frame."""
    from tqdm import tqdm

    total = n * (args.interpolate or 1)
    walks = walk(args.seed, n, gen.nz, args.interpolate).reshape(-1, gen.nz) if args.interpolate else None
    with tqdm(total=total, unit="img", unit_scale=True, delay=2, disable=process()[0] > 0) as bar:
        for i in range(0, total, gen.batch_size):
            k = min(gen.batch_size, total - i)
            if args.interpolate:
                z = walks[i:i + k]
            elif args.walk_dim is None:
                z = latents(args.seed, start + i, k, gen.nz)
            else:
                z = latents(args.seed, args.start, 1, gen.nz).repeat(k, 0)
                z[:, args.walk_dim] += 0.01 * (start - args.start + i + np.arange(k))
            yield gen(z, None if choice is None else choice[(start + np.arange(i, i + k) % n) % len(choice)])
            bar.update(k)

def generate(args):
    """What the command line asks for, or this process's part of it."""
    rank, world, local_rank = process()
    gpu = local_rank % max(1, gpu_count()) if args.device_id is None else args.device_id
    gen = Generator(args.model, args.batch_size, provider=args.provider, device_id=gpu, threads=args.threads)
    choice = gen.labels(args.labels)
    if args.walk_dim is not None and args.walk_dim >= gen.nz:
        raise OSError(f"--walk_dim {args.walk_dim}: this generator's latents have coordinates 0 to {gen.nz - 1}")
    if args.benchmark:
        benchmark(gen, choice, args)
        return
    columns = 0 if choice is None else len(choice)  # of a grid: one for each class
    out, start, n = args.out, args.start, args.n_samples or 10 * columns or 64
    if world > 1:
        if n < world or args.interpolate:
            raise OSError(f"--n_samples {n}: too few for {world} processes; --interpolate is for one")
        start, n = start + n * rank // world, n * (rank + 1) // world - n * rank // world
        if args.suffix:  # a file for each process; in a folder the numbers tell them apart
            out = str(Path(out).with_name(f"{Path(out).stem}_{start:09d}-{start + n - 1:09d}{args.suffix}"))
        print(f"process {rank} of {world}: pictures {start} to {start + n - 1} -> {out}", flush=True)
    if not gen.fixed:  # fewer pictures than a batch
        gen.batch_size = min(gen.batch_size, n * (args.interpolate or 1))
    parts = pictures(gen, args, choice, start, n)
    try:
        if args.suffix == ".npz":
            write_npz(out, parts, n, None if choice is None else choice[(start + np.arange(n)) % len(choice)])
        elif args.suffix == "":
            write_folder(out, parts, start)
        else:
            images = np.concatenate(list(parts))
            write_grids(out, images.reshape(-1, n, *images.shape[1:]), columns)
    except OSError as e:
        if e.errno:  # the system's; ours have none
            raise OSError(f"--out {out}: {e.strerror}") from e
        raise
    print(f"wrote {out}")

def benchmark(gen, choice, args):
    """Prints images/s and latencies of batches, with what they were measured on."""
    import onnxruntime as ort

    threads = args.threads or gen.session.get_session_options().intra_op_num_threads or os.cpu_count()
    print(f"{args.model}: {gen.meta.get('precision', 'unknown precision')}, {gen.provider}, {threads} CPU threads, "
          f"onnxruntime {ort.__version__}, numpy {np.__version__}, Python {sys.version.split()[0]}\n"
          f"{'batch':>5} {'images/s':>9} {'p50 ms':>9} {'p95 ms':>9} {'p99 ms':>9}")
    for n in [gen.batch_size] if gen.fixed else (1, 4, 16, 64, 256):
        gen.batch_size = n
        z = latents(args.seed, args.start, n, gen.nz)
        labels = None if choice is None else np.resize(choice, n)
        for _ in range(3):  # to warm up
            gen(z, labels)
        times = []
        while len(times) < 20 or sum(times) < 2:
            begin = time.perf_counter()
            gen(z, labels)
            times.append(time.perf_counter() - begin)
        p50, p95, p99 = np.percentile(times, (50, 95, 99)) * 1000
        print(f"{n:5} {n * len(times) / sum(times):9.1f} {p50:9.3f} {p95:9.3f} {p99:9.3f}", flush=True)

def main():
    """One line, exit code 1, for what the user can mend: files, values, memory. All else keeps its traceback."""
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
