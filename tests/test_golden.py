"""Golden files: written on request, compared otherwise, and a difference is refused."""

import pytest

from tests.conftest import TESTS, compare_golden, write_golden


def test_a_written_golden_file_compares_equal(tmp_path):
    path = tmp_path / "module" / "name.txt"
    write_golden(path, "text\n")
    compare_golden(path, "text\n")
    assert [file.name for file in path.parent.iterdir()] == ["name.txt"]


def test_another_text_is_refused(tmp_path):
    path = tmp_path / "name.txt"
    write_golden(path, "text\n")
    with pytest.raises(AssertionError, match="differs from"):
        compare_golden(path, "text")


def test_a_missing_golden_file_is_refused():
    with pytest.raises(pytest.fail.Exception, match=r"no golden file tests/golden/missing\.txt"):
        compare_golden(TESTS / "golden" / "missing.txt", "text")


@pytest.mark.parametrize("case", ["b = 1", "b/16"])
def test_golden_files_are_found_by_test_name(golden, case):
    golden(f"the case {case}\n", "txt")
