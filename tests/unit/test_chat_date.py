"""The day that a chat template sees is one a run: that on which it began, unless the recipe names another."""

from datetime import date

import pytest

from distlora.errors import UserError
from distlora.recipe.load import load_run_recipe, run_identity
from distlora.training.objective import conventions_of
from distlora.training.run_directory import check_run_dir, with_format_of_run
from tests.unit.test_resume import begun, checkpoint, open_run_dir, recipe

CHAT = {"task": "arithmetic", "template": "chat"}
TODAY = date.today().isoformat()


@pytest.mark.parametrize("data", [CHAT, {"task": "chat", "path": "talks.jsonl"}])
def test_a_run_that_begins_keeps_its_day(tmp_path, data):
    given, run_dir = begun(tmp_path, data=data)
    assert given.data.chat_date is None
    assert load_run_recipe(run_dir / "recipe.yaml").data.chat_date == TODAY


def test_a_run_that_shows_no_chat_has_no_day(tmp_path):
    given, run_dir = begun(tmp_path)
    assert load_run_recipe(run_dir / "recipe.yaml").data.chat_date is None
    assert with_format_of_run(given, False) is given


def test_a_run_that_goes_on_later_sees_the_day_on_which_it_began(tmp_path):
    old = "2026-01-31"
    begun(tmp_path, data=CHAT | {"chat_date": old})
    checkpoint(tmp_path / "run", 5)
    given = recipe(tmp_path, data=CHAT)
    for resume in (None, True):
        check_run_dir(given, resume)
        resumed = with_format_of_run(given, resume)
        assert resumed.data.chat_date == conventions_of(resumed).date == old
        open_run_dir(given, resume)
        assert load_run_recipe(tmp_path / "run" / "recipe.yaml").data.chat_date == old
    assert run_identity(given) == run_identity(resumed)
    assert with_format_of_run(given, False).data.chat_date == TODAY, "a run that begins anew begins today"


def test_another_day_than_that_of_the_run_is_refused(tmp_path):
    begun(tmp_path, data=CHAT | {"chat_date": "2026-01-31"})
    checkpoint(tmp_path / "run", 5)
    other = recipe(tmp_path, data=CHAT | {"chat_date": "2026-02-01"})
    with pytest.raises(UserError, match="data.chat_date=2026-02-01: the run in .* begun with 2026-01-31"):
        with_format_of_run(other)
    assert with_format_of_run(other, False).data.chat_date == "2026-02-01"


def test_a_run_of_an_older_format_still_reads_the_clock(tmp_path):
    begun(tmp_path, data=CHAT)
    checkpoint(tmp_path / "run", 5)
    file = tmp_path / "run" / "recipe.yaml"
    text = (
        file.read_text().replace("format: 4", "format: 3").replace(f"chat_date: '{TODAY}'", "chat_date: null")
    )
    file.write_text(text)
    resumed = with_format_of_run(recipe(tmp_path, data=CHAT))
    assert resumed.format == 3 and resumed.data.chat_date is conventions_of(resumed).date is None


def test_a_day_is_written_as_yaml_or_json_write_one(tmp_path):
    assert recipe(tmp_path, "data.chat_date=2026-01-31").data.chat_date == "2026-01-31"
    assert recipe(tmp_path, "data.chat_date='2026-01-31'").data.chat_date == "2026-01-31"
    with pytest.raises(UserError, match="data.chat_date.*wanted a day, as in 2026-01-31"):
        recipe(tmp_path, "data.chat_date=31.1.2026")
