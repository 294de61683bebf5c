"""ppo.py learns, its runs can be evaluated, tracked and watched."""

import json
import os
import shutil
import struct
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, load, run, run_dir_of, scalars
from moviepy import VideoFileClip
from wandb.proto import wandb_internal_pb2


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run of CartPole-v1, 300,000 steps, seed 4; made once for all tests."""
    cwd = tmp_path_factory.mktemp("trained")
    result = run("ppo.py", "--total-timesteps", 300_000, "--seed", 4, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return cwd


def test_cartpole_is_solved_within_300k_steps(trained):
    """Fails when PPO does not learn: random play gets about 22."""
    returns = np.array(
        [value for _, value in scalars(run_dir_of(trained), "charts/episodic_return")]
    )
    means_of_100 = np.convolve(returns, np.full(100, 0.01), mode="valid")
    assert means_of_100[0] < 60
    assert means_of_100.max() >= 475


def test_evaluation_agrees_with_training(trained):
    """Fails when evaluate.py plays another agent, another environment, or the wrong actions."""
    run_dir = run_dir_of(trained)
    command = [
        sys.executable,
        str(ROOT / "benchmark" / "evaluate.py"),
        str(run_dir),
        "--episodes",
        "50",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    summary, listed = result.stdout.splitlines()
    returns = np.array([float(word) for word in listed.removeprefix("returns:").split()])
    assert len(returns) == 50
    assert f"mean return {returns.mean():.2f}, std {returns.std():.2f}" in summary
    last_100 = np.array(load(run_dir)["recent_returns"])
    noise = np.sqrt(returns.var() / 50 + last_100.var() / 100)
    assert abs(returns.mean() - last_100.mean()) < 4 * noise + 5


def test_evaluation_refuses_what_is_no_run(tmp_path):
    for args in ([tmp_path / "none"], [tmp_path, "--episodes", "0"]):
        command = [sys.executable, str(ROOT / "benchmark" / "evaluate.py"), *map(str, args)]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 2
        assert len(result.stderr.splitlines()) == 1


def test_logged_names(trained):
    """Fails when a metric is missing, or when an episode is not logged."""
    run_dir = run_dir_of(trained)
    for name in (
        "charts/SPS charts/learning_rate losses/value_loss losses/policy_loss losses/entropy "
        "losses/old_approx_kl losses/approx_kl losses/clipfrac losses/explained_variance"
    ).split():
        assert len(scalars(run_dir, name)) == 300_000 // 512
    lengths = scalars(run_dir, "charts/episodic_length")
    assert lengths == scalars(run_dir, "charts/episodic_return")  # CartPole pays 1 for every step
    steps = 300_000 // 512 * 512
    # all but the 4 unfinished episodes
    assert steps - 4 * 500 <= sum(length for _, length in lengths) <= steps


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A folder with a short run that is tracked offline and filmed; made once for all tests."""
    cwd = tmp_path_factory.mktemp("tracked")
    args = [
        "--track",
        "--capture-video",
        "--total-timesteps",
        2048,
        "--wandb-project-name",
        "proof",
    ]
    # W&B saves the code of a script that lies below the working directory
    shutil.copy(ROOT / "ppo.py", cwd)
    result = run(cwd / "ppo.py", *args, cwd=cwd, WANDB_MODE="offline")
    assert result.returncode == 0, result.stderr
    return cwd


def test_video_is_playable(tracked):
    """Fails without RecordVideo, or when it films nothing that moves."""
    videos = sorted(run_dir_of(tracked).glob("videos/*/*.mp4"))
    assert videos
    with VideoFileClip(str(videos[-1])) as clip:
        frames = [frame.copy() for frame in clip.iter_frames()]
    assert len(frames) >= 8  # CartPole never falls sooner
    assert frames[0].shape == (400, 600, 3)
    assert any((frame != frames[0]).any() for frame in frames[1:])


def records(log: Path) -> Iterator[wandb_internal_pb2.Record]:
    """Every record of W&B's log of a run: a header of 7 bytes, then LevelDB's blocks of 32 KiB."""
    content, position, whole = log.read_bytes(), 7, b""
    while position + 7 <= len(content):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        whole += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


def test_tracking_sends_metrics_config_code_and_videos(tracked):
    """Fails without wandb.init, sync_tensorboard, config, save_code, or wandb.Video."""
    (folder,) = (tracked / "wandb").glob("offline-run-*")
    assert folder.name.endswith(run_dir_of(tracked).name)
    (log,) = folder.glob("*.wandb")
    metrics, config, files, synced, project = set(), {}, set(), [], None
    for record in records(log):
        metrics |= {item.key or ".".join(item.nested_key) for item in record.history.item}
        config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        files |= {file.path for file in record.files.files}
        synced += [record.tbrecord.log_dir] if record.HasField("tbrecord") else []
        project = record.run.project or project
    assert project == "proof"
    assert {"charts/episodic_return", "charts/SPS", "losses/policy_loss"} <= metrics
    assert any(name.startswith("video") for name in metrics), metrics
    assert [Path(name).name for name in synced] == [run_dir_of(tracked).name]
    assert config["learning_rate"] == 2.5e-4 and config["env_id"] == "CartPole-v1"
    assert any(file.endswith(".mp4") for file in files), files
    assert (folder / "files" / "code" / "ppo.py").read_text() == (ROOT / "ppo.py").read_text()


def test_films_are_sent_once_in_the_order_they_were_made(ppo, monkeypatch):
    """Fails when films go to W&B by name (0, 1, 27, 8), twice, or only at the end."""
    sent_to_wandb = []
    fake = types.SimpleNamespace(log=lambda entry: sent_to_wandb.append(entry["video"]), Video=str)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    args = ppo.Args(track=True)
    video_dir = Path("videos")
    video_dir.mkdir()
    sent = set()
    for made, episodes in enumerate([(0, 1, 8), (27,), ()]):
        for episode in episodes:
            film = video_dir / f"episode-{episode}.mp4"
            film.touch()
            os.utime(film, (100 * made + episode, 100 * made + episode))
        ppo.send_films(args, video_dir, sent)
    ppo.send_films(ppo.Args(track=False), video_dir, set())
    assert sent_to_wandb == [f"videos/episode-{episode}.mp4" for episode in (0, 1, 8, 27)]
