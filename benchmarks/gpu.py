"""All that wants a GPU, measured by one command in nine minutes: the tables of RESULTS.md.

    python benchmarks/gpu.py --out gpu.md
    python benchmarks/gpu.py --only training generation     # some parts
    python benchmarks/gpu.py --quick                        # does it run? Its figures mean nothing

MNIST is found under --data_dir or GAN_DATA_DIR; without it the embedded digits stand in. Nothing
is downloaded. Each part is a process of its own with a limit of time: what it has measured by
then is kept, and the others go on.

Training: the median over windows of 48 steps after a warm-up, by CUDA's own events, so that
nobody waits for the GPU in between. Launches and idle time: from torch.profiler, over 12 steps
more. Generation: from latents in RAM to pixels in RAM. "-" was not measured; the reasons stand
below the tables.
"""

import argparse
import contextlib
import copy
import functools
import gc
import importlib
import itertools
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# The parts, the most important first. Each may take this share of the time that is left, against
# the shares of those still to come: what one does not use is the others'.
SHARES = {"machine": 2, "training": 6, "generation": 5, "quality": 7, "compile": 7}
BATCHES = (1, 64, 512)  # of generation
SIZES = [  # of training: --ngf, --batch_size
    (64, 32), (128, 128), (128, 512), (64, 128), (64, 512), (128, 32),
]

def get_args(argv=None):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("--minutes", type=float, default=9, help="for everything")
    add("--data_dir", default=os.environ.get("GAN_DATA_DIR", "data"), help="where MNIST is, if it is")
    add("--only", nargs="+", choices=SHARES, default=list(SHARES), help="parts to run")
    add("--quick", action="store_true", help="few steps of small nets")
    add("--out", metavar="FILE.md", help="write the tables there too, after each part")
    add("--part", choices=SHARES, help=argparse.SUPPRESS)  # with which a part's process is started
    return p.parse_args(argv)

# ---------------------------------------------------------------------------------------- records

def tell(table, row, **cells):
    """A line of JSON on stdout: the parent puts it into its tables."""
    print(json.dumps({"table": table, "row": row, "cells": cells}), flush=True)

@contextlib.contextmanager
def reported(what):
    """What fails is told with its reason, and the next thing goes on."""
    try:
        yield
    except (Exception, SystemExit) as e:  # noqa: BLE001  whatever it is, it is a finding
        reason = " ".join(f"{what}: {type(e).__name__}: {e}".split())
        print(json.dumps({"reason": reason[:400]}), flush=True)
    gc.collect()
    torch.cuda.empty_cache()

@contextlib.contextmanager
def quiet():
    """What our programs print goes to the part's log: its stdout is for records."""
    with contextlib.redirect_stdout(sys.stderr):
        yield

def last_line(text):
    """Of what a program wrote, behind its progress bars: why it ended."""
    lines = [line for line in text.replace("\r", "\n").splitlines() if line.strip()]
    return lines[-1].strip()[-300:] if lines else "it said nothing"

# ---------------------------------------------------------------------------------------- machine

def driver():
    """Version of NVIDIA's driver, if nvidia-smi tells."""
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.check_output(ask, text=True, timeout=10).strip()
    except (OSError, subprocess.SubprocessError):
        return "-"

def processor():
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found.group(1) if found else platform.processor()

def machine(args):
    def fact(name, value):
        tell("machine", name, **{"": str(value)})

    card = torch.cuda.get_device_properties(0)
    memory = f"{card.total_memory / 2**30:.0f} GiB"
    fact("card", f"{card.name}, {memory}, compute capability {card.major}.{card.minor}")
    fact("driver", driver())
    fact("processor", f"{processor()}, {os.cpu_count()} cores")
    fact("Python", platform.python_version())
    fact("torch", torch.__version__)
    fact("CUDA, cuDNN", f"{torch.version.cuda}, {torch.backends.cudnn.version()}")
    fact("bf16 by default", torch.cuda.is_bf16_supported(False))
    with reported("onnxruntime"):
        import onnxruntime

        providers = onnxruntime.get_available_providers()
        names = ", ".join(name.removesuffix("ExecutionProvider") for name in providers)
        fact("onnxruntime", f"{onnxruntime.__version__} ({names})")

# --------------------------------------------------------------------------------------- training

class Meter:
    """Takes the place of Run.steps in a script: warms up, times windows of steps, profiles a few
    more, and ends the run."""

    def __init__(self, steps, quick):
        self.steps = steps
        self.warm_up = 4 if quick else 60  # cuDNN searches, --compile compiles
        self.window = 4 if quick else 48
        self.least_windows = 2 if quick else 5
        self.least_seconds = 0 if quick else 3
        self.profiled = 4 if quick else 12  # whole rounds of --gp_every

    def __call__(self, run, **state):
        marks, profiler, last = [], None, None
        begin = time.perf_counter()
        steps = self.steps(run, **state)
        for step, real, labels in steps:
            if step == last:
                break
            if step == self.warm_up:
                torch.cuda.synchronize()
                self.start_up = time.perf_counter() - begin
                begin = time.perf_counter()
            measured = step - self.warm_up
            if profiler is None and measured >= 0 and measured % self.window == 0:
                marks.append(torch.cuda.Event(enable_timing=True))
                marks[-1].record()
                seconds = time.perf_counter() - begin
                if len(marks) > self.least_windows and seconds > self.least_seconds:
                    torch.cuda.synchronize()
                    profiler = start_profiler()
                    last = step + self.profiled
            yield step, real, labels
        torch.cuda.synchronize()
        profiler.stop()
        steps.close()
        windows = [a.elapsed_time(b) for a, b in itertools.pairwise(marks)]
        self.ms = statistics.median(windows) / self.window
        self.launches, self.busy_ms = read_trace(profiler, self.profiled)
        self.batch = len(real)

def start_profiler():
    kinds = torch.profiler.ProfilerActivity
    profiler = torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA])
    profiler.start()
    return profiler

def read_trace(profiler, steps):
    """(launches, milliseconds in which the GPU does anything) of a step; (None, None) where the
    profiler sees no GPU."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    work, launches = [], 0
    for e in events:
        kind = e.get("cat")
        if kind in ("kernel", "gpu_memcpy", "gpu_memset"):
            work.append((e["ts"], e["ts"] + e["dur"]))
        if kind in ("cuda_runtime", "cuda_driver") and "Launch" in e["name"]:
            launches += 1
    if not work:
        return None, None
    busy, until = 0, -np.inf
    for begin, end in sorted(work):  # kernels of two streams may overlap
        busy += max(0, end - max(begin, until))
        until = max(until, end)
    return launches / steps, busy / 1000 / steps

def measure_training(table, row, name, flags, args):
    """A row of the table: this script with these flags."""
    with reported(f"{table}, {row}"):
        script = importlib.import_module(name)
        endless = ["--max_steps", 10**6, "--save_interval", 10**6, "--log_interval", 48]
        argv = [*endless, "--data_dir", "data", "--out_dir", tempfile.mkdtemp(dir="."), *flags]
        plain_steps = script.Run.steps
        meter = Meter(plain_steps, args.quick)
        script.Run.steps = lambda run, **state: meter(run, **state)
        try:
            with quiet():
                script.train(script.get_args(list(map(str, argv))))
        finally:
            script.Run.steps = plain_steps
        cells = {"images/s": f"{1000 * meter.batch / meter.ms:,.0f}", "ms a step": f"{meter.ms:.2f}"}
        if meter.launches:
            cells["launches a step"] = f"{meter.launches:.0f}"
            # The profiler slows the CPU's part of a step down, and no kernel.
            cells["GPU idle"] = f"{max(0, 1 - meter.busy_ms / meter.ms):.0%}"
        cells["start-up, s"] = f"{meter.start_up:.0f}"
        tell(table, row, **cells)

def named(ngf, batch):
    return f"dcgan.py, ngf {ngf}, batch {batch}"

def rgb(ngf, batch, quick):
    """Flags of dcgan.py at 64x64 RGB. The images are drawn once, and fill batches of any size."""
    size, images = (16, 1024) if quick else (64, 8192)
    return ["--dataset", "digits", "--img_size", size, "--nc", 3, "--max_images", images,
            "--ngf", ngf, "--batch_size", batch]

def training(args):
    for ngf, batch in SIZES:
        flags = rgb(ngf, batch, args.quick)
        measure_training("training", named(ngf, batch), "dcgan", flags, args)
    for name in ("gan", "acgan"):
        row = f"{name}.py, {args.dataset}, default flags"
        measure_training("training", row, name, ["--dataset", args.dataset], args)

def compiled(args):
    for ngf, batch in SIZES[:1] if args.quick else SIZES:
        torch.compiler.reset()  # or the eighth net would not be compiled
        flags = [*rgb(ngf, batch, args.quick), "--compile"]
        measure_training("compile", named(ngf, batch), "dcgan", flags, args)

# ------------------------------------------------------------------------------------- generation

FILES = ("--precision fp16 --uint8", "", "--uint8", "--precision fp16",
         "--phases")

def rate(make, n, seconds):
    """Pictures a second of make(), which leaves n of them in RAM."""
    for _ in range(3):
        make()
    done, begin = 0, time.perf_counter()
    while done == 0 or time.perf_counter() - begin < seconds:
        make()
        done += n
    return done / (time.perf_counter() - begin)

def measure_generation(row, make, args):
    """make(n): n pictures."""
    for n in BATCHES:
        with reported(f"generation, {row}, batch {n}"):
            speed = rate(functools.partial(make, n), n, 0.02 if args.quick else 1)
            tell("generation", row, **{f"batch {n}": f"{speed:,.0f}"})

def of_dtype(netG, dtype):
    """A copy of netG on the GPU that computes in this type; z is float32 outside."""
    net = copy.deepcopy(netG).to("cuda", dtype, memory_format=torch.channels_last)
    net.register_forward_pre_hook(lambda _, inputs: (inputs[0].to(dtype), *inputs[1:]))
    return net

def generation(args):
    """dcgan.py's generator at 64x64 RGB, ngf 128: its weights do not matter for its speed."""
    import dcgan

    torch.backends.cudnn.benchmark = True  # as in training
    flags = rgb(8 if args.quick else 128, 8, args.quick)
    argv = [*flags, "--data_dir", "data", "--max_steps", 2, "--device", "cpu", "--out_dir", "net"]
    with quiet():
        dcgan.train(dcgan.get_args(list(map(str, argv))))
    netG, _ = dcgan.load_generator("net/checkpoint.pt")
    z = {n: dcgan.latents(0, 0, n, netG.config["nz"]) for n in BATCHES}
    labels = {n: np.zeros(n, np.int64) for n in BATCHES}
    kinds = {"fp32 (TF32)": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    for kind, dtype in kinds.items():
        net = of_dtype(netG, dtype)

        def pytorch(n, net=net):
            return dcgan.generate(net, z[n], labels[n], n)

        measure_generation(f"PyTorch {kind}", pytorch, args)
    with reported("generation, ONNX Runtime"):
        onnx_runtime(z, args)

def onnx_runtime(z, args):
    """Files by export.py, through infer_ort.py's generator."""
    import onnxruntime

    import export
    import infer_ort

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise OSError(f"onnxruntime {onnxruntime.__version__} has no CUDA provider; "
                      "pip install 'onnxruntime-gpu[cuda,cudnn]'")
    for flags in FILES:
        row = f"ONNX Runtime, `{flags or 'fp32'}`"
        with reported(f"generation, {row}"):
            file = f"net{flags.replace(' ', '')}.onnx"
            argv = ["net", "-o", file, "--no-verify", *flags.split()]
            with quiet():
                export.export(export.get_args(argv))
            generators = {n: infer_ort.Generator(file, n, provider="cuda") for n in BATCHES}

            def run(n, generators=generators):
                return generators[n](z[n])

            measure_generation(row, run, args)

# ---------------------------------------------------------------------------------------- quality

SCORES = ("FID", "FID 2", "precision", "recall", "classes")

def program(name, *argv):
    """Runs one of ours to its end. Returns the seconds that it took."""
    begin = time.perf_counter()
    command = [sys.executable, str(ROOT / name), *argv]
    done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise OSError(f"{name}: exit status {done.returncode}: {last_line(done.stderr)}")
    return time.perf_counter() - begin

def quality(args):
    """A run by default flags, and its scores."""
    row = f"dcgan.py, {args.dataset}, default flags"
    data = ["--dataset", args.dataset, "--data_dir", "data"]
    short = ["--max_steps", "40"] if args.quick else []
    few = ["--n_samples", "200", "--epochs", "1"] if args.quick else []
    with reported("quality"):
        seconds = program("dcgan.py", *data, "--out_dir", "scored", *short)
        log = Path("scored/log.jsonl").read_text().splitlines()
        steps = json.loads(log[-1])["step"]
        tell("quality", row, seconds=f"{seconds:.0f}", steps=f"{steps:,}")
        program("benchmarks/quality.py", "scored", *data, "--json", "scores.json", *few)
        scores = json.loads(Path("scores.json").read_text())["scores"]
        for name, source in (("real training images", "real training images"), (row, "scored")):
            cells = {column: f"{scores[source][column]:.3g}" for column in SCORES}
            tell("quality", name, **cells)

# ----------------------------------------------------------------------------------------- tables

PARTS = {"machine": machine, "training": training, "generation": generation, "quality": quality,
         "compile": compiled}
STEP = ("images/s", "ms a step", "launches a step", "GPU idle")
ROWS = [named(ngf, batch) for ngf, batch in sorted(SIZES)]
TABLES = {  # of each part: title, columns, rows that stand there even if they were not measured
    "machine": ("What it ran on", ("",), []),
    "training": ("Training; dcgan.py at 64x64 RGB", STEP, ROWS),
    "compile": ("The same with `--compile`; start-up ends with the warm-up",
                (*STEP, "start-up, s"), ROWS),
    "generation": ("Generation, 64x64 RGB, ngf 128, images/s",
                   [f"batch {n}" for n in BATCHES], []),
    "quality": ("A run by default flags and its scores by benchmarks/quality.py",
                ("seconds", "steps", *SCORES), []),
}

def markdown(cells, reasons):
    """cells: {table: {row: {column: text}}}; reasons: why something is not in them."""
    lines = []
    for name, (title, columns, rows) in TABLES.items():
        if name not in cells:
            continue
        lines += [f"{title}:", ""]
        lines += [f"| | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
        for row in dict.fromkeys([*rows, *cells[name]]):
            measured = cells[name].get(row, {})
            texts = [measured.get(column, "-") for column in columns]
            lines.append(f"| {row} | {' | '.join(texts)} |")
        lines.append("")
    if reasons:
        lines += ["Not measured:", "", *(f"- {reason}" for reason in reasons), ""]
    return "\n".join(lines)

# ----------------------------------------------------------------------------------------- parent

def run_part(part, args, folder, seconds):
    """(records, "done" or why not). When its time is up, it is killed with all that it started."""
    said, errors = folder / f"{part}.jsonl", folder / f"{part}.log"
    argv = [sys.executable, str(Path(__file__).resolve()), "--part", part]
    if args.quick:
        argv.append("--quick")
    with open(said, "wb") as out, open(errors, "wb") as err:
        process = subprocess.Popen(argv, stdout=out, stderr=err, cwd=folder, start_new_session=True)
        try:
            status = process.wait(seconds)
            why = last_line(errors.read_text(errors="replace"))
            ended = "done" if status == 0 else f"exit status {status}: {why}"
        except subprocess.TimeoutExpired:
            ended = f"stopped when its {seconds:.0f} s were over"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    whole = [line for line in said.read_text().splitlines() if line.endswith("}")]
    return [json.loads(line) for line in whole], ended

def link_mnist(data_dir, folder):
    """A data folder for all parts, which may be written to; with MNIST if there is one."""
    (folder / "data").mkdir()
    mnist = Path(data_dir, "MNIST").resolve()
    if (mnist / "raw").is_dir():
        (folder / "data" / "MNIST").symlink_to(mnist)

def measure(args, folder):
    """The parts in turn, and what they have told so far after each of them."""
    end = time.monotonic() + 60 * args.minutes
    cells, reasons = {}, []
    link_mnist(args.data_dir, folder)
    parts = [part for part in SHARES if part in args.only]
    for k, part in enumerate(parts):
        begin = time.monotonic()
        share = SHARES[part] / sum(SHARES[later] for later in parts[k:])
        records, ended = run_part(part, args, folder, share * (end - begin))
        for record in records:
            if "reason" in record:
                reasons.append(record["reason"])
            else:
                row = cells.setdefault(record["table"], {}).setdefault(record["row"], {})
                row.update(record["cells"])
        if ended != "done":
            reasons.append(f"{part}: {ended}")
        print(f"{part}: {ended}, {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
        if args.out:
            Path(args.out).write_text(markdown(cells, reasons))
    return markdown(cells, reasons)

def main():
    args = get_args()
    if not torch.cuda.is_available():
        sys.exit("gpu.py: error: PyTorch finds no CUDA device here")
    if args.part:
        args.dataset = "mnist" if Path("data/MNIST").exists() else "digits"
        PARTS[args.part](args)
        return
    with tempfile.TemporaryDirectory() as folder:
        print(measure(args, Path(folder)))

if __name__ == "__main__":
    main()
