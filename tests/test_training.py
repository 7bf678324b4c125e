"""Training: nothing lost, every flag does what it says, several processes agree."""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS, TINY, assert_same, assert_same_state, command, error_of, train
from PIL import Image

import dcgan


def rows(out):
    return [json.loads(line) for line in open(f"{out}/log.jsonl")]


TRICKS = [
    "--hflip",
    "--dropout",
    "0.3",
    "--replay",
    "0.5",
    "--lr_decay",
    "linear",
    "--gp",
    "interpolate",
    "--d_steps",
    "2",
]


@pytest.mark.parametrize(
    "extra", [[], TRICKS, ["--sn", "--loss", "hinge", "--optim_d", "rmsprop", "--precision", "bf16"]]
)
def test_resume_is_bit_for_bit(script, extra):
    """8 steps an epoch: 21 steps in one go, and stopped at 11, in the middle of the second epoch."""
    whole = train(script, "--epochs", 3, "--max_steps", 21, *extra, out="whole")
    first = train(script, "--epochs", 3, "--max_steps", 11, *extra, out="parts")
    assert (first["epoch"], first["position"], first["step"]) == (1, 24, 11)
    script.train(script.get_args(["--resume", "--out_dir", "parts", "--max_steps", "21"]))
    parts = script.load_checkpoint("parts/checkpoint.pt")
    assert parts["step"] == 21
    assert_same_state(whole, parts)
    assert not torch.equal(next(iter(first["netG"].values())), next(iter(parts["netG"].values())))


def test_resume_goes_on_and_may_change_epochs_and_lr(script, capsys):
    train(script, "--epochs", 1, "--lr", 1e-3)
    script.train(script.get_args(["--resume", "run/checkpoint.pt", "--epochs", "2", "--lr_g", "0.5", "--lr_d", "0"]))
    ckpt = script.load_checkpoint("run/checkpoint.pt")
    assert (ckpt["epoch"], ckpt["step"], ckpt["args"]["ngf"]) == (2, 16, 4)
    assert [r["lr_g"] for r in rows("run")] == [1e-3] * 8 + [0.5] * 8
    assert "16/16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value"), [("ngf", 8), ("ndf", 8), ("nz", 9), ("img_size", 32), ("nc", 3), ("optim_g", "rmsprop")]
)
def test_resume_refuses_other_nets_by_flag(script, flag, value, capfd):
    train(script, "--max_steps", 1)
    message = error_of(capfd, script.get_args, ["--resume", "run/checkpoint.pt", f"--{flag}", str(value)])
    assert f"--{flag} {value}" in message


def test_resume_with_what_no_longer_fits_the_epoch(script):
    """8 images of the epoch are left: too few for a batch of 16, or of two processes. The next epoch begins."""
    train(script, "--epochs", 2, "--max_steps", 7)
    script.train(script.get_args(["--resume", "run/checkpoint.pt", "--batch_size", "16"]))
    ckpt = script.load_checkpoint("run/checkpoint.pt")
    assert (ckpt["epoch"], ckpt["position"], ckpt["step"]) == (2, 0, 7 + 4)


def test_resume_into_another_folder(script, capfd):
    train(script, "--max_steps", 3, out="a")
    train(script, "--max_steps", 5, out="b")
    args = script.get_args(["--resume", "a/checkpoint.pt", "--out_dir", "b"])
    assert "--out_dir b: there is a run in it" in error_of(capfd, script.train, args)
    script.train(script.get_args(["--resume", "a/checkpoint.pt", "--out_dir", "c", "--max_steps", "4"]))
    assert [script.load_checkpoint(f"{d}/checkpoint.pt")["step"] for d in "abc"] == [3, 5, 4]
    args = script.get_args(["--resume", "a/checkpoint.pt", "--max_steps", "3"])
    assert "--max_steps 3" in error_of(capfd, script.train, args)


def test_newest_checkpoint_of_default_folders(script):
    for seed in (1, 2):
        script.train(script.get_args([*TINY, "--max_steps", "1", "--seed", str(seed)]))
    assert sorted(os.listdir("runs")) == [f"{script.SCRIPT}-digits", f"{script.SCRIPT}-digits-2"]  # none overwritten
    args = script.get_args(["--resume"])
    assert (args.out_dir, args.seed) == (f"runs/{script.SCRIPT}-digits-2", 2)


def test_run_leaves_what_it_promises(script):
    ckpt = train(script, "--epochs", 3, "--keep_every", 1, "--tensorboard", "--sample_interval", 4)
    assert sorted(f for f in os.listdir("run") if f.endswith(".pt")) == [
        "checkpoint.pt",
        *(f"checkpoint_epoch_{e:04d}.pt" for e in (1, 2, 3)),
    ]
    assert sorted(os.listdir("run/samples")) == ["real.png", *(f"step_{s:08d}.png" for s in range(4, 25, 4))]
    with Image.open("run/samples.gif") as gif:
        assert gif.n_frames == 6
    log = rows("run")
    assert [r["step"] for r in log] == list(range(1, 25))
    assert log[-1]["epoch"] == 3
    keys = {"step", "epoch", "time", "lr_g", "lr_d", "loss_d", "loss_g", "D(x)", "D(G(z))", "images/s"}
    assert set(log[0]) == keys | ({"acc_real", "acc_fake"} if script.SCRIPT == "acgan" else set())
    assert all(0 < r["D(x)"] < 1 and r["images/s"] > 0 for r in log)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator("run", {"images": 0, "scalars": 0}).Reload()
    assert {"loss_d", "loss_g", "D(x)"} <= set(events.Tags()["scalars"])
    assert len(events.Images("samples")) == 6
    assert (ckpt["script"], ckpt["classes"]) == (script.SCRIPT, [str(d) for d in range(10)])
    assert not [f for f in os.listdir("run") if f.endswith(".tmp")]
    torch.load("run/checkpoint.pt", weights_only=True)


def test_same_seed_same_run_other_seed_other_run(script):
    a, b, c = (train(script, "--max_steps", 3, "--seed", s, out=f"run{i}") for i, s in enumerate((5, 5, 6)))
    assert_same(a["netG"], b["netG"])
    assert not torch.equal(next(iter(a["netG"].values())), next(iter(c["netG"].values())))


def test_ema(script):
    """--ema 0 samples netG itself; 0.999 an average that is another net and starts quickly (warm-up)."""
    raw = train(script, "--max_steps", 3, "--ema", 0, out="raw")
    for key in (k for k, _ in script.Generator(**raw["config"]).named_parameters()):
        assert torch.equal(raw["netG_ema"][key], raw["netG"][key])
    ema = train(script, "--max_steps", 3, out="ema")
    assert_same(ema["netG"], raw["netG"])
    assert not torch.equal(next(iter(ema["netG"].values())), next(iter(ema["netG_ema"].values())))


def test_the_average_keeps_no_graph(script, monkeypatch):
    """Its weights stay leaves without gradients: a graph would grow by a node for each weight in each step."""
    seen, update_bn = [], script.update_bn
    monkeypatch.setattr(script, "update_bn", lambda net, inputs: (seen.extend(net.parameters()), update_bn(net, inputs)))
    train(script, "--max_steps", 3)
    assert seen
    assert not any(w.requires_grad or w.grad_fn for w in seen)


@pytest.mark.parametrize("name", ["dcgan", "acgan"])
def test_the_average_has_statistics_of_its_own(name):
    """BatchNorm's of netG_ema are what torch.optim.swa_utils.update_bn finds for its weights, of the data's classes."""
    script = importlib.import_module(name)
    ckpt = train(script, "--max_steps", 5, "--lr", 0.05)
    netG, _ = script.load_generator("run/checkpoint.pt")
    inputs = [torch.from_numpy(script.latents(0, 0, 512, 8))]
    if name == "acgan":
        inputs.append(torch.from_numpy(np.random.default_rng(0).choice(np.arange(64) % 10, 512)))

    class Told(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.netG = netG

        def forward(self, some):
            return self.netG(*some)

    netG.load_state_dict(script.Generator(**ckpt["config"]).state_dict() | dict(netG.named_parameters()))
    torch.optim.swa_utils.update_bn([(some,) for some in zip(*(x.split(64) for x in inputs))], Told())
    buffers = dict(netG.named_buffers())
    assert buffers
    assert_same(buffers, {k: ckpt["netG_ema"][k] for k in buffers})
    far = [(v - ckpt["netG"][k]).abs().max() for k, v in buffers.items() if k.endswith("running_var")]
    assert min(far) > 1e-3  # netG's own are others


def test_max_steps_alone_takes_the_epochs_it_needs(script):
    """8 steps an epoch: two steps more than the default epochs and one take one more; --epochs, if given, ends it earlier."""
    default = script.EPOCHS["digits"]
    ckpt = train(script, "--max_steps", 8 * default + 10)
    assert (ckpt["step"], ckpt["epoch"]) == (8 * default + 10, default + 1)
    ckpt = train(script, "--max_steps", 50, "--epochs", 2, out="short")
    assert (ckpt["step"], ckpt["epoch"]) == (16, 2)


def test_a_resume_takes_the_epochs_it_needs_too(script, capfd):
    """What --max_steps has made of --epochs is nothing that the user has typed."""
    default = script.EPOCHS["digits"]
    train(script, "--max_steps", 3)

    def resume(*argv):
        script.train(script.get_args(["--resume", "run", *map(str, argv)]))
        return script.load_checkpoint("run/checkpoint.pt")["step"]

    assert "--max_steps 3: run/checkpoint.pt is at step 3" in error_of(capfd, resume)
    assert resume("--max_steps", 8 * default + 9) == 8 * default + 9
    assert resume("--epochs", default + 2) == 8 * (default + 2)


def test_a_run_cut_short_goes_on_to_its_max_steps(script, monkeypatch):
    """Killed at a save, and gone on with: as many steps as were asked for, and the rates of the whole run."""
    argv = ["--max_steps", 8 * script.EPOCHS["digits"] + 9, "--lr_decay", "linear", "--save_interval", 5]
    whole = train(script, *argv, out="whole")
    save, saves = script.atomic_write, []

    @contextlib.contextmanager
    def killed(path):
        with save(path) as f:
            yield f
        saves.append(path)
        if str(path).endswith("checkpoint.pt"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(script, "atomic_write", killed)
        train(script, *argv, out="parts")
    script.train(script.get_args(["--resume", "parts"]))
    assert_same(script.load_checkpoint("parts/checkpoint.pt")["netG"], whole["netG"])


def test_a_new_lr_at_resume_outranks_the_saved_lr_g(script):
    train(script, "--max_steps", 1, "--lr_g", 1e-3, "--lr_d", 5e-4)
    for flags, rates in (
        (["--lr", "1e-4"], [1e-4, 1e-4]),
        (["--lr", "1e-4", "--lr_d", "1e-5"], [1e-4, 1e-5]),
        ([], [1e-3, 5e-4]),
    ):
        assert script.learning_rates(script.get_args(["--resume", "run", *flags])) == rates


def test_rates_by_data_set_and_flag():
    """What MNIST takes by default, the papers' 2e-4 for what is the user's own, and flags before both."""

    def rates(*argv):
        return dcgan.learning_rates(dcgan.get_args([*argv]))

    assert rates("--dataset", "mnist") == [1e-3, 5e-4]
    assert rates("--dataset", "celeba") == rates("--dataset", "my_images") == [2e-4, 2e-4]
    assert rates("--dataset", "mnist", "--lr", "2e-4") == [2e-4, 2e-4]
    assert rates("--dataset", "mnist", "--lr_d", "0") == [1e-3, 0]
    assert rates("--lr", "3e-4", "--lr_g", "1e-3") == [1e-3, 3e-4]


def test_d_steps_and_pretrain_d_hold_netG_still(script):
    torch.manual_seed(0)
    start = train(script, "--max_steps", 1, "--lr_g", 0, "--lr_d", 0, out="start")["netG"]
    key = "main.0.weight"
    pre = train(script, "--max_steps", 5, "--pretrain_d", 5, out="pre")
    assert torch.equal(pre["netG"][key], start[key])
    assert not torch.equal(train(script, "--max_steps", 6, "--pretrain_d", 5, out="six")["netG"][key], start[key])
    ckpt = train(script, "--max_steps", 6, "--d_steps", 3, out="three")
    assert {int(s["step"]) for s in ckpt["optG"]["state"].values()} == {2}
    assert {int(s["step"]) for s in ckpt["optD"]["state"].values()} == {6}


def test_optimizers_and_rates(script):
    ckpt = train(script, "--max_steps", 1, "--optim_g", "rmsprop", "--lr_g", 0.125, "--lr_d", 0.25, "--beta1", 0.25)
    assert "square_avg" in ckpt["optG"]["state"][0]
    assert "exp_avg" in ckpt["optD"]["state"][0]
    assert (ckpt["optG"]["param_groups"][0]["lr"], ckpt["optD"]["param_groups"][0]["lr"]) == (0.125, 0.25)
    assert ckpt["optD"]["param_groups"][0]["betas"] == (0.25, 0.999)


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("none", [1] * 8),
        ("linear", [1 - k / 8 for k in range(8)]),
        ("step", [1, 1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125]),
    ],
)
def test_lr_decay_runs_over_the_whole_run(script, decay, expected):
    train(script, "--epochs", 1, "--lr_decay", decay, "--lr", 1e-3)
    assert [r["lr_d"] * 1e3 for r in rows("run")] == pytest.approx(expected)


@pytest.mark.parametrize(
    "extra",
    [
        ["--real_label", "0.9"],
        ["--fake_label", "0.1"],
        ["--dropout", "0.5"],
        ["--gp", "r1"],
        ["--gp", "interpolate"],
        ["--replay", "0.5"],
        ["--sn"],
        ["--loss", "hinge"],
        ["--init", "he"],
        ["--init", "xavier"],
        ["--hflip"],
        ["--gp", "r1", "--gp_weight", "1"],
    ],
)
def test_each_trick_changes_the_run(script, extra):
    """Ten steps (--replay's history is full after eight): other weights of netD than without the flag."""
    base = ["--gp", "r1"] if "--gp_weight" in extra else []
    if script.SCRIPT == "gan" and extra == ["--init", "he"]:  # its default
        extra = ["--init", "dcgan"]
    steps = ["--max_steps", 10, "--epochs", 2]
    plain, trick = train(script, *steps, *base, out="plain"), train(script, *steps, *extra, out="trick")
    key = next(k for k in trick["netD"] if k.startswith("main.0") and k.endswith(("weight", "original")))
    assert not torch.equal(trick["netD"][key], next(v for k, v in plain["netD"].items() if k == "main.0.weight"))
    assert all(np.isfinite(r["loss_d"]) for r in rows("trick"))


def test_gp_every_takes_the_penalty_in_some_steps_only(script, monkeypatch):
    """Steps 0 and 3 of 4, three times as heavy: the first step is that of a weight three times as large."""
    calls, penalty = [], script.gradient_penalty
    monkeypatch.setattr(script, "gradient_penalty", lambda *a: calls.append(1) or penalty(*a))
    train(script, "--max_steps", 4, "--gp", "r1", "--gp_every", 3, out="lazy")
    assert len(calls) == 2
    lazy = train(script, "--max_steps", 1, "--gp", "r1", "--gp_weight", 2, "--gp_every", 3, out="one")
    heavy = train(script, "--max_steps", 1, "--gp", "r1", "--gp_weight", 6, out="heavy")
    assert_same(lazy["netD"], heavy["netD"])


def test_aux_fake_weighs_the_class_loss_on_fakes():
    """At 0 the class head takes the step that it takes in a run that trains it alone; at the paper's 1 another."""
    acgan = importlib.import_module("acgan")
    alone = train(acgan, "--max_steps", 1, "--epochs", 2, "--pretrain_aux", 1, out="alone")["netD"]
    without = train(acgan, "--max_steps", 1, "--aux_fake", 0, out="without")["netD"]
    paper = train(acgan, "--max_steps", 1, out="paper")["netD"]
    assert torch.equal(without["aux.weight"], alone["aux.weight"])
    assert not torch.equal(paper["aux.weight"], alone["aux.weight"])
    assert torch.equal(without["adv.weight"], paper["adv.weight"])


def test_pretrain_aux_trains_a_classifier_first():
    acgan = importlib.import_module("acgan")
    ckpt = train(acgan, "--epochs", 4, "--pretrain_aux", 3, "--max_steps", 24, "--lr", 0.02, "--ndf", 16, out="aux")
    log = rows("aux")
    assert ckpt["optG"]["state"] == {}  # netG has not moved
    assert np.mean([r["acc_real"] for r in log[-4:]]) > np.mean([r["acc_real"] for r in log[:4]]) + 0.2
    assert log[-1]["loss_d"] < log[0]["loss_d"]
    assert {int(s["step"]) for s in train(acgan, "--epochs", 2, "--pretrain_aux", 1)["optG"]["state"].values()} == {8}


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_say_how_to_go_on(signum):
    argv = [sys.executable, "-u", str(ROOT / "dcgan.py"), *TINY, "--epochs", "100000", "--out_dir", "run"]
    p = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 120
    while not (os.path.exists("run/log.jsonl") and len(rows("run")) > 3) and time.time() < deadline:
        time.sleep(0.1)
    p.send_signal(signum)
    out, err = p.communicate(timeout=60)
    assert p.returncode == 128 + signum
    assert "Traceback" not in err
    assert "--resume run/checkpoint.pt" in out
    step = dcgan.load_checkpoint("run/checkpoint.pt")["step"]
    assert step == rows("run")[-1]["step"]
    dcgan.train(dcgan.get_args(["--resume", "run/checkpoint.pt", "--max_steps", str(step + 2)]))
    assert dcgan.load_checkpoint("run/checkpoint.pt")["step"] == step + 2


def test_kill_9_leaves_a_checkpoint_that_loads():
    argv = [
        sys.executable,
        str(ROOT / "gan.py"),
        *TINY,
        "--epochs",
        "100000",
        "--out_dir",
        "run",
        "--save_interval",
        "1",
    ]
    p = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    for k in range(5):  # at any moment: while it saves after every step
        while not os.path.exists("run/checkpoint.pt") and time.time() < deadline:
            time.sleep(0.05)
        time.sleep(0.0371 * k)
        p.kill()
        p.wait()
        gan = importlib.import_module("gan")
        before = gan.load_checkpoint("run/checkpoint.pt", "gan")["step"]
        p = subprocess.Popen([*argv, "--resume"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while (
            gan.load_checkpoint("run/checkpoint.pt")["step"] <= before and p.poll() is None and time.time() < deadline
        ):
            time.sleep(0.02)
        assert p.poll() is None
    p.kill()
    p.wait()


def test_divergence_stops_and_keeps_the_last_good_state(script, capfd):
    good = train(script, "--max_steps", 2)
    message = error_of(
        capfd,
        lambda: script.train(
            script.get_args(
                ["--resume", "run/checkpoint.pt", "--lr", "1e30", "--max_steps", "8", "--save_interval", "1"]
            )
        ),
    )
    assert "not finite" in message
    assert "--lr" in message
    assert "run/checkpoint.pt" in message
    left = script.load_checkpoint("run/checkpoint.pt")
    assert all(t.isfinite().all() for t in left["netG"].values())
    assert left["step"] >= good["step"]


def test_disk_full_keeps_the_old_checkpoint(script, capfd, monkeypatch):
    old = train(script, "--max_steps", 2)
    args = script.get_args(["--resume", "run/checkpoint.pt", "--max_steps", "4"])
    real_open = open

    def open_full(file, mode="r", *rest, **kwargs):
        if "checkpoint.pt" in str(file) and "w" in mode:
            return real_open("/dev/full", mode, *rest, **kwargs)
        return real_open(file, mode, *rest, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(script, "open", open_full, raising=False)
        message = error_of(capfd, script.train, args)
    assert "run/checkpoint.pt: cannot be saved" in message
    assert "No space left" in message
    assert_same(script.load_checkpoint("run/checkpoint.pt")["netG"], old["netG"])


def test_two_processes(script):
    """Equal weights everywhere, disjoint shards that cover the epoch, one writer."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | {
        "OMP_NUM_THREADS": "1"
    }
    code = f"""
import os, sys, torch, torch.distributed as dist
sys.path.insert(0, {str(ROOT)!r})
import {script.SCRIPT} as script
seen, original = [], script.to_float
script.to_float = lambda images, device: (seen.append(images.clone()), original(images, device))[1]
destroy = dist.destroy_process_group
def check():
    import gc
    nets = [m for m in gc.get_objects() if type(m) in (script.Generator, script.Discriminator)]
    sums = torch.cat([p.detach().flatten().double() for m in nets for p in m.parameters()])
    both = [torch.zeros_like(sums) for _ in range(2)]
    dist.all_gather(both, sums)
    assert torch.equal(*both), "weights differ between the processes"
    keys = {{t.numpy().tobytes() for images in seen for t in images}}
    every = [None, None]
    dist.all_gather_object(every, keys)
    assert len(every[0]) == len(every[1]) == 32 and not every[0] & every[1], "shards overlap"
    print("checked", flush=True)
    destroy()
dist.destroy_process_group = check
script.train(script.get_args(sys.argv[1:]))
"""
    with open("check.py", "w") as f:
        f.write(code)
    flags = [*TINY, "--epochs", "1", "--out_dir", "run", "--gp", "r1", "--replay", "0.5"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "check.py", *flags],
        env=env,
        text=True,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("checked") == 2
    assert [r["step"] for r in rows("run")] == [1, 2, 3, 4]
    ckpt = script.load_checkpoint("run/checkpoint.pt")
    assert (ckpt["epoch"], ckpt["step"]) == (1, 4)
    script.train(script.get_args(["--resume", "run/checkpoint.pt", "--epochs", "2"]))  # and on to one process
    assert script.load_checkpoint("run/checkpoint.pt")["step"] == 12


@pytest.mark.parametrize("ctrl_c", [False, True])
def test_two_processes_stop_together(ctrl_c):
    """SIGTERM to torchrun, as a scheduler sends it; and Ctrl-C, which a terminal sends to every process at once."""
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    p = subprocess.Popen(
        [*argv, str(ROOT / "gan.py"), *TINY, "--epochs", "100000", "--out_dir", "run"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    deadline = time.time() + 120
    while not (os.path.exists("run/log.jsonl") and len(rows("run")) > 3) and time.time() < deadline:
        time.sleep(0.1)
    os.killpg(p.pid, signal.SIGINT) if ctrl_c else p.terminate()
    out, _ = p.communicate(timeout=60)
    assert "go on with" in out
    assert dcgan.load_checkpoint("run/checkpoint.pt")["step"] == rows("run")[-1]["step"] >= 4


def test_a_signal_between_agreeing_and_acting():
    """It comes to one process just after all have agreed to go on: that one must not leave alone."""
    with open("late.py", "w") as f:
        f.write(
            f"import os, signal, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport gan\n"
            "agree, calls = gan.dist.all_reduce, []\n"
            "def late(flag):\n"
            "    agree(flag)\n"
            "    calls.append(1)\n"
            "    if os.environ['RANK'] == '1' and len(calls) == 5:\n"
            "        os.kill(os.getpid(), signal.SIGTERM)\n"
            "gan.dist.all_reduce = late\n"
            "gan.main()\n"
        )
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "late.py", *TINY]
    done = subprocess.run([*argv, "--out_dir", "run"], capture_output=True, text=True, timeout=100, check=False)
    assert "go on with" in done.stdout
    assert dcgan.load_checkpoint("run/checkpoint.pt")["step"] == 6


def test_readme_tricks_recipe():
    """The training-tricks article's command, cut short, as a user types it."""
    done = command(
        "dcgan",
        "--max_images",
        400,
        "--max_steps",
        4,
        "--pretrain_d",
        2,
        "--img_size",
        64,
        "--optim_g",
        "rmsprop",
        "--init",
        "he",
        "--lr_decay",
        "step",
        "--gp",
        "r1",
        "--gp_weight",
        1,
        "--replay",
        0.5,
        "--d_steps",
        2,
        "--ngf",
        8,
        "--ndf",
        8,
    )
    assert done.returncode == 0, done.stderr
    assert "runs/dcgan-digits/checkpoint.pt" in done.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_real_mnist_trains(name, data_dir):
    script = importlib.import_module(name)
    script.train(
        script.get_args(
            [
                "--dataset",
                "mnist",
                "--data_dir",
                str(data_dir),
                "--max_images",
                "512",
                "--ngf",
                "16",
                "--ndf",
                "16",
                "--epochs",
                "2",
                "--out_dir",
                "run",
                "--log_interval",
                "1",
            ]
        )
    )
    log = rows("run")
    assert log[-1]["D(x)"] > log[-1]["D(G(z))"]
    assert log[-1]["loss_d"] < log[0]["loss_d"]


@pytest.mark.parametrize("name", ["dcgan", "acgan"])
def test_real_cifar10_zip_trains(name, data_dir):
    script = importlib.import_module(name)
    ckpt = train(script, "--dataset", data_dir / "cifar10_train.zip", "--img_size", 32, "--max_steps", 3, out="run")
    assert len(ckpt["classes"]) == 10
    assert ckpt["config"]["nc"] == 3


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile(script, backend, monkeypatch):
    """The same training up to rounding, the same names in the checkpoint, and a resume."""
    compiled, compile_net = [], torch.nn.Module.compile

    def remember(net, **options):
        compiled.append(type(net).__name__)
        compile_net(net, backend=backend, **options)

    monkeypatch.setattr(torch.nn.Module, "compile", remember)
    plain = train(script, "--max_steps", 3, "--gp", "r1", out="plain")
    fast = train(script, "--max_steps", 3, "--gp", "r1", "--compile", out="fast")
    assert compiled == ["Generator", "Discriminator"]
    assert plain["netG"].keys() == fast["netG"].keys()
    for key, value in plain["netG"].items():
        torch.testing.assert_close(fast["netG"][key], value, rtol=1e-3, atol=2e-3)  # Adam: signs of tiny gradients
    np.testing.assert_allclose([r["loss_d"] for r in rows("fast")], [r["loss_d"] for r in rows("plain")], rtol=1e-2)
    script.train(script.get_args(["--resume", "--out_dir", "fast", "--max_steps", "4"]))
    assert len(compiled) == 4


def test_compile_without_a_compiler(script, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit):
        script.get_args(["--compile"])
    assert "--compile: needs a C++ compiler" in capsys.readouterr().err


def test_compile_and_tensorboard_can_be_left_out_at_resume(script, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda *args, **kwargs: None)
    train(script, "--max_steps", 1, "--compile", "--tensorboard")
    monkeypatch.setenv("PATH", "")
    args = script.get_args(["--resume", "run", "--no-compile", "--no-tensorboard", "--max_steps", "2"])
    assert (args.compile, args.tensorboard) == (False, False)
    script.train(args)
