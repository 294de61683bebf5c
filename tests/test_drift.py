"""The scripts repeat each other in the same words: what has one name is equal, byte for byte.

python tests/test_drift.py        # the size of each pair's difference, with its reason
"""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.name for path in ROOT.glob("ppo*.py"))

# The only functions and classes that may have one name and different words: {name: {script: why}}.
# A script that is not listed under a name says it in the words of the first script that is not.
OTHER_WORDS = {
    "Args": {script: "defaults, and arguments of its own" for script in SCRIPTS},
    "Agent": {
        "ppo.py": "two MLPs",
        "ppo_continuous_action.py": "two MLPs and a standard deviation",
        "ppo_atari_lstm.py": "an LSTM between the network and the heads",
        "ppo_procgen.py": "the IMPALA network",
        "ppo_multidiscrete.py": "a network for a map, several choices",
        "ppo_multidiscrete_mask.py": "the same, with a mask",
    },
    "make_env": {script: "another kind of environment" for script in SCRIPTS},
    "make_envs": {
        "ppo_continuous_action.py": "normalised",
        "ppo_atari_envpool.py": "EnvPool",
        "ppo_procgen.py": "EnvPool, rewards scaled",
        "ppo_multidiscrete.py": "no processes: Java, once started, cannot be forked",
        "ppo_multidiscrete_mask.py": "the same",
    },
    "Games": {
        "ppo_atari_envpool.py": "lives, and Atari's options of the engine",
        "ppo_procgen.py": "levels, and Procgen's options of the engine",
    },
    "Microrts": {"ppo_multidiscrete_mask.py": "the engine's own mask"},
    "MultiCategorical": {"ppo_multidiscrete_mask.py": "detail A4"},
    "ppo_loss": {
        "ppo_atari_lstm.py": "the agent needs the LSTM's state",
        "ppo_multidiscrete_mask.py": "the agent needs the mask",
    },
    "compiled_gradient": {"ppo_atari_lstm.py": "not one graph: episodes cut the LSTM's calls"},
    "main": {
        "ppo_atari_envpool.py": "one engine for all environments",
        "ppo_procgen.py": "one engine for all environments",
    },
    "train": {script: "the rollout of its kind of environment" for script in SCRIPTS},
}

# What to compare with what, and why they differ
PAIRS = {
    ("ppo.py", "ppo_atari.py"): "Atari's wrappers, the Nature CNN",
    ("ppo.py", "ppo_continuous_action.py"): "normalisation, a diagonal Gaussian",
    ("ppo_atari.py", "ppo_atari_lstm.py"): "the LSTM, its state, minibatches of whole environments",
    ("ppo_atari.py", "ppo_atari_envpool.py"): "the engine instead of wrappers, autoreset steps",
    ("ppo_atari_envpool.py", "ppo_procgen.py"): "scaled rewards, the IMPALA network",
    ("ppo_atari.py", "ppo_multidiscrete.py"): "the engine in Java, several choices in an action",
    ("ppo_multidiscrete.py", "ppo_multidiscrete_mask.py"): "masks",
}


def definitions(script: str) -> dict[str, str]:
    """The source of every function and class at the top of a script, decorators included."""
    source = (ROOT / script).read_text()
    lines = source.splitlines()
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


def difference(a: str, b: str) -> int:
    """How many lines `diff a b` marks."""
    result = subprocess.run(["diff", a, b], cwd=ROOT, capture_output=True, text=True)
    return sum(line.startswith(("<", ">")) for line in result.stdout.splitlines())


@pytest.mark.parametrize("script", SCRIPTS)
def test_equal_names_have_equal_words(script):
    """Fails when a function is changed in one script only, and is not listed with a reason."""
    ours = definitions(script)
    for other in SCRIPTS:
        theirs = definitions(other)
        for name in ours.keys() & theirs.keys():
            exceptions = OTHER_WORDS.get(name, {})
            if script not in exceptions and other not in exceptions:
                assert ours[name] == theirs[name], f"{name} differs from {other}'s"


def test_exceptions_are_needed():
    """Fails when a function that is listed as different no longer is: the list would hide drift."""
    for name, scripts in OTHER_WORDS.items():
        for script in scripts:
            ours = definitions(script).get(name)
            if ours is None:
                continue
            others = [definitions(other).get(name) for other in SCRIPTS if other not in scripts]
            assert ours not in others, f"{name} of {script}"


def test_what_keeps_a_run_is_in_every_script():
    """Fails when a script opens, saves, restores or logs a run by functions of its own."""
    of_all = set.intersection(*(set(definitions(script)) for script in SCRIPTS))
    wanted = {
        "refuse",
        "compute_gae",
        "clipped_gradient",
        "train_step",
        "restore_process_settings",
        "catch_signals",
        "seed_generators",
        "use_deterministic_algorithms",
        "load_checkpoint",
        "save_checkpoint",
        "restore",
        "open_run",
        "start_logging",
        "find_episodes",
        "log_episodes",
        "mean_losses",
        "explained_variance",
        "stop_if_not_finite",
        "Progress",
        "stop_logging",
        "join_processes",
        "std_mean",
        "average_over_processes",
        "explain_failure",
        "summarize",
        "parse_args",
    }
    assert wanted <= of_all
    assert not wanted & OTHER_WORDS.keys()


def test_copy_function_copies_to_those_that_share_it(tmp_path, monkeypatch):
    """Fails when a script is left out, or when one that has other words for a reason is changed."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import copy_function

    for script in SCRIPTS:
        (tmp_path / script).write_text((ROOT / script).read_text())
    ppo = tmp_path / "ppo.py"
    ppo.write_text(ppo.read_text().replace("    # Detail 7", "    # A change\n    # Detail 7"))
    monkeypatch.setattr(copy_function, "ROOT", tmp_path)
    monkeypatch.setattr("test_drift.ROOT", tmp_path)
    copy_function.main(copy_function.Args(names=["ppo_loss"]))

    changed = [name for name in SCRIPTS if "# A change" in (tmp_path / name).read_text()]
    assert changed == [name for name in SCRIPTS if name not in OTHER_WORDS["ppo_loss"]]


def test_readme_shows_how_to_read_differences():
    """Fails when README.md does not name `diff A B` for every pair."""
    readme = (ROOT / "README.md").read_text()
    for a, b in PAIRS:
        assert f"diff {a} {b}" in readme
        assert difference(a, b) > 10


def test_arguments_have_the_same_words():
    """Fails when an argument of the same name has another type or another help line."""
    fields = {}
    for script in SCRIPTS:
        arguments = re.findall(
            r'^    (\w+): (.+?) = .+\n    """(.+)"""$', definitions(script)["Args"], re.M
        )
        assert len(arguments) > 25
        for name, kind, text in arguments:
            if name != "env_id":
                assert fields.setdefault(name, (kind, text)) == (kind, text), (script, name)


if __name__ == "__main__":
    for (a, b), reason in PAIRS.items():
        print(f"{difference(a, b):4} lines  diff {a} {b}  # {reason}")
