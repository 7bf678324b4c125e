"""Sampling: picture i is a function of seed and i; other people's checkpoints load; every output can be read back."""

import math
import os
from collections import OrderedDict
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import TINY, command, error_of, main, train
from PIL import Image
from torch import nn

import acgan
import dcgan
import gan

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
def test_latents_are_philox_and_box_muller(nz):
    """Written again from the description, as somebody would in another language."""
    seed, i, blocks = 12345678901234567890 % 2**63, 1000003, math.ceil(nz / 4)
    z = []
    for b in range(blocks):
        u = [((word >> 11) + 0.5) / 2**53 for word in philox4x64([i * blocks + b + 1, 0, 0, 0], [seed, 0])]
        for u1, u2 in (u[:2], u[2:]):
            r, t = math.sqrt(-2 * math.log(u1)), 2 * math.pi * u2
            z += [r * math.cos(t), r * math.sin(t)]
    got = dcgan.latents(seed, i, 1, nz)
    assert got.dtype == np.float32
    np.testing.assert_array_max_ulp(got[0], np.float32(z[:nz]), 1)

def test_latents_are_random_access_and_normal():
    z = dcgan.latents(7, 0, 2000, 100)
    np.testing.assert_array_equal(z[500:510], dcgan.latents(7, 500, 10, 100))
    assert (z.mean(), z.std()) == (pytest.approx(0, abs=0.01), pytest.approx(1, abs=0.01))
    assert len(np.unique([z, dcgan.latents(8, 0, 2000, 100)])) > 398000

def sample(script, *argv):
    main(script, "--sample run --device cpu", *argv)

def pictures(script, *argv):
    """What --sample makes of the run in the folder `run`: arr_0, and labels of acgan's."""
    sample(script, "--out x.npz", *argv)
    return dict(np.load("x.npz"))

def pixels(file):
    return np.asarray(Image.open(file).convert("RGB"))

def test_picture_i_does_not_depend_on_batch_or_number(script):
    train(script, "--max_steps 3")
    many = pictures(script, "--n_samples 50")["arr_0"]
    assert (many.shape, many.dtype) == ((50, 16, 16, 1), np.uint8)
    np.testing.assert_array_equal(many[:3], pictures(script, "--n_samples 3")["arr_0"])
    for batch in (2, 7, 50):
        other = pictures(script, "--n_samples 50 --batch_size", batch)["arr_0"]  # sums are rounded in another order
        np.testing.assert_allclose(many.astype(int), other.astype(int), atol=1)
    assert not np.array_equal(many, pictures(script, "--n_samples 50 --seed 1")["arr_0"])

def test_every_output_shows_the_same_pictures(script):
    """Grid beside the checkpoint (the one that training showed last), folder, array; a run's folder or its file."""
    train(script, "--max_steps 2 --nc 3 --seed 4")
    sample(script, "--seed 4")
    grid, side = pixels("run/checkpoint_samples.png"), 10 if script is acgan else 8
    assert grid.shape == (side * 18 + 2, side * 18 + 2, 3)
    np.testing.assert_array_equal(grid, pixels("run/samples/step_00000002.png"))
    main(script, "--sample run/checkpoint.pt --seed 4 --n_samples 5 --out folder/ --device cpu")
    assert sorted(os.listdir("folder")) == [f"{i:06d}.png" for i in range(5)]
    for i, image in enumerate(pictures(script, "--seed 4 --n_samples 5")["arr_0"]):
        np.testing.assert_array_equal(grid[2:18, 2 + 18 * i:18 + 18 * i], image)
        np.testing.assert_array_equal(pixels(f"folder/{i:06d}.png"), image)

def test_walk_dim_sweeps_one_coordinate(script, monkeypatch):
    train(script, "--max_steps 1")
    monkeypatch.setattr(script, "generate", spy := mock.Mock(side_effect=script.generate))
    sample(script, "--walk_dim 3 --n_samples 20 --out x.png")
    expected = script.latents(0, 0, 1, 8).repeat(20, 0)
    expected[:, 3] += 0.01 * np.arange(20)
    np.testing.assert_allclose(spy.call_args.args[1], expected, atol=1e-5)

def test_classes_that_are_named_by_other_numbers(folder):
    (folder / "cat").rename(folder / "1")
    (folder / "dog").rename(folder / "2")
    train(acgan, "--max_steps 1 --dataset", folder)
    assert pictures(acgan, "--n_samples 4")["labels"].tolist() == [0, 1, 0, 1]

def test_acgan_labels(folder):
    """Classes in turn, by number or name; a column of the grid for each."""
    train(acgan, "--max_steps 5 --lr 0.01")
    assert pictures(acgan, "--n_samples 12")["labels"].tolist() == [*range(10), 0, 1]
    some = pictures(acgan, "--n_samples 4 --labels 7,3")
    assert some["labels"].tolist() == [7, 3, 7, 3]
    netG, classes = acgan.load_generator("run/checkpoint.pt")
    assert classes == list("0123456789")
    with torch.no_grad():
        images = netG(torch.from_numpy(acgan.latents(0, 0, 4, 8)), torch.tensor([7, 3, 7, 3]))
    assert np.abs(acgan.to_uint8(images).astype(int) - some["arr_0"]).max() <= 1
    sample(acgan, "--labels 3,7 --n_samples 10 --out columns.png")
    assert pixels("columns.png").shape == (5 * 18 + 2, 2 * 18 + 2, 3)
    train(acgan, "--max_steps 1 --dataset", folder, out="pets_run")
    main(acgan, "--sample pets_run --labels dog,0 --n_samples 3 --out x.npz")
    assert np.load("x.npz")["labels"].tolist() == [1, 0, 1]

class ExamplesGenerator(nn.Module):
    """The 64x64 generator as tutorials print it, layer by layer."""

    def __init__(self, nz, ngf, nc):
        super().__init__()
        self.main = nn.Sequential(
            nn.ConvTranspose2d(nz, ngf * 8, 4, 1, 0, bias=False), nn.BatchNorm2d(ngf * 8), nn.ReLU(True),
            nn.ConvTranspose2d(ngf * 8, ngf * 4, 4, 2, 1, bias=False), nn.BatchNorm2d(ngf * 4), nn.ReLU(True),
            nn.ConvTranspose2d(ngf * 4, ngf * 2, 4, 2, 1, bias=False), nn.BatchNorm2d(ngf * 2), nn.ReLU(True),
            nn.ConvTranspose2d(ngf * 2, ngf, 4, 2, 1, bias=False), nn.BatchNorm2d(ngf), nn.ReLU(True),
            nn.ConvTranspose2d(ngf, nc, 4, 2, 1, bias=False), nn.Tanh())

    def forward(self, x):
        return self.main(x)

@pytest.mark.parametrize(("wrap", "parallel"), [
    (None, False), (None, True), ("g_model_state_dict", False), ("generator", False), ("netG", True), ("state_dict", False),
    ("model_state_dict", True)])
def test_foreign_dcgan_checkpoints(wrap, parallel):
    torch.manual_seed(0)
    net = ExamplesGenerator(nz=30, ngf=6, nc=3)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
    state = (nn.DataParallel(net) if parallel else net).state_dict()
    torch.save({wrap: state, "epoch": 14, "d_model_state_dict": OrderedDict()} if wrap else state, "checkpoint_14.pkl")
    main(dcgan, "--sample checkpoint_14.pkl --n_samples 5 --device cpu --out x.npz")
    with torch.no_grad():
        expected = net.eval()(torch.from_numpy(dcgan.latents(0, 0, 5, 30)).reshape(5, 30, 1, 1))
    assert np.abs(np.load("x.npz")["arr_0"].astype(int) - dcgan.to_uint8(expected)).max() <= 1

def test_foreign_gan_and_acgan_state_dicts():
    for module, net in ((gan, gan.Generator(9, 4, 3, 12)), (acgan, acgan.Generator(9, 4, 1, 32, n_classes=3))):
        torch.save(net.state_dict(), "state.pth")
        loaded, classes = module.load_generator("state.pth")
        assert not loaded.training
        assert classes == (["0", "1", "2"] if module is acgan else [])
        assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), net.state_dict().values()))

def test_what_surrounds_somebodys_state_dict(capfd):
    """Other things under our names do not matter; dicts in a circle end."""
    state = dcgan.Generator(nz=8, ngf=4, nc=1, img_size=16).state_dict()
    torch.save(state, "plain.pth")
    main(dcgan, "--sample plain.pth --out plain.png")
    for others in ({"classes": 10}, {"config": {"lr": 1}}, {"script": None}):
        torch.save({"netG_ema": state} | others, "other.pth")
        main(dcgan, "--sample other.pth --out other.png --batch_size 1000000000")
        np.testing.assert_array_equal(pixels("other.png"), pixels("plain.png"))
    circle = {"a": {}}
    circle["a"]["b"] = circle
    tree = {}
    for _ in range(60):
        tree = {"a": tree, "b": tree}
    for dicts in (circle, tree, {"script": "dcgan", "config": None}):
        torch.save(dicts, "none.pth")
        assert "none.pth: " in error_of(capfd, main, dcgan, "--sample none.pth")

def test_pictures_of_five_channels(capfd):
    torch.save(dcgan.Generator(nz=8, ngf=4, nc=5, img_size=16).state_dict(), "five.pth")
    assert "--out five" in error_of(capfd, main, dcgan, "--sample five.pth")
    main(dcgan, "--sample five.pth --n_samples 3 --out five.npz")
    assert np.load("five.npz")["arr_0"].shape == (3, 16, 16, 5)

def test_command_lines_of_a_stranger(capfd):
    """Train, sample, without a flag more than needed."""
    done = command("gan", *TINY, "--max_steps 2")
    assert done.returncode == 0, done.stderr
    assert "images/s=" in done.stderr
    assert "python gan.py --sample runs/gan-digits" in done.stdout
    main(gan, "--sample runs/gan-digits")
    assert "runs/gan-digits/checkpoint_samples.png" in capfd.readouterr().out
