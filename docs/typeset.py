"""Formulas of the built site as MathML, which browsers set by themselves: no script, no font, no third party. And no
link from the site to files that are in the repository alone: notebooks come with it, others lose their link.

    python docs/typeset.py site        # after everything else has been put there

The book's sources write formulas as the code prints them ("1/2 [KL(X || I) + KL(X^T || I^T)]"), so that `--explain`,
the pages and the sources say the same. In the site the formulas of PAGES become MathML: cells of tables under a head
"formula" or "matrix", lines that are indented as code, and `code` in running text. What is no formula stays as it is.
"""

from __future__ import annotations

import html
import os
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("methods", "recipe", "tinyclip", "dclip")
HEADS = ("formula", "matrix")

_TOKEN = re.compile(
    r"(?P<number>\d+(?:\.\d+)?)|(?P<name>[^\W\d_]+\d*)|(?P<sub>_\w+)|(?P<sup>\^(?:\w+|[+-]?\d+))|(?P<norm>\|\|)"
    r"|(?P<sign>\+-)|(?P<space>\s+)|(?P<other>.)"
)
_FUNCTIONS = frozenset(
    {
        "CE", "KL", "InfoNCE", "cos", "exp", "log", "max", "mean", "min", "pool", "rownorm", "sigmoid", "size",
        "softCE", "softmax", "softplus", "std", "sum", "task", "transpose", "var", "w",
    }
)  # fmt: skip
_GREEK = {"tau": "τ", "alpha": "α", "beta": "β", "lambda": "λ", "gamma": "γ", "sigma": "σ"}
_PROSE = frozenset(
    {
        "a", "all", "also", "an", "and", "as", "at", "by", "each", "for", "from", "has", "in", "is", "it",
        "its", "of", "on", "one", "only", "or", "over", "the", "this", "to", "with",
    }
)  # fmt: skip
_SIGNS = {"-": "−", "*": "·", ".": "·", "||": "∥", "+-": "±"}


def is_formula_word(word: str) -> bool:
    """Whether a word between blanks belongs to a formula: a symbol, an operator, a known function."""
    core = word.strip(",;:")
    if core.strip("()[]") in _GREEK:
        return True
    bare = re.sub(r"[^\w]", "", core)
    if not core or (core.lower() in _PROSE and core != "A"):
        return False
    if core in _FUNCTIONS or core in _GREEK or re.fullmatch(r"[-+*/=.|≤≥<>]+|\+-|½", core):
        return True
    if "'" in core or ("-" in core.strip("-") and core.replace("-", "").isalpha() and len(core) > 4):
        return False
    if re.search(r"[\[\]()^=/]", core):
        return not re.fullmatch(r"\(?[A-Za-z][A-Za-z'-]{2,}\)?", core)
    if "_" in core:
        return len(core.split("_")[0]) <= 4 or core.split("_")[0] in _FUNCTIONS
    return len(bare) <= 2 or bool(re.fullmatch(r"[\d.]+", core))


def mathml(text: str, *, display: bool = False) -> str:
    """The MathML of a formula: 'KL(X^T || I^T)' as names, operators, sub- and superscripts and fractions."""
    nodes: list[str] = []
    starts: list[int] = []  # of open brackets among the nodes
    closed: tuple[int, int] | None = None  # where the group that has just ended stands
    for match in _TOKEN.finditer(text):
        kind, token = match.lastgroup, match[0]
        last, closed = closed, None
        if kind == "space":
            closed = last
            continue
        if kind == "number":
            previous = nodes[-2:] if len(nodes) >= 2 else []
            if previous and previous[1] == "<mo>/</mo>" and previous[0].startswith("<mn>"):
                nodes[-2:] = [f"<mfrac>{previous[0]}<mn>{token}</mn></mfrac>"]
            else:
                nodes.append(f"<mn>{token}</mn>")
        elif kind == "name":
            if len(token) > 2 and nodes and not nodes[-1].startswith("<mo"):
                nodes.append('<mspace width="0.17em"/>')
            nodes.append(_name(token))
        elif kind in ("sub", "sup") and nodes:
            first = last[0] if last else len(nodes) - 1
            base = nodes[first] if first == len(nodes) - 1 else f"<mrow>{''.join(nodes[first:])}</mrow>"
            nodes[first:] = [_script(base, token)]
            closed = (first, len(nodes))
        elif token in "([":
            starts.append(len(nodes))
            nodes.append(f'<mo stretchy="false">{token}</mo>')
        elif token in ")]":
            nodes.append(f'<mo stretchy="false">{token}</mo>')
            closed = (starts.pop(), len(nodes)) if starts else None
        elif token == "½":
            nodes.append("<mfrac><mn>1</mn><mn>2</mn></mfrac>")
        else:
            nodes.append(f"<mo>{html.escape(_SIGNS.get(token, token))}</mo>")
    shown = ' display="block"' if display else ""
    return f"<math{shown}><mrow>{''.join(nodes)}</mrow></math>"


def _name(token: str) -> str:
    split = re.fullmatch(r"([^\W\d_]+)(\d+)", token)
    if split:
        return f"<msub>{_name(split[1])}<mn>{split[2]}</mn></msub>"
    if token == "sum":
        return "<mo>∑</mo>"
    return f"<mi>{html.escape(_GREEK.get(token, token))}</mi>"


def _script(base: str, token: str) -> str:
    """A sub- or superscript; both of one base stand above each other, and a sum has its index below."""
    mark, inside = token[0], token[1:]
    inner = "".join(_GREEK.get(part, part) for part in re.split(r"_", inside))
    shown = (
        f"<mn>{inner}</mn>" if inner.isdigit() else "<mi>⊤</mi>" if (mark, inner) == ("^", "T") else f"<mi>{inner}</mi>"
    )
    if base == "<mo>∑</mo>":
        return f"<munder>{base}{shown}</munder>"
    if mark == "^" and base.startswith("<msub>") and base.endswith("</msub>"):
        return f"<msubsup>{base[6:-7]}{shown}</msubsup>"
    return f"<{'msub' if mark == '_' else 'msup'}>{base}{shown}</{'msub' if mark == '_' else 'msup'}>"


def typeset(text: str, *, display: bool = False) -> str:
    """HTML of a text in which runs of formula words are set; prose between them stays prose."""
    parts: list[str] = []
    run: list[str] = []

    def end() -> None:
        while run and run[0] in "-.|":
            parts.append(html.escape(run.pop(0)))
        text = " ".join(run)
        if not text:
            return
        tail = re.search(r"[,;:.]*$", text)
        core = text[: tail.start()] if tail else text
        # one letter among words is a symbol; a number or a function's name among words is prose
        plain = core in _FUNCTIONS or re.fullmatch(r"[\d.]+\)?", core)
        shown = html.escape(core) if plain else mathml(core, display=display)
        parts.append(f"<span>{shown}{html.escape(tail[0])}</span>" if tail and tail[0] else shown)
        run.clear()

    for word in text.split():
        if is_formula_word(word):
            run.append(word)
            held = " ".join(run)
            opened = sum(held.count(mark) for mark in "([") > sum(held.count(mark) for mark in ")]")
            if word.endswith((",", ";", ":")) and not opened:
                end()
        else:
            end()
            parts.append(html.escape(word))
    end()
    return " ".join(parts)


def is_formula(text: str) -> bool:
    """Whether a whole code span or line is a formula."""
    if re.search(r"[{}\"`]|--|\w\.\w{2,}|\w\(\)|=[\"'\w-]*$", text.strip()) and not re.search(r"\s=\s", text):
        return False
    return bool(re.search(r"\s(?:=|\|\|)\s|\bsum_|\^T", text)) and is_formula_word(text.split()[0])


def page(source: str) -> str:
    """One built page with its formulas set."""

    def table(match: re.Match[str]) -> str:
        heads = [re.sub(r"<[^>]+>", "", head).strip() for head in re.findall(r"<th[^>]*>(.*?)</th>", match[0], re.S)]
        column = next((k for k, head in enumerate(heads) if head.split(" (")[0] in HEADS), None)
        if column is None:
            return match[0]

        def row(found: re.Match[str]) -> str:
            cells = list(re.finditer(r"(<td[^>]*>)(.*?)(</td>)", found[0], re.S))
            if len(cells) <= column:
                return found[0]
            cell = cells[column]
            inner = typeset(html.unescape(re.sub(r"<[^>]+>", "", cell[2])))
            return found[0][: cell.start()] + cell[1] + inner + cell[3] + found[0][cell.end() :]

        return re.sub(r"<tr>.*?</tr>", row, match[0], flags=re.S)

    def code(match: re.Match[str]) -> str:
        text = html.unescape(match[1])
        return mathml(text) if is_formula(text) else match[0]

    def block(match: re.Match[str]) -> str:
        lines = html.unescape(re.sub(r"<[^>]+>", "", match[0])).strip("\n").splitlines()
        if not lines or not any(is_formula(line) for line in lines):
            return match[0]
        pieces = [[piece for piece in re.split(r"\s{2,}", line.strip()) if piece] for line in lines if line.strip()]
        shown = [
            "&emsp;".join(mathml(piece) if is_formula(piece) else typeset(piece) for piece in line) for line in pieces
        ]
        return '<div class="formula">' + "".join(f"<p>{line}</p>" for line in shown) + "</div>"

    source = re.sub(r"<table.*?</table>", table, source, flags=re.S)
    source = re.sub(r'<div class="(?:language-text )?highlight">.*?</pre>\s*</div>', block, source, flags=re.S)
    return re.sub(r"<code>([^<]*)</code>", code, source)


_LINK = re.compile(r'<a\s[^>]*?href="(?P<to>\.\.?/[^"#?]*)[^"]*"[^>]*>(?P<text>.*?)</a>', re.DOTALL)


def inside(markup: str, folder: Path, site: Path) -> str:
    """A page of `folder` without the links to files of the repository that are not in the site: their text stays, with
    the file's name where a pointer rests on it. Notebooks are copied, and their links lead there."""

    def kept(match: re.Match[str]) -> str:
        target = (folder / match["to"]).resolve()
        if target.is_relative_to(site.resolve()) and target.exists():
            return match[0]
        name = "/".join(part for part in match["to"].split("/") if part not in (".", ".."))
        if name.endswith(".ipynb") and (ROOT / name).is_file():
            (site / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, site / name)
            return match[0].replace(match["to"], Path(os.path.relpath(site / name, folder)).as_posix(), 1)
        return f'<span title="{name} in the sources">{match["text"]}</span>'

    return _LINK.sub(kept, markup)


def breakable(markup: str) -> str:
    """Names in the cells of tables may break behind their own marks, and nowhere else ("needed" stays whole)."""

    def broken(match: re.Match[str]) -> str:
        return re.sub(r"(?<=[\w)\]][._/=,:])(?=[\w({])", "<wbr>", match[0])

    def cell(match: re.Match[str]) -> str:
        return re.sub(r"(?<=<code>)[^<]{9,}(?=</code>)", broken, match[0])

    return re.sub(r"<td.*?</td>", cell, markup, flags=re.DOTALL)


def main(arguments: list[str]) -> int:
    site = Path(arguments[0] if arguments else "site")
    for file in sorted(site.rglob("index.html")):
        before = file.read_text(encoding="utf-8")
        if (after := breakable(inside(before, file.parent, site))) != before:
            file.write_text(after, encoding="utf-8")
    for name in PAGES:
        file = site / name / "index.html"
        before = file.read_text(encoding="utf-8")
        after = page(before)
        file.write_text(after, encoding="utf-8")
        print(f"{file}: {after.count('<math')} formulas")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
