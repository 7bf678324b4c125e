"""Nets and losses: shapes, names, formulas."""

import pytest
import torch
import torch.nn.functional as F
from conftest import error_of

import acgan
import dcgan
import gan

SIZES = (16, 32, 64, 128, 256)


@pytest.mark.parametrize("size", SIZES)
def test_dcgan_makes_and_judges_every_size(size):
    for nc in (1, 3):
        netG, netD = dcgan.Generator(nz=5, ngf=2, nc=nc, img_size=size), dcgan.Discriminator(nc, 2, size)
        images = netG(torch.randn(2, 5))
        assert images.shape == (2, nc, size, size)
        assert images.abs().max() <= 1
        assert netD(images).shape == (2,)
        assert dcgan.config_of(netG.state_dict()) == {"nz": 5, "ngf": 2, "nc": nc, "img_size": size}


@pytest.mark.parametrize("size", SIZES)
def test_acgan_makes_and_judges_every_size(size):
    netG, netD = acgan.Generator(5, 2, 3, size, n_classes=7), acgan.Discriminator(3, 2, size, n_classes=7)
    images = netG(torch.randn(2, 5), torch.tensor([0, 6]))
    adv, aux = netD(images)
    assert (images.shape, adv.shape, aux.shape) == ((2, 3, size, size), (2,), (2, 7))
    assert acgan.config_of(netG.state_dict())["n_classes"] == 7


@pytest.mark.parametrize("size", [1, 28, 33])
def test_gan_makes_any_size(size):
    netG, netD = gan.Generator(5, 2, 3, size), gan.Discriminator(3, 2, size)
    assert netD(netG(torch.randn(4, 5))).shape == (4,)
    assert gan.config_of(netG.state_dict()) == {"nz": 5, "ngf": 2, "nc": 3, "img_size": size}


@pytest.mark.parametrize("size", [8, 28, 48, 512])
def test_other_sizes_are_refused(size, capfd):
    for module in (dcgan, acgan):
        assert f"--img_size {size}" in error_of(capfd, module.check_img_size, size)


def test_dcgan_is_the_net_of_pytorch_examples_at_64():
    """Names and shapes that pytorch/examples and the PyTorch DCGAN tutorial write with nz 100, ngf 64, ndf 64, nc 3."""
    netG, netD = dcgan.Generator(), dcgan.Discriminator()
    weights = {k: tuple(v.shape) for k, v in netG.state_dict().items() if k.endswith("weight") and v.ndim == 4}
    assert weights == {
        "main.0.weight": (100, 512, 4, 4),
        "main.3.weight": (512, 256, 4, 4),
        "main.6.weight": (256, 128, 4, 4),
        "main.9.weight": (128, 64, 4, 4),
        "main.12.weight": (64, 3, 4, 4),
    }
    assert [k for k in netG.state_dict() if "running_mean" in k] == [f"main.{i}.running_mean" for i in (1, 4, 7, 10)]
    weights = {k: tuple(v.shape) for k, v in netD.state_dict().items() if k.endswith("weight") and v.ndim == 4}
    assert weights == {
        "main.0.weight": (64, 3, 4, 4),
        "main.2.weight": (128, 64, 4, 4),
        "main.5.weight": (256, 128, 4, 4),
        "main.8.weight": (512, 256, 4, 4),
        "main.11.weight": (1, 512, 4, 4),
    }
    assert [k for k in netD.state_dict() if "running_mean" in k] == [f"main.{i}.running_mean" for i in (3, 6, 9)]
    assert not [k for k in (*netG.state_dict(), *netD.state_dict()) if k.endswith("bias") and "main.0" in k]
    assert dcgan.Discriminator(dropout=0.3).state_dict().keys() == netD.state_dict().keys()


def test_gan_widths_follow_the_flags():
    shapes = [tuple(p.shape) for p in gan.Generator(100, 64, 1, 28).parameters() if p.ndim == 2]
    assert shapes == [(256, 100), (512, 256), (784, 512)]
    shapes = [tuple(p.shape) for p in gan.Discriminator(1, 64, 28).parameters() if p.ndim == 2]
    assert shapes == [(512, 784), (256, 512), (1, 256)]


def test_acgan_multiplies_latent_and_embedding():
    netG = acgan.Generator(5, 2, 1, 16, n_classes=3).eval()
    z, y = torch.randn(2, 5), torch.tensor([1, 2])
    same = netG(z * netG.label_emb(y), torch.tensor([0, 0]))
    netG.label_emb.weight.data[0] = 1
    torch.testing.assert_close(netG(z * netG.label_emb(y), torch.tensor([0, 0])), netG(z, y))
    assert not torch.equal(same, netG(z, y))


def test_spectral_norm_bounds_every_layer(script):
    netD = script.Discriminator(1, 8, 16, sn=True)
    script.weights_init(netD, "he")
    for _ in range(30):
        netD(torch.randn(4, 1, 16, 16))
    layers = [m for m in netD.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    for layer in layers:
        assert torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2).item() == pytest.approx(1, abs=0.05)
    assert not [m for m in netD.modules() if isinstance(m, torch.nn.BatchNorm2d)]


def test_init(script):
    for kind, std in (("dcgan", lambda w: 0.02), ("he", lambda w: (2 / 1.04 / w[0].numel()) ** 0.5)):
        torch.manual_seed(0)
        netD = script.Discriminator(1, 64, 16)
        script.weights_init(netD, kind)
        w = max(netD.parameters(), key=torch.Tensor.numel)
        assert w.std().item() == pytest.approx(std(w), rel=0.05)
    if script.SCRIPT != "gan":  # he must not drive netG's Tanh into saturation
        netG = script.Generator(20, 16, 1, 64)
        script.weights_init(netG, "he")
        args = [torch.zeros(8, dtype=torch.long)] if script.SCRIPT == "acgan" else []
        assert (netG(torch.randn(8, 20), *args).abs() > 0.95).float().mean() < 0.2
    script.weights_init(netD, "xavier")
    assert w.std().item() != pytest.approx(0.02, rel=0.2)


def test_losses_are_the_papers(script):
    real, fake = torch.tensor([1.5, -0.5]), torch.tensor([-2.0, 0.5])
    d = -torch.log(torch.sigmoid(real)).mean() - torch.log(1 - torch.sigmoid(fake)).mean()
    torch.testing.assert_close(script.d_loss(real, fake), d)
    torch.testing.assert_close(script.g_loss(fake), -torch.log(torch.sigmoid(fake)).mean())
    torch.testing.assert_close(script.d_loss(real, fake, "hinge"), F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    torch.testing.assert_close(script.g_loss(fake, "hinge"), -fake.mean())
    p, q = torch.sigmoid(real), torch.sigmoid(fake)
    smooth = (-0.9 * p.log() - 0.1 * (1 - p).log()).mean() + (-0.2 * q.log() - 0.8 * (1 - q).log()).mean()
    torch.testing.assert_close(script.d_loss(real, fake, "bce", 0.9, 0.2), smooth)


def test_gradient_penalties_of_a_linear_critic(script):
    """d/dx sum(w x) = w everywhere: r1 is |w|^2 / 2, the two-sided penalty (|w| - 1)^2."""
    w = torch.full((1, 4, 4), 0.5, requires_grad=True)  # |w| = 2

    def critic(x):
        out = (x * w).sum((1, 2, 3))
        return (out, None) if script.SCRIPT == "acgan" else out

    real, fake = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4)
    r1 = script.gradient_penalty(critic, real, fake, "r1")
    assert r1.item() == pytest.approx(2)
    assert script.gradient_penalty(critic, real, fake, "interpolate").item() == pytest.approx(1)
    r1.backward()
    assert w.grad is not None


def test_replay_mixes_in_old_fakes(script):
    replay = script.Replay(8, 0.5)
    for step in range(2):  # fills up
        (out,) = replay.mix(torch.full((4, 1), float(step)))
        assert (out == step).all()
    out, _labels = script.Replay(4, 0.0).mix(torch.ones(4, 1), torch.zeros(4))
    assert (out == 1).all()
    (out,) = replay.mix(torch.full((4, 1), 2.0))
    assert sorted((out == 2).flatten().tolist()) == [False, False, True, True]
    assert (replay.store[0] == 2).sum() == 2


def test_replay_keeps_channels_last(script):
    replay = script.Replay(8, 0.5)
    for _ in range(4):
        (out,) = replay.mix(torch.randn(4, 3, 16, 16).to(memory_format=torch.channels_last))
        assert out.is_contiguous(memory_format=torch.channels_last)


def test_lr_factor(script):
    assert [script.lr_factor("linear", p) for p in (0, 0.25, 1)] == [1, 0.75, 0]
    assert [script.lr_factor("step", p) for p in (0, 0.24, 0.25, 0.5, 0.99)] == [1, 1, 0.5, 0.25, 0.125]
    assert script.lr_factor("none", 0.7) == 1
