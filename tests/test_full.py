"""The runner of the full matrices resumes, records failures, and collects what is marked."""

import json
from collections import Counter

import pytest

from tests import full

GROUPS = Counter({"tests/test_a.py": 2, "tests/test_b.py": 1})


def entry(*failed: str) -> dict[str, object]:
    return {"tests": 1, "skipped": 0, "failed": list(failed), "seconds": 0.1}


@pytest.fixture
def runner(tmp_path, monkeypatch):
    """Runs GROUPS with made-up outcomes; returns the exit code and the files that were really run."""

    def run(outcomes, sources="s1", fresh=False):
        ran = []
        monkeypatch.setattr(full, "run_group", lambda file: ran.append(file) or outcomes[file]())
        return full.run(GROUPS, tmp_path / "results.json", sources, fresh=fresh), ran

    return run


PASS = {"tests/test_a.py": entry, "tests/test_b.py": entry}
FAIL_B = {"tests/test_a.py": entry, "tests/test_b.py": lambda: entry("tests/test_b.py::test_x")}


def test_what_passed_is_not_run_again(runner):
    assert runner(PASS) == (0, ["tests/test_a.py", "tests/test_b.py"])
    assert runner(PASS) == (0, [])


def test_what_failed_is_run_again_and_reported(runner, capsys):
    assert runner(FAIL_B) == (1, ["tests/test_a.py", "tests/test_b.py"])
    assert "FAILED tests/test_b.py::test_x" in capsys.readouterr().out
    assert runner(PASS) == (0, ["tests/test_b.py"])


def test_other_sources_or_fresh_run_everything(runner):
    runner(PASS)
    assert runner(PASS, sources="s2") == (0, ["tests/test_a.py", "tests/test_b.py"])
    assert runner(PASS, sources="s2", fresh=True) == (0, ["tests/test_a.py", "tests/test_b.py"])


def test_an_interrupted_run_keeps_what_is_done(runner):
    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner({**PASS, "tests/test_b.py": interrupt})
    assert runner(PASS) == (0, ["tests/test_b.py"])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"sources": "s1"}', '{"sources": "s1", "groups": 3}'])
def test_a_damaged_record_is_ignored(text, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(text)
    assert full.recorded_groups(path, "s1") == {}


MARKED = """
import pytest

@pytest.mark.full
@pytest.mark.parametrize("n", [1, 2])
def test_marked(n):
    assert n == 1

def test_plain():
    pass
"""


@pytest.fixture
def project(tmp_path):
    (tmp_path / "pyproject.toml").write_text((full.ROOT / "pyproject.toml").read_text())
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_m.py").write_text(MARKED)
    return tmp_path


def test_only_marked_tests_are_collected_and_failures_are_named(project):
    assert full.collect(project) == {"tests/test_m.py": 2}
    result = full.run_group("tests/test_m.py", project)
    assert (result["tests"], result["failed"]) == (2, ["tests/test_m.py::test_marked[2]"])


def test_tests_that_do_not_import_stop_the_run(project):
    (project / "tests" / "test_m.py").write_text("import no_such_module")
    with pytest.raises(SystemExit) as stop:
        full.collect(project)
    assert stop.value.code == 2


def test_the_hash_follows_the_sources(project):
    before = full.state(project)
    assert full.state(project) == before
    (project / "tests" / "test_m.py").write_text("")
    assert full.state(project) != before


def test_a_record_is_json_without_leftovers(runner, tmp_path):
    runner(PASS)
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]
    assert list(json.loads((tmp_path / "results.json").read_text())["groups"]) == list(GROUPS)
