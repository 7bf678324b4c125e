"""Nets and losses: shapes, names, formulas."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import acgan
import dcgan
import gan

SIZES = [16, 32, 64, 128, 256]

@pytest.mark.parametrize(("script", "size"), [*((dcgan, size) for size in SIZES), *((gan, size) for size in (1, 28, 33))])
def test_gan_and_dcgan_make_and_judge_every_size(script, size):
    for nc in (1, 3):
        netG, netD = script.Generator(nz=5, ngf=2, nc=nc, img_size=size), script.Discriminator(nc, 2, size)
        images = netG(torch.randn(2, 5))
        assert images.shape == (2, nc, size, size)
        assert images.abs().max() <= 1
        assert torch.isfinite(netD(images)).tolist() == [True, True]
        script.Generator(**netG.config).load_state_dict(netG.state_dict())
        script.Generator(**script.config_of(netG.state_dict())).load_state_dict(netG.state_dict())

@pytest.mark.parametrize("size", SIZES)
def test_acgan_makes_and_judges_every_size(size):
    netG, netD = acgan.Generator(5, 2, 3, size, n_classes=7), acgan.Discriminator(3, 2, size, n_aux=7)
    images = netG(torch.randn(2, 5, 1, 1), torch.tensor([0, 6]))
    adv, aux = netD(images)
    assert (images.shape, adv.shape, aux.shape) == ((2, 3, size, size), (2,), (2, 7))
    acgan.Generator(**acgan.config_of(netG.state_dict())).load_state_dict(netG.state_dict())

def test_large_nets_are_no_wider_than_eight_times_ngf_but_wider_ones_of_others_load():
    for script, more in ((dcgan, {}), (acgan, {"n_classes": 3})):
        netG = script.Generator(5, 2, 3, 256, **more)
        assert max(len(w) for w in netG.parameters() if w.ndim == 4) == 16  # in channels of a transposed convolution
        theirs = script.Generator(5, 2, 3, 128, widest=16, **more)
        assert script.config_of(theirs.state_dict()) == theirs.config
    assert max(len(w) for w in dcgan.Discriminator(3, 2, 256).parameters()) == 16

def test_spectral_norm_bounds_every_layer():
    torch.manual_seed(0)
    netD = dcgan.Discriminator(1, 8, 16, sn=True)
    dcgan.weights_init(netD, "he")
    for _ in range(100):
        netD(torch.randn(4, 1, 16, 16))
    layers = [m for m in netD.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    for layer in layers:
        assert torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2).item() == pytest.approx(1, abs=0.05)
    assert len(layers) >= 3
    assert not [m for m in netD.modules() if isinstance(m, torch.nn.BatchNorm2d)]

@pytest.mark.parametrize("init", ["dcgan", "he", "xavier"])
def test_weights_init(init):
    """The standard deviations of the papers; netG's Tanh is not driven into saturation."""
    torch.manual_seed(0)
    netD, netG = dcgan.Discriminator(1, 64, 16), dcgan.Generator(20, 16, 1, 64)
    dcgan.weights_init(netD, init)
    dcgan.weights_init(netG, init)
    weight = max(netD.parameters(), key=torch.Tensor.numel)
    fan_in, fan_out = weight[0].numel(), weight[:, 0].numel()
    std = {"dcgan": 0.02, "he": (2 / 1.04 / fan_in) ** 0.5, "xavier": (2 / (fan_in + fan_out)) ** 0.5}[init]
    assert weight.std().item() == pytest.approx(std, rel=0.05)
    scales = [m.weight.std().item() for m in netD.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert scales == [pytest.approx(0.02, rel=0.3)]
    assert (netG(torch.randn(8, 20)).abs() > 0.95).float().mean() < 0.2

def test_losses_are_the_papers(script):
    """Binary cross-entropy, smoothed where a script can be told to; dcgan.py's hinge."""
    real, fake = torch.tensor([1.5, -0.5]), torch.tensor([-2.0, 0.5])
    p, q = torch.sigmoid(real), torch.sigmoid(fake)
    plain = SimpleNamespace(loss="bce", real_label=1.0, fake_label=0.0)
    smooth = SimpleNamespace(loss="bce", real_label=0.9, fake_label=0.2)
    hinge = SimpleNamespace(loss="hinge")
    d_args, g_args = ([] if script is gan else [plain]), ([plain] if script is dcgan else [])
    torch.testing.assert_close(script.d_loss(real, fake, *d_args), -p.log().mean() - (1 - q).log().mean())
    torch.testing.assert_close(script.g_loss(fake, *g_args), -q.log().mean())
    if script is not gan:
        expected = (-0.9 * p.log() - 0.1 * (1 - p).log()).mean() + (-0.2 * q.log() - 0.8 * (1 - q).log()).mean()
        torch.testing.assert_close(script.d_loss(real, fake, smooth), expected)
    if script is dcgan:
        torch.testing.assert_close(script.d_loss(real, fake, hinge), F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        torch.testing.assert_close(script.g_loss(fake, hinge), -fake.mean())

def test_gradient_penalties_of_a_linear_critic(script):
    """d/dx sum(w x) = w everywhere: r1 is |w|^2 / 2, the two-sided penalty (|w| - 1)^2."""
    w = torch.full((1, 4, 4), 0.5, requires_grad=True)  # |w| = 2

    class critic:
        def forward(x):
            out = (x * w).sum((1, 2, 3))
            return (out, torch.stack((out, torch.zeros(3)), 1)) if script is acgan else out

    real, fake, labels = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4), torch.zeros(3, dtype=torch.long)
    rest = {gan: (), dcgan: (fake, "r1"), acgan: (labels, 0)}[script]
    r1 = script.gradient_penalty(critic, real, *rest)
    rgb = script.gradient_penalty(critic, real.repeat(1, 3, 1, 1), *rest)  # no heavier for three channels
    assert (r1.item(), rgb.item()) == pytest.approx((2, 2))
    r1.backward()
    torch.testing.assert_close(w.grad, w.detach())
    if script is dcgan:
        assert dcgan.gradient_penalty(critic, real, fake, "interpolate").item() == pytest.approx(1)
    if script is acgan:  # the margin of adc, class 0 over class 0 of fakes, is as steep: twice the gradient
        assert acgan.gradient_penalty(critic, real, labels, 1).item() == pytest.approx(8)

def test_to_uint8():
    """The one conversion, the same in every runtime: x * 127.5 + 128, cut off."""
    x = torch.tensor([-1.5, -1, -0.999, 0, 0.9999, 1, 2]).reshape(1, 1, 1, 7)
    assert dcgan.to_uint8(x).flatten().tolist() == [0, 0, 0, 128, 255, 255, 255]
    pixels = torch.arange(256.0).reshape(1, 1, 16, 16)
    assert dcgan.to_uint8((pixels - 127.5) / 127.5).flatten().tolist() == list(range(256))
