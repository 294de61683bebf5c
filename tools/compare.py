"""Two scripts side by side, as HTML: what differs is open and coloured, what is equal is closed.

A page that is wide has the two scripts in two columns; on a narrow one, the old lines stand above
the new ones, and equal lines stand there once. docs/site/site.css says how.
"""

import ast
import difflib
import html
import re
from dataclasses import dataclass

from pygments.lexers import PythonLexer
from pygments.token import STANDARD_TYPES

CONTEXT = 3  # equal lines that stay open on either side of a change
SIMILAR = 0.6  # from here on, two lines count as one that was changed


@dataclass
class Script:
    """A file, as it is shown."""

    name: str
    lines: list[str]
    tokens: list[list[tuple[str, str]]]
    """of each line: (class of its colour, text)"""
    spans: dict[str, range]
    """of each function and class at the top of the file: indices of its lines"""

    def names_in(self, indices: range) -> list[str]:
        """-> the functions and classes that lie in these lines as a whole."""
        names = []
        for name, span in self.spans.items():
            if indices.start <= span.start and span.stop <= indices.stop:
                names.append(name)
        return names

    def name_at(self, index: int) -> str | None:
        """-> the function or class that this line belongs to, None for one outside of all."""
        for name, span in self.spans.items():
            if index in span:
                return name
        return None


def read_script(name: str, source: str) -> Script:
    """Cuts a file into lines, colours them, and finds its functions and classes."""
    spans = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            spans[node.name] = range(first - 1, node.end_lineno)

    tokens = [[]]
    for kind, text in PythonLexer(stripnl=False).get_tokens(source):
        first, *others = text.split("\n")
        tokens[-1].append((STANDARD_TYPES.get(kind, ""), first))
        for part in others:
            tokens.append([(STANDARD_TYPES.get(kind, ""), part)])
    lines = source.splitlines()
    return Script(name, lines, tokens[: len(lines)], spans)


def find_changed_words(old: str, new: str) -> tuple[set[int], set[int]]:
    """-> which characters of either line are in a word that the other one lacks."""
    pattern = r"\w+|\s+|[^\w\s]"
    old_words = re.findall(pattern, old)
    new_words = re.findall(pattern, new)
    matcher = difflib.SequenceMatcher(None, old_words, new_words)
    changed = (set(), set())
    for words, characters, side in ((old_words, changed[0], 0), (new_words, changed[1], 1)):
        kept = set()
        for block in matcher.get_matching_blocks():
            kept.update(range(block[side], block[side] + block.size))
        position = 0
        for index, word in enumerate(words):
            if index not in kept and not word.isspace():
                characters.update(range(position, position + len(word)))
            position += len(word)
    return changed


def pair_similar_lines(old: list[str], new: list[str]) -> dict[int, int]:
    """-> {index of an old line: index of the new line it became}; most lines have none."""
    pairs = {}
    for index, line in enumerate(old):
        if not line.strip():
            continue
        (best,) = difflib.get_close_matches(line, new, n=1, cutoff=SIMILAR) or [None]
        if best is not None and new.index(best) not in pairs.values():
            pairs[index] = new.index(best)
    return pairs


def render_line(script: Script, index: int, marked: set[int]) -> str:
    """-> one line, coloured, with its number; marked: the characters to be underlaid."""
    parts = []
    position = 0
    for kind, text in script.tokens[index]:
        # A token is cut where the marks begin and end
        start = 0
        for end in range(1, len(text) + 1):
            is_marked = position + start in marked
            if end < len(text) and (position + end in marked) == is_marked:
                continue
            part = html.escape(text[start:end])
            if kind:
                part = f'<span class="{kind}">{part}</span>'
            if is_marked:
                part = f"<mark>{part}</mark>"
            parts.append(part)
            start = end
        position += len(text)
    return f'<span class="line" data-line="{index + 1}">{"".join(parts)}\n</span>'


def render_lines(script: Script, indices: range, marks: dict[int, set[int]], kind: str) -> str:
    """-> these lines in a box; kind: its class, which says old, new or equal."""
    lines = [render_line(script, index, marks.get(index, set())) for index in indices]
    return f'<pre class="{kind}"><code>{"".join(lines)}</code></pre>'


def render_row(a: Script, b: Script, old: range, new: range, changed: bool) -> str:
    """-> some lines of a beside those of b."""
    marks = ({}, {})
    if changed:
        old_lines = [a.lines[index] for index in old]
        new_lines = [b.lines[index] for index in new]
        for i, j in pair_similar_lines(old_lines, new_lines).items():
            words = find_changed_words(old_lines[i], new_lines[j])
            marks[0][old[i]], marks[1][new[j]] = words
    kinds = ("old", "new") if changed else ("equal again", "equal")
    left = render_lines(a, old, marks[0], kinds[0])
    right = render_lines(b, new, marks[1], kinds[1])
    return f'<div class="row">{left}{right}</div>'


def describe_stretch(script: Script, indices: range) -> str:
    """-> what a closed equal stretch has: how many lines, and which functions."""
    names = script.names_in(indices)
    words = f"{len(indices)} equal lines"
    if names:
        words += ": " + ", ".join(f"<code>{name}</code>" for name in names)
    return words


def render_equal(a: Script, b: Script, old: range, new: range, first: bool, last: bool) -> str:
    """-> equal lines, closed but for those beside a change."""
    before = 0 if first else CONTEXT
    after = 0 if last else CONTEXT
    if len(old) <= before + after + CONTEXT:
        return render_row(a, b, old, new, changed=False)

    end = len(old) - after
    parts = []
    if before:
        parts.append(render_row(a, b, old[:before], new[:before], changed=False))
    summary = describe_stretch(b, new[before:end])
    hidden = render_row(a, b, old[before:end], new[before:end], changed=False)
    parts.append(f"<details><summary>{summary}</summary>{hidden}</details>")
    if after:
        parts.append(render_row(a, b, old[end:], new[end:], changed=False))
    return "".join(parts)


def render_comparison(a: Script, b: Script) -> str:
    """-> the two scripts side by side; each function that differs has the anchor in-NAME."""
    # Blank lines alone do not make two stretches equal
    matcher = difflib.SequenceMatcher(
        lambda line: not line.strip(), a.lines, b.lines, autojunk=False
    )
    steps = matcher.get_opcodes()
    parts = []
    anchors = set()
    for number, (step, i1, i2, j1, j2) in enumerate(steps):
        old, new = range(i1, i2), range(j1, j2)
        if step == "equal":
            first, last = number == 0, number == len(steps) - 1
            parts.append(render_equal(a, b, old, new, first, last))
            continue

        # An anchor for each function in which something differs
        names = [a.name_at(index) for index in old] + [b.name_at(index) for index in new]
        for name in names:
            if name is not None and name not in anchors:
                anchors.add(name)
                parts.append(f'<span class="place" id="in-{name}"></span>')
        parts.append(render_row(a, b, old, new, changed=True))
    head = f'<div class="row head"><code>{a.name}</code><code>{b.name}</code></div>'
    return f'<div class="diff highlight">{head}{"".join(parts)}</div>'


def compare_names(a: Script, b: Script) -> dict[str, list[str]]:
    """-> names of functions and classes: equal, with other words, only in a, only in b."""
    names = {"equal": [], "other words": [], "only in a": [], "only in b": []}
    for name, span in b.spans.items():
        if name not in a.spans:
            names["only in b"].append(name)
            continue
        old = a.spans[name]
        if a.lines[old.start : old.stop] == b.lines[span.start : span.stop]:
            names["equal"].append(name)
        else:
            names["other words"].append(name)
    names["only in a"] = [name for name in a.spans if name not in b.spans]
    return names
