"""What is printed: nothing is cut, nothing is taken for markup, one row a line outside a terminal."""

import io

import pytest

from clipdistill.runtime.console import Coloured, TextTable, say

NAMES = ["scenes-student-with-a-long-name-0", "scenes-student-with-a-long-name-1"]


def table() -> TextTable:
    rows = [[name, "12.34", Coloured("+1.2 (0.3 to 2.1)", "green"), "the terms of CLIP-KD and more"] for name in NAMES]
    return TextTable(
        ["model", "text→image R@1", "minus clip-kd", "what it is"], rows, "scores", "per cent", text=(0, 3)
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_row_is_one_line_in_a_file_however_narrow_the_terminal_is(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    file = io.StringIO()
    table().print(file)
    lines = file.getvalue().splitlines()
    assert len(lines) == 2 + 1 + len(NAMES) + 1
    assert lines[3].startswith(NAMES[0])
    assert lines[3].endswith("the terms of CLIP-KD and more")
    assert "\033" not in file.getvalue()


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 200])
def test_nothing_is_cut_at_any_width(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    lines = table().lines(width)
    words = " ".join(lines).split()
    assert {"scores", "per", "cent", *NAMES, "12.34", "CLIP-KD"} <= {word.rstrip(":") for word in words}
    assert all(len(line) <= max(width, len(NAMES[0])) for line in lines), lines
    for piece in ("+1.2 (0.3 to 2.1)", "text→image") if width >= 40 else ():
        assert any(piece in line for line in lines), piece


def test_numbers_stand_under_each_other():
    lines = TextTable(["a", "n"], [["x", "5"], ["yy", "1000"]]).lines()
    assert lines == ["a      n", "--  ----", "x      5", "yy  1000"]


def test_wide_characters_count_twice():
    lines = TextTable(["名前", "n"], [["学生", "5"], ["cafe\u0301", "7"]]).lines()
    assert [line.rstrip()[-1] for line in lines[2:]] == ["5", "7"]
    assert lines[2] == "学生  5"
    assert lines[3] == "cafe\u0301  7"


@pytest.mark.parametrize("text", ["lr[/0.1]", "[bold]x[/]", "a[/b]", ":smile:", "%s {0}", "\\[x]"])
def test_text_is_never_markup(text, capsys):
    say(text)
    TextTable(["name"], [[text]]).print()
    assert capsys.readouterr().out == f"{text}\nname\n{'-' * max(4, len(text))}\n{text}\n"


def test_a_terminal_is_not_steered_by_text():
    file = Terminal()
    say("a\x1b[2Jb\rc", file)
    TextTable(["n"], [["\x1b]0;title\x07"]]).print(file)
    assert "\x1b[2J" not in file.getvalue()
    assert "\x1b]" not in file.getvalue()
    assert "\r" not in file.getvalue()


def test_colours_only_on_a_terminal_that_wants_them(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    file = Terminal()
    table().print(file)
    assert "\033[32m" in file.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    file = Terminal()
    table().print(file)
    assert "\033" not in file.getvalue()


def test_markdown_escapes_bars_and_shows_colours_as_bold():
    assert TextTable(["a"], [[Coloured("+1", "green")], [Coloured("0", "")]]).markdown().endswith("| **+1** |\n| 0 |")
    assert TextTable(["a", "b"], [["x|y", "1"]]).markdown() == "| a | b |\n| --- | ---: |\n| x\\|y | 1 |"
