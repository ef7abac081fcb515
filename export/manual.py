"""The pages of Python's manual, as Debian's python3-doc has them in reST, as plain text.

For the training of the demo model (`demo.py`): the text is laid out as pydoc lays out its topics,
and long classes are documents of their own, as those of the docstrings are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

# The package `python3.11-doc`; the manual has the licence of Python itself (PSF).
INSTALLED = Path("/usr/share/doc/python3.11/html/_sources")

SHORT_CLASS = 600  # characters

# Directives that say nothing to a reader: they go, with what is indented below them.
SILENT = frozenset({
    "index", "module", "currentmodule", "sectionauthor", "moduleauthor", "audit-event",
    "audit-event-table", "highlight", "toctree", "include", "literalinclude", "tabularcolumns",
    "testsetup", "testcleanup", "contents", "image", "figure", "miscnews", "program",
    "limited-api-list", "py:module", "py:currentmodule",
})  # fmt: skip

# Directives whose line goes, while what is indented below them stays.
FRAMES = frozenset({
    "code-block", "sourcecode", "doctest", "testcode", "testoutput", "productionlist", "list-table",
    "csv-table", "table", "parsed-literal", "glossary", "epigraph", "only", "sidebar", "topic",
    "rst-class",
})  # fmt: skip

# Directives with a word of their own before what they say.
WORDS = {
    "note": "Note:", "warning": "Warning:", "seealso": "See also:", "important": "Important:",
    "caution": "Caution:", "impl-detail": "CPython implementation detail:",
    "availability": "Availability:", "versionadded": "New in version",
    "versionchanged": "Changed in version", "deprecated": "Deprecated since version",
    "deprecated-removed": "Deprecated since version", "class": "class", "exception": "exception",
    "classmethod": "classmethod", "staticmethod": "staticmethod", "decorator": "@",
}  # fmt: skip

DIRECTIVE = re.compile(r"( *)\.\. (?:([a-zA-Z][\w:+-]*)::(?: (.*))?|.*)$")
CLASS = re.compile(r"^\.\. class:: .*\n(?:[ \t]+.*\n|\n)*", re.MULTILINE)
TITLE = re.compile(r"\A\s*(?:([=*-])\1+\n)?(.+)\n([=*-])\3+\n")
ROLE = re.compile(r":([a-z][a-z:+-]*):`([^`]+)`", re.DOTALL)


def pages(manual: Path, short: int = SHORT_CLASS) -> Iterator[str]:
    """The documents of each page below `manual`: its text, then each of its longer classes.

    Args:
        short: characters below which a class stays where it is on its page.
    """
    for path in sorted(manual.rglob("*.rst.txt")):
        text = path.read_text(encoding="utf-8").expandtabs()
        text = re.sub(r" *\\\n +", " ", text)  # signatures of several lines
        directive = re.search(r"^\.\. (?:current)?module:: (\S+)", text, re.MULTILINE)
        module = directive[1] if directive else ""
        long = [match[0] for match in CLASS.finditer(text) if len(match[0]) >= short]
        for class_text in long:
            text = text.replace(class_text, "", 1)
        yield titled(text, module)
        for class_text in long:
            head, _, body = plain(class_text).partition("\n")
            name = head.removeprefix("class ")
            if module and not name.startswith(f"{module}."):
                name = f"{module}.{name}"
            yield f"class {name}\n\n{dedented(body)}".strip()


def titled(page: str, module: str) -> str:
    """The text of a page; a module's begins as the document of its docstrings does."""
    title = TITLE.match(re.sub(r"\A(?:\.\. .*\n|\s*\n)*", "", page))
    if not module or not title or module not in title[2] or "---" not in title[2]:
        return plain(page)
    about = title[2].partition("---")[2].strip()
    return f"The {module} module\n\n{about}\n\n{plain(page.partition(title[0])[2])}".strip()


def dedented(text: str) -> str:
    """`text` moved left by the indentation of its first line."""
    lines = text.strip("\n").splitlines()
    depth = len(lines[0]) - len(lines[0].lstrip()) if lines else 0
    return "\n".join(line[min(depth, len(line) - len(line.lstrip())) :] for line in lines)


def plain(text: str) -> str:
    """reST as text: no markup but what pydoc's topics have."""
    lines: list[str] = []
    silent = -1  # the indentation of the directive that hides the lines below it
    options = False  # whether the last line was a directive, which options may follow
    for line in inline(text).splitlines():
        depth = len(line) - len(line.lstrip())
        if silent >= 0 and (not line.strip() or depth > silent):
            continue
        silent = -1
        if options and re.match(r" +:[\w-]+:", line):
            continue
        options = False
        if match := DIRECTIVE.match(line):
            indent, name, rest = match[1], match[2], (match[3] or "").strip()
            options = True
            if name is None or name in SILENT:
                silent = depth
            elif name not in FRAMES:
                label = " ".join(word for word in (WORDS.get(name, ""), rest) if word)
                lines.append(indent + (label or name))
        elif line.strip() != "::":
            lines.append(re.sub(r"::$", ":", line.rstrip()))
    lines = underlined(lines)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def inline(text: str) -> str:
    """Replace roles and references by the text that they show."""
    text = ROLE.sub(lambda match: shown(match[1].rpartition(":")[2], match[2]), text)
    text = re.sub(r"``([^`]+)``", r'"\1"', text)
    text = re.sub(r"`([^`<]+?)\s*<[^`>]*>`__?", r"\1", text, flags=re.DOTALL)
    return re.sub(r"`([^`\n]+)`_{0,2}", r"\1", text).replace("\\*", "*").replace("\\ ", "")


def shown(role: str, target: str) -> str:
    """The text of a role: the last name of `~a.b.c`, a title before `<target>`, a function's ()."""
    title = re.match(r"(.+?)\s*<[^>]*>\Z", target, re.DOTALL)
    if title:
        return title[1]
    name = target.lstrip("!")
    if name.startswith("~"):
        name = name[1:].rpartition(".")[2]
    if role in ("func", "meth") and not name.endswith(")"):
        return f"{name}()"
    return {"pep": f"PEP {name}", "rfc": f"RFC {name}", "issue": f"bpo-{name}"}.get(role, name)


def underlined(lines: list[str]) -> list[str]:
    """Titles, which have become shorter, with lines of their length; no overlines, no rules."""
    kept: list[str] = []
    for before, line in zip(["", *lines], lines, strict=False):
        if re.fullmatch(r"([=*\-~^#\"'.+])\1{3,}", line):
            if before.strip() and not before.startswith(" "):
                kept.append(line[0] * len(before))
        else:
            kept.append(line)
    return kept


def without(known: list[str], documents: list[str], run: int = 8) -> list[str]:
    """The documents without the paragraphs that repeat `known`.

    A paragraph repeats it where `run` consecutive words of both are the same, letters and digits
    alone counted and case ignored, or where all its words, three or more, are one of its
    paragraphs or lines.
    """
    runs = {one for text in known for one in runs_of(words_of(text), run)}
    whole = {
        tuple(words_of(part))
        for text in known
        for part in (*text.split("\n\n"), *text.splitlines())
    }

    def repeats(paragraph: str) -> bool:
        words = words_of(paragraph)
        if len(words) >= 3 and tuple(words) in whole:
            return True
        return not runs.isdisjoint(runs_of(words, run))

    kept = (
        "\n\n".join(part for part in document.split("\n\n") if not repeats(part))
        for document in documents
    )
    return [document for document in kept if document.strip()]


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def runs_of(words: list[str], run: int) -> Iterator[tuple[str, ...]]:
    """Every `run` consecutive words."""
    return (tuple(words[start : start + run]) for start in range(len(words) - run + 1))
