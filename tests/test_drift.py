"""The scripts repeat each other in the same words: equal functions byte for byte, no more difference than needed."""

import ast
import re
import subprocess

import pytest
from conftest import ROOT

SCRIPTS = sorted(path.name for path in ROOT.glob("ppo*.py"))
EVERYWHERE = ["refuse", "compute_gae", "clipped_gradient", "compiled_gradient", "train_step", "load_checkpoint"]
# what other scripts have in ppo.py's words, or in those of the script they build on
EQUAL = {
    "ppo_continuous_action.py": {"ppo.py": [*EVERYWHERE, "ppo_loss", "MLP"]},
    "ppo_atari.py": {"ppo.py": [*EVERYWHERE, "ppo_loss", "save_checkpoint", "make_envs", "Categorical"]},
    "ppo_atari_lstm.py": {
        "ppo.py": [name for name in EVERYWHERE if name != "compiled_gradient"],
        "ppo_atari.py": [
            "save_checkpoint",
            "make_envs",
            "Categorical",
            "ActOnReset",
            "MaxAndSkip",
            "EpisodicLife",
            "warp",
        ],
    },
    "ppo_atari_envpool.py": {
        "ppo.py": [*EVERYWHERE, "ppo_loss"],
        "ppo_atari.py": ["save_checkpoint", "Categorical", "Agent"],
    },
    "ppo_procgen.py": {
        "ppo.py": [*EVERYWHERE, "ppo_loss"],
        "ppo_continuous_action.py": ["save_checkpoint", "RunningMeanStd"],
        "ppo_atari_envpool.py": ["Categorical"],
    },
    "ppo_multidiscrete.py": {
        "ppo.py": [*EVERYWHERE, "ppo_loss"],
        "ppo_atari.py": ["save_checkpoint", "make_envs", "Categorical"],
    },
    "ppo_multidiscrete_mask.py": {
        "ppo.py": EVERYWHERE,
        "ppo_multidiscrete.py": [
            "save_checkpoint",
            "make_envs",
            "Categorical",
            "find_engine",
            "start_java",
            "set_field",
        ],
    },
}
# lines that `diff A B` marks
BUDGETS = {
    (
        "ppo.py",
        "ppo_atari.py",
    ): 170,  # 30 over the first plan: missing extras end in one line, memory is kept and laid out
    ("ppo.py", "ppo_continuous_action.py"): 155,  # 75 over: details 28-31 with statistics that environments share,
    # kept in checkpoints, stand in the file; no library has them as baselines had
    ("ppo_atari.py", "ppo_atari_lstm.py"): 90,
    ("ppo_atari.py", "ppo_atari_envpool.py"): 200,  # 30 over: the engine sums no games, takes no seeds at a reset and
    # films nothing, so the file does
    ("ppo_atari_envpool.py", "ppo_procgen.py"): 190,  # 80 over: details 30 and 31 with statistics in the checkpoint,
    # Qt 5 for the engine; the network has parts of its own
    ("ppo_atari.py", "ppo_multidiscrete.py"): 285,  # 15 over: what is missing or another version is refused in one line
    ("ppo_multidiscrete.py", "ppo_multidiscrete_mask.py"): 45,  # 15 over: 10 are the docstring at the top, 4
    # --exact-unit-mask, and where nothing can be chosen there is no entropy
}


def definitions(script: str) -> dict[str, str]:
    """The source of every function and class at the top of a script, decorators included."""
    source = (ROOT / script).read_text()
    lines = source.splitlines()
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    first = {node.name: min([node.lineno, *(d.lineno for d in node.decorator_list)]) for node in nodes}
    return {node.name: "\n".join(lines[first[node.name] - 1 : node.end_lineno]) for node in nodes}


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != "ppo.py"])
def test_equal_functions_are_equal_byte_for_byte(script):
    """Fails when one of them is changed in one script only, and when a new script is not listed."""
    ours = definitions(script)
    for other, names in EQUAL[script].items():
        theirs = definitions(other)
        for name in names:
            assert ours[name] == theirs[name], f"{name} differs from {other}'s"


@pytest.mark.parametrize(("a", "b"), BUDGETS)
def test_difference_is_within_its_budget(a, b):
    """Fails when a script drifts away from the one it builds on."""
    difference = subprocess.run(["diff", a, b], cwd=ROOT, capture_output=True, text=True).stdout
    assert 10 < sum(line.startswith(("<", ">")) for line in difference.splitlines()) <= BUDGETS[a, b]


def test_readme_shows_how_to_read_differences():
    """Fails when README.md does not name `diff A B` for every pair."""
    readme = (ROOT / "README.md").read_text()
    for a, b in BUDGETS:
        assert f"diff {a} {b}" in readme


def test_arguments_have_the_same_words():
    """Fails when an argument of the same name has another type or another help line."""
    fields = {}
    for script in SCRIPTS:
        arguments = re.findall(r"^    (\w+): (.+?) = .+?  # (.+)$", definitions(script)["Args"], re.M)
        assert len(arguments) > 25
        for name, kind, text in arguments:
            if name != "env_id":
                assert fields.setdefault(name, (kind, text)) == (kind, text), (script, name)
