"""Lines of a topic: printed as they come, met or missed; tests that are skipped or absent show nothing."""

import pytest

from vilma.targets import Group, Line, show


def test_show(capsys):
    assert show([Line("a", "1 ms", "<= 2 ms", True)]) == 0
    assert capsys.readouterr().out == "met     a: 1 ms   (target: <= 2 ms)\n"
    assert show(iter([Line("a", "3 ms", "<= 2 ms", False), Line("b", "x", "x", True)])) == 1
    assert capsys.readouterr().out.splitlines() == [
        "MISSED  a: 3 ms   (target: <= 2 ms)",
        "met     b: x   (target: x)",
    ]


def test_a_line_is_printed_before_the_next_is_measured(capsys):
    def lines():
        yield Line("first", "1", "1", True)
        assert "first" in capsys.readouterr().out
        yield Line("second", "2", "2", True)

    assert show(lines()) == 0


@pytest.mark.parametrize(
    "body, met, said",
    [
        ("assert True", True, "2 passed"),
        ("assert False", False, "1 failed, 1 passed"),
        ("import pytest; pytest.skip('no reason')", False, "1 passed, 1 skipped"),
        ("import os; os.kill(os.getpid(), 9)", False, "ended by signal 9"),
    ],
)
def test_a_group_of_tests(tmp_path, body, met, said):
    file = tmp_path / "test_it.py"
    file.write_text(f"def test_one():\n    {body}\n\ndef test_two():\n    pass\n")
    line = Group("works", (str(file),)).line()
    assert line.name == "works" and line.met is met and said in line.figure
    if met:
        assert not Group("none", (str(file), "-k", "nothing_of_this_name")).line().met
