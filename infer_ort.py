"""Pictures from an ONNX generator that export.py wrote, or anybody's, through ONNX Runtime; PyTorch is not needed.

    python infer_ort.py model.onnx                                              # a grid, beside the model
    python infer_ort.py model.onnx --n_samples 50000 --out samples.npz          # what FID tools read
    python infer_ort.py model.onnx --n_samples 1000 --labels 3,7 --out folder/  # numbered files, of two classes
    python infer_ort.py model.onnx --interpolate 60 --out walk.gif
    python infer_ort.py model.onnx --benchmark
    torchrun --nproc_per_node 8 infer_ort.py model.onnx --n_samples 1000000 --out samples.npz    # or srun, mpirun

Picture i of a seed is the one that --sample of the training scripts makes, whatever the batch size, provider or number
of processes, which each take a part of the range and write a file of their own.
"""

import argparse
import collections
import contextlib
import ctypes
import itertools
import json
import math
import os
import signal
import sys
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np


def fail(message):
    """Ends the program with one line for the user: exit code 2 if the message begins with a flag, 1 otherwise."""
    print(f"infer_ort.py: error: {' '.join(message.splitlines())}", file=sys.stderr)  # a file's name may hold a newline
    sys.exit(2 if message.startswith("--") else 1)


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


def get_args(argv=None):
    p = ArgumentParser(prog="infer_ort.py", description=__doc__.split("\n")[0], allow_abbrev=False,
                                formatter_class=HelpFormatter)
    p.add_argument("model", help="ONNX file of a generator")
    p.add_argument("--n_samples", type=number(int, 1), help="pictures (default: a grid of 64, or of 10 of each class)")
    p.add_argument("--batch_size", type=number(int, 1), default=64, help="pictures at a time; changes no picture")
    p.add_argument("--seed", type=number(int, 0, 2**63 - 1), default=0, help="of the latents")
    p.add_argument("--start", type=number(int, 0, 2**53), default=0, help="number of the first picture")
    p.add_argument("--labels", help="classes in turn, by number or name: 0,3,7 or cat,dog or all (default: all)")
    p.add_argument("--out", metavar="FILE.png|FILE.npz|FILE.gif|FOLDER/", help="(default: a grid beside the model)")
    p.add_argument("--format", choices=("png", "jpg", "webp"), help="of the files in FOLDER/ (default: png)")
    p.add_argument("--interpolate", type=number(int, 2), metavar="FRAMES", help="GIF of a closed walk between latents")
    p.add_argument("--walk_dim", type=number(int, 0), metavar="D", help="sweep one coordinate, 0.01 a picture")
    p.add_argument("--provider", choices=("auto", "cpu", "cuda", "tensorrt"), default="auto", help="what computes")
    p.add_argument("--device_id", type=number(int, 0), help="GPU (default: by the process's local rank)")
    p.add_argument("--threads", type=number(int, 0, 1024), default=0, help="on the CPU; 0: one for each core")
    p.add_argument("--benchmark", action="store_true", help="measure batches of 1 to 256, write nothing")
    args = p.parse_args(argv)
    if any("\ud800" <= c <= "\udfff" for c in args.model):
        p.error(f"{args.model}: ONNX Runtime opens no file whose name is not UTF-8; rename it")
    if args.interpolate and args.walk_dim is not None:
        p.error("--interpolate and --walk_dim are two walks; choose one")
    if args.interpolate and args.start:
        p.error("--start: --interpolate walks between the first latents of a seed; choose another --seed")
    allowed = (".gif",) if args.interpolate else (".png", ".npz", "")
    suffix = Path(args.out).suffix if args.out and not args.out.endswith(("/", os.sep)) else ""
    if args.out and suffix not in allowed:
        p.error(f"--out {args.out}: give {'a .gif' if args.interpolate else 'a .png, an .npz or a folder/'}")
    if args.format and (not args.out or suffix):
        p.error(f"--format {args.format}: is that of the files in a folder; give --out FOLDER/")
    args.format = args.format or "png"
    return args


def process():
    """(rank, world size, local rank) as torchrun, srun or mpirun tell; (0, 1, 0) without them."""
    for names in (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
                  "OMPI_COMM_WORLD_LOCAL_RANK"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")):
        if names[0] in os.environ and names[1] in os.environ:  # Slurm's: only in what srun started
            try:
                rank, world, local_rank = (int(os.environ.get(name, "0")) for name in names)
            except ValueError:
                fail(f"{', '.join(names)} in the environment: not all are numbers; unset them, or start with torchrun")
            if 0 <= rank < world:
                return rank, world, local_rank
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
    with contextlib.suppress(OSError, AttributeError):
        cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        n = ctypes.c_int(0)
        if cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(n)) == 0:
            return n.value
    return 0


def open_session(path, provider="auto", device_id=0, threads=0, cuda_options=None):
    """onnxruntime.InferenceSession of a file. Exits if the file or the provider cannot be used; warns of a lost GPU."""
    import onnxruntime as ort

    ort.set_default_logger_severity(4)  # what matters is said below, in one line
    expected = provider in ("cuda", "tensorrt") or (provider == "auto" and gpu_count() > 0)
    options = ort.SessionOptions()
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # ONNX Runtime's own choice, one for each physical core, does not know of taskset, cgroups or srun.
    options.intra_op_num_threads = threads or (allowed if allowed < os.cpu_count() else 0)
    options.log_severity_level = 4
    # An exhaustive search for algorithms would be repeated for each new shape: chunks have one.
    cuda = ("CUDAExecutionProvider", {"device_id": device_id, "cudnn_conv_algo_search": "EXHAUSTIVE"}
            | (cuda_options or {}))
    tensorrt = ("TensorrtExecutionProvider", {"device_id": device_id})
    wanted = [*[tensorrt] * (provider == "tensorrt"), *[cuda] * expected]
    missing = [name for name, _ in wanted[:1] if name not in ort.get_available_providers()]
    if not missing and expected and hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(None):
            ort.preload_dlls()  # CUDA and cuDNN from their pip packages
    session = None
    if not missing:
        session = create(ort, path, options, [*wanted, "CPUExecutionProvider"])
    if expected and (missing or session.get_providers()[0] != wanted[0][0]):
        why = f"this onnxruntime ({ort.__version__}) is built without it" if missing else "it cannot be loaded here"
        hint = "pip install 'onnxruntime-gpu[cuda,cudnn]'" if provider != "tensorrt" else "pip install 'tensorrt<11'"
        if provider != "auto":
            fail(f"--provider {provider}: {why}; {hint}, or --provider cpu")
        print(f"infer_ort.py: warning: there is a GPU, but the CPU is used: {why}; {hint}", file=sys.stderr)
        session = session or create(ort, path, options, ["CPUExecutionProvider"])
    return session


def create(ort, path, options, providers):
    """A session, or one line about the file."""
    try:
        with contextlib.redirect_stdout(None):  # it prints how it falls back
            return ort.InferenceSession(str(path), options, providers=providers)
    except Exception as e:  # ONNX Runtime has exceptions without a common name
        if Path(path).is_dir():
            fail(f"{path}: is a folder; name the .onnx file in it, or make one with python export.py")
        if not Path(path).is_file():
            fail(f"{path}: no such file")
        if not isinstance(e, ValueError) and "onnxruntime" not in type(e).__module__ and type(e) is not RuntimeError:
            raise
        reason = next((line for line in str(e).splitlines() if line.strip()), type(e).__name__)
        hint = "; python export.py makes one of a checkpoint" if Path(path).suffix in (".pt", ".pth", ".pkl") else ""
        fail(f"{path}: not an ONNX file that can be run, or damaged ({reason.split(' : ')[-1].strip()[:120]}){hint}")


class Generator:
    """An ONNX generator: (n, nz) latents -> uint8 (n, H, W, C) pictures.

    Inputs: z, float (N, nz) or (N, nz, 1, 1), and perhaps labels, integer (N). Output: pictures, NCHW or NHWC, uint8 or
    float in [-1, 1]. Works in batches of `batch_size`, or of what the file is made for; a rest is filled up, for every
    new shape costs time on a GPU.
    """

    def __init__(self, path, batch_size=64, **session):
        self.path, self.session = path, open_session(path, **session)
        self.provider = self.session.get_providers()[0]
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        try:
            self.meta = self.session.get_modelmeta().custom_metadata_map
            self.names = [v.name for v in (*inputs, *outputs)]
        except UnicodeDecodeError as e:
            fail(f"{path}: damaged, a name or a text in it is not UTF-8 ({e.reason})")
        inputs.sort(key=lambda v: "int" in v.type)
        z, label = inputs[0], inputs[1] if len(inputs) > 1 else None
        shape = outputs[0].shape
        ok = (len(inputs) in (1, 2) and "float" in z.type and len(z.shape) in (2, 4) and isinstance(z.shape[1], int)
              and z.shape[1] > 0 and set(z.shape[2:]) <= {1} and len(shape) == 4
              and outputs[0].type in ("tensor(uint8)", "tensor(float)", "tensor(float16)")
              and (label is None or ("int" in label.type and len(label.shape) == 1)))
        channels = [axis for axis in (1, 3) if len(shape) == 4 and shape[axis] in (1, 3)]
        if not ok or not channels:
            found = "; ".join(f"{v.name} {v.type[7:-1]} {tuple(v.shape)}" for v in (*inputs, *outputs))
            fail(f"{path}: no generator; it has {found}, and should have z (N, nz) in and pictures of 1 or 3 channels "
                 "out, (N, C, H, W) or (N, H, W, C)")
        nhwc = self.meta.get("layout", "NHWC" if channels == [3] else "NCHW") == "NHWC"
        self.nz, self.nchw, self.z_shape = z.shape[1], not nhwc, tuple(z.shape[1:])
        self.nc = shape[3 if nhwc else 1]
        self.fixed = isinstance(z.shape[0], int)
        self.batch_size = z.shape[0] if self.fixed else batch_size
        self.dtypes = [np.float16 if "16" in z.type else np.float32]
        self.names = [v.name for v in inputs]
        self.n_classes, self.classes = 0, []
        try:
            if label:
                self.dtypes.append(np.int32 if "int32" in label.type else np.int64)
                self.n_classes = int(self.meta.get("n_classes", 2**31))  # no metadata: any number
                self.classes = [str(c) for c in json.loads(self.meta.get("classes", "[]"))]
            height = shape[1 if nhwc else 2]
            found = {"nz": self.nz, "nc": self.nc} | ({"img_size": height} if isinstance(height, int) else {})
            wrong = [f"{k} {self.meta[k]} against {v}" for k, v in found.items() if int(self.meta.get(k, v)) != v]
            if wrong or (label and self.n_classes < 1):
                raise ValueError(", ".join(wrong) or f"n_classes {self.n_classes}")
        except (ValueError, TypeError) as e:
            fail(f"{path}: its metadata contradicts its tensors, it was tampered with ({e})")
        if self.meta.get("format_version", "1") != "1":
            fail(f"{path}: of format {self.meta['format_version'][:20]}, made by another export.py; take the "
                 "infer_ort.py beside that one")
        if "crc32" in self.meta:  # export.py's last eight bytes, of all before them
            data = memoryview(Path(path).read_bytes())
            if data[-8:] != self.meta["crc32"].encode() or data[-8:] != b"%08x" % zlib.crc32(data[:-8]):
                fail(f"{path}: damaged, or changed since export.py wrote it; export it again, or, if the change is yours, "
                     "delete its metadata entry crc32")
        # Buffers that stay on the GPU need every size to be known.
        self.bound = self.provider == "CUDAExecutionProvider" and all(isinstance(d, int) for d in shape[1:])
        self.device = "cuda", int(self.session.get_provider_options()[self.provider].get("device_id", 0))
        self.binding = None

    def labels(self, text):
        """Class numbers that --labels names; exits on what is no class."""
        if text in (None, "all") and self.n_classes == 2**31:
            fail(f"--labels: {self.path} does not say how many classes it knows; name some, such as --labels 0,1,2")
        if text in (None, "all"):
            return np.arange(self.n_classes)
        if not self.n_classes:
            fail(f"--labels {text}: {self.path} knows no classes; leave it out")
        known, found = {name: k for k, name in enumerate(self.classes)}, []
        for name in map(str.strip, text.split(",")):
            found.append(int(name) if name.isdecimal() else known.get(name, -1))
            if not 0 <= found[-1] < self.n_classes:
                fail(f"--labels {name}: this generator knows 0 to {self.n_classes - 1}"
                     + (f", {', '.join(self.classes)}" if self.classes else ""))
        return np.array(found)

    def fill_up_to(self, n):
        """No more than n at a time, for fewer pictures than a batch."""
        self.batch_size = self.batch_size if self.fixed else min(self.batch_size, n)

    def __call__(self, z, labels=None):
        """float (n, nz), int (n) -> uint8 (n, H, W, C)."""
        n, out = len(z), []
        for i in range(0, n, self.batch_size):
            rows = np.arange(i, i + self.batch_size).clip(max=n - 1)
            out.append(self.run(z[rows], None if labels is None else labels[rows]))
        return out[0][:n] if len(out) == 1 else np.concatenate(out)[:n]

    def run(self, z, labels=None):
        """One batch of exactly batch_size."""
        arrays = [z.reshape(-1, *self.z_shape), *([] if labels is None else [labels])]
        feed = {k: np.ascontiguousarray(a, t) for k, a, t in zip(self.names, arrays, self.dtypes)}
        try:
            x = self.run_bound(feed) if self.bound else self.session.run(None, feed)[0]
        except Exception as e:
            if "onnxruntime" not in type(e).__module__:
                raise
            reason = next(iter(str(e).splitlines()), "")
            unknown = "knows fewer classes than --labels names, " if self.n_classes == 2**31 else ""
            fail(f"{self.path}: cannot be run on {len(z)} latents ({reason.split(' : ')[-1].strip()[:160]}); it is "
                 f"damaged, {unknown}or the memory does not suffice: try --batch_size 16")
        if x.dtype != np.uint8:
            if not np.isfinite(x).all():
                fail(f"{self.path}: makes pictures that are not finite; it is damaged, or its training diverged")
            x = (x.astype(np.float32) * 127.5 + 128).clip(0, 255).astype(np.uint8)
        return x.transpose(0, 2, 3, 1) if self.nchw else x

    def run_bound(self, feed):
        """Through buffers on the GPU that stay where they are, as CUDA graphs need it."""
        import onnxruntime as ort

        output = self.session.get_outputs()[0]
        if self.binding is None:
            self.values = {k: ort.OrtValue.ortvalue_from_numpy(a, *self.device) for k, a in feed.items()}
            self.binding = self.session.io_binding()
            for k, value in self.values.items():
                self.binding.bind_ortvalue_input(k, value)
            dtype = {"tensor(float)": np.float32, "tensor(float16)": np.float16}.get(output.type, np.uint8)
            shape = [self.batch_size, *output.shape[1:]]
            self.result = ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype, *self.device)
            self.binding.bind_ortvalue_output(output.name, self.result)
        for k, a in feed.items():
            self.values[k].update_inplace(a)
        self.session.run_with_iobinding(self.binding)
        return self.result.numpy()


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


def write_npz(path, parts, n, labels_of):
    """parts: an iterator of uint8 (k, H, W, C), n pictures together; labels_of(i, k): int64 or None. Streamed."""
    def entry(archive, name, shape, dtype, chunks):
        with archive.open(name, "w", force_zip64=True) as f:
            np.lib.format.write_array_header_1_0(f, {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
                                                     "fortran_order": False, "shape": shape})
            for chunk in chunks:
                f.write(memoryview(np.ascontiguousarray(chunk)).cast("B"))

    first = next(parts)
    with atomic_write(path) as f, zipfile.ZipFile(f, "w") as archive:
        entry(archive, "arr_0.npy", (n, *first.shape[1:]), np.uint8, itertools.chain([first], parts))
        if labels_of(0, 1) is not None:
            chunks = (labels_of(i, min(65536, n - i)) for i in range(0, n, 65536))
            entry(archive, "labels.npy", (n,), np.int64, chunks)


def write_folder(path, parts, start, suffix):
    """Numbered files from `start` on, encoded by threads while the next pictures are made."""
    options = {"png": {"compress_level": 1}, "jpg": {"quality": 95, "subsampling": 0}, "webp": {"quality": 95}}[suffix]

    def write(first, images):
        for i, image in enumerate(images, first):
            with atomic_write(Path(path, f"{i:06d}.{suffix}")) as f:
                to_image(image).save(f, {"jpg": "jpeg"}.get(suffix, suffix), **options)

    threads, waiting = os.cpu_count() or 1, collections.deque()
    with ThreadPoolExecutor(threads) as pool:
        for images in parts:
            for k in range(0, len(images), 16):
                waiting.append(pool.submit(write, start + k, images[k:k + 16]))
            start += len(images)
            while len(waiting) > 8 * threads:
                waiting.popleft().result()
        for future in waiting:
            future.result()


def generate(args):
    """What the command line asks for, or this process's part of it."""
    rank, world, local_rank = process()
    gen = Generator(args.model, args.batch_size, provider=args.provider, threads=args.threads,
                    device_id=local_rank % max(1, gpu_count()) if args.device_id is None else args.device_id)
    choice = gen.labels(args.labels) if gen.n_classes or args.labels else None
    if args.walk_dim is not None and args.walk_dim >= gen.nz:
        fail(f"--walk_dim {args.walk_dim}: this generator's latents have coordinates 0 to {gen.nz - 1}")
    if args.benchmark:
        benchmark(gen, choice, args)
        return
    frames = args.interpolate or 1
    columns = 0 if choice is None else len(choice)  # of a grid: one for each class
    start, n = args.start, args.n_samples or 10 * columns or 64
    name = "walk.gif" if args.interpolate else "samples.png" if args.walk_dim is None else f"walk_{args.walk_dim}.png"
    out = args.out or f"{Path(args.model).with_suffix('')}_{name}"
    suffix = "" if out.endswith(("/", os.sep)) else Path(out).suffix
    if world > 1:
        if n < world or frames > 1:
            fail("--interpolate: start one process" if frames > 1 else f"--n_samples {n}: too few for {world} processes")
        start, n = start + n * rank // world, n * (rank + 1) // world - n * rank // world
        if suffix:  # a file for each process; in a folder the numbers tell them apart
            out = str(Path(out).with_name(f"{Path(out).stem}_{start:09d}-{start + n - 1:09d}{suffix}"))
        print(f"process {rank} of {world}: pictures {start} to {start + n - 1} -> {out}", flush=True)
    walks = walk(args.seed, n, gen.nz, frames).reshape(-1, gen.nz) if frames > 1 else None
    gen.fill_up_to(n * frames)

    def latents_of(i, k):
        if walks is not None:
            return walks[i:i + k]
        if args.walk_dim is None:
            return latents(args.seed, start + i, k, gen.nz)
        z = latents(args.seed, args.start, 1, gen.nz).repeat(k, 0)
        z[:, args.walk_dim] += 0.01 * np.arange(start - args.start + i, start - args.start + i + k)
        return z

    def labels_of(i, k):
        return None if choice is None else choice[(start + np.arange(i, i + k) % n) % len(choice)]

    def parts():
        from tqdm import tqdm

        with tqdm(total=n * frames, unit="img", unit_scale=True, delay=2, dynamic_ncols=True, disable=rank > 0) as bar:
            for i in range(0, n * frames, gen.batch_size):
                k = min(gen.batch_size, n * frames - i)
                yield gen(latents_of(i, k), labels_of(i, k))
                bar.update(k)

    try:
        if suffix == ".npz":
            write_npz(out, parts(), n, labels_of)
        elif suffix == "":
            write_folder(out, parts(), start, args.format)
        else:
            images = np.concatenate(list(parts()))
            grids = [make_grid(frame, columns) for frame in images.reshape(frames, n, *images.shape[1:])]
            animation = {"save_all": True, "append_images": grids[1:], "loop": 0, "duration": 50}
            with atomic_write(out) as f:
                grids[0].save(f, suffix[1:], **(animation if frames > 1 else {}))
    except OSError as e:
        fail(f"--out {out}: cannot be written ({e.strerror or e})")
    print(f"wrote {out}")


def benchmark(gen, choice, args):
    """Prints images/s and latencies of batches, with what they were measured on."""
    import onnxruntime as ort

    threads = args.threads or gen.session.get_session_options().intra_op_num_threads or os.cpu_count()
    print(f"{args.model}: {gen.meta.get('precision', 'unknown precision')}, {gen.provider}, {threads} CPU threads, "
          f"onnxruntime {ort.__version__}, numpy {np.__version__}, Python {sys.version.split()[0]}\n"
          f"{'batch':>5} {'images/s':>9} {'p50 ms':>9} {'p95 ms':>9} {'p99 ms':>9}")
    for n in [gen.batch_size] if gen.fixed else (1, 4, 16, 64, 256):
        gen.batch_size, gen.binding = n, None
        z = latents(args.seed, args.start, n, gen.nz)
        labels = None if choice is None else choice[np.arange(n) % len(choice)]
        times, end = [], math.inf
        for i in range(10000):
            begin = time.perf_counter()
            gen(z, labels)
            now = time.perf_counter()
            if i == 2:  # warm from here on
                times, end = [], now + 2
            times.append(now - begin)
            if now > end and len(times) >= 20:
                break
        p50, p95, p99 = np.percentile(times, (50, 95, 99)) * 1000
        print(f"{n:5} {n * len(times) / sum(times):9.1f} {p50:9.3f} {p95:9.3f} {p99:9.3f}", flush=True)


def main():
    if sys.stdout:  # not where it is closed
        sys.stdout.reconfigure(errors="backslashreplace")  # the name of a file need not be text
    args = get_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        generate(args)
    except KeyboardInterrupt:
        fail("interrupted; no file is half written")
    except MemoryError:
        fail("not enough memory; lower --batch_size or, for a grid, --n_samples")
    except ModuleNotFoundError as e:
        if e.name not in ("onnxruntime", "PIL", "tqdm"):
            raise
        fail(f"{e.name} is missing; pip install -r requirements.txt brings it")


if __name__ == "__main__":
    main()
