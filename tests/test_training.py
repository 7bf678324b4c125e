"""Training: nothing lost, every flag does what it says, several processes agree."""

import os
import signal
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import POSIX, ROOT, TINY, assert_same, error_of, main, resume, rows, run, train, words
from PIL import Image

import acgan
import dcgan
import gan

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
    ckpt = script.load_checkpoint(f"{out}/checkpoint.pt")
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

# ----------------------------------------------------------------------------------- nothing lost

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
    assert [row["step"] for row in rows("parts")] == list(range(1, 22))
    assert not torch.equal(next(iter(first["netG"].values())), next(iter(parts["netG"].values())))

def test_resume_may_change_length_rates_and_batch_size(capfd):
    def rates(ckpt):
        return [ckpt[opt]["param_groups"][0]["lr"] for opt in ("optG", "optD")]

    assert train(gan, "--max_steps 3 --lr_g 1e-3 --lr_d 1e-3 --lr_decay none")["step"] == 3
    assert resume(gan, "--max_steps 5 --beta1 0.7")["optG"]["param_groups"][0]["betas"] == (0.7, 0.999)
    ckpt = resume(gan, "--epochs 2 --lr_d 0.5")
    assert (ckpt["step"], ckpt["seen"], ckpt["args"]["ngf"], rates(ckpt)) == (16, 128, 4, [1e-3, 0.5])
    assert "--epochs" in error_of(capfd, "gan", "--resume run")  # it is done
    ckpt = resume(gan, "--epochs 3 --batch_size 16")
    assert (ckpt["step"], ckpt["seen"]) == (20, 192)
    assert [row["step"] for row in rows()] == list(range(1, 21))

def test_a_run_of_another_folder_or_of_a_numbered_checkpoint_is_a_new_one():
    train(gan, "--epochs 2 --keep_every 1")
    before = {file: file.read_bytes() for file in Path("run").rglob("*.*") if file.is_file()}
    gan.train(gan.get_args(words("--resume run/checkpoint_epoch_0001.pt --epochs 3 --keep_every 1")))
    assert sorted(file.name for file in Path("run-2").glob("*.pt")) == [
        "checkpoint.pt", "checkpoint_epoch_0002.pt", "checkpoint_epoch_0003.pt"]
    gan.train(gan.get_args(words("--resume run --epochs 3 --out_dir other")))
    assert gan.load_checkpoint("other/checkpoint.pt")["step"] == 24
    assert {file: file.read_bytes() for file in before} == before

def test_rows_that_a_killed_run_wrote_after_its_last_save_are_taken_back(script):
    """Also half a row; and TensorBoard's."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(script, "--max_steps 5 --tensorboard")
    early = Path("run/checkpoint.pt").read_bytes()
    resume(script, "--max_steps 9")
    Path("run/checkpoint.pt").write_bytes(early)
    with open("run/log.jsonl", "a") as f:
        f.write('{"step": 10, "lo')
    resume(script, "--max_steps 8")
    assert [row["step"] for row in rows()] == list(range(1, 9))
    events = EventAccumulator("run", {"scalars": 0}).Reload()
    assert [event.step for event in events.Scalars("loss_d")] == list(range(1, 9))

def test_divergence_stops_and_keeps_the_last_good_state(script, capfd, watch):
    good, looks = train(script, "--max_steps 2"), []
    watch(script, lambda state: looks.append(1) or len(looks) == 2 and next(state["netD"].parameters()).data.fill_(np.nan))
    for flags in ("--save_interval 1", "--lr_g 1e30 --lr_d 1e30"):
        assert "--lr_g" in error_of(capfd, script.METHOD, "--resume run --max_steps 8", flags)
    left = script.load_checkpoint("run/checkpoint.pt")
    assert all(value.isfinite().all() for net in ("netG", "netD", "netG_ema") for value in left[net].values())
    assert left["step"] >= good["step"]

def test_a_run_leaves_what_it_promises(script):
    ckpt = train(script, "--epochs 3 --keep_every 1 --save_interval 4")
    assert sorted(os.listdir("run")) == ["checkpoint.pt", *(f"checkpoint_epoch_{e:04d}.pt" for e in (1, 2, 3)),
                                         "log.jsonl", "samples", "samples.gif"]
    assert sorted(os.listdir("run/samples")) == ["real.png", *(f"step_{s:08d}.png" for s in range(0, 25, 4))]
    with Image.open("run/samples.gif") as gif:
        assert gif.n_frames == 7
    assert [row["step"] for row in rows()] == list(range(1, 25))
    assert rows()[-1]["epoch"] == 3
    keys = {"step", "epoch", "time", "loss_d", "loss_g", "D(x)", "D(G(z))", "images/s"}
    assert set(rows()[0]) == keys | ({"acc_real", "acc_fake"} if script is acgan else set())
    assert all(0 < row["D(x)"] < 1 and row["images/s"] > 0 for row in rows())
    assert (ckpt["script"], ckpt["classes"]) == (script.METHOD, list("0123456789"))

def test_runs_never_overwrite_each_other(capfd):
    for seed, flags in enumerate(("", "--out_dir mine", "--out_dir mine", "")):
        gan.train(gan.get_args([*TINY, *words("--max_steps 1 --seed", seed, flags)]))
    assert sorted(os.listdir()) == ["data", "mine", "mine-2", "runs"]
    assert sorted(os.listdir("runs")) == ["gan-digits", "gan-digits-2"]
    os.mkdir("there")  # an empty folder, a mounted one say, is taken
    train_args = gan.get_args([*TINY, *words("--max_steps 1 --out_dir there")])
    gan.train(train_args)
    assert Path("there/checkpoint.pt").exists()

@pytest.mark.parametrize("error", [FileExistsError(17, "File exists"), OSError(37, "No locks available")])
def test_no_folders_without_end(error, capfd, monkeypatch):
    """Whatever the file system says of a new folder."""
    made = []

    def refused(path, *args, **kwargs):
        made.append(path)
        raise error

    monkeypatch.setattr(Path, "mkdir", refused)
    monkeypatch.setattr(dcgan, "load_data", lambda *args: (torch.zeros(8, 16, 16, 1, dtype=torch.uint8), torch.zeros(8, dtype=int), []))
    error_of(capfd, "dcgan", *TINY, "--max_steps 1 --out_dir x")
    assert len(made) <= 1000

# -------------------------------------------------------------------------------------- the method

@pytest.mark.parametrize(("flags", "n", "expected"), [
    ("", 16, 500), ("", 400, 5000), ("", 10**6, 6000), ("--max_steps 3000", 16, 3000), ("--epochs 600", 16, 1200)])
def test_few_images_end_a_run_early(flags, n, expected, monkeypatch):
    """n images after 250 passes or 250 * sqrt(n) steps of 8 images, before the rates fall; a length that is typed is kept."""
    monkeypatch.setitem(dcgan.DATASETS["digits"], "max_steps", 6000)
    run = dcgan.Run(dcgan.get_args([*TINY, *words(flags)]))
    run.epoch_size, run.state = n, {"netG_ema": dcgan.Generator(8, 4, 1, 16)}
    run.plan()
    assert run.total == expected

@pytest.mark.parametrize(("flags", "expected"), [
    ("--dataset my_images", (64, 3, False, 24000, 2e-3, 1e-3, "r1")), ("--dataset celeba", (64, 3, True, 24000, 2e-3, 1e-3, "r1")),
    ("--dataset mnist --lr_g 1 --lr_d 0", (32, 1, False, 6000, 1, 0, "r1")),
    ("--dataset cifar10 --recipe paper", (32, 3, True, 24000, 2e-4, 2e-4, "none")),
    ("--recipe paper --img_size 16 --nc 3 --hflip --lr_g 3 --epochs 2", (16, 3, True, None, 3, 2e-4, "none"))])
def test_layers_of_flags(flags, expected):
    """The default; over it the data set's size, channels, flips and length; the recipe; what is typed."""
    args = dcgan.get_args(words(flags))
    assert (args.img_size, args.nc, args.hflip, args.max_steps, args.lr_g, args.lr_d, args.gp) == expected

def test_help_shows_the_defaults_of_the_data_set(capfd):
    for flags, size in (("", 32), ("--dataset celeba", 64)):
        with pytest.raises(SystemExit):
            main("dcgan", flags, "--help")
        assert f"height, width (default: {size})" in capfd.readouterr().out

def test_ema(script, watch):
    """netG_ema is the average by hand, BatchNorm's statistics included, whose decay is shorter at first."""
    seen, nets = [], {}
    watch(script, lambda state: nets.update(state) or seen.append({k: w.clone() for k, w in nets["netG"].state_dict().items()}))
    train(script, "--max_steps 4 --ema 0.3 --lr_g 0.01")
    average = seen[0]
    for step, new in enumerate(seen[1:]):
        decay = min(0.3, (1 + step) / (10 + step))
        average = {k: decay * old + (1 - decay) * new[k] if old.is_floating_point() else old for k, old in average.items()}
    torch.testing.assert_close(dict(nets["netG_ema"].state_dict()), average)
    assert any("running_var" in name for name in average)
    assert not any(w.requires_grad or w.grad_fn for w in nets["netG_ema"].parameters())

def test_d_steps_and_pretraining_hold_netG_still(script):
    ckpt = train(script, "--max_steps 6 --d_steps 3")
    assert [{int(w["step"]) for w in ckpt[opt]["state"].values()} for opt in ("optG", "optD")] == [{2}, {6}]
    assert ["loss_g" in row for row in rows()] == [False, False, True] * 2
    if script is not gan:
        ckpt = train(script, "--max_steps 6 --pretrain_d 4", out="pretrained")
        assert [{int(w["step"]) for w in ckpt[opt]["state"].values()} for opt in ("optG", "optD")] == [{2}, {6}]

def test_the_class_head():
    """That of the paper has one row a class, that of adc two; --aux_g weighs the class in netG alone."""
    for aux, n in (("acgan", 10), ("adc", 20)):
        start, end = (train(acgan, "--batch_size 64 --max_steps 1 --aux", aux, f"--lr_g {lr} --lr_d {lr}", out=f"{aux}{lr}")["netD"]["aux.weight"]
                      for lr in (0, 1))
        assert len(start) == n
        assert (start != end).flatten(1).any(1).all()
    light, heavy = (train(acgan, "--max_steps 1 --aux_g", weight, out=f"run{weight}") for weight in (0, 5))
    assert_same(light["netD"], heavy["netD"])
    assert not torch.equal(light["netG"]["label_emb.weight"], heavy["netG"]["label_emb.weight"])

@pytest.mark.parametrize(("flags", "expected"), [
    ("--lr_decay none --epochs 1", [1] * 8), ("--lr_decay linear --epochs 1", [1] * 5 + [0.75, 0.5, 0.25]),
    ("--lr_decay step --lr_step 2 --max_images 16 --epochs 5", [1] * 4 + [0.5] * 4 + [0.25] * 2)])
def test_lr_decay_runs_over_the_whole_run(flags, expected, watch):
    """Also where it is stopped and gone on with in the middle."""
    rates = []
    watch(dcgan, lambda state: rates.append([state[opt].param_groups[0]["lr"] for opt in ("optG", "optD")]))
    stopped(dcgan, 3, "--lr_d 1e-3 --lr_g 2e-3", flags)
    resume(dcgan)
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
        assert len(replay.state_dict()["old"]) <= 64
    assert (shown < step).any()

# ------------------------------------------------------------------------------- several processes

CHECK = f"""
import sys, torch, torch.distributed as dist
sys.path.insert(0, {str(ROOT)!r})
import acgan
steps, seen = acgan.Run.steps, []
def checked(run, **state):
    for step, real, labels in steps(run, **state):
        seen.append((run.seen // run.epoch_size, [image.numpy().tobytes() for image in real]))
        yield step, real, labels
        if step == 7:
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
    """Equal weights everywhere, disjoint shares that cover each epoch, one writer; and on to one process."""
    Path("check.py").write_text(CHECK)
    done = run(sys.executable, "-m torch.distributed.run --standalone --nproc_per_node 2 check.py", *TINY,
               "--out_dir run --epochs 2 --pretrain_d 3 --d_steps 2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("checked") == 2
    assert [row["step"] for row in rows()] == list(range(1, 9))
    assert resume(acgan, "--epochs 3")["step"] == 16

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
