"""docs/methods.md says of each term what its file says; `python -m tests.objective.test_methods_page` writes that."""

from __future__ import annotations

from clipdistill.objective.explain import option_text
from clipdistill.registry import TERMS
from tests.conftest import REPOSITORY

PAGE = REPOSITORY / "docs" / "methods.md"
BEGIN, END = "<!-- terms -->\n", "<!-- end of terms -->"


def terms_part() -> str:
    """The table of all terms, and what the released code and the options change."""
    table = ["| name | formula | gradient | source | weight |", "|---|---|---|---|---|"]
    notes = []
    for name in TERMS.names():
        term = TERMS.get(name)
        formula, gradient = (text.replace("|", r"\|") for text in (term.formula, term.gradient))
        table.append(f"| `{name}` | {term.title}: {formula} | {gradient} | {term.source} | {term.default_weight:g} |")
        notes += [f"* `{name}`, released code: {term.differs}"] if term.differs else []
        notes += [f"* `{name}`, option `{option_text(option, option.default)}" for option in term.options]
    notes = [note.replace(": ", "`: ", 1) if ", option `" in note else note for note in notes]
    return "\n".join([*table, "", *notes]) + "\n"


def page() -> str:
    """The page with that part as it must be."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return before + BEGIN + terms_part() + END + rest.partition(END)[2]


def test_the_page_says_what_the_terms_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == page()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
