"""Images/s of deploy/infer_ort.html in a headless Chromium against ONNX Runtime in Python.

    npm install --prefix web onnxruntime-web@1.30.0
    GAN_ORT_WEB=web taskset -c 0 python benchmarks/browser.py dcgan.onnx dcgan_int8.onnx ...

They run in turn, with one thread each.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np
from test_browser import served

import infer_ort

def in_browser(page, name, seed, n=256):
    """The page's own figure for n pictures of the seed, in chunks of 16: session.run alone."""
    page.open(name, seed, n)
    page.wait(f"document.querySelector('canvas')?.ariaLabel === '{n} pictures of seed {seed}'")
    return float(page.wait("speed.textContent").split()[0].replace(",", ""))

def in_python(generator, n=256):
    z = infer_ort.latents(0, 0, n, generator.nz)
    labels = np.arange(n) % generator.n_classes if generator.n_classes else None
    begin = time.perf_counter()
    generator(z, labels)
    return n / (time.perf_counter() - begin)

def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("models", nargs="+", metavar="MODEL.onnx")
    models = p.parse_args().models
    generators, speeds = {}, {}
    for model in models:
        generators[model] = infer_ort.Generator(model, batch_size=16, provider="cpu", threads=1)
        speeds[model] = ([], [])
    with tempfile.TemporaryDirectory() as folder:
        for k, model in enumerate(models):
            shutil.copy(model, f"{folder}/{k}.onnx")
        os.chdir(folder)  # where Chromium's profile goes
        with served(Path(folder)) as page:
            for seed in range(5):
                for k, model in enumerate(models):
                    speeds[model][0].append(in_browser(page, f"{k}.onnx", seed))
                    speeds[model][1].append(in_python(generators[model]))
    print("| file | Chromium | Python | ratio |\n|---|---|---|---|")
    for model, both in speeds.items():
        cells = [f"{statistics.median(x):.0f} ({min(x):.0f} to {max(x):.0f})" for x in both]
        ratio = statistics.median(a / b for a, b in zip(*both))
        print(f"| {Path(model).name} | {cells[0]} | {cells[1]} | {ratio:.2f} |")

if __name__ == "__main__":
    main()
