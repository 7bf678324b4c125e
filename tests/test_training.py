"""Training: nothing lost, every flag does what it says, several processes agree."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import POSIX, ROOT, TINY, assert_same, ended, error_of, forked, main, resume, train, words
from PIL import Image

import acgan
import dcgan
import gan

def rows(out="run"):
    return [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]

def stopped(script, step, *argv, out="run"):
    """A tiny run that a SIGTERM stops after so many steps, and its checkpoint."""
    next_batch = script.Run.next_batch

    def signalled(run):
        if run.step == step - 1:
            signal.raise_signal(signal.SIGTERM)
        return next_batch(run)

    with mock.patch.object(script.Run, "next_batch", signalled), pytest.raises(SystemExit) as e:
        train(script, *argv, out=out)
    assert e.value.code == 128 + signal.SIGTERM
    ckpt = script.load_checkpoint(f"{out}/checkpoint.pt", [script.SCRIPT])
    assert ckpt["step"] == rows(out)[-1]["step"] == step
    return ckpt

@pytest.fixture
def watch(monkeypatch):
    """watch(script, look): look(state) before the first step of its runs and after each."""
    def watch(script, look):
        steps = script.Run.steps

        def watched(run, **state):
            look(state)
            for item in steps(run, **state):
                yield item
                look(state)

        monkeypatch.setattr(script.Run, "steps", watched)
    return watch

@pytest.mark.parametrize(("script", "flags"), [
    (gan, ""), (gan, "--hflip --dropout 0.3 --d_steps 2"), (acgan, "--precision bf16"),
    (acgan, "--hflip --dropout 0.3 --aux acgan --real_label 0.9 --pretrain_d 5"), (dcgan, ""),
    (dcgan, "--hflip --dropout 0.3 --replay 0.5 --lr_decay step --lr_step 1 --gp interpolate --d_steps 2 --optim_g rmsprop"),
    (dcgan, "--sn --loss hinge --optim_d rmsprop --precision bf16 --gp_every 3 --pretrain_d 5")])
def test_resume_is_bit_for_bit(script, flags, capfd):
    """8 steps an epoch: 21 steps in one go, and stopped by a signal at 11, in the middle of the second epoch."""
    whole = train(script, "--max_steps 21", flags, out="whole")
    first = stopped(script, 11, "--max_steps 21", flags, out="parts")
    assert "--resume parts" in capfd.readouterr().out  # the way to go on
    parts = resume(script, out="parts")
    assert parts["step"] == 21
    assert_same(whole, parts)
    assert not torch.equal(next(iter(first["netG"].values())), next(iter(parts["netG"].values())))

def test_resume_goes_on_and_may_change_length_rates_and_batch_size(capfd):
    def rates(ckpt):
        return [ckpt[opt]["param_groups"][0]["lr"] for opt in ("optG", "optD")]

    assert train(gan, "--epochs 5 --max_steps 3 --lr 1e-3 --lr_decay none")["step"] == 3  # the last one counts
    assert resume(gan, "--max_steps 5 ")["step"] == 5
    ckpt = resume(gan, "--epochs 2 --lr_d 0.5")
    assert (ckpt["step"], ckpt["seen"], ckpt["args"]["ngf"], rates(ckpt)) == (16, 128, 4, [1e-3, 0.5])
    assert "run" in error_of(capfd, resume, gan)  # it is done
    ckpt = resume(gan, "--epochs 3 --lr 1e-4 --batch_size 16")
    assert (ckpt["step"], ckpt["seen"], rates(ckpt)) == (20, 192, [1e-4, 1e-4])
    assert [row["step"] for row in rows()] == list(range(1, 21))

def test_few_images_end_a_run_early(script, monkeypatch):
    """By default, after so many passes over them, before the rates fall; a length that is given is kept."""
    monkeypatch.setattr(script, "MAX_EPOCHS", 2)
    ckpt = train(script, "--max_images 16")
    assert ckpt["step"] == 4
    assert ckpt["optG"]["param_groups"][0]["lr"] == ckpt["args"]["lr_g"]
    assert resume(script, "--max_steps 5")["step"] == 5
    assert train(script, "--max_images 400", out="more")["step"] == 40  # 2 * sqrt(400)

def test_runs_never_overwrite_each_other_and_the_newest_goes_on(capfd):
    """--resume alone takes the run that was written last, of those with steps left; times of files do not count."""
    for seed, flags in enumerate(("", "--out_dir mine", "--out_dir mine", "")):
        train(gan, "--max_steps 1 --seed", seed, flags, out=None)
    assert sorted(os.listdir()) == ["data", "mine", "mine-2", "runs"]
    assert sorted(os.listdir("runs")) == ["gan-digits", "gan-digits-2"]
    assert "steps left" in error_of(capfd, main, gan, "--resume")
    stopped(gan, 1, "--max_steps 9 --seed 7", out="runs/gan-a")
    stopped(gan, 1, "--max_steps 9 --seed 8", out="runs/gan-b")
    train(gan, "--max_steps 1 --seed 9", out="runs/gan-c")
    os.utime("runs/gan-a/checkpoint.pt")
    args = gan.get_args(["--resume"])
    assert (args.out_dir, args.seed) == ("runs/gan-b", 8)

def test_run_leaves_what_it_promises(script):
    ckpt = train(script, "--epochs 3 --keep_every 1 --save_interval 4")
    assert sorted(os.listdir("run")) == [".lock", "checkpoint.pt", *(f"checkpoint_epoch_{e:04d}.pt" for e in (1, 2, 3)),
                                         "log.jsonl", "samples", "samples.gif"]
    assert sorted(os.listdir("run/samples")) == ["real.png", *(f"step_{s:08d}.png" for s in range(0, 25, 4))]
    with Image.open("run/samples.gif") as gif:
        assert gif.n_frames == 7
    log = rows()
    assert [row["step"] for row in log] == list(range(1, 25))
    assert log[-1]["epoch"] == 3
    keys = {"step", "epoch", "time", "loss_d", "loss_g", "D(x)", "D(G(z))", "images/s"}
    assert set(log[0]) == keys | ({"acc_real", "acc_fake"} if script is acgan else set())
    assert all(0 < row["D(x)"] < 1 and row["images/s"] > 0 for row in log)
    assert (ckpt["script"], ckpt["classes"]) == (script.SCRIPT, list("0123456789"))

def test_tensorboard():
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(gan, "--max_steps 2 --save_interval 1 --tensorboard")
    events = EventAccumulator("run", {"images": 0, "scalars": 0}).Reload()
    assert {"loss_d", "loss_g", "D(x)"} <= set(events.Tags()["scalars"])
    assert len(events.Images("samples")) == 3  # one before the first step

def test_ema(script, watch):
    """netG_ema is the average by hand, whose decay is shorter at first; its weights have no gradients or graph."""
    seen, nets = [], {}
    watch(script, lambda state: nets.update(state) or seen.append([w.detach().clone() for w in nets["netG"].parameters()]))
    train(script, "--max_steps 4 --ema 0.3 --lr 0.01")
    average = seen[0]
    for step, new in enumerate(seen[1:]):
        decay = min(0.3, (1 + step) / (10 + step))
        average = [decay * old + (1 - decay) * w for old, w in zip(average, new)]
    torch.testing.assert_close([*nets["netG_ema"].parameters()], average)
    assert not any(w.requires_grad or w.grad_fn for w in nets["netG_ema"].parameters())

def test_the_average_has_statistics_of_its_own(script):
    """BatchNorm's of netG_ema are what torch.optim.swa_utils.update_bn finds for its weights, of classes in turn."""
    ckpt = train(script, "--max_steps 5 --lr 0.05")
    netG, _ = script.load_generator("run/checkpoint.pt")
    inputs = [torch.from_numpy(script.latents(0, 0, 512, 8))]
    if script is acgan:
        inputs.append(torch.arange(512) % 10)
    forward = netG.forward
    netG.forward = lambda some: forward(*some)
    torch.optim.swa_utils.update_bn([(some,) for some in zip(*(x.split(64) for x in inputs))], netG)
    buffers = {name: value for name, value in netG.named_buffers() if "running" in name}
    torch.testing.assert_close(buffers, {name: ckpt["netG_ema"][name] for name in buffers})
    far = [(value - ckpt["netG"][name]).abs().max() for name, value in buffers.items() if name.endswith("var")]
    assert min(far) > 1e-3  # netG's own are others

def test_d_steps_hold_netG_still(script):
    ckpt = train(script, "--max_steps 6 --d_steps 3")
    assert [{int(w["step"]) for w in ckpt[opt]["state"].values()} for opt in ("optG", "optD")] == [{2}, {6}]
    assert ["loss_g" in row for row in rows()] == [False, False, True] * 2

def test_aux_g_weighs_the_class_in_netG_alone():
    """The first step of netD does not know it, that of netG does."""
    light, heavy = (train(acgan, "--max_steps 1 --aux_g", weight, out=f"run{weight}") for weight in (0, 5))
    assert_same(light["netD"], heavy["netD"])
    assert not torch.equal(light["netG"]["label_emb.weight"], heavy["netG"]["label_emb.weight"])

def test_adc_has_classes_of_its_own_for_fakes():
    """The head of the paper has one row a class, that of adc two; after a step each row has moved."""
    for aux, n in (("acgan", 10), ("adc", 20)):
        start, end = (train(acgan, "--batch_size 64 --max_steps 1 --aux", aux, lr, out=f"{aux}{lr[-1]}")["netD"]["aux.weight"]
                      for lr in ("--lr 0", "--lr 1"))
        assert len(start) == n
        assert (start != end).flatten(1).any(1).all()

@pytest.mark.parametrize(("decay", "expected"), [
    ("none", [1] * 8), ("linear", [1] * 5 + [0.75, 0.5, 0.25])])
def test_lr_decay_runs_over_the_whole_run(script, decay, expected, watch):
    """Also where it is stopped and gone on with in the middle."""
    rates = []
    watch(script, lambda state: rates.append([state[opt].param_groups[0]["lr"] for opt in ("optG", "optD")]))
    stopped(script, 3, "--epochs 1 --lr 1e-3 --lr_g 2e-3 --lr_decay", decay)
    resume(script)
    np.testing.assert_allclose(rates[1:4] + rates[5:], np.outer(expected, [2e-3, 1e-3]))

TRICKS = ["--dropout 0.5", "--hflip", "--beta1 0.9", "--beta2 0.9", "--lr_d 1e-4", "--lr_g 1e-4", "--precision bf16",
          "--batch_size 9", "--seed 1", "--gp_weight 2", "--gp_every 2", "--lr_decay none", "--gp_weight 0", "--d_steps 2"]
OWN_TRICKS = {
    gan: [],
    dcgan: ["--real_label 0.9", "--fake_label 0.1", "--gp none", "--gp interpolate", "--replay 0.5", "--sn", "--loss hinge",
            "--init he", "--init xavier", "--optim_g rmsprop", "--optim_d rmsprop", "--pretrain_d 2",
            "--lr_decay step --max_images 8 --lr_step 1"],
    acgan: ["--real_label 0.9", "--fake_label 0.1", "--aux acgan", "--aux_g 0.1", "--pretrain_d 2"],
}

def test_each_flag_changes_the_run(script):
    """Weights of netD like no other's after some steps; and without one, the same seed makes the same run."""
    seen = {}
    for k, trick in enumerate(["", *TRICKS, *OWN_TRICKS[script], "--seed 0"]):
        netD = train(script, "--max_steps 5", trick, out=f"run{k}")["netD"]
        weight = next(w for name, w in netD.items() if name in ("main.0.weight", "main.0.parametrizations.weight.original"))
        same = [other for other, w in seen.items() if w.shape == weight.shape and torch.equal(w, weight)]
        if trick == "--gp none":
            assert same == ["--gp_weight 0"]
            continue
        assert same == ([""] if trick == "--seed 0" else []), trick
        seen[trick] = weight
        assert all(np.isfinite(row["loss_d"]) for row in rows(f"run{k}"))

def test_gp_every_takes_the_penalty_in_some_steps_only(script, monkeypatch):
    """Steps 0 and 3 of 4, three times as heavy: the first step is that of a weight three times as large."""
    calls, penalty = [], script.gradient_penalty
    monkeypatch.setattr(script, "gradient_penalty", lambda *args: calls.append(1) or penalty(*args))
    train(script, "--max_steps 4 --gp_every 3", out="lazy")
    assert len(calls) == 2
    lazy = train(script, "--max_steps 1 --gp_weight 2 --gp_every 3", out="one")
    assert_same(lazy["netD"], train(script, "--max_steps 1 --gp_weight 6 --gp_every 1", out="heavy")["netD"])

def test_replay_shows_netD_old_fakes():
    """Half of what it sees, of eight steps at most."""
    replay = dcgan.Replay(0.5)
    for step in range(20):
        shown = replay(torch.full((8, 1), step))
        assert shown.shape == (8, 1)
        assert (shown == step).sum() >= 4
        assert shown.min() >= step - 8
    assert (shown < step).any()

def test_pretraining_holds_netG_still(capfd):
    """netD, and acgan.py's class head, learn on an untrained netG; the number of netG's steps is said."""
    for script in (dcgan, acgan):
        ckpt = train(script, "--max_steps 6 --pretrain_d 4", out=script.SCRIPT)
        assert "6 netD steps, 2 netG steps" in capfd.readouterr().out
        assert [{int(w["step"]) for w in ckpt[opt]["state"].values()} for opt in ("optG", "optD")] == [{2}, {6}]

def test_lr_decay_by_steps(watch):
    """--lr_step 2: halved after every second epoch."""
    rates = []
    watch(dcgan, lambda state: rates.append(state["optG"].param_groups[0]["lr"]))
    train(dcgan, "--epochs 5 --max_images 16 --lr 1 --lr_decay step --lr_step 2")
    assert rates[1:] == [1] * 4 + [0.5] * 4 + [0.25] * 2

def test_divergence_stops_and_keeps_the_last_good_state(script, capfd, watch):
    good, looks = train(script, "--max_steps 2"), []
    watch(script, lambda state: looks.append(1) or len(looks) == 2 and next(state["netD"].parameters()).data.fill_(np.nan))
    assert "--lr" in error_of(capfd, resume, script, "--max_steps 8 --save_interval 1")  # its losses are finite still
    assert rows()[-1]["step"] == 2
    assert "--lr" in error_of(capfd, resume, script, "--lr 1e30 --max_steps 8 --save_interval 1")
    left = script.load_checkpoint("run/checkpoint.pt", [script.SCRIPT])
    assert all(value.isfinite().all() for net in ("netG", "netD", "netG_ema") for value in left[net].values())
    assert left["step"] >= good["step"]

CHECK = f"""
import sys, torch, torch.distributed as dist
sys.path.insert(0, {str(ROOT)!r})
import acgan
steps, seen = acgan.Run.steps, []
def checked(run, **state):
    for step, real, labels in steps(run, **state):
        seen.append((run.seen // run.epoch_size, [image.numpy().tobytes() for image in real]))
        yield step, real, labels
    weights = torch.cat([w.detach().flatten() for name in ("netG", "netD") for w in state[name].parameters()])
    both, every = [torch.zeros_like(weights) for _ in range(2)], [None, None]
    dist.all_gather(both, weights)
    assert torch.equal(*both), "weights differ between the processes"
    for epoch in range(2):
        dist.all_gather_object(every, {{image for e, images in seen for image in images if e == epoch}})
        assert len(every[0]) == len(every[1]) == 32 and not every[0] & every[1], "shards overlap"
    print("checked", flush=True)
acgan.Run.steps = checked
acgan.main()
"""

@POSIX
def test_torchrun():
    """Equal weights everywhere, disjoint shards that cover each epoch, one writer; and on to one process."""
    Path("check.py").write_text(CHECK)
    argv = words("-m torch.distributed.run --standalone --nproc_per_node 2 check.py", *TINY, "--out_dir run --epochs 2",
                 "--pretrain_d 3 --d_steps 2")
    done = subprocess.run([sys.executable, *argv], text=True, capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("checked") == 2
    assert [row["step"] for row in rows()] == list(range(1, 9))
    assert resume(acgan, "--epochs 3")["step"] == 16

def test_two_processes_stop_together():
    """The signal comes to one of them only: neither waits for the other, and one has saved."""
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(20000 + os.getpid() % 10000)}
    both = [forked(main, "gan", *TINY, "--epochs 100000 --out_dir run", said=f"said{rank}.txt",
                   env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
    until = time.time() + 120
    while not Path("run/log.jsonl").exists() and time.time() < until:
        time.sleep(0.1)
    os.kill(both[1].pid, signal.SIGTERM)
    assert [ended(process, 60) for process in both] == [128 + signal.SIGTERM] * 2, Path("said0.txt").read_text()
    assert "--resume" in Path("said0.txt").read_text()
    assert gan.load_checkpoint("run/checkpoint.pt", ["gan"])["step"] == rows()[-1]["step"] >= 1

def test_real_mnist_trains(script, data_dir):
    os.mkdir("data")
    os.symlink(data_dir / "MNIST", "data/MNIST")  # the cache is written beside it
    flags = "--dataset mnist --max_images 512 --ngf 16 --ndf 16 --epochs 2 --batch_size 64 --gp_weight 0"
    script.train(script.get_args(words(flags, "--out_dir run --log_interval 1")))
    log = rows()
    assert log[-1]["D(x)"] > log[-1]["D(G(z))"]
    assert log[-1]["loss_d"] < log[0]["loss_d"]

def test_real_cifar10_zip_trains(data_dir):
    ckpt = train(acgan, "--dataset", data_dir / "cifar10_train.zip", "--img_size 32 --max_steps 3")
    assert (len(ckpt["classes"]), ckpt["config"]["nc"]) == (10, 3)

@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile(backend, monkeypatch):
    """The same training up to rounding, the same names in the checkpoint, and a resume without it."""
    compiled, compile_net = [], torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net, **options: compiled.append(type(net).__name__)
                        or compile_net(net, backend=backend, **options))
    plain = train(dcgan, "--max_steps 3", out="plain")
    fast = train(dcgan, "--max_steps 3 --compile", out="fast")
    assert compiled == ["Generator", "Discriminator"]
    torch.testing.assert_close(fast["netG"], plain["netG"], rtol=1e-3, atol=2e-3)  # Adam: signs of tiny gradients
    np.testing.assert_allclose([r["loss_d"] for r in rows("fast")], [r["loss_d"] for r in rows("plain")], rtol=1e-2)
    assert resume(dcgan, "--no-compile --max_steps 4", out="fast")["step"] == 4
    assert len(compiled) == 2
