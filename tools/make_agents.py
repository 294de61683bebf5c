"""Trains the agents of docs/agents/, evaluates them, and makes a short film of each.

    python tools/make_agents.py                          # the three small ones
    python tools/make_agents.py CartPole-v1              # this one alone
    python tools/make_agents.py CartPole-v1 --run runs/CartPole-v1__ppo__1__1790000000

The last command trains nothing: it takes the agent of a run, as it is at its last checkpoint. This
is also how the agents come in whose training takes hours: of those, the film and the returns are
kept, but not the checkpoint, which is too large for a repository.

Writes docs/agents/NAME/checkpoint.pt (without the optimizer's state: it can be evaluated, not
resumed) and loop.webp, a line in docs/agents/agents.json, and the table in docs/agents/README.md.
To be run anew when the scripts' checkpoints change.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import gymnasium as gym
import numpy as np
import torch
import tyro
from moviepy import VideoFileClip
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
AGENTS = ROOT / "docs" / "agents"
sys.path.insert(0, str(ROOT / "benchmark"))

import common  # noqa: E402
import evaluate  # noqa: E402
import report  # noqa: E402

MAX_BYTES = 600_000  # of a film


@dataclass
class Agent:
    """What is trained, and how it is shown."""

    script: str
    frames: int
    """of the film, from the episode's start"""
    every: int = 1
    """one frame of the film for so many of the environment"""
    fps: int = 25
    width: int = 320
    camera: str | None = None
    """MuJoCo's camera that goes along; without it, a robot runs out of the picture"""
    small: bool = True
    """its checkpoint is kept"""


ALL = {
    "CartPole-v1": Agent("ppo.py", frames=125, every=2),
    "HalfCheetah-v4": Agent(
        "ppo_continuous_action.py", frames=80, fps=20, width=240, camera="track"
    ),
    "MicrortsMining-v1": Agent("ppo_multidiscrete_mask.py", frames=200),
    "Breakout-v5": Agent("ppo_atari_envpool.py", frames=600, every=3, small=False),
    "Pong-v5": Agent("ppo_atari_envpool.py", frames=200, small=False),
    "starpilot": Agent("ppo_procgen.py", frames=150, fps=15, small=False),
}
SMALL = [name for name, agent in ALL.items() if agent.small]


@dataclass
class Args:
    names: Annotated[list[str], tyro.conf.Positional] = field(default_factory=lambda: SMALL)
    """which agents to make, by their environments"""
    run: Path | None = None
    """folder of a run to take the agent from, instead of training"""
    episodes: int = 20
    """episodes to evaluate over"""


def train(name: str) -> Path:
    """Trains by the script's defaults -> folder of the run."""
    before = set(Path("runs").glob("*"))
    command = [sys.executable, str(ROOT / ALL[name].script), "--env-id", name]
    if subprocess.run(command).returncode != 0:
        common.refuse(f"{name}: its training has failed")
    (run_dir,) = set(Path("runs").glob(f"{name}__*")) - before
    return run_dir


def check_run(name: str, run_dir: Path) -> None:
    """Refuses the run of another environment or script."""
    checkpoint = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)
    if checkpoint["args"]["env_id"] != name:
        common.refuse(f"{run_dir}: was trained on {checkpoint['args']['env_id']}, not on {name}")
    if f"{checkpoint['script']}.py" != ALL[name].script:
        common.refuse(
            f"{run_dir}: was made by {checkpoint['script']}.py, not by {ALL[name].script}"
        )


def copy_checkpoint(run_dir: Path, folder: Path) -> None:
    """Copies what it takes to play: all but the optimizer's state, two thirds of the file."""
    checkpoint = torch.load(run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)
    del checkpoint["optimizer"]
    torch.save(checkpoint, folder / "checkpoint.pt")


def film_episode(folder: Path, camera: str | None) -> Path:
    """Films one episode of an agent: several would take minutes each where there is no GPU."""
    shutil.rmtree(folder / "evaluation", ignore_errors=True)
    if camera is not None:
        gym.spec(folder.name).kwargs["camera_name"] = camera
    evaluate.evaluate(evaluate.Args(folder, episodes=1, capture_video=True))
    return min((folder / "evaluation").glob("*.mp4"))


def make_loop(film: Path, agent: Agent, path: Path) -> None:
    """Cuts a film short and small -> an animated picture, for pages that show no films."""
    images = []
    with VideoFileClip(str(film)) as clip:
        for index, frame in enumerate(clip.iter_frames()):
            if len(images) == agent.frames:
                break
            if index % agent.every == 0:
                image = Image.fromarray(frame)
                height = round(image.height * agent.width / image.width)
                images.append(image.resize((agent.width, height), Image.Resampling.LANCZOS))
    first, *others = images
    first.save(
        path, save_all=True, append_images=others, duration=1000 // agent.fps, loop=0, quality=60
    )
    if path.stat().st_size > MAX_BYTES:
        common.refuse(f"{path}: has {path.stat().st_size:,} bytes, more than {MAX_BYTES:,}")


def make_agent(name: str, run_dir: Path, episodes: int) -> dict:
    """Evaluates and films the agent of a run -> its line in agents.json."""
    check_run(name, run_dir)
    folder = AGENTS / name
    folder.mkdir(parents=True, exist_ok=True)
    copy_checkpoint(run_dir, folder)
    returns = evaluate.evaluate(evaluate.Args(folder, episodes=episodes))
    film = film_episode(folder, ALL[name].camera)
    make_loop(film, ALL[name], folder / "loop.webp")
    shutil.rmtree(folder / "evaluation")
    if not ALL[name].small:
        (folder / "checkpoint.pt").unlink()

    run, _ = report.read_run(run_dir, common.describe_machine())
    return {
        "script": ALL[name].script,
        "command": run["command"],
        "steps": common.count_steps(common.read_checkpoint(run_dir)),
        "hours": round(float(run["hours"]), 3),
        "commit": run["commit"],
        "date": run["date"],
        "machine": run["machine"],
        "mean_return": round(float(np.mean(returns)), 2),
        "std": round(float(np.std(returns)), 2),
        "returns": [round(value, 2) for value in returns],
    }


def make_table(agents: dict) -> str:
    """Lines of agents.json -> the table in docs/agents/README.md."""
    lines = ["| environment | at play | return | trained by | steps |", "|---|---|---|---|---|"]
    for name, agent in agents.items():
        picture = f"![{name}, played by a trained agent]({name}/loop.webp)"
        score = f"{agent['mean_return']:.1f} ± {agent['std']:.1f}, {len(agent['returns'])} episodes"
        cells = [name, picture, score, f"`{agent['command']}`", f"{agent['steps']:,}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write_table(agents: dict) -> None:
    """Puts the table between its marks in docs/agents/README.md."""
    path = AGENTS / "README.md"
    before, rest = path.read_text().split("<!-- agents -->\n")
    _, after = rest.split("<!-- /agents -->")
    marks = ("<!-- agents -->\n", "\n<!-- /agents -->")
    path.write_text(before + marks[0] + make_table(agents) + marks[1] + after)


def main(args: Args) -> None:
    """Makes the agents one after the other; what is done is kept if a later one fails."""
    for name in args.names:
        if name not in ALL:
            common.refuse(f"{name}: is none of {', '.join(ALL)}")
    if args.run is not None and len(args.names) != 1:
        common.refuse(f"--run {args.run}: takes one name")

    path = AGENTS / "agents.json"
    for name in args.names:
        agent = make_agent(name, args.run or train(name), args.episodes)
        agents = json.loads(path.read_text()) if path.exists() else {}
        agents[name] = agent
        agents = {name: agents[name] for name in ALL if name in agents}
        path.write_text(json.dumps(agents, indent=2) + "\n")
        write_table(agents)
        print(f"{name}: mean return {agent['mean_return']:.2f}, std {agent['std']:.2f}")


if __name__ == "__main__":
    main(tyro.cli(Args))
