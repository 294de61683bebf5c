"""The site: built of the repository's files, whole, and readable in a browser, wide and narrow."""

import functools
import html
import json
import re
import shutil
import sys
import threading
import tomllib
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import gymnasium as gym
import pandas as pd
import pytest
from conftest import ROOT, import_scripts
from playwright.sync_api import sync_playwright

sys.path.insert(0, str(ROOT / "tools"))

import compare  # noqa: E402
import make_agents  # noqa: E402
import make_site  # noqa: E402

CONFIG = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]
DETAILS = make_site.read_details()
PAIRS = [(a, b) for a, b, _ in make_site.read_pairs()]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copy(ROOT / "zensical.toml", folder)
    make_site.make_pages(folder / "site" / "pages")
    make_site.build(folder)
    return folder / "site" / "html"


@pytest.fixture(scope="module")
def address(site):
    """The address at which the site is served."""
    handler = functools.partial(QuietHandler, directory=str(site))
    with ThreadingHTTPServer(("localhost", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}"
        server.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def browser():
    """A browser of this machine; skips where there is none."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"there is no browser here: none of {', '.join(BROWSERS)}")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def find_html(site: Path) -> list[str]:
    """The pages that were built, by their paths; 404.html is no page."""
    paths = [str(path.relative_to(site)) for path in site.rglob("*.html")]
    return sorted(path for path in paths if path != "404.html")


def test_every_page_is_built_and_can_be_reached(site):
    """Fails when a page of the navigation is missing, or a page is reached by no link."""
    pages = set(find_html(site))
    in_nav = {page.replace(".md", ".html") for page in make_site.find_pages(CONFIG["nav"])}
    sources = {page for page in pages if page.endswith("-source.html")}
    assert in_nav == pages - sources
    assert len(sources) == 8

    linked = set()
    for page in pages:
        for target in re.findall(r'href="([^"#:?]+\.html)', (site / page).read_text()):
            linked.add(str((site / page).parent.joinpath(target).resolve().relative_to(site)))
    assert pages <= linked | {"index.html"}


def test_every_link_and_anchor_is_there(site):
    """Fails when a page leads to, or shows, a file or an anchor that does not exist."""
    texts = {page: (site / page).read_text() for page in find_html(site)}
    anchors = {page: set(re.findall(r'\bid="([^"]+)"', text)) for page, text in texts.items()}
    for page, text in texts.items():
        assert 'href="http://' not in text.replace("http://joschu.net", "")
        for target in re.findall(r'(?:href|src)="([^"]+)"', text):
            path, anchor = urldefrag(html.unescape(target))
            if urlsplit(path).scheme or path in (".", ".."):
                continue
            file = (site / page).parent / unquote(path) if path else site / page
            file = file.resolve()
            assert file.is_file(), (page, target)
            if anchor and file.suffix == ".html" and not anchor.startswith("__"):
                name = str(file.relative_to(site))
                assert unquote(anchor) in anchors[name], (page, target)


def describe_space(space: gym.Space) -> str:
    """A space in the words of README.md's table: a grid has the size of the map."""
    kind = f"`{type(space).__name__}`"
    match space.shape:
        case ():
            return kind
        case (8,) if kind == "`MultiDiscrete`":
            return f"{kind}, eight choices"
        case (_,):
            return f"{kind}, any vector"
        case (_, _, 27):
            return f"{kind} [height, width, 27]"
        case (channels, height, width):
            return f"{kind} [{channels}, {height}, {width}]"


def test_spaces_are_those_of_the_scripts(site):
    """Fails when README.md's table, or a page, gives a script other observations or actions."""
    for name, script in import_scripts().items():
        envs = script.make_envs(script.Args())
        observations = describe_space(envs.single_observation_space)
        actions = describe_space(envs.single_action_space)
        envs.close()
        assert make_site.read_spaces(f"{name}.py") == (observations, actions), name

        page = (site / "scripts" / f"{name}.html").read_text()
        text = re.sub("</?code>", "`", page)
        assert f"Observations: {observations}. Actions: {actions}." in text, name


def write_small_site(folder: Path, text: str, nav: str) -> None:
    """A site of one page, with this text and this navigation."""
    make_site.write(folder / "site" / "pages", "index.md", f"# Start\n\n{text}\n")
    folders = 'docs_dir = "site/pages"\nsite_dir = "site/html"\n'
    config = f'[project]\nsite_name = "x"\nnav = {nav}\n{folders}'
    (folder / "zensical.toml").write_text(config)


@pytest.mark.parametrize("text", ["[x](gone.md)", "[x](index.md#gone)"])
def test_a_broken_link_ends_the_build(text, tmp_path, capfd):
    """Fails when a page with a link to nowhere is built, or one without is not."""
    write_small_site(tmp_path, "[x](index.md#start)", '["index.md"]')
    make_site.build(tmp_path)
    assert (tmp_path / "site" / "html" / "index.html").is_file()

    write_small_site(tmp_path, text, '["index.md"]')
    with pytest.raises(SystemExit) as error:
        make_site.build(tmp_path)
    assert error.value.code == 2
    assert "does not exist" in capfd.readouterr().err


def test_an_unknown_page_ends_the_build(tmp_path, capsys):
    """Fails when zensical.toml can name a page that is not there."""
    write_small_site(tmp_path, "", '["index.md", { X = [{ Y = "gone.md" }] }]')
    with pytest.raises(SystemExit):
        make_site.build(tmp_path)
    assert "gone.md" in capsys.readouterr().err


def test_links_of_documents_are_moved(tmp_path, capsys):
    """Fails when a document's link is not moved to its page, code is changed, or none refused."""
    text = "[a](ppo.py) [b](docs/details.md#procgen) `[c](ppo.py)`\n```sh\n[d](ppo.py)\n```\n"
    moved = make_site.move_links(tmp_path, text, "README.md", "scripts/index.md")
    assert moved == (
        "[a](ppo.md) [b](../details.md#procgen) `[c](ppo.py)`\n```sh\n[d](ppo.py)\n```\n"
    )

    data = "[e](../benchmark/results/prices.json)"
    moved = make_site.move_links(tmp_path, data, "docs/details.md", "details.md")
    assert moved == "[e](files/benchmark/results/prices.json)"
    assert (tmp_path / "files/benchmark/results/prices.json").is_file()

    with pytest.raises(SystemExit):
        make_site.move_links(tmp_path, "[f](gone.py)", "README.md", "index.md")
    assert "gone.py" in capsys.readouterr().err


def test_every_detail_is_shown_with_its_code(tmp_path):
    """Fails when a detail has no section, or its code is not that of the script, line by line."""
    assert len(DETAILS) == 41
    make_site.make_pages(tmp_path)
    page = (tmp_path / "details.md").read_text()
    for detail in DETAILS:
        assert f"## {detail.title} {{ #{detail.anchor} }}" in page
        for script in detail.where:
            script_page = (tmp_path / make_site.PAGES[script]).read_text()
            lines = (ROOT / script).read_text().splitlines()
            for first, code in make_site.cut_detail(script, detail.number):
                assert code in script_page
                shown = code.splitlines()
                assert shown[-1].lstrip()[0] != "#", (script, detail.number)
                for line, wanted in zip(shown, lines[first - 1 :], strict=False):
                    assert line.strip() == wanted.strip()


def test_sources_lead_to_their_commit():
    """Fails when a source is not linked to the file and the commit that docs/details.md names."""
    linked = make_site.link_source("common/models.py#L19 (9b68103)")
    blob = "https://github.com/openai/baselines/blob"
    assert f"]({blob}/9b68103/baselines/common/models.py#L19)" in linked
    linked = make_site.link_source("common/policies.py#L157, common/models.py#L15-L26")
    assert f"]({blob}/ea25b9e/baselines/common/models.py#L15-L26)" in linked
    assert linked.count("](") == 2


@pytest.mark.parametrize("a, b", PAIRS)
def test_a_comparison_is_the_two_scripts(a, b):
    """Fails when a line is lost, doubled, out of order, or its difference is not marked."""
    scripts = [compare.read_script(name, (ROOT / name).read_text()) for name in (a, b)]
    page = compare.render_comparison(*scripts)
    boxes = re.findall(r'<pre class="([\w ]+)"><code>(.*?)</code></pre>', page, re.S)
    for script, kinds in zip(scripts, [("old", "equal again"), ("new", "equal")], strict=True):
        shown = [html.unescape(re.sub("<.+?>", "", text)) for kind, text in boxes if kind in kinds]
        assert "".join(shown).splitlines() == script.lines
    numbers = [re.findall(r'data-line="(\d+)"', text) for kind, text in boxes if kind == "new"]
    changed = {int(number) for group in numbers for number in group}
    equal = set(scripts[0].lines)
    for number, line in enumerate(scripts[1].lines, start=1):
        assert line in equal or number in changed, line


def test_words_that_changed_are_marked():
    """Fails when the wrong words of a changed line are marked."""
    old = compare.read_script("a.py", "x = 1\nrate = first(learning, 0.5)\n")
    new = compare.read_script("b.py", "x = 1\nrate = first(learning, 0.25)\n")
    marked = re.findall("<mark>(.+?)</mark>", compare.render_comparison(old, new))
    assert [re.sub("<.+?>", "", mark) for mark in marked] == ["5", "25"]


def test_measured_effects_appear(tmp_path):
    """Fails when ablations.csv is there and what it measured is not on the pages."""
    common = dict(domain="classic", script="ppo.py", env_id="CartPole-v1", total_timesteps=500_000)
    lines = []
    for detail, variant, returns in (
        ("full", "recipe", (480, 500)),
        ("11", "no gradient clipping", (250, 270)),
        ("2-4", "plain start", (400, 410)),
        ("time limits", "bootstrapped", (485, 490)),
    ):
        for seed, value in enumerate(returns):
            line = dict(detail=detail, variant=variant, seed=seed, mean_return=value)
            lines.append(line | dict(first_return=20.0) | common)
    pd.DataFrame(lines).to_csv(tmp_path / "ablations.csv", index=False)

    pages = tmp_path / "pages"
    make_site.make_pages(pages, results=tmp_path)
    for page in ("details.md", "scripts/ppo.md", "results.md"):
        rows = re.findall(r"^\|.*no gradient clipping \|.*$", (pages / page).read_text(), re.M)
        (row,) = [row for row in rows if "500,000" in row]  # docs/details.md's own has no steps
        assert "-49 %" in row  # (260 - 490) / (490 - 20)
        assert "CartPole-v1" in row

    # A variant of several details is with each of them; one of none is among the results alone
    assert (pages / "scripts" / "ppo.md").read_text().count("plain start") == 3
    results = (pages / "results.md").read_text()
    assert results.count("![classic, each detail taken out, ") == 2  # figures
    assert "| [2-4](details.md#detail-2) | plain start |" in results
    assert "| time limits | bootstrapped |" in results
    assert "bootstrapped" not in (pages / "scripts" / "ppo.md").read_text()


def test_agents_are_those_of_the_table():
    """Fails when docs/agents/README.md shows other returns than were measured, or a film is big."""
    agents = json.loads((ROOT / "docs" / "agents" / "agents.json").read_text())
    readme = (ROOT / "docs" / "agents" / "README.md").read_text()
    assert make_agents.make_table(agents) in readme
    for name, agent in agents.items():
        folder = ROOT / "docs" / "agents" / name
        assert (folder / "loop.webp").stat().st_size < make_agents.MAX_BYTES
        assert agent["mean_return"] == pytest.approx(sum(agent["returns"]) / len(agent["returns"]))
        assert (folder / "checkpoint.pt").is_file() == make_agents.ALL[name].small


@pytest.mark.parametrize("name", make_agents.SMALL)
def test_agents_play_as_well_as_is_said(name, evaluate):
    """Fails when a committed checkpoint does not load, or its agent has forgotten how to play."""
    agent = json.loads((ROOT / "docs" / "agents" / "agents.json").read_text())[name]
    (value,) = evaluate(ROOT / "docs" / "agents" / name, episodes=1)
    spread = max(agent["returns"]) - min(agent["returns"])
    assert value >= min(agent["returns"]) - spread


def test_every_page_fits_the_window(browser, site, address):
    """Fails when a page scrolls sideways, has an error, or loads anything from elsewhere."""
    page = browser.new_page()
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: problems.extend(find_foreign(request.url, address)))

    def note(message):
        if message.type in ("error", "warning"):
            problems.append(message.text)

    def note_failure(request):
        # A slow favicon is given up when this test opens the next page. A missing one is an error
        # on the console.
        if request.failure != "net::ERR_ABORTED":
            problems.append(f"failed: {request.url}, {request.failure}")

    page.on("console", note)
    page.on("requestfailed", note_failure)
    for path in find_html(site):
        page.set_viewport_size({"width": 390, "height": 900})
        page.goto(f"{address}/{path}")
        for width in (390, 1440):
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") <= width, (path, width)
            assert page.locator("h1").first.is_visible(), (path, width)
        assert not problems, (path, problems)
    page.close()


def find_foreign(url: str, address: str) -> list[str]:
    """The url, if it is neither of this site nor made by the page itself."""
    own = (address, "data:", "blob:")
    return [] if url.startswith(own) else [f"from elsewhere: {url}"]


def test_agents_are_not_mistaken_for_one_another(capsys):
    """Fails when an unknown agent is accepted, or the run of another environment."""
    cartpole = ROOT / "docs" / "agents" / "CartPole-v1"
    for args, words in (
        (make_agents.Args(["Gone-v1"]), "Gone-v1"),
        (make_agents.Args(["HalfCheetah-v4"], run=cartpole), "was trained on CartPole-v1"),
        (make_agents.Args(run=cartpole), "takes one name"),
    ):
        with pytest.raises(SystemExit) as error:
            make_agents.main(args)
        assert error.value.code == 2
        assert words in capsys.readouterr().err


def test_code_keeps_its_indentation(browser, site, address):
    """Fails when a page shows the lines of a code block without the spaces they begin with."""
    page = browser.new_page()
    indented = 0
    for path in find_html(site):
        page.goto(f"{address}/{path}")
        both = "blocks => blocks.map(block => [block.textContent, block.innerText])"
        for written, shown in page.locator("pre code:visible").evaluate_all(both):
            beginnings = re.findall("^ *(?=[^ \n])", written, re.MULTILINE)
            assert re.findall("^ *(?=[^ \n])", shown, re.MULTILINE) == beginnings, (path, shown)
            indented += sum(len(spaces) > 0 for spaces in beginnings)
    assert indented > 1000
    page.close()


def test_line_numbers_are_beside_their_lines(browser, address):
    """Fails when a line of a script is not at the height of its number, if only far down."""
    page = browser.new_page()
    tops = "lines => lines.map(line => line.getBoundingClientRect().top)"
    for script in make_site.SCRIPTS:
        page.goto(f"{address}/scripts/{Path(script).stem}-source.html")
        numbers = page.locator(".highlighttable .linenos a").evaluate_all(tops)
        lines = page.locator(".highlighttable code > span").evaluate_all(tops)
        assert len(numbers) == len(lines) == len((ROOT / script).read_text().splitlines())
        distances = [abs(number - line) for number, line in zip(numbers, lines, strict=True)]
        assert max(distances) < 4, script  # of 19 pixels that a line is high
    page.close()


@pytest.mark.parametrize("width", [390, 1440])
def test_films_in_tables_are_large_enough(width, browser, address):
    """Fails when long cells beside the agents at play shrink them."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    for path in ("index.html", "agents.html"):
        page.goto(f"{address}/{path}")
        films = page.locator("td img").all()
        assert len(films) >= 3, path
        for film in films:
            assert film.bounding_box()["width"] >= 120, path
    page.close()


@pytest.mark.parametrize("width", [390, 1440])
def test_search_finds_a_detail(width, browser, address):
    """Fails when the search box does not lead from "gradient clipping" to detail 11."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(f"{address}/index.html")
    page.locator("label[for=__search]:visible, .md-search__button:visible").first.click()
    page.get_by_role("combobox", name="Search").fill("gradient clipping")
    page.get_by_role("option", name="Detail 11: global gradient clipping").first.click()
    page.wait_for_url("**/details.html*detail-11*")
    assert page.get_by_role("heading", name="Detail 11").is_visible()
    page.close()


@pytest.mark.parametrize("width", [390, 1440])
def test_a_comparison_opens(width, browser, address):
    """Fails when equal lines cannot be opened, or the columns are not what fits the window."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(f"{address}/compare/index.html")
    page.get_by_role("link", name="ppo.py → ppo_continuous_action.py").first.click()
    assert page.get_by_role("heading", name="ppo.py → ppo_continuous_action.py").is_visible()

    line = page.locator(".diff pre.equal:not(.again) .line", has_text="def ppo_loss(").first
    assert not line.is_visible()
    page.locator(".diff summary", has_text="ppo_loss").first.click()
    assert line.is_visible()

    # Both in view on a wide page, one on a narrow one
    assert page.locator(".diff pre.again", has_text="def ppo_loss(").is_visible() == (width > 1000)
    page.get_by_role("button", name="Open what is equal").click()
    assert page.locator(".diff details:not([open])").count() == 0
    page.get_by_role("button", name="Close what is equal").click()
    assert page.locator(".diff details[open]").count() == 0
    page.close()
