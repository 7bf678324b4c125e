"""The scripts are self-contained copies: what is no method must be the same text in all three."""

import importlib
import re

import pytest
from conftest import ROOT, SCRIPTS, words

def test_the_plumbing_is_the_same_bytes():
    below = [(ROOT / f"{name}.py").read_text().split("PLUMBING")[1:] for name in SCRIPTS]
    assert len(below[0]) == 1
    assert below[0] == below[1] == below[2]

@pytest.mark.parametrize("name", SCRIPTS)
def test_commands_of_the_readme_and_the_docstring_are_accepted(name):
    """Every command line parses: none names a flag that is not there."""
    script = importlib.import_module(name)
    found = re.findall(rf"^ *(?:\w+=\S+ )?(?:python|torchrun [^\n]*?) ?{name}\.py([^#\n]*)",
                       (ROOT / "README.md").read_text() + script.__doc__, re.MULTILINE)
    assert len(found) >= 6
    for argv in found:
        argv = re.sub(r"--resume( [^-]\S*)?", "", argv.split("&&")[0])  # it reads a checkpoint
        script.get_args(words(argv))
