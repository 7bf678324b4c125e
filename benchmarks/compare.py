"""Commands in turn, from launch to end: images/s, their range, and the ratio to the first.

    compare.py --images 25600 "python dcgan.py --max_steps 800" "python peer/main.py --niter 1"
    compare.py --images 20000 "python infer_ort.py int8.onnx --n_samples 20000 --out x.npy" \\
        "build/infer_ort int8.onnx --n_samples 20000 --out y.npy"

Machines are noisy: so in turn, several rounds, and the ratio of each round. On one core:

    taskset -c 0 env OMP_NUM_THREADS=1 python benchmarks/compare.py ...
"""

import argparse
import shlex
import statistics
import subprocess
import sys
import time

p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
p.add_argument("commands", nargs="+", metavar="COMMAND")
p.add_argument("--images", required=True, help="how many each makes, or trains on: 3000; or 3000,6400")
p.add_argument("--rounds", type=int, default=3)
args = p.parse_args()
images = [int(n) for n in args.images.split(",")]
if len(images) == 1:
    images *= len(args.commands)
if len(images) != len(args.commands):
    p.error(f"--images {args.images}: give one number, or one for each of the {len(args.commands)} commands")

speeds = [[] for _ in args.commands]
for _ in range(args.rounds):
    for command, n, speed in zip(args.commands, images, speeds):
        begin = time.perf_counter()
        done = subprocess.run(shlex.split(command), capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"compare.py: error: {command}: exit code {done.returncode}: {done.stderr.strip()[-500:]}")
        speed.append(n / (time.perf_counter() - begin))

print("| command | images/s | ratio |\n|---|---|---|")
for command, speed in zip(args.commands, speeds):
    ratios = [a / b for a, b in zip(speed, speeds[0])]
    print(f"| `{command}` | {statistics.median(speed):.0f} ({min(speed):.0f} to {max(speed):.0f}) "
          f"| {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |")
