"""The scripts are self-contained copies: what is no method must be the same text in all three."""

import ast
import difflib
import importlib
import re

import pytest
from conftest import ROOT, SCRIPTS

METHOD = {
    "check_img_size",
    "Generator",
    "Discriminator",
    "config_of",
    "get_args",
    "sample",
    "train",
    "gradient_penalty",
    "parse_labels",
}  # all other functions and classes are common


def definitions(name):
    text = (ROOT / f"{name}.py").read_text()
    nodes = [n for n in ast.parse(text).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    return {n.name: ast.get_source_segment(text, n) for n in nodes}


def actions(name):
    """Flag -> what its help line shows, by running the real parser."""
    module = importlib.import_module(name)
    seen = {}
    original = module.ArgumentParser.parse_args

    def spy(self, *args, **kwargs):
        for a in self._actions:
            seen[a.option_strings[0]] = (a.default, a.help, a.choices, a.nargs, a.const)
        return original(self, *args, **kwargs)

    module.ArgumentParser.parse_args = spy
    try:
        module.get_args([])
    finally:
        module.ArgumentParser.parse_args = original
    return seen


@pytest.mark.parametrize("other", ["gan", "acgan"])
def test_common_definitions_are_the_same_text(other):
    mine, theirs = definitions("dcgan"), definitions(other)
    assert set(mine) - METHOD == set(theirs) - METHOD
    for name in set(mine) - METHOD:
        assert mine[name] == theirs[name], f"{name} differs between dcgan.py and {other}.py"


@pytest.mark.parametrize("other", ["gan", "acgan"])
def test_common_flags_have_the_same_meaning(other):
    mine, theirs = actions("dcgan"), actions(other)
    allowed = {"--img_size", "--init", "--sn", "--n_samples", "--out_dir"}  # the method shows
    assert set(theirs) - set(mine) == ({"--attr", "--labels", "--aux_fake", "--pretrain_aux"} if other == "acgan" else set())
    assert set(mine) <= set(theirs)
    for flag in set(mine) - allowed:
        assert mine[flag] == theirs[flag], flag


@pytest.mark.parametrize(("a", "b", "most"), [("gan", "dcgan", 100), ("dcgan", "acgan", 132)])
def test_siblings_stay_close(a, b, most):
    lines = difflib.ndiff(*((ROOT / f"{s}.py").read_text().splitlines() for s in (a, b)))
    assert sum(line[0] in "+-" for line in lines) <= most


def test_readme_commands_are_accepted():
    """Every command line in README parses: no recipe names a flag that is not there."""
    found = re.findall(
        r"^\s*(?:python|torchrun [^\n]*?) ?(gan|dcgan|acgan)\.py([^#\n]*)",
        (ROOT / "README.md").read_text(),
        re.MULTILINE,
    )
    assert {name for name, _ in found} == set(SCRIPTS)
    for name, argv in found:
        if "--resume" not in argv:  # that reads a checkpoint
            importlib.import_module(name).get_args(argv.split("&&")[0].split())
