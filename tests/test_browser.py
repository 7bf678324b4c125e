"""deploy/infer_ort.html in a headless Chromium: the pictures of infer_ort.py, through onnxruntime-web."""

import base64
import contextlib
import functools
import http.server
import json
import os
import shutil
import subprocess
import threading
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SCRIPTS
from onnx import TensorProto, helper
from PIL import Image
from test_export import KEPT, model_of
from test_infer import far, foreign, infer, pixels_of, run_cpp, sampled, save_graph, sigmoid, tampered

ORT = Path(os.environ.get("GAN_ORT_WEB", "nowhere"), "node_modules/onnxruntime-web/dist").resolve()
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(not (CHROMIUM and ORT.is_dir()), reason="needs Chromium, and npm's onnxruntime-web in "
                                "the folder that GAN_ORT_WEB names")

class Page:
    """The page in Chromium, which is told what to do through two pipes (Chrome DevTools Protocol)."""

    def __init__(self, url):
        (read, self.told), (said, write), self.url, self.session = os.pipe(), os.pipe(), url, {}
        line = (f"exec {CHROMIUM} --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
                "--disable-background-networking --disable-component-update --user-data-dir=profile "
                f"--remote-debugging-pipe 3<&{read} 4>&{write}")
        self.process = subprocess.Popen(["bash", "-c", line], pass_fds=(read, write), stderr=subprocess.DEVNULL)
        os.close(write)
        self.said = os.fdopen(said, "rb")
        target = self.tell("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.tell("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}

    def tell(self, method, **params):
        os.write(self.told, json.dumps({"id": 1, "method": method, "params": params, **self.session}).encode() + b"\0")
        answer = {}
        while "id" not in answer:  # but an event
            answer = json.loads(b"".join(iter(lambda: self.said.read(1) or pytest.fail("Chromium ended"), b"\0")))
        return answer["result"]

    def wait(self, code):
        """The value of JavaScript, as soon as it is a true one."""
        end = time.monotonic() + 60
        while not (value := self.tell("Runtime.evaluate", expression=code, returnByValue=True)["result"].get("value")):
            assert time.monotonic() < end, code
            time.sleep(0.05)
        return value

    def open(self, path, seed=0, n=50):
        self.tell("Page.navigate", url=f"{self.url}/infer_ort.html?ort=ort/&number={n}&model={path}&seed={seed}")

    def save(self, seed, n):
        """page.png: the grid of the seed, which each model needs to have of its own, on white."""
        self.wait(f"document.querySelector('canvas')?.ariaLabel === '{n} pictures of seed {seed}'")
        image = Image.open(BytesIO(base64.b64decode(self.wait("canvas.toDataURL().split(',')[1]"))))
        Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).save("page.png")

    def same(self, model, seed, n=50, argv=""):
        """The picture of the seed is that of infer_ort.py."""
        self.save(seed, n)
        infer(model, f"--n_samples {n} --seed {seed}", argv, out="python.png")
        assert far("page.png", "python.png") <= 1

@contextlib.contextmanager
def served(folder):
    """The page, from this folder of a server of its own. benchmarks/browser.py measures it."""
    for name, path in (("infer_ort.html", ROOT / "deploy/infer_ort.html"), ("ort", ORT), ("kept", KEPT.name)):
        (folder / name).symlink_to(path)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = Page(f"http://127.0.0.1:{server.server_port}")
        yield page
        page.process.terminate()
        page.process.wait()
        server.shutdown()

@pytest.fixture
def page(tmp_path):
    with served(tmp_path) as page:
        yield page

def test_pictures_are_those_of_infer_ort(page):
    for seed, (script, flags) in enumerate((s, f) for s in SCRIPTS for f in ("", "--precision int8 --uint8")):
        model = model_of(script, flags)
        page.open(f"kept/{Path(model).name}", seed)
        page.same(model, seed)
    page.wait("for (const k of [3, 7]) document.querySelectorAll('#classes input')[k].click(); number.value = 4;"
              f"seed.value = '{2**63 - 1}'; seed.dispatchEvent(new Event('input', {{ bubbles: true }}))")
    page.same(model, 2**63 - 1, 4, "--labels 3,7")
    for seed, shapes in enumerate(((["n", 12], ["n", 3, 8, 10]), ([4, 12, 1, 1], [4, 8, 8, 1])), 10):
        foreign(*shapes)
        model = shutil.move("foreign.onnx", f"foreign{seed}.onnx")  # or the browser might show the first again
        page.open(model, seed)
        page.same(model, seed)

def test_the_range_of_foreign_pictures_is_recognised(page):
    """One that ends in a sigmoid would be washed out; what was recognised stands under the title."""
    ranges = ((-1, 1, "[-1, 1]"), (0, 1, "[0, 1]"), (0, 255, "[0, 255]"), (0, 800, "[-1, 1]"))
    for seed, (low, high, name) in enumerate(ranges):
        want = pixels_of(sigmoid(low, high, (5, 12), label=seed % 2)(seed, 16), name)
        model = shutil.move("sigmoid.onnx", f"sigmoid{seed}.onnx")
        page.open(model, seed, 16)
        page.save(seed, 16)
        assert f" {name} " in page.wait("message.innerText")
        columns = 10 if seed % 2 else 4  # a multiple of the classes
        grid = np.asarray(Image.open("page.png").convert("L")).astype(int)
        got = [grid[2 + i // columns * 10, 2 + i % columns * 12] for i in range(16)]
        assert np.abs(got - want).max() <= 1

def test_what_is_wrong_becomes_a_line(page):
    Path("text.onnx").write_text("I am no model")
    Path("cut.onnx").write_bytes(b"\x72\xff")
    shapes = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 7]) for name in "xy"]
    save_graph("identity.onnx", [helper.make_node("Identity", ["x"], ["y"])], shapes[:1], shapes[1:])
    tampered("acgan", n_classes="1000000000")
    for name in ("nowhere", "text", "cut", "identity", "tampered"):
        page.open(f"{name}.onnx")
        page.wait(f"document.querySelector('.error')?.innerText.startsWith('{name}.onnx: ')")

def test_a_coordinate_that_the_next_model_lacks(page):
    """It would leave the pictures of the model before it under the new one's name."""
    model = f"kept/{Path(model_of('dcgan')).name}"
    page.open(model)
    page.wait("document.querySelector('canvas')?.ariaLabel")
    page.wait("dim.max = 99; dim.value = 90")
    page.wait(f"fetch('{model}').then((r) => r.blob()).then((blob) => {{ const dropped = new DataTransfer();"
              "dropped.items.add(new File([blob], 'x.onnx')); file.files = dropped.files; file.onchange(); }); true")
    page.wait("dim.value === '0'")

def test_one_seed_one_picture(page, script, cpp):
    """In PyTorch, Python, C++ and the browser."""
    model, argv = model_of(script.SCRIPT), "--n_samples 50 --seed 123456789"
    page.open(f"kept/{Path(model).name}", 123456789)
    page.same(model, 123456789)
    sampled(script, argv, out="torch.png")
    if cpp:
        run_cpp(cpp, model, argv, "--out cpp.png")
    for name in ("python", "page", "cpp")[:2 + bool(cpp)]:
        assert far(f"{name}.png", "torch.png") <= 1
