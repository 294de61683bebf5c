"""Copies functions or classes of one script into all scripts that say the same in the same words.

    python tools/copy_function.py compute_gae                 # from ppo.py, after a change there
    python tools/copy_function.py MaxAndSkip --source ppo_atari.py
    python tools/copy_function.py --all                       # everything of ppo.py

A script that says it in other words, for a reason that tests/test_drift.py names, is left alone;
so is one that has no function of that name.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from test_drift import OTHER_WORDS, SCRIPTS, definitions  # noqa: E402


@dataclass
class Args:
    names: Annotated[list[str], tyro.conf.Positional] = field(default_factory=list)
    """functions and classes to copy"""
    source: str = "ppo.py"
    """the script to copy them from"""
    all: bool = False
    """copy all that the source has"""


def copy_definition(name: str, source: str, target: str) -> bool:
    """Puts the source's words in the place of the target's -> whether they were others."""
    path = ROOT / target
    ours = definitions(source)[name]
    theirs = definitions(target)[name]
    if theirs == ours:
        return False
    path.write_text(path.read_text().replace(theirs, ours, 1))
    return True


def main(args: Args) -> None:
    names = list(definitions(args.source)) if args.all else args.names
    for name in names:
        if name not in definitions(args.source):
            print(f"copy_function.py: {args.source} has no {name}", file=sys.stderr)
            raise SystemExit(2)
        exceptions = OTHER_WORDS.get(name, {})
        for target in SCRIPTS:
            if name not in definitions(target):
                continue
            if args.source in exceptions or target in exceptions:
                continue
            if copy_definition(name, args.source, target):
                print(f"{target}: {name}")


if __name__ == "__main__":
    main(tyro.cli(Args))
