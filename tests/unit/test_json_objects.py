"""JSON files that are one object: one row, or rows under a key, whatever the key is called."""

import json

import pytest

from distlora.data.sources import load_rows
from distlora.errors import UserError

CHAT = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
SHARED = {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}
ROWS = [{"text": "a"}, {"text": "b"}]


def saved(tmp_path, content):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(content))
    return str(file)


@pytest.mark.parametrize("chat", [CHAT, SHARED, CHAT | {"id": 1}, SHARED | {"tools": []}])
def test_one_conversation_is_one_row(tmp_path, chat):
    assert load_rows(saved(tmp_path, chat), "train") == [chat]


def test_rows_with_a_sender_or_a_role_are_no_conversation(tmp_path):
    for rows in ([{"from": "a@b", "text": "x"}], [{"role": "engineer", "text": "x"}]):
        with pytest.raises(UserError, match="as in data.path=.*:mails"):
            load_rows(saved(tmp_path, {"mails": rows, "count": 1}), "train")


def test_rows_under_a_key_are_hinted_at_though_they_are_called_conversations(tmp_path):
    file = saved(tmp_path, {"conversations": [CHAT, CHAT]})
    with pytest.raises(UserError, match="as in data.path=.*:conversations"):
        load_rows(file, "train")
    assert load_rows(f"{file}:conversations", "train") == [CHAT, CHAT]


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"a.b": ROWS}, "a.b"),
        ({"a": {"b.c": ROWS}}, "a.b.c"),
        ({"a.b": {"c": ROWS}}, "a.b.c"),
        ({"a": {"b": {"c": ROWS}}}, "a.b.c"),
        ({"a.b": ROWS, "a": {"b": []}}, "a.b"),
    ],
)
def test_keys_with_dots_are_found(tmp_path, content, key):
    assert load_rows(f"{saved(tmp_path, content)}:{key}", "train") == ROWS


@pytest.mark.parametrize(
    ("content", "told"),
    [({"a": {"b": ROWS}}, "no key 'c'"), ({"a": 1}, "has a number where an object with the key 'c'")],
)
def test_keys_that_are_not_there_are_named(tmp_path, content, told):
    with pytest.raises(UserError, match=told):
        load_rows(f"{saved(tmp_path, content)}:a.c", "train")
