"""Makes the project's site out of the repository's own files.

    pip install -e ".[docs,benchmark]"
    python tools/make_site.py
    python -m http.server --directory site/html    # read it at http://localhost:8000

Writes Markdown pages to site/pages/ and has Zensical build them, by zensical.toml, into site/html/.
Nothing in there is loaded from elsewhere; only the search needs a server.
Nothing is written twice: a page is a document of the repository whose links are moved to where they
lead on the site, or is put together from scripts, docs/details.md and benchmark/results/. A link
that leads nowhere ends the build.
"""

import csv
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import tyro
from compare import compare_names, read_script, render_comparison

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmark"))

import ablations  # noqa: E402
import common  # noqa: E402

SCRIPTS = sorted(path.name for path in ROOT.glob("ppo*.py"))
BASELINES = "https://github.com/openai/baselines/blob"

# Where a file of the repository has become a page; other files are copied to site/pages/files/
PAGES = {
    "README.md": "index.md",
    "docs/details.md": "details.md",
    "docs/recipes.md": "recipes.md",
    "docs/agents/README.md": "agents.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmark/results": "results.md",
} | {script: f"scripts/{Path(script).stem}.md" for script in SCRIPTS}

# What stands at the top of a page that nothing lies under; of one that is shown from side to side
ALONE = "---\nhide:\n  - navigation\n---\n\n"
WIDE = "---\nsearch:\n  exclude: true\nhide:\n  - navigation\n  - toc\n---\n\n"


@dataclass
class Detail:
    """A row of the table in docs/details.md."""

    number: str
    name: str
    where: list[str]
    why: str
    source: str
    tests: str

    @property
    def title(self) -> str:
        return f"Detail {self.number}: {self.name}"

    @property
    def anchor(self) -> str:
        return f"detail-{self.number.lower()}"


def read(path: str) -> str:
    """-> the text of a file of the repository."""
    return (ROOT / path).read_text()


def write(pages: Path, page: str, text: str) -> None:
    """Writes one page."""
    path = pages / page
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def make_link(target: str, page: str) -> str:
    """-> how that page names another page or file of the site."""
    path, hash_sign, anchor = target.partition("#")
    return os.path.relpath(path, Path(page).parent) + hash_sign + anchor


def move_links(pages: Path, text: str, source: str, page: str) -> str:
    """A document of the repository -> the same as a page: its links lead to pages, or to copies.

    source: the document's name; page: that of the page. Refuses a link to a file that is not there.
    """

    def move(match: re.Match) -> str:
        target = match["target"]
        if target is None or target.startswith(("#", "https://", "http://")):
            return match[0]  # code, or no file

        path, hash_sign, anchor = target.partition("#")
        path = os.path.normpath(Path(source).parent / path)
        if not (ROOT / path).exists():
            common.refuse(f"{source}: leads to {target}, which is not there")
        return f"]({make_link(place_file(pages, path) + hash_sign + anchor, page)})"

    code = r"```.*?^ *```|`[^`\n]*`"
    return re.sub(rf"{code}|\]\((?P<target>[^)\s]+)\)", move, text, flags=re.S | re.M)


def place_file(pages: Path, path: str) -> str:
    """-> where a file of the repository is on the site; it is copied there if it is no page."""
    if path in PAGES:
        return PAGES[path]
    place = f"files/{path}"
    (pages / place).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / path, pages / place)
    return place


def cut_section(text: str, title: str) -> str:
    """-> what stands under a heading of the second rank, without the heading."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    if found is None:
        common.refuse(f"there is no section '{title}'")
    return found[1].strip() + "\n"


def read_rows(table: str) -> list[list[str]]:
    """A Markdown table -> its rows of cells, without head and rule."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def write_table(head: list[str], rows: list[list[str]]) -> str:
    """-> a Markdown table, "" for one without rows."""
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n\n"


def read_details() -> list[Detail]:
    """-> the rows of the table in docs/details.md."""
    details = []
    for line in read("docs/details.md").splitlines():
        if re.match(r"\| A?\d+ \| .+ \| .+ \| .+ \| .+ \| .+ \|$", line):
            number, name, where, why, source, tests = line.strip("| ").split(" | ")
            scripts = SCRIPTS if where == "every script" else re.findall(r"`(\w+\.py)`", where)
            details.append(Detail(number, name, scripts, why, source, tests))
    if not details:
        common.refuse("docs/details.md: there is no table of details")
    return details


def link_source(source: str) -> str:
    """The source of a detail -> the same with links to GitHub, where it is a file of baselines.

    "common/distributions.py#L104 (9b68103)" is that file at commit 9b68103; no commit is ea25b9e.
    """
    commit = re.search(r"\(([0-9a-f]{7})\)", source)
    commit = commit[1] if commit else "ea25b9e"
    folders = r"(?:a2c|common|ppo2)/[\w/]+\.py#L\d+(?:-L\d+)?"
    return re.sub(
        folders, lambda match: f"[{match[0]}]({BASELINES}/{commit}/baselines/{match[0]})", source
    )


def cut_detail(script: str, number: str) -> list[tuple[int, str]]:
    """-> (number of its first line, code) of each place where a script marks this detail.

    It ends before a blank line, the next detail, or what is indented less than its comment.
    """
    lines = read(script).splitlines()
    found = []
    for index, line in enumerate(lines):
        if not re.match(rf" *# Detail {number}: ", line):
            continue
        margin = len(line) - len(line.lstrip())
        end = index + 1
        while re.match(r" *# Detail ", lines[end]):  # other marks of the same lines
            end += 1
        while lines[end].startswith(" " * margin) and lines[end].strip():
            if re.match(r" *# Detail ", lines[end]):
                break
            end += 1
        code = "\n".join(line[margin:] for line in lines[index:end])
        found.append((index + 1, code))
    if not found:
        common.refuse(
            f"{script}: detail {number} is not marked, but docs/details.md says it is there"
        )
    return found


def show_code(script: str, number: str) -> str:
    """-> a block of code for each place where a script marks this detail."""
    blocks = []
    for line, code in cut_detail(script, number):
        blocks.append(f'```python title="{script}, line {line}" linenums="{line}"\n{code}\n```\n\n')
    return "".join(blocks)


def read_effects(results: Path) -> list[dict]:
    """-> measured effects of leaving a detail out, from ablations.csv, the greatest loss last.

    Empty where nothing has been measured yet. benchmark/ablations.py computes them.
    """
    path = results / "ablations.csv"
    if not path.exists():
        return []

    effects = []
    lines = pd.read_csv(path, dtype={"detail": str})
    for (domain, steps), of_domain in lines.groupby(["domain", "total_timesteps"]):
        changes = ablations.compute_changes(of_domain)
        for row in changes.to_dict("records"):
            number, _, name = row["label"].partition(": ")
            env_ids = [
                column
                for column in changes
                if column not in ablations.NOT_ENV_IDS and not pd.isna(row[column])
            ]
            interval = ""
            if not pd.isna(row["low"]):
                low, high = ablations.in_percent(row["low"]), ablations.in_percent(row["high"])
                interval = f"{low} to {high} %"
            effect = {
                "domain": domain,
                "script": row["script"],
                "number": number,
                "instead": name,
                "change": f"{ablations.in_percent(row['change'])} %",
                "interval": interval,
                "seeds": str(row["seeds"]),
                "environments": ", ".join(env_ids),
                "steps": f"{steps:,}",
            }
            effects.append(effect)
    return effects


def find_effects(effects: list[dict], scripts: list[str], number: str) -> list[dict]:
    """-> those of a detail in these scripts, with those of several details that it is part of."""
    found = []
    for effect in effects:
        if effect["script"] in scripts and number in list_numbers(effect["number"]):
            found.append(effect)
    return found


def list_numbers(number: str) -> list[str]:
    """What a variant leaves out -> its details: "28-31" are four, and "time limits" is none."""
    numbers = [detail.number for detail in read_details()]
    if number in numbers:
        return [number]
    first, _, last = number.partition("-")
    if first in numbers and last in numbers:
        return numbers[numbers.index(first) : numbers.index(last) + 1]
    return []


def show_effects(effects: list[dict]) -> str:
    """-> a table of measured effects, "" if there are none."""
    head = ["script", "instead", "change", "95 %", "seeds", "environments", "steps"]
    rows = [
        [
            f"`{e['script']}`",
            e["instead"],
            e["change"],
            e["interval"],
            e["seeds"],
            e["environments"],
            e["steps"],
        ]
        for e in effects
    ]
    return write_table(head, rows)


def make_documents(pages: Path) -> None:
    """Documents that are pages as they stand."""
    for source in (
        "README.md",
        "docs/recipes.md",
        "docs/agents/README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
    ):
        page = PAGES[source]
        write(pages, page, ALONE + move_links(pages, read(source), source, page))


def make_details(pages: Path, details: list[Detail], effects: list[dict]) -> None:
    """docs/details.md, with its table unfolded: a section for each detail, with its code."""
    text = move_links(pages, read("docs/details.md"), "docs/details.md", "details.md")
    before, _, after = text.partition("| # | name |")
    after = after[after.index("\n\n") :]
    parts = [ALONE, before]
    for detail in details:
        parts.append(f"## {detail.title} {{ #{detail.anchor} }}\n\n{capitalize(detail.why)}.\n\n")
        parts.append(show_code(detail.where[0], detail.number))
        links = [
            f"[{script}](scripts/{Path(script).stem}.md#{detail.anchor})" for script in detail.where
        ]
        parts.append(
            f"In {', '.join(links)}. Source: {link_source(detail.source)}. "
            f"Fails without it: {detail.tests}.\n{{ .facts }}\n\n"
        )
        measured = find_effects(effects, SCRIPTS, detail.number)
        if measured:
            parts.append("Measured without it, as a part of what the whole recipe gains:\n\n")
            parts.append(show_effects(measured))
    parts.append(after)
    write(pages, "details.md", "".join(parts))


def capitalize(text: str) -> str:
    """-> the same with a capital letter first; code is left as it is."""
    return text[:1].upper() + text[1:]


def find_extra(script: str) -> str | None:
    """-> the extra of pyproject.toml that a script needs, None if the base is enough."""
    project = tomllib.loads(read("pyproject.toml"))["project"]
    (block,) = re.findall(r"^# /// script\n(.*?)^# ///$", read(script), re.M | re.S)
    needed = tomllib.loads(re.sub(r"^# ?", "", block, flags=re.M))["dependencies"]
    needed = set(needed) - set(project["dependencies"])
    if not needed:
        return None
    for extra, pins in project["optional-dependencies"].items():
        if set(pins) == needed:
            return extra
    common.refuse(f"{script}: no extra of pyproject.toml has what it needs beside the base")


def show_arguments(script: str) -> str:
    """-> tables of the arguments, by their groups in Args."""
    (block,) = re.findall(r"^class Args:\n(.*?)^    (?:@|def )", read(script), re.M | re.S)
    parts = []
    rows = []
    pattern = r'^    # (.+)$|^    (\w+): .+ = (.+)\n    """(.+)"""$'
    for group, name, default, text in re.findall(pattern, block, re.M):
        if group:
            parts.append(write_table(["option", "default", "what it is"], rows))
            parts.append(f"### {group}\n\n")
            rows = []
            continue
        if default == "Path(__file__).stem":
            default = f'"{Path(script).stem}"'
        rows.append([f"`--{name.replace('_', '-')}`", f"`{default}`", text])
    parts.append(write_table(["option", "default", "what it is"], rows))
    return "".join(parts)


def find_titles() -> dict[str, str]:
    """-> {name of a result: its title}, from the pictures of README.md, in their order."""
    pictures = re.findall(
        r"!\[(.+?), mean return .*?\]\(benchmark/results/(\w+)_steps\.png\)", read("README.md")
    )
    return {name: title for title, name in pictures}


def show_curves(pages: Path, name: str, page: str) -> str:
    """-> the learning curves of one result, over steps and over hours."""
    parts = []
    title = find_titles()[name]
    for kind, words in (("steps", "environment steps"), ("hours", "hours")):
        path = f"benchmark/results/{name}_{kind}.png"
        if (ROOT / path).exists():
            link = make_link(place_file(pages, path), page)
            parts.append(f"![{title}, mean return over {words}]({link}){{ loading=lazy }}\n\n")
    return "".join(parts)


def show_results(pages: Path, script: str, page: str) -> str:
    """-> rows and curves of a script's trainings, beside what is published."""
    parts = []
    for path in sorted((ROOT / "benchmark" / "results").glob("*.md")):
        table = path.read_text()
        rows = [row for row in read_rows(table) if row[0].split()[0] == script]
        if rows:
            head = [cell.strip() for cell in table.splitlines()[0].strip("| ").split(" | ")]
            parts.append(write_table(head, rows))
            parts.append(show_curves(pages, path.stem, page))
    if not parts:
        return "Nothing has been measured yet.\n\n"
    return "".join(parts)


def show_speed(script: str) -> str:
    """-> steps per second of a script beside others', "" if it was not measured."""
    parts = []
    for path in sorted((ROOT / "benchmark" / "results").glob("speed_*.json")):
        speed = json.loads(path.read_text())
        if not any(name.split(" ")[0].strip(",") == script for name in speed["ratio"]):
            continue
        rows = []
        for name, ratio in speed["ratio"].items():
            median = statistics.median(speed["steps_per_second"][name])
            rows.append([speed["env_id"], name, f"{median:.0f}", ratio])
        parts.append(write_table(["environment", "", "median steps/s", "ratio"], rows))
        parts.append(f"{speed['date']}, {speed['machine']}: `{speed['command']}`\n{{ .facts }}\n\n")
    return "".join(parts)


def read_spaces(script: str) -> tuple[str, str]:
    """-> the observations and the actions that a script is for, from README.md's table."""
    row = rf"^\| \[{script}\]\({script}\) \| [^|]+ \| ([^|]+) \| ([^|]+) \|"
    ((observations, actions),) = re.findall(row, read("README.md"), re.M)
    return observations, actions


def make_script_page(pages: Path, script: str, details: list[Detail], effects: list[dict]) -> None:
    """A page on one script, and one with its text."""
    stem = Path(script).stem
    page = PAGES[script]
    docstring = read(script).split('"""')[1]
    title, *paragraphs = docstring.strip().split("\n\n")
    commands = re.sub("^    ", "", paragraphs[0], flags=re.M)
    extra = find_extra(script)
    install = f'pip install -e ".[{extra}]"' if extra else "pip install -e ."

    parts = [f"# {script}\n\n{title}\n\n"]
    observations, actions = read_spaces(script)
    parts.append(f"Observations: {observations}. Actions: {actions}.\n\n")
    agents = json.loads(read("docs/agents/agents.json"))
    for name, agent in agents.items():
        if agent["script"] == script:
            link = make_link(place_file(pages, f"docs/agents/{name}/loop.webp"), page)
            parts.append(f"![{name}, played by an agent of this script]({link})\n{{ .loop }}\n\n")

    parts.append(f"## Install and use\n\n```sh\n{install}\n{commands}\n```\n\n")
    parts.append(
        f"Or `uv run {script}`, which installs what the file names at its top. "
        f"[The whole script]({stem}-source.md) · {list_comparisons(script, page)}\n\n"
    )
    parts += [paragraph + "\n\n" for paragraph in paragraphs[1:]]

    parts.append("## Details\n\n")
    for detail in details:
        if script not in detail.where:
            continue
        parts.append(f"### {detail.title} {{ #{detail.anchor} }}\n\n{capitalize(detail.why)}.\n\n")
        parts.append(show_code(script, detail.number))
        link = make_link(f"details.md#{detail.anchor}", page)
        parts.append(
            f"Source: {link_source(detail.source)}. [Everywhere else]({link})\n{{ .facts }}\n\n"
        )
        measured = find_effects(effects, [script], detail.number)
        if measured:
            parts.append("Measured without it, as a part of what the whole recipe gains:\n\n")
            parts.append(show_effects(measured))

    parts.append(f"## Results\n\n{show_results(pages, script, page)}")
    speed = show_speed(script)
    if speed:
        parts.append(f"## Speed\n\n{speed}")
    parts.append(f"## Arguments\n\n{show_arguments(script)}")
    metrics = cut_section(read("README.md"), "Logged metrics")
    parts.append(f"## Logged metrics\n\n{move_links(pages, metrics, 'README.md', page)}")
    write(pages, page, "".join(parts))

    source = (
        WIDE + f"# {script}, the whole script\n\n" + f'```python linenums="1"\n{read(script)}```\n'
    )
    write(pages, f"scripts/{stem}-source.md", source)


def read_pairs() -> list[tuple[str, str, str]]:
    """-> (a, b, what the difference shows), from README.md's `diff a b  # words`."""
    return re.findall(r"^diff (\S+) (\S+) +# (.+)$", read("README.md"), re.M)


def name_comparison(a: str, b: str) -> str:
    """-> the page that compares these two scripts."""
    return f"compare/{Path(a).stem}--{Path(b).stem}.md"


def list_comparisons(script: str, page: str) -> str:
    """-> links to the comparisons that a script is part of."""
    links = []
    for a, b, _ in read_pairs():
        if script in (a, b):
            other = b if script == a else a
            links.append(f"[beside {other}]({make_link(name_comparison(a, b), page)})")
    return " · ".join(links)


def show_names(names: dict[str, list[str]], a: str, b: str) -> str:
    """-> a list of functions and classes: what differs, with links, and what is equal."""

    def link(name: str) -> str:
        return f"[`{name}`](#in-{name})"

    lines = []
    for title, key in (
        ("In other words", "other words"),
        (f"Only in {a}", "only in a"),
        (f"Only in {b}", "only in b"),
    ):
        if names[key]:
            lines.append(f"- **{title}**: {', '.join(map(link, names[key]))}")
    equal = ", ".join(f"`{name}`" for name in names["equal"])
    lines.append(f"- **Equal, byte for byte**: {equal}")
    return "\n".join(lines) + "\n\n"


def make_comparisons(pages: Path) -> None:
    """A page for each pair of README.md, and one that leads to them."""
    pairs = read_pairs()
    if not pairs:
        common.refuse("README.md: there is no `diff a b  # words`")
    scripts = {name: read_script(name, read(name)) for name in SCRIPTS}

    rows = []
    for a, b, words in pairs:
        page = name_comparison(a, b)
        names = compare_names(scripts[a], scripts[b])
        link = f"[{a} → {b}]({make_link(page, 'compare/index.md')})"
        count = f"{len(names['equal'])} functions are equal"
        rows.append([link, f"{capitalize(words)}; {count}"])
        text = (
            WIDE
            + f"# {a} → {b}\n\n{capitalize(words)}. [All comparisons](index.md)\n\n"
            + show_names(names, a, b)
            + '<button type="button" class="open-all">Open what is equal</button>\n\n'
            + render_comparison(scripts[a], scripts[b])
            + "\n"
        )
        write(pages, page, text)

    head = ["from → to", "what it shows"]
    text = (
        "# Compare\n\n"
        "Where two scripts do the same thing they say it in the same words, so what is left is the "
        "difference between two variants of PPO. Functions that are equal, byte for byte, are "
        "closed; click to open them.\n\n" + write_table(head, rows)
    )
    write(pages, "compare/index.md", text)


def make_scripts_index(pages: Path) -> None:
    """The table of README.md's section on scripts, with what follows from it."""
    text = cut_section(read("README.md"), "The scripts").partition("\nWhere two scripts")[0]
    page = "scripts/index.md"
    write(pages, page, "# The scripts\n\n" + move_links(pages, text, "README.md", page))


def show_runs(path: Path) -> str:
    """-> a closed box with every run of a result: seed, return, date, commit, machine, command."""
    with path.open() as file:
        runs = list(csv.DictReader(file))
    rows = []
    for run in runs:
        rows.append(
            [
                run["env_id"],
                run["seed"],
                f"{float(run['mean_return']):.1f}",
                f"{int(run['steps']):,}",
                f"{float(run['hours']):.2f}",
                run["date"],
                f"`{run['commit'][:7]}`",
                run["machine"],
                f"`{run['command']}`",
            ]
        )
    head = ["environment", "seed", "mean return", "steps", "hours", "date", "commit", "machine"]
    table = write_table([*head, "command"], rows).replace("\n|", "\n    |")
    return f'??? note "Every run"\n\n    {table}'


def make_results(pages: Path, effects: list[dict]) -> None:
    """All tables and curves of benchmark/results/ that README.md shows."""
    page = "results.md"
    readme = read("README.md")
    folder = ROOT / "benchmark" / "results"
    before = cut_section(readme, "Results").partition("<!-- results -->")[0]
    parts = [ALONE, "# Results\n\n", move_links(pages, before, "README.md", page), "\n"]
    for name, title in find_titles().items():
        parts.append(f"## {title} ({name})\n\n")
        parts.append((folder / f"{name}.md").read_text().strip() + "\n\n")
        parts.append(show_curves(pages, name, page))
        runs = folder / f"{name}_runs.csv"
        if runs.exists():
            parts.append(show_runs(runs))
        files = []
        for kind in ("runs", "curves"):
            file = f"benchmark/results/{name}_{kind}.csv"
            if (ROOT / file).exists():
                files.append(f"[{name}_{kind}.csv]({place_file(pages, file)})")
        parts.append(f"Files: {', '.join(files)}\n{{ .facts }}\n\n")

    if effects:
        parts.append(show_ablations(pages, effects))
    speed = cut_section(readme, "Speed")
    parts.append(f"## Speed\n\n{move_links(pages, speed, 'README.md', page)}\n")
    for path in sorted(folder.glob("*.json")):
        place = place_file(pages, f"benchmark/results/{path.name}")
        parts.append(f"- [{path.name}]({place})\n")
    write(pages, page, "".join(parts))


def show_ablations(pages: Path, effects: list[dict]) -> str:
    """-> Markdown: what each detail is worth, for each domain, with its figures."""
    parts = [
        "## Each detail taken out\n\n"
        "The change of the interquartile mean over seeds when one detail is taken out, in units of "
        "what the full recipe gains in its training: -100 % is to have learned nothing. Of fewer "
        "than five seeds there is no interval, and a change may be chance.\n\n"
    ]
    # The overview has figures of all domains, and no rows of its own
    domains = sorted({effect["domain"] for effect in effects})
    for domain in ["overview", *domains]:
        parts.append(f"### {domain}\n\n")
        for suffix, measure in (
            ("", "return at the end"),
            ("_throughout", "mean over the training"),
        ):
            figure = f"benchmark/results/ablations_{domain}{suffix}.png"
            if (ROOT / figure).exists():
                link = place_file(pages, figure)
                words = f"{domain}, each detail taken out, {measure}"
                parts.append(f"![{words}]({link}){{ loading=lazy }}\n\n")
        rows = []
        for effect in effects:
            if effect["domain"] == domain:
                link = effect["number"]
                if numbers := list_numbers(link):
                    link = f"[{link}](details.md#detail-{numbers[0].lower()})"
                rows.append(
                    [
                        link,
                        effect["instead"],
                        f"`{effect['script']}`",
                        effect["change"],
                        effect["interval"],
                        effect["seeds"],
                        effect["environments"],
                        effect["steps"],
                    ]
                )
        head = ["detail", "instead", "script", "change", "95 %", "seeds", "environments", "steps"]
        parts.append(write_table(head, rows))
    return "".join(parts)


def make_pages(pages: Path, results: Path = ROOT / "benchmark" / "results") -> None:
    """Writes all pages; results: the folder that has ablations.csv, if there is one."""
    shutil.rmtree(pages, ignore_errors=True)
    details = read_details()
    effects = read_effects(results)
    make_documents(pages)
    make_details(pages, details, effects)
    make_scripts_index(pages)
    for script in SCRIPTS:
        make_script_page(pages, script, details, effects)
    make_comparisons(pages)
    make_results(pages, effects)
    shutil.copytree(ROOT / "docs" / "site", pages / "style")


def build(folder: Path) -> None:
    """Makes HTML of the pages in folder/site/pages, by the zensical.toml in the folder.

    A broken link ends it, and so does a page that zensical.toml names and that is not there.
    """
    config = tomllib.loads((folder / "zensical.toml").read_text())["project"]
    for page in find_pages(config["nav"]):
        if not (folder / config["docs_dir"] / page).is_file():
            common.refuse(f"zensical.toml: names the page {page}, which is not there")

    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    if subprocess.run(command, cwd=folder).returncode != 0:
        common.refuse("Zensical did not build the site; what it says above is to be mended")


def find_pages(nav: list) -> list[str]:
    """-> the pages that a navigation names, at any depth."""
    pages = []
    for item in nav:
        if isinstance(item, str):
            pages.append(item)
            continue
        for value in item.values():
            pages += find_pages(value) if isinstance(value, list) else [value]
    return pages


def main() -> None:
    """Makes the project's site, in site/html/."""
    make_pages(ROOT / "site" / "pages")
    build(ROOT)


if __name__ == "__main__":
    tyro.cli(main)
