"""benchmark/evaluate.py: which episodes count, what is written, and whose code is run."""

import shutil
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, load, train_in
from evaluate import Args

SMALL = dict(num_envs=2, num_steps=64, num_minibatches=2, update_epochs=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run of ppo.py on CartPole-v1."""
    import ppo

    return train_in(ppo, tmp_path_factory.mktemp("evaluate"), **SMALL, total_timesteps=2048)


@pytest.fixture
def run_dir(trained, tmp_path):
    """A copy of that run, without evaluations."""
    return shutil.copytree(trained, tmp_path / "run")


def run(*args: object) -> subprocess.CompletedProcess:
    """Runs `python benchmark/evaluate.py ARGS` to its end."""
    command = [sys.executable, ROOT / "benchmark" / "evaluate.py", *args]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


def test_which_episodes_count_is_decided_beforehand(run_dir, monkeypatch):
    """Fails when the first episodes to end are taken, of which too many are short."""
    played = []  # (environment, return) in the order of their ends
    make_envs = evaluate.make_envs_of_run

    def spy(*args):
        envs = make_envs(*args)
        step = envs.step

        def spy_step(action):
            result = step(action)
            ended = result[4].get("final_info", {"_episode": []})
            for i in np.flatnonzero(ended["_episode"]):
                played.append((i, ended["episode"]["r"][i]))
            return result

        envs.step = spy_step
        return envs

    monkeypatch.setattr(evaluate, "make_envs_of_run", spy)
    returns = evaluate.evaluate(Args(run_dir, episodes=10, num_envs=4))
    quotas = [3, 3, 2, 2]
    for i, quota in enumerate(quotas):
        own = [score for env, score in played if env == i]
        assert returns[i::4] == own[:quota]
    assert len(played) > 10  # some environments went on, which does not count
    first_to_end = sorted(score for _, score in played[:10])
    assert first_to_end != sorted(returns)


def test_same_seed_same_returns(run_dir):
    """Fails when the seed does not decide, or does not matter."""
    first = evaluate.evaluate(Args(run_dir, episodes=6, num_envs=3, seed=5))
    assert first == evaluate.evaluate(Args(run_dir, episodes=6, num_envs=3, seed=5))
    assert first != evaluate.evaluate(Args(run_dir, episodes=6, num_envs=3, seed=6))
    seeds = evaluate.make_seeds(1, 50) + evaluate.make_seeds(2, 50)
    assert len(set(seeds)) == 100


def test_greedy_takes_the_most_likely_action(run_dir):
    """Fails when an action is sampled; once greedy, only the start of an episode is random."""
    episodes = []
    for torch_seed in (0, 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "manual_seed", lambda seed, s=torch_seed: None)
            torch.default_generator.manual_seed(torch_seed)
            episodes.append(evaluate.evaluate(Args(run_dir, episodes=5, greedy=True)))
    assert episodes[0] == episodes[1]


@pytest.mark.parametrize(
    ("name", "logits"),
    [("ppo", [[0.0, 2.0, 1.0]]), ("ppo_continuous_action", [[0.3, -2.0]])],
)
def test_most_likely_action(name, logits):
    """Fails when it is another one for a discrete or a continuous choice."""
    module = __import__(name)
    logits = torch.tensor(logits)
    if name == "ppo":
        assert evaluate.find_most_likely(module.Categorical(logits)).tolist() == [1]
    else:
        gaussian = module.DiagonalGaussian(logits, torch.zeros(2))
        assert torch.equal(evaluate.find_most_likely(gaussian), logits)
    ours = torch.distributions.Categorical(logits=logits)
    assert evaluate.find_most_likely(ours).tolist() == [logits.argmax().item()]


def test_most_likely_action_of_several_choices():
    """Fails when a masked choice is taken, or the choices are mixed up."""
    import ppo_multidiscrete
    import ppo_multidiscrete_mask

    logits = torch.tensor([[0.0, 3.0, 5.0, 1.0, 2.0]])  # of 2, and of 3
    plain = ppo_multidiscrete.MultiCategorical(logits, [2, 3])
    assert evaluate.find_most_likely(plain).tolist() == [[1, 0]]
    mask = torch.tensor([[True, False, False, True, True]])
    masked = ppo_multidiscrete_mask.MultiCategorical(logits, [2, 3], mask)
    assert evaluate.find_most_likely(masked).tolist() == [[0, 2]]


def test_statistics():
    """Fails when a statistic is wrong, or the interval is not one of the mean."""
    returns = np.random.default_rng(0).normal(100, 20, 400)
    result = evaluate.compute_statistics(returns)
    assert result["mean"] == returns.mean() and result["std"] == returns.std()
    assert result["min"] == returns.min() and result["max"] == returns.max()
    assert result["median"] == np.median(returns)
    half = 1.96 * returns.std() / 20
    assert result["low"] == pytest.approx(returns.mean() - half, abs=0.4)
    assert result["high"] == pytest.approx(returns.mean() + half, abs=0.4)
    equal = evaluate.compute_statistics(np.full(10, 500.0))
    assert (equal["low"], equal["high"]) == (500, 500)
    assert np.isnan(evaluate.compute_statistics(np.array([3.0]))["low"])


def test_a_line_for_each_evaluation(run_dir):
    """Fails when evaluation.csv does not say what was played, or loses an earlier line."""
    first = run(run_dir, "--episodes", 6, "--num-envs", 3)
    second = run(run_dir, "--episodes", 1, "--greedy", "--seed", 9)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    lines = pd.read_csv(run_dir / "evaluation.csv")
    assert lines.episodes.tolist() == [6, 1] and lines.greedy.tolist() == [False, True]
    assert lines.seed.tolist() == [1, 9] and lines.num_envs.tolist() == [3, 1]
    assert lines.trained_steps.tolist() == [2048, 2048]
    returns = [float(word) for word in first.stdout.split("returns:")[1].split()]
    assert lines["mean"][0] == pytest.approx(np.mean(returns), rel=1e-4)
    assert lines["median"][0] == pytest.approx(np.median(returns), rel=1e-4)
    assert lines.low[0] <= lines["mean"][0] <= lines.high[0] and np.isnan(lines.low[1])
    assert (lines.steps_per_second > 0).all() and (lines.commit.str.len() == 40).all()


def count_pictures(film: Path) -> int:
    """-> how many pictures a film has."""
    from moviepy import VideoFileClip

    with VideoFileClip(str(film)) as clip:
        return sum(1 for _ in clip.iter_frames())


def test_films_of_all_episodes(run_dir):
    """Fails when an episode is not filmed, or one that was not played leaves a film."""
    returns = evaluate.evaluate(Args(run_dir, episodes=3, capture_video=True))
    films = sorted((run_dir / "evaluation").iterdir())
    assert [film.name for film in films] == [f"rl-video-episode-{i}.mp4" for i in range(3)]
    for film, length in zip(films, returns, strict=True):
        assert abs(count_pictures(film) - length - 1) <= 1


def test_films_of_the_best_and_the_median_episode(run_dir):
    """Fails when other episodes are kept, or films that are not."""
    returns = evaluate.evaluate(Args(run_dir, episodes=5, capture_video_of="best-and-median"))
    films = {film.name: count_pictures(film) for film in (run_dir / "evaluation").iterdir()}
    assert films.keys() == {"best.mp4", "median.mp4"}
    assert abs(films["best.mp4"] - max(returns) - 1) <= 1
    assert abs(films["median.mp4"] - np.median(returns) - 1) <= 1


def test_a_copied_script_is_given_by_its_path(run_dir, tmp_path):
    """Fails when a copy cannot be evaluated, or its name alone has it imported from anywhere."""
    checkpoint = load(run_dir) | {"script": "random"}
    torch.save(checkpoint, run_dir / "checkpoint.pt")
    copy = shutil.copy(ROOT / "ppo.py", tmp_path / "random.py")

    result = run(run_dir, "--episodes", 2)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "made by random.py, which is none of the eight scripts" in result.stderr
    assert "--script path/to/random.py" in result.stderr
    result = run(run_dir, "--episodes", 2, "--script", copy)
    assert result.returncode == 0, result.stderr
    assert "2 episodes" in result.stdout
    result = run(run_dir, "--script", ROOT / "ppo.py")  # not the one that made it
    assert result.returncode == 2 and "belongs to random.py" in result.stderr


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["--seed", "-1"], "evaluate.py: --seed -1: must be"),
        (["--seed", "99999999999999999999"], "evaluate.py: --seed 99999999999999999999: must be"),
        (["--episodes", "0"], "evaluate.py: --episodes 0: must be"),
        (["--num-envs", "0"], "evaluate.py: --num-envs 0: must be"),
        (["--num-envs", "2", "--capture-video"], "evaluate.py: --num-envs 2: only one"),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line(run_dir, capsys, monkeypatch, args, line):
    """Fails when the check is taken out."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py"])
    with pytest.raises(SystemExit) as end:
        evaluate.main(evaluate.tyro.cli(Args, args=[str(run_dir), *args]))
    err = capsys.readouterr().err
    assert (end.value.code, err.count("\n")) == (2, 1) and err.startswith(line)


def test_a_folder_that_cannot_be_written_is_one_line(run_dir):
    """Fails when it is noticed after all episodes, or in a traceback."""
    (run_dir / "evaluation").write_text("in the way")
    result = run(run_dir, "--capture-video", "--episodes", "1")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert result.stderr.startswith("evaluate.py: --capture-video ")
    (run_dir / "evaluation.csv").mkdir()
    result = run(run_dir, "--episodes", "1")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert result.stderr.startswith("evaluate.py: evaluation.csv: ") and result.stdout == ""
