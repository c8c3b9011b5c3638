"""Every text is plain English: no sentence of more than MAX_WORDS words, and no BANNED phrase.

Checked are the pages, the report's template, the comments of recipes and scripts, and in trainer/ every docstring,
comment and message. A sentence ends at a full stop, question mark or exclamation mark, and with its paragraph, list
item or table cell. Code counts as one word.
"""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

from tests.harness.processes import ROOT

MAX_WORDS = 30
BANNED = (
    r"\banew\b", r"\bto be had\b", r"\bwherefrom\b", r"\bwhereof\b", r"\bhearsay\b", r"\blest\b", r"\bof no use\b",
    r"\bsomething else than\b", r"\bother \w+ than\b", r"\bgo(?:es)? over\b", r"\bwhat it gives\b", r"\basked for\b",
    r"(?<!here )\bis no (?!longer\b|more\b)\w", r"\bmay be wanted\b", r"\bout of reach\b", r"\bhas its say\b",
)  # fmt: skip

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = sorted((ROOT / "trainer").rglob("*.py"))
OTHERS = [
    *sorted((ROOT / "trainer" / "recipes").glob("*.yaml")),
    ROOT / "trainer" / "recipes" / "quickstart" / "README.md",
    ROOT / "trainer" / "reporting" / "page.html.j2",
    *(ROOT / "launch.sh", ROOT / "tests" / "run.sh", ROOT / "examples" / "slurm" / "train.sbatch"),
]
WORD = re.compile(r"[^\W\d_][\w'’-]*")


def sentences(text):
    """The sentences of plain text or Markdown; list items, table cells and paragraphs end one."""
    text = re.sub(r"^```.*?^```", "\n\n", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"``.*?``|`[^`\n]*`", "Code", text)
    text = re.sub(r"Code(?:,\s+Code)+", "Code", text)
    text = re.sub(r"!?\[(.*?)\]\([^)]*\)", r"The \1", text)
    text = re.sub(r"https?://\S+", "Link", text)
    text = re.sub(r"^ *\S.*\S {3,}\S.*$", "\n", text, flags=re.MULTILINE)  # laid out by hand
    for block in re.split(r"\n\s*\n|\n\s*(?=[-*] |\d+\. |\||#)|\|", text):
        yield from re.split(r"(?<=[.!?])[\"')]?\s+(?=[^a-z])", " ".join(block.split()))


def python_texts(source):
    """Docstrings, comments and messages of a module."""
    tree = ast.parse(source)
    documented = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    inside_f_strings = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            inside_f_strings |= {id(part) for part in node.values}
            parts = (str(part.value) if isinstance(part, ast.Constant) else "value" for part in node.values)
            yield "".join(parts).replace("\n", "\n\n")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside_f_strings:
            if id(node) in documented:  # an entry of Args, Returns or Raises is a paragraph
                yield re.sub(r"\n(?= *\w[\w., *]*: )", "\n\n", node.value)
            else:
                yield node.value.replace("\n", "\n\n")
    yield from comments(source)


def comments(source):
    """Comments; lines of nothing else that follow each other are one text."""
    block, last = [], -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        if token.start[0] != last + 1 or not token.line.lstrip().startswith("#"):
            yield "\n".join(block)
            block = []
        block.append(token.string.lstrip("#! "))
        last = token.start[0]
    yield "\n".join(block)


def texts(path):
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return python_texts(source)
    if path.suffix == ".j2":
        visible = re.sub(r"<style.*?</style>|\{%.*?%\}|\{#.*?#\}", " ", source, flags=re.DOTALL)
        return [re.sub(r"<[^>]*>", "\n\n", re.sub(r"\{\{.*?\}\}", "value", visible))]
    if path.suffix in (".yaml", ".sh", ".sbatch"):
        blocks = re.findall(r"(?:^ *#.*\n)+", source, re.MULTILINE)
        return [re.sub(r"^ *#!? ?", "", block, flags=re.MULTILINE) for block in blocks]
    return [source]


def problems(path):
    found = []
    for sentence in (sentence for text in texts(path) for sentence in sentences(text)):
        num_words = len(WORD.findall(sentence))
        if num_words > MAX_WORDS:
            found.append(f"{num_words} words: {sentence}")
        found += [f"{hit[0]!r} in: {sentence}" for phrase in BANNED if (hit := re.search(phrase, sentence, re.I))]
    return found


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [*PAGES, *MODULES, *OTHERS], ids=name_of)
def test_sentences_are_short_and_plain(path):
    found = problems(path)
    assert not found, "\n".join(found)


def test_the_checker_finds_what_it_looks_for(tmp_path):
    long = " ".join(["word"] * (MAX_WORDS + 1))
    module = tmp_path / "module.py"
    module.write_text(
        f'"""{long}."""\n# {long[:60]}\n# {long[60:]}\nraise SystemExit(f"{long} {{1}}")  # tried anew\nx = "short"\n'
    )
    assert len(problems(module)) == 4
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n\n{long[:70]}. Short `{long}` [x]({long}).\n\n| {long} | short |\n\n```\n{long}\n```\n")
    assert len(problems(page)) == 1
