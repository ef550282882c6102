"""Commands and links of Markdown pages, for the tests that run them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import REPOSITORY

PROGRAMS = ("clipdistill", "torchrun", "srun", "python", "make", "pip")


@dataclass(frozen=True)
class Block:
    """A fenced block: the page, the line it begins at, its language ("" for none) and its text."""

    page: str
    line: int
    language: str
    text: str


@dataclass(frozen=True)
class Command:
    """One command of a page, with continuation lines joined."""

    page: str
    line: int
    text: str

    @property
    def words(self) -> list[str]:
        """As a shell splits it, comments left out."""
        return shlex.split(self.text, comments=True)

    @property
    def clipdistill(self) -> list[str] | None:
        """The arguments of the `clipdistill` that this command runs (under torchrun too), or None."""
        words = self.words
        if words[0] == "clipdistill":
            return words[1:]
        if "-m" in words and words[words.index("-m") + 1] == "clipdistill.cli":
            return words[words.index("-m") + 2 :]
        return None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def pages() -> list[Path]:
    """README and every page of docs/."""
    return [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    found: list[Block] = []
    name = page.relative_to(REPOSITORY).as_posix()
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^```([\w-]*)[^\n]*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
        line = text.count("\n", 0, match.start()) + 2
        found.append(Block(name, line, match[1], match[2]))
    return found


def commands(page: Path) -> list[Command]:
    """Every line of a fenced block that runs a program we know, in order."""
    found: list[Command] = []
    for block in blocks(page):
        if block.language not in ("", "bash", "slurm", "sh", "console"):
            continue
        lines = block.text.split("\n")
        number = 0
        while number < len(lines):
            start, text = number, lines[number].strip().removeprefix("$ ")
            while text.endswith("\\") and number + 1 < len(lines):
                number += 1
                text = f"{text[:-1]}{lines[number].strip()}"
            number += 1
            if text.split(" ")[0] in PROGRAMS:
                found.append(Command(block.page, block.line + start, text))
    return found


def links(page: Path) -> list[tuple[str, str]]:
    """(target, anchor) of every link of a page that is not to another site; target "" is the page itself."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"`[^`\n]*`", "", text)
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            found.append((path, anchor))
    return found


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as the site's generator makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    found = set()
    for heading in re.findall(r"^#{1,6} (.+)$", text, flags=re.MULTILINE):
        plain = re.sub(r"[^\w\s-]", "", re.sub(r"[`*]|\]\([^)]*\)|\[", "", heading)).strip().lower()
        found.add(re.sub(r"[-\s]+", "-", plain))
    return found
