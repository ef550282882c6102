"""docs/typeset.py: formulas of the site as MathML, prose as prose."""

from __future__ import annotations

import importlib.util
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

DOCS = REPOSITORY / "docs"
_spec = importlib.util.spec_from_file_location("typeset", DOCS / "typeset.py")
assert _spec is not None
assert _spec.loader is not None
typeset = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(typeset)


def plain(markup: str) -> str:
    """The text of markup, with formulas in brackets."""
    marked = re.sub(r"<math.*?</math>", lambda m: f"⟦{re.sub(r'<[^>]+>', '', m[0])}⟧", markup, flags=re.S)
    return re.sub(r"</?span>", "", marked)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("S = s A0 B0^T", "⟦S=sA0B0⊤⟧"),
        ("1/2 [KL(T || S) + KL(T^T || S^T)],  T = t u v^T", "⟦12[KL(T∥S)+KL(T⊤∥S⊤)]⟧, ⟦T=tuv⊤⟧"),
        (
            "feature distillation (MFD when it is masked): mean_ND (A - u)^2",
            "feature distillation (MFD when it is masked): ⟦meanND(A−u)2⟧",
        ),
        (
            "1/2 [softCE(T, S)], U the teacher's rows of length 1",
            "⟦12[softCE(T,S)]⟧, ⟦U⟧ the teacher's rows of length 1",
        ),
        ("E = softmax(p k^T / tau) - 1,  g_p = E k / (tau N)", "⟦E=softmax(pk⊤/τ)−1⟧, ⟦gp=Ek/(τN)⟧"),
        ("the mean of each picture's captions", "the mean of each picture's captions"),
    ],
)
def test_formulas_are_set_and_words_left(text: str, shown: str) -> None:
    assert plain(typeset.typeset(text)).replace("&#x27;", "'") == shown


def test_scripts_and_fractions_have_their_elements() -> None:
    made = typeset.mathml("1/2 sum_t w_t (x + y)^2 A0^T")
    assert "<mfrac><mn>1</mn><mn>2</mn></mfrac>" in made
    assert "<munder><mo>∑</mo><mi>t</mi></munder>" in made
    assert "<msub><mi>w</mi><mi>t</mi></msub>" in made
    assert re.search(r"<msup><mrow>.*x.*y.*</mrow><mn>2</mn></msup>", made)
    assert "<msubsup><mi>A</mi><mn>0</mn><mi>⊤</mi></msubsup>" in made


def test_every_formula_of_the_terms_is_well_formed_and_complete() -> None:
    lines = (DOCS / "methods.md").read_text(encoding="utf-8").splitlines()
    cells = [line.split(" | ")[1].replace(r"\|", "|") for line in lines if re.match(r"\| `\w+` \|", line)]
    assert len(cells) > 15
    for cell in cells:
        made = typeset.typeset(cell)
        assert "<math" in made
        root = ElementTree.fromstring(f"<p>{made}</p>")
        letters = re.sub(
            r"[^a-zA-Z]", "", "".join(root.itertext()).replace("τ", "tau").replace("⊤", "T").replace("∑", "sum")
        )
        assert letters == re.sub(r"[^a-zA-Z]", "", cell)


def test_only_formulas_of_a_page_change() -> None:
    page = (
        "<table><thead><tr><th>name</th><th>formula</th></tr></thead><tbody><tr><td><code>task</code></td>"
        "<td>loss: CE(S^T)</td></tr></tbody></table><p><code>L = sum_t w_t * term_t</code> <code>{task: 1}</code> "
        '<code>train.steps=3</code></p><div class="highlight"><pre><span></span><code>clipdistill train --recipe clip\n'
        '</code></pre></div>\n<div class="highlight"><pre><code>L = task + 3 crd    w: a word\n</code></pre></div>'
    )
    made = typeset.page(page)
    assert made.count("<math") == 3
    for kept in (
        "<code>task</code>",
        "<code>{task: 1}</code>",
        "<code>train.steps=3</code>",
        "clipdistill train --recipe",
    ):
        assert kept in made
    assert "<td>loss: <math>" in made
    assert '<div class="formula"><p><math>' in made


def test_links_to_files_of_the_repository_alone_become_text(tmp_path: Path) -> None:
    site = tmp_path / "site"
    (site / "data").mkdir(parents=True)
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "own.py").write_text("")
    kept = '<a href="./data/">Data</a> <a class="x" href="https://example.org/">far</a> <a href="#here">here</a>'
    lost = '<a href="../examples/own.py">one</a> <a href="../../tests/test_a.py#x"><code>two</code></a>'
    assert typeset.inside(f"{kept} {lost}", site, site) == (
        f'{kept} <span title="examples/own.py in the sources">one</span> '
        '<span title="tests/test_a.py in the sources"><code>two</code></span>'
    )


def test_notebooks_come_with_the_site(tmp_path: Path) -> None:
    page = tmp_path / "site" / "tutorial"
    page.mkdir(parents=True)
    link = '<a href="../../examples/notebooks/first_student.ipynb">first</a>'
    shown = typeset.inside(link, page, tmp_path / "site")
    assert shown == '<a href="../examples/notebooks/first_student.ipynb">first</a>'
    assert (page / "../examples/notebooks/first_student.ipynb").is_file()


def test_names_in_tables_break_behind_their_marks_only() -> None:
    cell = "<td><code>train.batch_size</code></td><td><code>needed</code> a.b_c</td>"
    broken = "<td><code>train.<wbr>batch_<wbr>size</code></td><td><code>needed</code> a.b_c</td>"
    assert typeset.breakable(f"<code>train.batch_size</code>{cell}") == f"<code>train.batch_size</code>{broken}"


def test_links_are_looked_at_when_the_site_is_whole() -> None:
    makefile = (typeset.ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = makefile.split("\ndocs:")[1].split("\n\n")[0].strip().splitlines()
    assert "site/try" in recipe[-2]
    assert "docs/typeset.py site" in recipe[-1]
