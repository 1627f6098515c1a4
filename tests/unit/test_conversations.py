"""Conversations: which rows are read, which turns are learned, and what is kept of a long one."""

import json

import pyarrow
import pytest
from pyarrow import parquet

from distlora.data import load_questions, load_split
from distlora.errors import UserError
from distlora.models.targets import IGNORE
from distlora.tasks import is_correct
from tests.unit.test_chat_templates import (
    CHATML,
    TURNS,
    learned,
    load,
    messages_of,
    section,
    tokenizer_of,
    whole,
)

TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.content %}{{ message.content }}{% endif %}{% for call in message.tool_calls or [] %}"
    "{{ '<tool_call>' + call.function.name + ' ' + call.function.arguments | tojson + '</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ "
    "'<|im_start|>assistant\n' }}"
    "{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 1}}}


@pytest.fixture
def tokenizer():
    return tokenizer_of(CHATML)


def said(turns=TURNS):
    return [f"{text}<|im_end|>" for _, text in turns]


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_every_form_of_a_conversation_is_the_same(tmp_path, tokenizer, system):
    messages = messages_of(system=system)
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    shared = [{"from": names[each["role"]], "value": each["content"]} for each in messages]
    rows = [
        {"messages": messages},
        {"messages": json.dumps(messages)},
        {"conversations": shared},
        {"messages": [{**each, "role": each["role"].title(), "weight": None} for each in messages]},
        {"messages": [*messages, {"role": "user", "content": "Thanks."}]},
        {"conversations": shared[system is not None :], "system": system or ""},
    ]
    for row in rows:
        (sample,) = load(tmp_path, tokenizer, row).samples
        assert sample.input_ids == whole(tokenizer, messages) and learned(sample, tokenizer) == said()
        assert sample.answer == TURNS[-1][1]
    asked = {"prompt": messages[:-1], "completion": messages[-1:]}
    for row in (asked, {**asked, "completion": TURNS[-1][1]}):
        (sample,) = load(tmp_path, tokenizer, row).samples
        assert sample.input_ids == whole(tokenizer, messages)
        assert learned(sample, tokenizer) == said(TURNS[-1:]), "the prompt is not learned"


def test_parquet_with_its_nulls_is_read(tmp_path):
    table = [
        {
            "messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "tool_calls": [CALL]}],
            "tools": [TOOL],
        },
        {"messages": messages_of()},
    ]
    table[0]["tools"] = [{"type": "function", "function": {"name": "add", "description": None}}]
    parquet.write_table(pyarrow.Table.from_pylist(table), tmp_path / "rows.parquet")
    data = section(tmp_path, *table, path=str(tmp_path / "rows.parquet"))
    tokenizer = tokenizer_of(TOOLS)
    first, second = load_split(data, "train", tokenizer).samples
    assert tokenizer.decode(first.input_ids).startswith(
        '<|im_start|>system\n{"type": "function", "function": {"name": "add"}}'
    )
    assert second.input_ids == whole(tokenizer, messages_of())


def test_texts_are_a_question_and_its_answer(tmp_path, tokenizer):
    (asked, answer), messages = TURNS[0], messages_of(TURNS[:1])
    for row, fields in (
        ({"prompt": asked, "completion": answer}, None),
        ({"prompt": asked, "response": answer}, None),
        ({"q": asked, "a": answer}, {"prompt": "q", "response": "a"}),
        ({"talk": messages, "messages": "none"}, {"messages": "talk"}),
        ({"q": json.dumps(messages[:1]), "a": answer}, {"prompt": "q", "response": "a"}),
    ):
        (sample,) = load(tmp_path, tokenizer, row, fields=fields).samples
        assert sample.input_ids == whole(tokenizer, messages) and learned(sample, tokenizer) == said(
            TURNS[:1]
        )


def test_a_prompt_may_be_a_number_or_json_of_its_own(tmp_path, tokenizer):
    for asked, answer in (
        (3, 4),
        ('[{"a": 1}]', '{"b": 2}'),
        ('{"role": "cook"}', '[{"from": "Rome", "to": "Pisa"}]'),
    ):
        (sample,) = load(tmp_path, tokenizer, {"prompt": asked, "completion": answer}).samples
        assert sample.input_ids == whole(tokenizer, messages_of([(str(asked), str(answer))]))


def test_the_loss_is_on_all_turns_or_the_last_and_not_where_a_message_says_so(tmp_path, tokenizer):
    def turns(*marks, **more):
        messages = messages_of()
        for message, mark in zip(messages[1::2], marks):
            message.update(mark)
        encoded = load(tmp_path, tokenizer, messages, messages_of(), **more)
        assert encoded.samples[0].input_ids == whole(tokenizer, messages_of())
        return learned(encoded.samples[0], tokenizer)

    first, last = said()
    assert turns() == [first, last] and turns(train_on="last") == [last]
    assert turns({"weight": 0}) == turns({"train": False}, {"weight": 1.0}) == [last]
    assert turns({}, {"weight": 0}) == turns({"train": True}, {"train": False}) == [first]


def test_a_conversation_without_a_turn_to_learn_is_dropped_and_counted(tmp_path, tokenizer):
    silent = messages_of(TURNS[:1])
    silent[1]["weight"] = 0
    encoded = load(tmp_path, tokenizer, messages_of(), silent, messages_of()[:1])
    assert (len(encoded.samples), encoded.dropped, encoded.truncated) == (1, 2, 0)
    assert "no answer" in encoded.why_dropped and "no turn that is trained" in encoded.why_dropped


def test_the_longest_part_that_ends_with_an_assistants_turn_is_kept(tmp_path, tokenizer):
    turns = [*TURNS, ("And then?", "Then it is 4, and so on and on.")]
    lengths = [len(whole(tokenizer, messages_of(turns[:count]))) for count in (1, 2, 3)]
    row = messages_of(turns)
    for max_length, count in (
        (lengths[2], 3),
        (lengths[2] - 1, 3),  # the line break behind the end of turn may be cut
        (lengths[2] - 2, 2),
        (lengths[1], 2),
        (lengths[1] - 2, 1),
    ):
        encoded = load(tmp_path, tokenizer, row, max_length=max_length)
        (sample,) = encoded.samples
        assert learned(sample, tokenizer) == said(turns[:count])
        assert sample.input_ids == whole(tokenizer, messages_of(turns[:count]))[:max_length]
        assert (encoded.truncated, encoded.dropped) == (int(max_length < lengths[2]), 0)
    encoded = load(tmp_path, tokenizer, row, messages_of(TURNS[:1]), max_length=lengths[0])
    assert len(encoded.samples) == 2 and encoded.truncated == 1
    with pytest.raises(UserError, match="data.max_length: none of the 1 samples"):
        load(tmp_path, tokenizer, row, max_length=lengths[0] - 2)
    for more in ({"train_on": "last"}, {}):
        late = messages_of(turns)
        late[1]["train"] = late[3]["train"] = False
        encoded = load(tmp_path, tokenizer, late, messages_of(TURNS[:1]), max_length=lengths[1], **more)
        assert (len(encoded.samples), encoded.dropped) == (1, 1)


def test_tools_and_calls_go_to_the_template(tmp_path):
    tokenizer = tokenizer_of(TOOLS)
    asked = {"role": "user", "content": "1+1?"}
    result, answer = {"role": "tool", "content": "2"}, {"role": "assistant", "content": "It is 2."}
    messages = [asked, {"role": "assistant", "tool_calls": [CALL]}, result, answer]
    written = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 1}'}}
    openai = [asked, {"role": "assistant", "content": None, "tool_calls": [written]}, result, answer]
    shared = [
        {"from": "human", "value": "1+1?"},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "It is 2."},
    ]
    want = tokenizer.apply_chat_template(messages, tools=[TOOL], tokenize=True)["input_ids"]
    for row in (
        {"messages": messages, "tools": [TOOL]},
        {"messages": openai, "tools": json.dumps([TOOL])},
        {"conversations": shared, "tools": [TOOL]},
    ):
        (sample,) = load(tmp_path, tokenizer, row).samples
        assert sample.input_ids == want
        call = '<tool_call>add {"a": 1, "b": 1}</tool_call><|im_end|>'
        assert learned(sample, tokenizer) == [call, "It is 2.<|im_end|>"]
    joined = TOOLS.replace("call.function.arguments | tojson", "call.function.arguments")
    (sample,) = load(tmp_path, tokenizer_of(joined), {"messages": messages, "tools": [TOOL]}).samples
    assert sample.input_ids == want, "a template that wants the arguments as a text"
    for row, what in (
        ({"messages": messages}, "leaves out the tool call of message 1"),
        ({"messages": messages_of(), "tools": [TOOL]}, "leaves out the tools"),
    ):
        plain = CHATML.replace("message['content']", "message['content'] | default('')")
        with pytest.raises(UserError, match=f"row 0 of .* not fit the chat template, which {what}"):
            load(tmp_path, tokenizer_of(plain), row)


BAD = [
    ({"messages": []}, "no messages in column 'messages' where a list of messages is wanted"),
    ({"messages": "Hello"}, "a text in column 'messages'"),
    ({"messages": [3]}, "a number as message 0"),
    ({"messages": [{"content": "Hello"}]}, "no role in message 0"),
    (
        {"messages": [{"role": "usr", "content": "Hello"}]},
        "the role 'usr' in message 0.*, did you mean user?",
    ),
    ({"messages": [{"role": "user"}]}, "no content in message 0"),
    ({"messages": [{"role": "user", "content": 3}]}, "a number as the content of message 0"),
    (
        {"messages": [{"role": "user", "content": "a\ud83d"}]},
        r"an unpaired surrogate \('.ud83d'\) in message 0",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        "a part of the kind 'image' in message 0",
    ),
    ({"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}, "the weight 0.5 in message 0"),
    ({"messages": [{"role": "assistant", "content": "a", "train": "no"}]}, "train 'no' in message 0"),
    (
        {"messages": [{"role": "assistant", "content": "a", "train": True, "weight": 0}]},
        "a weight and a train that contradict",
    ),
    ({"messages": [{"role": "user", "content": "a", "train": True}]}, "a loss on message 0"),
    ({"conversations": [{"from": "function_call", "value": "add"}]}, "no call with a name"),
    ({"messages": [{"role": "assistant", "tool_calls": "add"}]}, "no list of calls"),
    ({"messages": [{"role": "assistant", "content": "a"}], "tools": "add"}, "no list of tools"),
]


@pytest.mark.parametrize("row, what", BAD)
def test_a_row_that_is_no_conversation_is_named(tmp_path, tokenizer, row, what):
    good = {key: messages_of() for key in row if key != "tools"}
    with pytest.raises(UserError, match=f"^data: row 1 of .* has {what}.*; correct it$"):
        load(tmp_path, tokenizer, good, row)


def test_settings_that_chats_do_not_have_are_refused(tmp_path, tokenizer):
    for row, more, what in (
        ({"text": "a"}, {}, "has neither messages nor conversations nor prompt and completion"),
        ({"messages": messages_of()}, {"fields": {"mesages": "messages"}}, "did you mean messages"),
        ({"messages": messages_of()}, {"fields": {"messages": "chats"}}, "has no column 'chats'"),
        ({"messages": messages_of()}, {"template": "{prompt}"}, "has the tokenizer's chat template"),
        ({"messages": messages_of()}, {"think_step_by_step": True}, "shows messages as they are"),
    ):
        with pytest.raises(UserError, match=what):
            load(tmp_path, tokenizer, row, **more)


def test_the_last_turn_is_the_answer_to_a_question(tmp_path, tokenizer):
    row = {"messages": [*messages_of(system="Be brief."), {"role": "user", "content": "Thanks."}]}
    questions = load_questions(section(tmp_path, row), "train", tokenizer)
    (item,) = questions.items
    shown = messages_of(system="Be brief.")[:-1]
    assert item.prompt == tokenizer.apply_chat_template(shown, tokenize=False, add_generation_prompt=True)
    assert item.answer == TURNS[-1][1] and is_correct("chat", f" {item.answer} ", item.answer)
    assert not is_correct("chat", "No.", item.answer)
    assert questions.ends == {tokenizer.convert_tokens_to_ids("<|im_end|>")}


def test_the_first_token_has_no_loss(tmp_path):
    tokenizer = tokenizer_of("{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
    (sample,) = load(tmp_path, tokenizer, [{"role": "assistant", "content": "Hello."}]).samples
    assert sample.labels == [IGNORE, *sample.input_ids[1:]]
