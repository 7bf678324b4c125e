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
import onnx
import pytest
from conftest import ROOT, SCRIPTS, main, pixels
from PIL import Image
from test_deploy import KEPT, TWELVE, model_of

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

    def type(self, **values):
        """Into fields of the form."""
        for name, value in values.items():
            self.wait(f"{name}.value = '{value}'; form.dispatchEvent(new Event('input')); true")

    def save(self, seed, n):
        """page.png: the grid of the seed, which each model needs to have of its own, on white."""
        self.wait(f"document.querySelector('canvas')?.ariaLabel === '{n} pictures of seed {seed}'")
        image = Image.open(BytesIO(base64.b64decode(self.wait("canvas.toDataURL().split(',')[1]"))))
        Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).save("page.png")

    def same(self, model, seed, n=50, argv=""):
        """The picture of the seed is that of infer_ort.py; in int8 a rare activation is rounded the other way."""
        self.save(seed, n)
        main("infer_ort", model, f"--provider cpu --n_samples {n} --seed {seed} --out python.png", argv)
        page, python = (pixels(f"{name}.png").astype(int) for name in ("page", "python"))
        assert page.shape == python.shape
        assert (np.abs(page - python) > 1).mean() <= (0.01 if "int8" in model else 0)

@contextlib.contextmanager
def served(folder):
    """The page, from this folder of a server of its own."""
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
    """And a class is that of the name on its button: folders 0 to 11 are sorted 0, 1, 10, 11, 2."""
    for seed, (script, flags) in enumerate((s, f) for s in SCRIPTS for f in ("", "--precision int8 --uint8")):
        model = model_of(script, flags)
        page.open(f"kept/{Path(model).name}", seed)
        page.same(model, seed)
    model = model_of("acgan", "", 12)
    page.open(f"kept/{Path(model).name}", 50)
    page.save(50, 50)
    for name in ("10", "3"):
        page.wait(f"document.querySelectorAll('#classes input')[{TWELVE.index(name)}].click(); true")
    page.type(number=4, seed=2**63 - 1)
    page.same(model, 2**63 - 1, 4, "--labels 10,3")

def test_what_is_wrong_becomes_a_line(page):
    Path("text.onnx").write_text("I am no model")
    Path("cut.onnx").write_bytes(b"\x72\xff")
    model = onnx.load(model_of("acgan"))
    onnx.save(model, "elsewhere.onnx", save_as_external_data=True, size_threshold=0)
    onnx.helper.set_model_props(model, {"format_version": "2"})
    onnx.save(model, "other.onnx")
    for name in ("nowhere", "text", "cut", "other"):
        page.open(f"{name}.onnx")
        page.wait(f"document.querySelector('.error')?.innerText.startsWith('{name}.onnx: ')")
    page.open("elsewhere.onnx")
    page.wait("document.querySelector('.error')?.innerText.includes('another file')")

def test_the_name_is_that_of_the_pictures(page):
    """Whatever is dropped on the page, and when; and one that fails leaves what was there."""
    page.open(f"kept/{Path(model_of('dcgan')).name}")
    page.save(0, 50)
    model = model_of("acgan")
    for path in ("infer_ort.html", f"kept/{Path(model).name}", "infer_ort.html"):
        page.wait(f"fetch('{path}').then((r) => r.blob()).then((blob) => {{ const dropped = new DataTransfer();"
                  f"dropped.items.add(new File([blob], '{Path(path).name}'));"
                  "ondrop(new DragEvent('drop', { dataTransfer: dropped })); }); true")
        if path == "infer_ort.html":
            page.wait("document.querySelector('.error')?.innerText.startsWith('infer_ort.html: ')")
        else:
            page.wait(f"caption.innerText.startsWith('{Path(model).name} ')")
            page.same(model, 0)
    assert page.wait("caption.innerText").startswith(Path(model).name)
    page.type(seed=8)
    page.same(model, 8)
