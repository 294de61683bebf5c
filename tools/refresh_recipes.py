"""Gives the diffs of docs/recipes.md the line numbers that the scripts have now.

    python tools/refresh_recipes.py

Each diff is applied to its script and made anew. One that no longer applies is to be written anew
by hand: the program says which, and leaves docs/recipes.md as it is.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "docs" / "recipes.md"


def refresh(diff: str) -> str:
    """diff: of a script and its copy -> the same changes, at the script's present lines."""
    header = re.match(r"--- (\S+)\n\+\+\+ (\S+)\n", diff)
    if header is None:
        sys.exit(f"a diff in {RECIPES} does not begin with the names of two files")
    script, copy = header.groups()
    original = str(ROOT / script)
    with tempfile.TemporaryDirectory() as folder:
        changed = str(Path(folder, copy))
        command = ["patch", "--silent", f"--output={changed}", original]
        result = subprocess.run(command, input=diff, capture_output=True, text=True)
        if result.returncode != 0:
            sys.exit(f"{copy} no longer applies to {script}: {result.stdout}{result.stderr}")

        command = ["diff", "-u", f"--label={script}", f"--label={copy}", original, changed]
        refreshed = subprocess.run(command, capture_output=True, text=True).stdout

    # Empty lines without the space at their end, which editors take away
    return re.sub(r"^ $", "", refreshed, flags=re.M)


def main() -> None:
    text = RECIPES.read_text()
    text = re.sub(
        r"^```diff\n(.*?)^```$",
        lambda block: f"```diff\n{refresh(block[1])}```",
        text,
        flags=re.M | re.S,
    )
    RECIPES.write_text(text)


if __name__ == "__main__":
    main()
