"""Rows of conversations in less common forms: what is read, what is refused, what counts as unanswered."""

import json

import pytest

from distlora.data import load_questions
from distlora.data.chat import Chat
from distlora.data.conversations import ChatExamples
from distlora.data.encode import encode_chats
from distlora.errors import UserError
from tests.unit.test_chat_templates import (
    CHATML,
    ON_A_DAY,
    TURNS,
    learned,
    load,
    messages_of,
    section,
    tokenizer_of,
    whole,
)
from tests.unit.test_conversations import CALL, TOOL, TOOLS

ASKED, SAID = TURNS[0]


@pytest.fixture
def tokenizer():
    return tokenizer_of(CHATML)


@pytest.mark.parametrize(
    "tools, what",
    [
        ([{"type": "function", "function": "add"}], "a text as the function of tool 0"),
        ([TOOL, {"type": "function", "function": ["add"]}], "a list as the function of tool 1"),
        ([{"name": 3}], "a number as the name of tool 0"),
        (["add"], "no list of tools"),
    ],
)
def test_tools_in_another_form_are_refused_in_one_sentence(tmp_path, tools, what):
    with pytest.raises(UserError, match=f"^data: row 0 of .* has {what}.* column 'tools'.*; correct it$"):
        load(tmp_path, tokenizer_of(TOOLS), {"messages": messages_of(), "tools": tools})


@pytest.mark.parametrize(
    "row, what",
    [
        ({"prompt": float("nan"), "completion": "b"}, "NaN in column 'prompt'"),
        ({"prompt": "a", "completion": float("-inf")}, "-infinity in column 'completion'"),
        ({"prompt": "a", "completion": "b", "system": float("nan")}, "NaN in column 'system'"),
        ({"prompt": "a", "completion": "b", "system": ["c"]}, "a list in column 'system'"),
        ({"messages": messages_of(), "system": "half \ud83d"}, "an unpaired surrogate .* in column 'system'"),
        ({"prompt": "a", "completion": "b \ufdd0"}, r"a noncharacter \(U\+FDD0 to U\+FDEF\) in message 0"),
    ],
)  # fmt: skip
def test_a_cell_that_holds_no_text_is_named(tmp_path, tokenizer, row, what):
    with pytest.raises(UserError, match=f"^data: row 0 of .*, counted from 0, has {what}.*; correct it$"):
        load(tmp_path, tokenizer, row)


@pytest.mark.parametrize("prompt", [ASKED, messages_of(TURNS[:1]) + [{"role": "user", "content": "Sure?"}]])
def test_a_row_without_a_completion_is_unanswered(tmp_path, tokenizer, prompt):
    rows = [{"prompt": prompt, "completion": None}, {"prompt": ASKED, "completion": SAID}]
    encoded = load(tmp_path, tokenizer, *rows)
    assert (len(encoded.samples), encoded.dropped, encoded.unanswered) == (1, 1, 1)
    questions = load_questions(section(tmp_path, *rows), "train", tokenizer)
    assert [each.answer for each in questions.items] == [SAID] and questions.dropped == 1
    with pytest.raises(UserError, match="no row of .* has an answer"):
        load(tmp_path, tokenizer, rows[0])


def test_prompt_and_completion_may_be_one_message_each(tmp_path, tokenizer):
    asked, said = messages_of(TURNS[:1])
    for row in (
        {"prompt": asked, "completion": said},
        {"prompt": [asked], "completion": json.dumps(said)},
        {"prompt": ASKED, "completion": {"from": "gpt", "value": SAID}},
    ):
        (sample,) = load(tmp_path, tokenizer, row).samples
        assert sample.input_ids == whole(tokenizer, [asked, said])
        assert learned(sample, tokenizer) == [f"{SAID}<|im_end|>"]


def test_a_legacy_call_of_a_function_is_a_call_of_a_tool(tmp_path):
    tokenizer = tokenizer_of(TOOLS)
    call = {"name": "add", "arguments": '{"a": 1, "b": 1}'}
    asked, answer = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "It is 2."}
    legacy = {"role": "assistant", "content": None, "function_call": call}
    messages = [asked, legacy, {"role": "function", "name": "add", "content": "2"}, answer]
    (sample,) = load(tmp_path, tokenizer, {"messages": messages, "tools": [TOOL]}).samples
    same = [asked, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "2"}, answer]
    assert sample.input_ids == whole(tokenizer, same, tools=[TOOL])
    legacy["function_call"] = "add"
    with pytest.raises(UserError, match="no call with a name and arguments in message 1"):
        load(tmp_path, tokenizer, messages)


def test_an_empty_list_of_calls_is_none(tmp_path, tokenizer):
    messages = messages_of()
    for message in messages:
        message["tool_calls"] = []
    for template in (CHATML, TOOLS):
        (sample,) = load(tmp_path, tokenizer_of(template), messages).samples
        assert sample.input_ids == whole(tokenizer, messages_of())
    with pytest.raises(UserError, match="no content in message 1"):
        load(tmp_path, tokenizer, [messages[0], {"role": "assistant", "content": None, "tool_calls": []}])


class CountingChat(Chat):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.encoded = 0

    def encode(self, conversations, all_turns=True):
        self.encoded += len(conversations)
        return super().encode(conversations, all_turns)


@pytest.mark.parametrize("kept", [0, 1, 7, 11])
def test_the_part_of_a_long_conversation_that_fits_is_found_at_once(tmp_path, tokenizer, kept):
    turns = [(f"{number}+1?", f"It is {number + 1}.") for number in range(12)]
    max_length = len(whole(tokenizer, messages_of(turns[:kept]))) if kept else 8
    data = section(tmp_path, {"messages": messages_of(turns)}, max_length=max_length)
    chat = CountingChat(tokenizer, ON_A_DAY)
    found = encode_chats(ChatExamples(data, "train"), chat, data).samples
    assert [learned(sample, tokenizer) for sample in found] == [
        [f"{said}<|im_end|>" for _, said in turns[:count]] for count in (kept,) if count
    ]
    assert chat.encoded <= 3
