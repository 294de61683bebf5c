"""benchmark/ablations.py: each variant is what its script is without one detail, and is trained."""

import functools
import importlib
import re
import shutil
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import ablations
import gymnasium as gym
import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
import tyro
from ablations import DOMAINS, Variant
from common import load_script
from conftest import ROOT, find_slurm_job, load, run, train_in

VARIANTS = [variant for domain in DOMAINS.values() for variant in domain.variants]
FLAGS_OF_ALL = {v.script: domain.flags for domain in DOMAINS.values() for v in domain.variants}

# Large steps, so that what is clipped goes beyond its range at once
TINY = dict(
    num_envs=2,
    num_steps=64,
    num_minibatches=2,
    update_epochs=4,
    learning_rate=0.03,
    total_timesteps=1_000_000,
    cuda=False,
)

# Where two iterations are enough to see a difference
ENV_IDS = {
    "ppo.py": "Toy-v0",
    "ppo_continuous_action.py": "ToyBox-v0",
    "ppo_multidiscrete_mask.py": "MicrortsMining-v1",
    "ppo_atari.py": "BreakoutNoFrameskip-v4",
    "ppo_atari_envpool.py": "BreakoutNoFrameskip-v4",
    "ppo_atari_lstm.py": "BreakoutNoFrameskip-v4",
}
FAST = ("ppo.py", "ppo_continuous_action.py")


class Toy(gym.Env):
    """Noise to observe and as a reward, once out of all proportion; episodes of up to ten steps."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)

    def __init__(self, action_space: gym.Space):
        self.action_space = action_space
        self.num_steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observe(), {}

    def step(self, action):
        self.num_steps += 1
        reward = self.scale() * self.np_random.normal(5 * np.sum(action), 1)
        return self.observe(), reward, self.np_random.random() < 0.05, False, {}

    def observe(self):
        return self.scale() * self.np_random.normal(size=3).astype(np.float32)

    def scale(self) -> float:
        return 1e4 if self.num_steps == 120 else 1.0


gym.register("Toy-v0", functools.partial(Toy, gym.spaces.Discrete(2)), max_episode_steps=10)
gym.register("ToyBox-v0", functools.partial(Toy, gym.spaces.Box(-1, 1, (2,))), max_episode_steps=10)


def params(variants: list[Variant]) -> list:
    """pytest's parameters of variants, those that need an emulator or Java marked as slow."""
    found = []
    for variant in variants:
        marks = [] if variant.script in FAST else [pytest.mark.slow]
        name = f"{Path(variant.script).stem}-{variant.slug}"
        found.append(pytest.param(variant, id=name, marks=marks))
    return found


def train(script, flags: str, env_id: str, folder: Path) -> dict[str, torch.Tensor]:
    """Two iterations -> the weights."""
    tiny = script.Args(**TINY, env_id=env_id)
    args = tyro.cli(script.Args, args=flags.split(), default=tiny)
    args = replace(args, total_timesteps=2 * args.batch_size)
    with pytest.MonkeyPatch.context() as patch:
        if hasattr(script, "TASKS"):  # MicroRTS: games that come to their time limit
            tasks = {name: task._replace(time_limit=20) for name, task in script.TASKS.items()}
            patch.setattr(script, "TASKS", tasks)
        return load(train_in(script, folder, **asdict(args)))["agent"]


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """originals(script, env_id) -> the weights of the script itself, trained once."""

    @functools.cache
    def train_original(script: str, env_id: str) -> dict[str, torch.Tensor]:
        module = importlib.import_module(script.removesuffix(".py"))
        folder = tmp_path_factory.mktemp("original")
        return train(module, FLAGS_OF_ALL[script], env_id, folder / "run")

    return train_original


def equal(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    """Whether two agents have the same weights, bit for bit."""
    return weights.keys() == others.keys() and all(
        torch.equal(weights[name], others[name]) for name in weights
    )


@pytest.mark.parametrize("variant", params(VARIANTS))
def test_a_variant_trains_otherwise_than_its_script(variant, originals, tmp_path, monkeypatch):
    """Fails when an edit or a flag changes nothing, or a copy of the full recipe something."""
    env_id = ENV_IDS[variant.script]
    if variant.name == "raw rewards":  # Breakout's first ones are 1
        env_id = "SpaceInvadersNoFrameskip-v4"
    monkeypatch.chdir(tmp_path)
    ablations.write_copy(variant)
    copy = load_script(str(variant.copy))
    flags = f"{FLAGS_OF_ALL[variant.script]} {variant.flags}"
    weights = train(copy, flags, env_id, tmp_path / "variant")
    is_recipe = variant.detail == "full"
    assert equal(weights, originals(variant.script, env_id)) == is_recipe


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: f"{Path(v.script).stem}-{v.slug}")
def test_edited_lines_are_in_the_script_once(variant):
    """Fails when a script says in other words, or twice, what a variant takes out of it."""
    source = (ROOT / (variant.source or variant.script)).read_text()
    for old, new in variant.edits:
        assert source.count(old) == 1 and new != old, old
    compile(ablations.edit(variant), variant.slug, "exec")


def test_flags_of_a_domain_come_before_those_of_a_variant(tmp_path, monkeypatch, capsys):
    """Fails when a run is trained without its domain's flags, or they win over a variant's."""
    args = ablations.Args(domain="atari", variants=["half-precision-float32"], list=True)
    variants = ablations.choose_variants(args)
    monkeypatch.chdir(tmp_path)
    for variant in variants:
        ablations.write_copy(variant)
    jobs = ablations.make_jobs(variants, args)
    assert [variant.detail for variant, _ in jobs] == ["full", "half precision"]
    assert [job.args["amp"] for _, job in jobs] == [True, False]
    assert ablations.main(args) == 0
    assert "every run, before its own flags: --amp\n" in capsys.readouterr().out


def test_an_edit_that_does_not_fit_is_refused(capsys):
    """Fails when a variant is trained as the full recipe, because its edit found nothing."""
    source = (ROOT / "ppo.py").read_text()
    for old, count in (("no such line", 0), ("import torch", source.count("import torch"))):
        assert count != 1
        with pytest.raises(SystemExit):
            ablations.edit(Variant("ppo.py", "9", "nothing", "", [(old, "")]))
        assert f"9-nothing: ppo.py has these lines {count} times" in capsys.readouterr().err


def test_every_detail_is_a_variant_or_a_definition():
    """Fails when a detail is forgotten, or one that has a variant is said to have none."""
    no_details = {"full", "time limits", "half precision", "28-31"}
    taken_out = {variant.detail for variant in VARIANTS} - no_details
    assert not taken_out & ablations.DEFINITIONS.keys()
    details = {*map(str, range(1, 38)), "A1", "A3", "A4"}
    assert taken_out | ablations.DEFINITIONS.keys() == details
    for domain in DOMAINS.values():
        names = [variant.copy for variant in domain.variants]
        assert len(set(names)) == len(names)


def test_epsilon_as_in_tensorflow(tmp_path, monkeypatch):
    """Fails when epsilon is not the one that makes PyTorch's Adam TensorFlow's, step by step."""
    monkeypatch.chdir(tmp_path)
    (variant,) = (v for v in DOMAINS["classic"].variants if v.slug == "3-epsilon-as-in-TensorFlow")
    ablations.write_copy(variant)
    script = load_script(str(variant.copy))
    agent = script.Agent(gym.spaces.Box(-1, 1, (3,)), gym.spaces.Discrete(2))
    optimizer = torch.optim.Adam(agent.parameters(), fused=True)
    mb = {name: torch.randn(8) for name in ("logprobs", "values", "advantages", "returns")}
    mb |= {"obs": torch.randn(8, 3), "actions": torch.ones(8, dtype=torch.int64)}
    for k in range(5):
        script.train_step(agent, optimizer, mb, script.Args())
        wanted = 1e-5 / (1 - 0.999 ** (k + 1)) ** 0.5
        assert optimizer.param_groups[0]["eps"] == pytest.approx(wanted)


def test_the_queue_goes_seed_by_seed_and_the_full_recipe_is_first(tmp_path, monkeypatch):
    """Fails when a queue that is cut off has some variants and not the others."""
    monkeypatch.chdir(tmp_path)
    args = ablations.Args(variants=["9", "5-lambda-1"], num_seeds=2, env_ids=["A-v0", "B-v0"])
    variants = ablations.choose_variants(args)
    assert [v.slug for v in variants] == ["full-recipe", "5-lambda-1", "9-no-value-clipping"]
    for variant in variants:
        ablations.write_copy(variant)
    jobs = [job for _, job in ablations.make_jobs(variants, args)]
    order = [(job.args["seed"], job.script, job.args["env_id"]) for job in jobs]
    scripts = [str(variant.copy) for variant in variants]
    assert order == [(s, f, e) for s in (1, 2) for f in scripts for e in ("A-v0", "B-v0")]
    assert jobs[2].args["gae_lambda"] == 1 and not jobs[4].args["clip_vloss"]
    assert len({job.name for job in jobs}) == len(jobs)

    with pytest.raises(SystemExit):
        ablations.choose_variants(ablations.Args(variants=["99"]))


def test_slurm_trains_variants_too(slurm):
    """Fails when Slurm's jobs are not the variants' runs, or cannot be reported when they end."""
    words = "--variants 4 --env-ids CartPole-v1 --num-seeds 1 --total-timesteps 1024 --save out"
    where = "--slurm --partition a100 --time 2:00:00 --workers 1 --threads 2"
    script = "benchmark/ablations.py"
    result = run(script, *words.split(), *where.split(), cwd=slurm)
    assert result.returncode == 0, result.stderr
    assert "submitted 2 runs as job array 4711" in result.stdout
    submitted = (slurm / "submitted.sh").read_text()
    for option in ("array=0-1%1", "partition=a100", "cpus-per-task=2", "time=120", "requeue"):
        assert f"#SBATCH --{option}\n" in submitted, option
    assert not (slurm / "out").exists()

    for task in (0, 1):
        words_of_job, node = find_slurm_job(slurm, task)
        assert subprocess.run(words_of_job, **node, timeout=100).returncode == 0
    result = run(script, *words.split(), "--report", cwd=slurm)
    assert result.returncode == 0, result.stderr
    lines = pd.read_csv(slurm / "out" / "ablations.csv")
    assert lines.variant.tolist() == ["constant learning rate", "recipe"]
    assert lines.steps.tolist() == [1024, 1024]


def test_trains_reports_and_trains_nothing_twice(tmp_path, monkeypatch, capsys):
    """Fails when a run is missing or not told apart, is trained or counted twice, or lost."""
    monkeypatch.chdir(tmp_path)
    args = ablations.Args(
        variants=["4", "A3"],
        env_ids=["CartPole-v1"],
        num_seeds=2,
        total_timesteps=1024,
        save=tmp_path / "out",
    )
    assert ablations.main(args) == 0
    lines = pd.read_csv(tmp_path / "out" / "ablations.csv")
    assert len(lines) == 6 and set(lines.detail) == {"full", "4", "A3"}
    assert set(lines.seed) == {1, 2} and set(lines.steps) == {1024}
    row = lines[(lines.detail == "4") & (lines.seed == 2)].iloc[0]
    run = load(tmp_path / "runs" / row.run)
    assert row.mean_return == pytest.approx(np.mean(run["recent_returns"]), rel=1e-4)
    assert 8 <= row.first_return <= 200 and 8 <= row.auc <= 200
    options = "--total-timesteps 1024 --no-anneal-lr"
    assert row.command == f"python runs/ablations/ppo__4-constant-learning-rate.py {options}"
    assert re.match(r"[0-9a-f]{40}$", row.commit) and "core" in row.machine

    # The domain's figures would be of all its environments
    figures = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert figures == ["ablations_CartPole-v1.png", "ablations_CartPole-v1_throughout.png"]

    # Again: nothing to train; a line of another domain and one of a run that is gone stay
    others = lines.iloc[:2].assign(domain=["mujoco", "classic"], seed=9, run=["a", "b"])
    pd.concat([lines, others]).to_csv(tmp_path / "out" / "ablations.csv", index=False)
    folders = sorted((tmp_path / "runs").iterdir())
    capsys.readouterr()
    assert ablations.main(args) == 0
    assert "6 runs, of which 6 are finished" in capsys.readouterr().out
    assert sorted((tmp_path / "runs").iterdir()) == folders
    assert len(pd.read_csv(tmp_path / "out" / "ablations.csv")) == 8

    # On another machine: what has a line is not trained again
    for folder in folders:
        if "__" in folder.name:
            shutil.rmtree(folder)
    lines = pd.read_csv(tmp_path / "out" / "ablations.csv")
    lines[lines.run != row.run].to_csv(tmp_path / "out" / "ablations.csv", index=False)
    assert ablations.main(args) == 0
    assert "6 runs, of which 5 are finished" in capsys.readouterr().out
    new = [path for path in (tmp_path / "runs").iterdir() if "__ppo__4" in path.name]
    assert len(new) == 1
    assert len(pd.read_csv(tmp_path / "out" / "ablations.csv")) == 8


def test_a_game_of_envpool_is_reported_by_the_name_it_was_asked_for(tmp_path, monkeypatch, capsys):
    """Fails when Breakout-v5, which EnvPool calls it, is in no figure and table of Atari, or its
    runs are trained again."""
    monkeypatch.chdir(tmp_path)
    args = ablations.Args(
        domain="atari",
        variants=["half-precision-float32"],
        total_timesteps=2048,
        save=tmp_path / "out",
    )
    assert ablations.main(args) == 0
    path = tmp_path / "out" / "ablations.csv"
    lines = pd.read_csv(path, dtype={"detail": str})
    assert lines.detail.tolist() == ["full", "half precision"]
    assert lines.env_id.tolist() == 2 * ["BreakoutNoFrameskip-v4"]
    assert lines.run.str.startswith("Breakout-v5__").all()
    assert lines.command.str.contains("--amp").tolist() == [True, False]

    # As if they had learned
    lines = lines.assign(first_return=0, mean_return=[4, 2], auc=[2, 2])
    lines.to_csv(path, index=False)
    shutil.rmtree(tmp_path / "runs")
    capsys.readouterr()
    assert ablations.main(args) == 0
    assert "2 runs, of which 2 are finished" in capsys.readouterr().out
    figures = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert figures == ["ablations_atari.png", "ablations_atari_throughout.png"]
    effects = ablations.make_effects(lines.assign(total_timesteps=1_000_000))
    assert "**atari**, `ppo_atari_envpool.py` with `--amp`, the return after 1,000,000" in effects
    row = "| half precision: float32 (`ppo_atari_envpool.py`) | {} %, 1 seed |"
    assert row.format(-50) in effects and row.format("+0") in effects


def test_a_run_that_became_nan_counts(tmp_path, monkeypatch):
    """Fails when a variant that diverges is trained for ever, or only its lucky seeds count."""
    monkeypatch.chdir(tmp_path)
    (losses,) = re.findall(r" +losses = mean_losses\(stats\)\n", (ROOT / "ppo.py").read_text())
    diverging = f'{losses}        losses["policy_loss"] = float("nan") if iteration == 2 else 0.0\n'
    variant = Variant("ppo.py", "9", "diverging", "", [(losses, diverging)])
    args = ablations.Args(env_ids=["CartPole-v1"], num_seeds=1, total_timesteps=4096, save=tmp_path)
    ablations.write_copy(variant)
    jobs = ablations.make_jobs([variant], args)
    assert ablations.train(ablations.find_unfinished(jobs, args), workers=1) == 1
    (line,) = ablations.collect(jobs, args).itertuples()
    assert (line.note, line.steps) == ("became NaN or infinite", 1024)
    assert line.total_timesteps == 4096 and line.mean_return > 8
    assert ablations.find_unfinished(jobs, args) == []  # not again


def make_lines(env_id: str, variant: str, returns: list[float], first: float) -> pd.DataFrame:
    """Lines of ablations.csv."""
    detail = "full" if variant == "recipe" else "9"
    columns = dict(script="ppo.py", env_id=env_id, detail=detail, variant=variant)
    columns["seed"] = range(1, len(returns) + 1)
    return pd.DataFrame({"mean_return": returns, "first_return": first} | columns)


def test_change_of_the_interquartile_mean(capsys):
    """Fails when the change is not that of the IQM, in units of what the full recipe gained."""
    lines = pd.concat(
        [
            make_lines("A", "recipe", [0, 20, 25, 25, 30, 90], 5),  # IQM 25, gained 20
            make_lines("B", "recipe", [-80] * 5, -500),  # gained 420
            make_lines("A", "nothing learned", [5] * 6, 7),
            make_lines("B", "nothing learned", [-500] * 5, -500),
            make_lines("A", "better", [45] * 4, 5),  # beside all six seeds of the recipe
            make_lines("B", "better", [-80] * 5, -500),
            make_lines("A", "only A", [45, 45], 5),
            make_lines("C", "recipe", [1, 1], 2),
            make_lines("C", "better", [7, 7], 2),
        ]
    )
    changes = ablations.compute_changes(lines)
    assert changes.label.tolist() == ["9: better", "9: nothing learned"]
    assert changes.change.tolist() == pytest.approx([0.5, -1.0])
    assert changes.A.tolist() == pytest.approx([1.0, -1.0])
    assert changes.B.tolist() == pytest.approx([0.0, -1.0])
    better, nothing = changes.to_dict("records")
    assert np.isnan(better["low"]) and np.isnan(better["high"])  # four seeds on A
    assert nothing["low"] < -1.05 and nothing["high"] > -0.95  # the full recipe's seeds on A
    assert (better["seeds"], nothing["seeds"]) == (4, 5)
    output = capsys.readouterr().err
    assert "ppo.py: has learned nothing on C, left out" in output
    assert "ppo.py, 9 only A: too few runs, left out" in output


@pytest.mark.parametrize("num_seeds", [5, 20])
def test_interval_has_its_coverage(num_seeds):
    """Fails when the interval of a difference that is known holds it in other than 95 of 100."""
    generator = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        full = make_lines("A", "recipe", generator.normal(100, 10, num_seeds), 0)
        variant = make_lines("A", "worse", generator.normal(80, 10, num_seeds), 0)
        change = ablations.compute_change(full, variant)
        held += change["low"] <= -0.2 <= change["high"]
    assert 175 <= held <= 198


def test_table_of_effects():
    """Fails when a row is missing, out of order, or a cell says more than its seeds allow."""
    env_ids = ["CartPole-v1", "Acrobot-v1", "LunarLander-v3"]
    parts = [
        make_lines("CartPole-v1", "recipe", [500] * 5, 20),
        make_lines("CartPole-v1", "no value clipping", [260] * 5, 20),
        make_lines("Acrobot-v1", "recipe", [-84, -85, -82, -90, -80], -500),
        make_lines("Acrobot-v1", "no value clipping", [-84, -86, -81, -90, -80], -500),
        make_lines("LunarLander-v3", "recipe", [-300] * 5, -200),  # has learned nothing
        make_lines("LunarLander-v3", "no value clipping", [0] * 5, -200),
        make_lines("CartPole-v1", "shared trunk", [380], 20).assign(detail="13"),
        make_lines("CartPole-v1", "clip range annealed", [500, 500], 20).assign(detail="A1"),
    ]
    lines = pd.concat(parts).assign(domain="classic", total_timesteps=500_000)
    auc = {"CartPole-v1": 260, "Acrobot-v1": -240, "LunarLander-v3": -300}
    lines["auc"] = lines.env_id.map(auc)
    lines.loc[lines.variant == "clip range annealed", "auc"] = 320
    other_steps = make_lines("CartPole-v1", "no value clipping", [20] * 5, 20)
    other_steps = other_steps.assign(domain="classic", total_timesteps=4096)
    table = ablations.make_effects(pd.concat([lines, other_steps]))

    rows = [line for line in table.splitlines() if line.startswith("|")]
    head, _, *rows, head_throughout, _, _, _, throughout = rows
    assert head == head_throughout == f"| detail: instead | {' | '.join(env_ids)} |"
    assert throughout.startswith("| A1: clip range annealed | +25 %, 2 seeds |")
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    labels = ["9: no value clipping", "13: shared trunk", "A1: clip range annealed"]
    assert [row[0] for row in cells] == labels
    assert cells[0][1] == "**-50 % (-50 to -50)**"
    change, low, high = map(int, re.findall(r"[+-]\d+", cells[0][2]))
    assert low < 0 < high and change == 0 and "**" not in cells[0][2]
    assert cells[0][3] == ""
    assert cells[1][1] == "-25 %, 1 seed" and cells[2][1] == "+0 %, 2 seeds"


def test_small_changes_keep_their_sign():
    """Fails when a loss of less than half a percent is told as a gain."""
    changes = [0.03, 0.004, 0.0, -0.004, -0.52]
    assert [ablations.in_percent(change) for change in changes] == ["+3", "+0", "+0", "-0", "-52"]


def test_figure(tmp_path, monkeypatch):
    """Fails when a variant has no line in each panel, the greatest loss is not at the top, or a
    colour says more than an interval."""
    lines = pd.concat(
        [
            make_lines("A", "recipe", [100] * 5, 0),
            make_lines("B", "recipe", [200, 201, 202, 203, 204], 0),
            make_lines("A", "better", [150] * 5, 0),
            make_lines("B", "better", [200, 201, 202, 203, 204], 0),
            make_lines("A", "worse", [10] * 5, 0),
            make_lines("B", "worse", [20] * 4, 0),
            make_lines("A", "only A", [100] * 5, 0),
        ]
    )
    parts = ablations.split_changes(lines, ["B", "A"])
    monkeypatch.setattr(ablations.plt, "close", lambda figure: None)
    ablations.plot(parts, "a title", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")

    figure = ablations.plt.gcf()
    assert figure.get_suptitle() == "a title"
    assert [panel.get_title() for panel in figure.axes] == ["mean over environments", "B", "A"]
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["9: better", "9: worse", "9: only A"]  # from below

    points = [panel.collections[1] for panel in figure.axes]
    changes = [list(p.get_offsets()[:, 0]) for p in points]
    assert changes[0][:2] == pytest.approx([25, -90.05], abs=0.01)
    assert changes[1][:2] == pytest.approx([0, -90.10], abs=0.01)
    assert changes[2] == pytest.approx([50, -90, 0])
    lows = [line[0][0] for line in figure.axes[2].collections[0].get_segments()]
    assert lows == pytest.approx([50, -90, 0])

    grey, red, blue = map(matplotlib.colors.to_rgba, ("darkgrey", "tab:red", "tab:blue"))
    edges = [[tuple(color) for color in p.get_edgecolors()[:2]] for p in points]
    assert edges == [[blue, grey], [grey, grey], [blue, red]]  # four seeds have no interval
    hollow = [tuple(p.get_facecolors()[1]) == (1, 1, 1, 1) for p in points]
    assert hollow == [True, True, False]


def test_mean_is_over_environments_that_have_most_variants():
    """Fails when an environment of which one variant is trained hides those of the others."""
    parts = []
    for env_id in ("A", "B"):
        parts.append(make_lines(env_id, "recipe", [100] * 5, 0))
        parts += [make_lines(env_id, f"variant {i}", [50] * 5, 0) for i in range(4)]
    parts.append(make_lines("C", "recipe", [100] * 5, 0))
    parts.append(make_lines("C", "variant 0", [0] * 5, 0))
    panels = ablations.split_changes(pd.concat(parts), ["A", "B", "C"])
    assert list(panels) == ["mean of A, B", "A", "B", "C"]
    assert panels["mean of A, B"].change.tolist() == [-0.5] * 4
    assert panels["C"].change.tolist() == [-1]

    parts.append(make_lines("C", "variant 1", [0] * 5, 0))
    panels = ablations.split_changes(pd.concat(parts), ["A", "B", "C"])
    assert list(panels) == ["mean over environments", "A", "B", "C"]
    mean = panels["mean over environments"].set_index("label").change
    assert mean.to_dict() == pytest.approx({"9: variant 0": -2 / 3, "9: variant 1": -2 / 3})


def test_overview(tmp_path, monkeypatch):
    """Fails when a row or column is missing or out of order, or a cell says more than is known."""
    nearly = [500, 501, 502, 503, 504]
    parts = [
        make_lines("CartPole-v1", "recipe", nearly, 20).assign(domain="classic"),
        make_lines("CartPole-v1", "clip range annealed", nearly, 20).assign(detail="A1"),
        make_lines("CartPole-v1", "no value clipping", [262] * 5, 20),
        make_lines("CartPole-v1", "shared trunk", [380] * 2, 20).assign(detail="13"),
        make_lines("HalfCheetah-v4", "recipe", [900, 1000, 1000, 1000, 1100], 0),
        make_lines("HalfCheetah-v4", "no value clipping", [400, 900, 1000, 1100, 1600], 0),
        make_lines("HalfCheetah-v4", "shared trunk", [1300] * 5, 0).assign(detail="26"),
    ]
    lines = pd.concat(parts).assign(total_timesteps=500_000, domain="classic")
    cheetah = lines.env_id == "HalfCheetah-v4"
    lines.loc[cheetah, ["domain", "script"]] = ["mujoco", "ppo_continuous_action.py"]
    rows = ablations.find_overview(lines.iloc[::-1])

    monkeypatch.setattr(ablations.plt, "close", lambda figure: None)
    ablations.plot_overview(rows, "a title", tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    panel = ablations.plt.gcf().axes[0]
    labels = [label.get_text() for label in panel.get_yticklabels()]
    env_ids = [label.get_text() for label in panel.get_xticklabels()]
    assert env_ids == ["CartPole-v1", "HalfCheetah-v4"]

    trunk, trunk_of_mujoco = "13: shared trunk", "26: shared trunk"
    clipping, annealed = "9: no value clipping", "A1: clip range annealed"
    assert labels == [clipping, trunk, trunk_of_mujoco, annealed]

    texts = {}
    for text in panel.texts:
        column, line = text.get_position()
        texts[labels[line], env_ids[column]] = text.get_text(), text.get_weight()
    low, high = map(int, re.findall(r"[+-]\d+", texts[clipping, "HalfCheetah-v4"][0]))
    assert -61 < low < -10 and 10 < high < 61
    assert texts == {
        (clipping, "CartPole-v1"): ("-50", "bold"),
        (clipping, "HalfCheetah-v4"): (f"{low} to +{high}", "normal"),
        (trunk, "CartPole-v1"): ("-25 ?", "normal"),
        (trunk_of_mujoco, "HalfCheetah-v4"): ("+30", "bold"),
        (annealed, "CartPole-v1"): ("+0", "normal"),
    }

    colors = panel.images[0].get_array()
    white = (1, 1, 1, 1)
    red, blue, grey = colors[0, 0], colors[2, 1], colors[3, 0]
    assert red[0] > red[2] + 0.3 and blue[2] > blue[0] + 0.3
    for line, column in ((0, 1), (1, 0), (1, 1), (2, 0), (3, 1)):  # undecided or not measured
        assert tuple(colors[line, column]) == white
    assert grey[0] == grey[1] == grey[2] < 1


def test_names_do_not_overlap_in_an_overview():
    """Fails when the name of an environment is wider than its column, or not whole."""
    for domain in ablations.DOMAINS.values():
        for env_id in domain.env_ids:
            lines = ablations.break_name(env_id).split("\n")
            assert max(map(len, lines)) <= 16 and "".join(lines) == env_id
    assert ablations.break_name("MicrortsMining-v1") == "Microrts\nMining-v1"
