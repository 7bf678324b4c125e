"""Sampling: picture i is a function of seed and i; other people's checkpoints load; every output can be read back."""

import importlib
import math
import os
import pickle
from collections import OrderedDict

import numpy as np
import pytest
import torch
from conftest import TINY, command, error_of, train
from PIL import Image
from torch import nn

import dcgan


def philox4x64(counter, key):
    """Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), in plain integers."""
    mask = 2**64 - 1
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = c[0] * 0xD2E7470EE14C6C93, c[2] * 0xCA5A826395121157
        c = [(b >> 64) ^ c[1] ^ k[0], b & mask, (a >> 64) ^ c[3] ^ k[1], a & mask]
        k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
    return c


@pytest.mark.parametrize("nz", [1, 2, 7, 100])
def test_latents_are_philox_and_box_muller(script, nz):
    """Written again from the docstring, as somebody would in another language."""
    seed, i, blocks = 12345678901234567890 % 2**63, 1000003, math.ceil(nz / 4)
    z = []
    for b in range(blocks):
        u = [((word >> 11) + 0.5) / 2**53 for word in philox4x64([i * blocks + b + 1, 0, 0, 0], [seed, 0])]
        for u1, u2 in (u[:2], u[2:]):
            r, t = math.sqrt(-2 * math.log(u1)), 2 * math.pi * u2
            z += [r * math.cos(t), r * math.sin(t)]
    got = script.latents(seed, i, 1, nz)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got[0], z[:nz], rtol=1e-6, atol=1e-7)


def test_latents_are_random_access_and_normal(script):
    z = script.latents(7, 0, 2000, 100)
    np.testing.assert_array_equal(z[500:510], script.latents(7, 500, 10, 100))
    assert abs(z.mean()) < 0.01
    assert abs(z.std() - 1) < 0.01
    assert not np.array_equal(z, script.latents(8, 0, 2000, 100))
    assert len(np.unique(z)) > 199000


def sample(script, *argv):
    script.sample(script.get_args(["--sample", "run/checkpoint.pt", "--device", "cpu", *map(str, argv)]))


def pictures(script, *argv, out="x.npz"):
    sample(script, "--out", out, *argv)
    with np.load(out) as f:
        return dict(f)


def test_picture_i_does_not_depend_on_batch_or_number(script):
    train(script, "--max_steps", 3, "--img_size", 16)
    many = pictures(script, "--n_samples", 50)["arr_0"]
    assert many.shape == (50, 16, 16, 1)
    assert many.dtype == np.uint8
    np.testing.assert_array_equal(many[:3], pictures(script, "--n_samples", 3)["arr_0"])
    for batch in (1, 7, 50):
        np.testing.assert_array_equal(many, pictures(script, "--n_samples", 50, "--batch_size", batch)["arr_0"])
    assert not np.array_equal(many, pictures(script, "--n_samples", 50, "--seed", 1)["arr_0"])
    assert not np.array_equal(many, pictures(script, "--n_samples", 50, "--weights", "raw")["arr_0"])


def test_default_is_a_grid(script):
    train(script, "--max_steps", 1)
    sample(script)
    with Image.open("run/checkpoint_samples.png") as grid:
        assert grid.size == ((10 * 18 + 2,) * 2 if script.SCRIPT == "acgan" else (8 * 18 + 2,) * 2)


def test_a_run_folder_stands_for_its_checkpoint(script):
    train(script, "--max_steps", 1)
    script.sample(script.get_args(["--sample", "run", "--out", "x.png"]))
    assert os.path.exists("x.png")
    assert script.get_args(["--resume", "run/"]).resume == "run/checkpoint.pt"


def test_folder_npz_and_png_agree(script):
    train(script, "--max_steps", 1, "--nc", 3)
    images = pictures(script, "--n_samples", 5)["arr_0"]
    sample(script, "--n_samples", 5, "--out", "folder/")
    assert sorted(os.listdir("folder")) == [f"{i:06d}.png" for i in range(5)]
    for i in range(5):
        np.testing.assert_array_equal(np.asarray(Image.open(f"folder/{i:06d}.png")), images[i])
    sample(script, "--n_samples", 1, "--out", "one.png")
    np.testing.assert_array_equal(np.asarray(Image.open("one.png")), images[0])


def test_grid_is_what_training_showed(script):
    """The last grid of a run is --sample's with the same seed."""
    train(script, "--max_steps", 2, "--seed", 4)
    sample(script, "--seed", 4, "--out", "again.png")
    np.testing.assert_array_equal(
        np.asarray(Image.open("again.png")), np.asarray(Image.open("run/samples/step_00000002.png"))
    )


def test_interpolate_walks_and_returns(script):
    train(script, "--max_steps", 1)
    sample(script, "--interpolate", 12, "--out", "walk.gif", "--n_samples", 4)
    with Image.open("walk.gif") as gif:
        assert gif.n_frames == 12
    z = script.walk(3, 2, 8, 40)
    key = script.latents(3, 0, 8, 8).reshape(4, 2, 8)
    np.testing.assert_allclose(z[::10], key, rtol=1e-5)
    steps = np.linalg.norm(np.diff(np.concatenate((z, z[:1])), axis=0), axis=-1)
    assert steps.max() < np.linalg.norm(key[0] - key[1], axis=-1).max()  # no jump, also none from the last to the first
    lengths, ends = np.linalg.norm(z, axis=-1), np.linalg.norm(key, axis=-1)
    assert lengths.min() > 0.9 * ends.min()  # spherical: it keeps away from the origin
    sample(script, "--interpolate")
    assert os.path.exists("run/checkpoint_walk.gif")


def test_walk_dim_sweeps_one_coordinate(script, monkeypatch):
    train(script, "--max_steps", 1)
    seen = []
    original = script.generate
    monkeypatch.setattr(
        script, "generate", lambda netG, inputs, b: (seen.append(inputs[0]), original(netG, inputs, b))[1]
    )
    sample(script, "--walk_dim", 3, "--n_samples", 20)
    (z,) = seen
    np.testing.assert_allclose(np.diff(z[:, 3]), 0.01, atol=1e-5)
    assert (np.delete(z, 3, 1) == np.delete(script.latents(0, 0, 1, 8), 3, 1)).all()


def test_acgan_labels(capfd):
    acgan = importlib.import_module("acgan")
    train(acgan, "--max_steps", 5, "--lr", 0.01)
    every = pictures(acgan, "--n_samples", 12)
    assert every["labels"].tolist() == [*range(10), 0, 1]
    some = pictures(acgan, "--n_samples", 4, "--labels", "7,3")
    assert some["labels"].tolist() == [7, 3, 7, 3]
    netG, _ = acgan.load_generator("run/checkpoint.pt")
    z, y = torch.from_numpy(acgan.latents(0, 0, 4, 8)), torch.tensor([7, 3, 7, 3])
    with torch.no_grad():
        np.testing.assert_array_equal(acgan.to_uint8(netG(z, y)), some["arr_0"])
    sample(acgan, "--labels", "3,7", "--n_samples", 10, "--out", "rows.png")
    with Image.open("rows.png") as grid:
        assert grid.size == (5 * 18 + 2, 2 * 18 + 2)  # a row for each class
    assert acgan.parse_labels("dog, 0", ["cat", "dog"], 2) == [1, 0]
    message = error_of(capfd, acgan.parse_labels, "bird", ["cat", "dog"], 2)
    assert "--labels bird: this generator knows 0 to 1, cat, dog" in message


class ExamplesGenerator(nn.Module):
    """The 64x64 generator as tutorials print it, layer by layer."""

    def __init__(self, nz, ngf, nc):
        super().__init__()
        self.main = nn.Sequential(
            nn.ConvTranspose2d(nz, ngf * 8, 4, 1, 0, bias=False),
            nn.BatchNorm2d(ngf * 8),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf * 8, ngf * 4, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ngf * 4),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf * 4, ngf * 2, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ngf * 2),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf * 2, ngf, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ngf),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf, nc, 4, 2, 1, bias=False),
            nn.Tanh(),
        )

    def forward(self, x):
        return self.main(x)


@pytest.mark.parametrize("wrap", [None, "g_model_state_dict", "generator", "netG", "state_dict", "model_state_dict"])
@pytest.mark.parametrize("parallel", [False, True])
def test_foreign_dcgan_checkpoints(wrap, parallel):
    torch.manual_seed(0)
    net = ExamplesGenerator(nz=30, ngf=6, nc=3)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
    state = (nn.DataParallel(net) if parallel else net).state_dict()
    torch.save(
        {wrap: state, "epoch": 14, "d_model_state_dict": OrderedDict()} if wrap else state,
        "gan_checkpoint_14_epoch.pkl",
    )
    argv = ["--sample", "gan_checkpoint_14_epoch.pkl", "--n_samples", "5", "--device", "cpu"]
    dcgan.sample(dcgan.get_args([*argv, "--out", "x.npz"]))
    with torch.no_grad():
        expected = net.eval()(torch.from_numpy(dcgan.latents(0, 0, 5, 30)).reshape(5, 30, 1, 1))
    assert np.abs(np.load("x.npz")["arr_0"].astype(int) - dcgan.to_uint8(expected)).max() <= 1
    dcgan.sample(dcgan.get_args([*argv, "--walk_dim", "0"]))
    assert os.path.exists("gan_checkpoint_14_epoch_walk_0.png")


def test_foreign_gan_and_acgan_state_dicts():
    gan, acgan = importlib.import_module("gan"), importlib.import_module("acgan")
    for module, net in ((gan, gan.Generator(9, 4, 3, 12)), (acgan, acgan.Generator(9, 4, 1, 32, n_classes=3))):
        torch.save(net.state_dict(), "state.pth")
        loaded, _ = module.load_generator("state.pth")
        assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), net.state_dict().values()))


def test_pickles_that_run_code_are_refused(script, capfd):
    class Payload:
        def __reduce__(self):
            return os.mkdir, ("pwned",)

    torch.save({"netG": Payload()}, "evil.pt")
    with open("evil.pkl", "wb") as f:
        pickle.dump(Payload(), f)
    torch.save(nn.Linear(2, 2), "module.pt")
    for file in ("evil.pt", "evil.pkl", "module.pt"):
        message = error_of(capfd, script.load_generator, file)
        assert file in message
        assert "refused" in message
        assert "state_dict()" in message
    assert not os.path.exists("pwned")


def test_stranger_command_line(tmp_path):
    """Train, sample, without a flag more than needed, in processes of their own."""
    done = command("gan", *TINY, "--max_steps", 2)
    assert done.returncode == 0, done.stderr
    assert "images/s=" in done.stderr
    done = command("gan", "--sample", "runs/gan-digits/checkpoint.pt")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "wrote runs/gan-digits/checkpoint_samples.png"
    assert os.path.exists("runs/gan-digits/checkpoint_samples.png")


def test_rows_of_classes_are_aligned_when_counts_differ(script):
    images = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1).repeat(8, 1).repeat(8, 2)
    grid = np.asarray(script.make_grid(images, np.array([2, 0, 0, 0, 2, 7])))[..., 0]
    centres = [[grid[5 + 10 * r, 5 + 10 * c] for c in range(3)] for r in range(3)]
    assert centres == [[1, 2, 3], [0, 4, 255], [5, 255, 255]]
