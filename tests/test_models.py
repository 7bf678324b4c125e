"""Nets and losses: shapes, names, formulas."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import SCRIPTS
from torch import nn

import acgan
import dcgan
import gan

SIZES = [16, 32, 64, 128, 256]

@pytest.mark.parametrize(("script", "size"), [*((dcgan, size) for size in SIZES), *((gan, size) for size in (1, 28, 33)),
                                              *((acgan, size) for size in SIZES)])
def test_nets_make_and_judge_every_size(script, size):
    labels, more = ([torch.tensor([0, 6])], [7]) if script is acgan else ([], [])
    for nc in (1, 3):
        netG, netD = script.Generator(5, 2, nc, size, *more), script.Discriminator(nc, 2, size, *more)
        images = netG(torch.randn(2, 5), *labels)
        assert images.shape == (2, nc, size, size)
        assert images.abs().max() <= 1
        judged = netD(images)
        shapes = [x.shape for x in judged] if more else [judged.shape]
        assert shapes == [(2,), (2, 7)][:1 + len(more)]
        script.Generator(**netG.config).load_state_dict(netG.state_dict())
        if script is not gan:  # in channels of a transposed convolution
            assert max(len(w) for w in netG.main.parameters() if w.ndim == 4) <= max(5, 16)

def test_layers_are_those_of_pytorch_examples():
    """In names, order, kernels, strides and widths, at 64x64."""
    kinds = [type(m) for m in dcgan.Generator(100, 64, 3, 64).main]
    assert kinds == [nn.ConvTranspose2d, nn.BatchNorm2d, nn.ReLU] * 4 + [nn.ConvTranspose2d, nn.Tanh]
    convs = [m for m in dcgan.Generator(100, 64, 3, 64).main if isinstance(m, nn.ConvTranspose2d)]
    assert [m.out_channels for m in convs] == [512, 256, 128, 64, 3]
    assert [(m.kernel_size[0], m.stride[0], m.padding[0]) for m in convs] == [(4, 1, 0)] + [(4, 2, 1)] * 4
    convs = [m for m in dcgan.Discriminator(3, 64, 64).main if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in convs] == [64, 128, 256, 512, 1]

def test_spectral_norm_bounds_every_layer(tmp_path):
    """Of a run with --sn, which has no BatchNorm in netD."""
    from conftest import train

    ckpt = train(dcgan, "--sn --max_steps 60")
    netD = dcgan.Discriminator(1, 4, 16, sn=True)
    for m in netD.main:
        if isinstance(m, nn.Conv2d):
            nn.utils.parametrizations.spectral_norm(m)
    netD.load_state_dict(ckpt["netD"])
    layers = [m for m in netD.eval().modules() if isinstance(m, nn.Conv2d)]
    for layer in layers:
        assert torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2).item() == pytest.approx(1, abs=0.1)
    assert len(layers) == 3
    assert not [m for m in netD.modules() if isinstance(m, nn.BatchNorm2d)]

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
    scales = [m.weight.std().item() for m in netD.modules() if isinstance(m, nn.BatchNorm2d)]
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

@pytest.mark.parametrize("name", SCRIPTS)
def test_pixels(name):
    """The one conversion, the same in every runtime: x * 127.5 + 128, cut off and truncated."""
    class Net(nn.Linear):
        def forward(self, z):
            return z.view(-1, 1, 1, 2)

    script = __import__(name)
    x = torch.tensor([[-1.5, -1], [-0.999, 0], [0.9999, 1]])
    assert script.generate(Net(1, 1), x.numpy()).flatten().tolist() == [0, 0, 0, 128, 255, 255]
    every = ((torch.arange(256) - 127.5) / 127.5).reshape(128, 2)
    assert script.generate(Net(1, 1), every.numpy()).flatten().tolist() == list(range(256))
