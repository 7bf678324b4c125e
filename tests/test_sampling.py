"""--sample shows what was trained; the scripts are copies of one another where they are no method."""

import importlib
import os
import re
import runpy
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ROOT, SCRIPTS, ended, fill, forked, main, pixels, rows, train, words

import acgan
import dcgan
import infer_ort

# ---------------------------------------------------------------------------------------- sampling

@pytest.mark.parametrize("nz", [1, 2, 7, 100])
def test_latents_are_those_of_infer_ort(nz):
    """In any number, and the next ones after them."""
    np.testing.assert_array_equal(dcgan.latents(7, 30, nz), infer_ort.latents(7, 0, 30, nz))
    np.testing.assert_array_equal(dcgan.latents(7, 30, nz)[20:], infer_ort.latents(7, 20, 10, nz))

def test_every_output_shows_the_same_pictures(script):
    """Grid beside the checkpoint (the one that training showed last) and folder; a run's folder or its file; any number."""
    train(script, "--max_steps 2 --nc 3 --seed 4")
    main(script.METHOD, "--sample run --seed 4 --device cpu")
    grid, side = pixels("run/checkpoint_samples.png"), 10 if script is acgan else 8
    assert grid.shape == (side * 18 + 2, side * 18 + 2, 3)
    np.testing.assert_array_equal(grid, pixels("run/samples/step_00000002.png"))
    for n in (5, 70):
        main(script.METHOD, "--sample run/checkpoint.pt --seed 4 --device cpu --out some.v1/ --n_samples", n)
        assert sorted(os.listdir("some.v1")) == [f"{i:06d}.png" for i in range(n)]
        for i in range(5):
            np.testing.assert_array_equal(grid[2:18, 2 + 18 * i:18 + 18 * i], pixels(f"some.v1/{i:06d}.png"))
    main(script.METHOD, "--sample run --device cpu --out other.png")
    assert not np.array_equal(pixels("other.png"), grid)

def test_walk_dim_sweeps_one_coordinate(script, monkeypatch):
    train(script, "--max_steps 1")
    monkeypatch.setattr(script, "generate", spy := mock.Mock(side_effect=script.generate))
    main(script.METHOD, "--sample run --device cpu --walk_dim 3 --n_samples 20 --out x.png")
    expected = script.latents(0, 1, 8).repeat(20, 0)
    expected[:, 3] += 0.01 * np.arange(20)
    np.testing.assert_allclose(spy.call_args.args[1], expected, atol=1e-5)

def test_labels_are_names_before_they_are_numbers(monkeypatch):
    """Folders 0 to 11 sort as 0, 1, 10, 11, 2: "2" is the folder of that name; where no class has the name, a number."""
    for k in range(12):
        fill(f"twelve/{k}", 2, first=10 * k)
    train(acgan, "--dataset twelve --max_steps 1 --nc 3")
    monkeypatch.setattr(acgan, "generate", spy := mock.Mock(side_effect=acgan.generate))
    main("acgan", "--sample run --device cpu --labels", "2,10,0 --n_samples 5 --out x.png")
    assert spy.call_args.args[2].tolist() == [4, 2, 0, 4, 2]
    fill("pair/cat")
    fill("pair/dog", first=50)
    train(acgan, "--dataset pair --max_steps 1 --nc 3", out="pair_run")
    with mock.patch.object(sys, "argv", ["acgan.py", *words("--sample pair_run --device cpu --n_samples 3 --out y.png --labels"), "1, cat"]):
        acgan.main()
    assert spy.call_args.args[2].tolist() == [1, 0, 1]
    assert pixels("y.png").shape == (2 * 18 + 2, 2 * 18 + 2, 3)  # a column for each class

# ------------------------------------------------------------------------------------ three copies

def test_the_plumbing_is_the_same_bytes():
    below = [(ROOT / f"{name}.py").read_text().split("PLUMBING")[1:] for name in SCRIPTS]
    assert len(below[0]) == 1
    assert below[0] == below[1] == below[2]

@pytest.mark.parametrize("name", SCRIPTS)
def test_commands_of_the_readme_and_the_docstring_are_accepted(name, capfd):
    """Every command line parses: none names a flag that is not there."""
    script = importlib.import_module(name)
    found = re.findall(rf"^ *(?:\w+=\S+ )?(?:python|torchrun [^\n]*?) ?{name}\.py([^#\n]*)",
                       (ROOT / "README.md").read_text() + script.__doc__, re.MULTILINE)
    assert len(found) >= 6
    for argv in found:
        script.get_args(words(re.sub(r"--resume \S*", "", argv.split("&&")[0])))  # it reads a checkpoint

def edited(*argv):
    sys.argv = ["mine.py", *argv]
    runpy.run_path("mine.py", run_name="__main__")

def test_a_renamed_copy_reads_its_older_runs():
    """Also those of the scripts as they were before December 2026."""
    ckpt = train(dcgan, "--max_steps 1")
    older = {"config": ckpt["config"] | {"widest": 8}, "args": ckpt["args"] | {"lr": 0.1, "max_steps": 24000, "epochs": 250}}
    torch.save(ckpt | older | {"total": 1, "time": 0.0}, "run/checkpoint.pt")
    Path("mine.py").write_text((ROOT / "dcgan.py").read_text())
    for argv in ("--sample run --n_samples 2 --device cpu --out x.png", "--resume run --max_steps 2"):
        assert ended(forked(edited, *words(argv))) == 0, Path("said.txt").read_text()
    assert "python mine.py --sample run" in Path("said.txt").read_text()
    assert rows()[-1]["step"] == 2
