"""Where an exported file runs, is right and is fast: engines and versions from PyPI and npm.

    python benchmarks/runtimes.py runs/gan-mnist runs/dcgan-mnist runs/acgan-mnist
    python benchmarks/runtimes.py runs/dcgan-mnist --runtimes onnxruntime==1.16.3

Each runtime gets an environment of its own in --envs, kept for the next time. Every file runs in
all of them in turn, round by round, on one thread of a process of its own. A cell is the greatest
difference from PyTorch's pictures, in levels of 255, and images per second of CPU time in batches
of 16, relative to the onnxruntime that is installed here.
"""

import argparse
import itertools
import logging
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import numpy as np
import onnxruntime
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import export
from dcgan import last_checkpoint, to_uint8

RUNTIMES = [
    "onnxruntime==1.15.1", "onnxruntime==1.17.3", "onnxruntime==1.20.1",
    "onnxruntime-node@1.30.0",
    "opencv-python-headless==4.8.1.78", "opencv-python-headless==4.10.0.84",
    "opencv-python-headless==4.14.0.94", "opencv-python-headless==5.0.0.93",
    "openvino==2026.4.1",
]
PRECISIONS = {"fp32": "", "fp16": "--precision fp16", "int8": "--precision int8 --uint8"}
BATCHES = (1, 16)

# What runs there: MODEL FOLDER NZ SECONDS. Inputs and float32 outputs are raw files in FOLDER;
# the speed is printed.
PYTHON = """
import os, sys, time
import numpy as np
kind, model, folder, nz, seconds = sys.argv[1:]
z = np.fromfile(f"{folder}/z.bin", np.float32).reshape(-1, int(nz))
inputs = {"z": z}
if os.path.exists(f"{folder}/labels.bin"):
    inputs["labels"] = np.fromfile(f"{folder}/labels.bin", np.int64)
if kind == "onnxruntime":
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    run = lambda feed: session.run(None, feed)[0]
elif kind == "openvino":
    import openvino
    options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    net = openvino.Core().compile_model(model, "CPU", options)
    run = lambda feed: net(feed)[0]
else:
    import cv2
    cv2.setNumThreads(1)
    net = cv2.dnn.readNetFromONNX(model)
    def run(feed):
        for name, x in feed.items():
            net.setInput(x, name)
        return net.forward()
for n in (1, 16):
    feed = {name: x[:n] for name, x in inputs.items()}
    run(feed).astype(np.float32).tofile(f"{folder}/images_{n}.bin")
done, begin = 0, time.process_time()
while time.process_time() - begin < float(seconds):
    run(feed)
    done += n
print(done / (time.process_time() - begin))
"""
NODE = """
const ort = require("onnxruntime-node"), fs = require("fs");
const [model, folder, nz, seconds] = process.argv.slice(1);
function read(name, type) {
  const bytes = new Uint8Array(fs.readFileSync(`${folder}/${name}.bin`));
  return new type(bytes.buffer);
}
(async () => {
  const session = await ort.InferenceSession.create(model, {intraOpNumThreads: 1});
  let feed, n;
  for (n of [1, 16]) {
    feed = {z: new ort.Tensor("float32", read("z", Float32Array).slice(0, n * nz), [n, +nz])};
    if (session.inputNames.includes("labels"))
      feed.labels = new ort.Tensor("int64", read("labels", BigInt64Array).slice(0, n), [n]);
    const {images} = await session.run(feed);
    fs.writeFileSync(`${folder}/images_${n}.bin`, Float32Array.from(images.data));
  }
  let done = 0, used = 0;
  for (const begin = process.cpuUsage(); used < seconds; done += n) {
    await session.run(feed);
    used = process.cpuUsage(begin).user / 1e6;
  }
  console.log(done / used);
})().catch(e => { console.error(e.message); process.exit(1); });
"""

def get_args():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = p.add_argument
    add("checkpoints", nargs="+", help="what export.py takes")
    add("--runtimes", nargs="+", metavar="NAME==VERSION|NAME@VERSION", default=RUNTIMES,
        help="of PyPI or npm")
    add("--envs", type=Path, default=Path("runs/runtimes"), help="folder of their environments")
    add("--rounds", type=int, default=3, help="how often each file is measured")
    add("--seconds", type=float, default=0.5, help="of one measurement")
    return p.parse_args()

def install(runtime, envs):
    """The command that starts a worker in this runtime. Makes its environment if there is none."""
    env = (envs / runtime).absolute()
    if "@" in runtime:
        if not env.exists():
            env.mkdir(parents=True)
            # Without scripts: the package's own would download CUDA.
            npm = ["npm", "install", "--ignore-scripts", "--prefix", ".", runtime]
            subprocess.run(npm, cwd=env, check=True)
        return ["env", f"NODE_PATH={env}/node_modules", "node", "-e", NODE, "--"]
    if not env.exists():
        venv.create(env, with_pip=True)
        pip = [env / "bin/pip", "install", "-q", runtime]
        with_old_numpy = subprocess.run([*pip, "numpy<2"], check=False)  # which old wheels want
        if with_old_numpy.returncode:  # and new ones refuse
            subprocess.run(pip, check=True)
    return [env / "bin/python", "-c", PYTHON, runtime.split("=")[0]]

def measure(worker, model, folder, want, args):
    """(images/s, greatest difference in levels), or the end of what the runtime says.
    want: uint8 (16, H, W, C)."""
    argv = [*worker, model, folder, str(args.nz), str(args.seconds)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        return " ".join(done.stderr.split())[-150:]
    levels = 0
    for n in BATCHES:
        got = np.fromfile(f"{folder}/images_{n}.bin", np.float32)
        if got.size != want[:n].size:
            return f"{got.size / want[0].size:g} pictures for {n} latents"
        if "int8" not in model:  # that file's are pixels already
            got = torch.from_numpy(got).reshape(n, want.shape[3], *want.shape[1:3])
            got = to_uint8(got)
        difference = got.reshape(want[:n].shape).astype(int) - want[:n]
        levels = max(levels, np.abs(difference).max())
    return float(done.stdout), levels

def measure_file(checkpoint, precision, workers, args):
    """The script's name, and a dict for each round: {runtime: what measure says of it}."""
    script, netG, *_ = export.load(checkpoint)
    n = max(BATCHES)
    inputs = export.draw(script, netG, 0, 0, n)
    labels = inputs.get("labels", np.zeros(n, np.int64))
    want = script.generate(netG, inputs["z"], labels)
    args.nz = netG.config["nz"]
    with tempfile.TemporaryDirectory() as folder:
        model = f"{folder}/{precision}.onnx"
        flags = PRECISIONS[precision].split()
        export.export(export.get_args([checkpoint, *flags, "-o", model]))
        for name, x in inputs.items():
            x.tofile(f"{folder}/{name}.bin")
        rounds = []
        for _ in range(args.rounds):
            row = {}
            for runtime, worker in workers.items():
                row[runtime] = measure(worker, model, folder, want, args)
            rounds.append(row)
    return script.SCRIPT, rounds

def main():
    args = get_args()
    logging.disable(logging.WARNING)
    here = f"onnxruntime {onnxruntime.__version__} (here)"
    workers = {here: [sys.executable, "-c", PYTHON, "onnxruntime"]}
    for runtime in args.runtimes:
        workers[runtime] = install(runtime, args.envs)
    table, columns, reasons = {runtime: [] for runtime in workers}, [], []
    for checkpoint, precision in itertools.product(args.checkpoints, PRECISIONS):
        name, rounds = measure_file(last_checkpoint(checkpoint), precision, workers, args)
        speed = np.median([row[here][0] for row in rounds])
        columns.append(f"{name} {precision}, {speed:.0f} images/s here")
        for runtime, cells in table.items():
            results = [row[runtime] for row in rounds]
            failed = [result for result in results if isinstance(result, str)]
            if failed:
                cells.append("no")
                reasons.append(f"- {runtime}, {columns[-1]}: {failed[0]}")
                continue
            ratio = np.median([row[runtime][0] / row[here][0] for row in rounds])
            cells.append(f"{max(levels for _, levels in results)}; {ratio:.2f}")
    print(f"\n| levels; speed | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    print("\n".join(f"| {runtime} | {' | '.join(cells)} |" for runtime, cells in table.items()))
    print("\n".join(["", *reasons]))

if __name__ == "__main__":
    main()
