"""Settings resolve argument > environment > default, and refuse bad values by naming the good ones."""

import logging
import math
from pathlib import Path

import pytest

from mugraph import settings
from mugraph.errors import SettingError
from mugraph.settings import SETTINGS, configure_logging, settings_table


def test_argument_beats_environment_beats_default(monkeypatch):
    assert settings.effort.get() == "quick"
    monkeypatch.setenv("MUGRAPH_EFFORT", "full")
    assert settings.effort.get() == "full"
    assert settings.effort.get("none") == "none"


def test_an_empty_environment_variable_is_not_set(monkeypatch):
    monkeypatch.setenv("MUGRAPH_SEED", " ")
    assert settings.seed.get() == 0


def test_an_argument_may_be_false_or_zero(monkeypatch):
    monkeypatch.setenv("MUGRAPH_PROGRESS_BAR", "1")
    monkeypatch.setenv("MUGRAPH_SEED", "7")
    assert settings.progress_bar.get(False) is False
    assert settings.seed.get(0) == 0


GOOD = [
    (settings.effort, "full", "full"),
    (settings.budget_seconds, "2.5", 2.5),
    (settings.budget_seconds, "inf", math.inf),
    (settings.cache_dir, "somewhere", Path("somewhere")),
    (settings.skip_cache, "yes", True),
    (settings.force_search, "0", False),
    (settings.disallow_search, "TRUE", True),
    (settings.print_output_code, "on", True),
    (settings.print_repro, "off", False),
    (settings.logs, "+search,verify,-ir", {"search": logging.DEBUG, "verify": logging.INFO, "ir": logging.ERROR}),
    (settings.progress_bar, "0", False),
    (settings.seed, "7", 7),
    (settings.debug_dir, "debug", Path("debug")),
    (settings.interpret, "1", True),
    (settings.calibration, "no", False),
    (settings.no_color, "0", True),
]


@pytest.mark.parametrize(("setting", "text", "value"), GOOD)
def test_a_good_value_is_parsed_from_either_source(setting, text, value, monkeypatch):
    assert setting.get(text) == value
    monkeypatch.setenv(setting.env, text)
    assert setting.get() == value
    assert setting.get(value) == value


BAD = [
    (settings.effort, "fast"),
    (settings.budget_seconds, "0"),
    (settings.budget_seconds, "-1"),
    (settings.budget_seconds, "nan"),
    (settings.budget_seconds, "soon"),
    (settings.skip_cache, "2"),
    (settings.logs, "serach"),
    (settings.progress_bar, "maybe"),
    (settings.seed, "-1"),
    (settings.seed, "1.5"),
    (settings.interpret, "gpu"),
]


@pytest.mark.parametrize(("setting", "text"), BAD)
def test_a_bad_value_names_its_source_and_the_valid_ones(setting, text, monkeypatch):
    with pytest.raises(SettingError) as by_argument:
        setting.get(text)
    assert f"argument {setting.name}='{text}'" in str(by_argument.value)
    assert setting.valid in str(by_argument.value)
    monkeypatch.setenv(setting.env, text)
    with pytest.raises(SettingError) as by_environment:
        setting.get()
    assert f"{setting.env}='{text}'" in str(by_environment.value)
    assert setting.valid in str(by_environment.value)


def test_an_empty_path_is_refused():
    with pytest.raises(SettingError):
        settings.cache_dir.get("")


def test_the_default_cache_is_the_users(monkeypatch):
    monkeypatch.delenv("MUGRAPH_CACHE_DIR")
    assert "mugraph" in settings.cache_dir.get().parts


def test_the_table_lists_every_setting():
    declared = {value for value in vars(settings).values() if isinstance(value, settings.Setting)}
    assert set(SETTINGS) == declared
    lines = settings_table().splitlines()
    assert len(lines) == 1 + len(SETTINGS)
    for setting, line in zip(SETTINGS, lines[1:], strict=True):
        assert line.split()[:2] == [setting.name, setting.env]


@pytest.fixture
def _logging_restored():
    yield
    configure_logging({})


@pytest.mark.usefixtures("_logging_restored")
def test_logs_go_to_stderr_at_their_levels(capsys):
    configure_logging("+search,verify")
    configure_logging("+search,verify")
    for topic in ("search", "verify", "ir"):
        logging.getLogger(f"mugraph.{topic}").debug("detail")
        logging.getLogger(f"mugraph.{topic}").info("news")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "DEBUG mugraph.search: detail",
        "INFO mugraph.search: news",
        "INFO mugraph.verify: news",
    ]


@pytest.mark.usefixtures("_logging_restored")
def test_logging_is_left_to_the_application_unless_asked_for(monkeypatch):
    monkeypatch.setenv("MUGRAPH_LOGS", "all")
    configure_logging()
    assert logging.getLogger("mugraph").level == logging.INFO
    monkeypatch.delenv("MUGRAPH_LOGS")
    configure_logging()
    root = logging.getLogger("mugraph")
    assert (root.handlers, root.propagate, root.level) == ([], True, logging.NOTSET)
