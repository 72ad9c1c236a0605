import pytest

from src.errors import JobError, StartError, one_line, shortened


@pytest.mark.parametrize("separator", ["\n", "\r\n", "\u2028", "\x1b[2J", "\x00"])
def test_error_for_people_is_one_whole_line(separator: str):
    for error in (StartError(f"MODEL_ID=a{separator}b: no such model"), JobError(f"a{separator}b: no such model")):
        line = one_line(error)
        assert line.isprintable() and line.endswith("b: no such model")


def test_error_of_a_library_is_its_first_line():
    assert one_line(ValueError("what it was\x1b[0m\nand where\nand why")) == "ValueError: what it was?[0m"
    assert one_line(KeyError()) == "KeyError"


@pytest.mark.parametrize(
    ("value", "quoted"),
    [
        ("x" * 40, "x" * 40),
        ("x" * 41, "x" * 40 + "..."),
        ("山\u2028水\ud800", "山?水?"),
        (512.5, "512.5"),
        (2**128, "a huge number"),
        (-(2**128), "a huge number"),
    ],
)
def test_quoted_value_is_short_and_printable(value: object, quoted: str):
    assert shortened(value) == quoted
