"""Chat templates: the whole conversation is what the template says, and the assistant's turns are learned
with the token that ends them.
"""

import json
from functools import cache
from types import SimpleNamespace

import pytest
from tokenizers import AddedToken

from distlora.data import Conventions, load_questions, load_split
from distlora.errors import UserError
from distlora.models.targets import IGNORE
from tests.unit.test_data_encode import WithoutOffsets, make_tokenizer, of_kind

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' "
    "+ '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation "
    "roles must "
    "alternate user/assistant') }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not "
    "supported') }}"
    "{% endif %}{% for message in messages %}" + ALTERNATE + "{% if (message['role'] == 'assistant') %}"
    "{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ "
    "'<start_of_turn>' + role + "
    "'\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{'<start_of_turn>model\n'}}{% endif %}"
)
LLAMA_2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + "
    "message['content'].strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + "
    "message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{{ bos_token }}{%- if not date_string is defined %}{%- if strftime_now is defined %}{%- set "
    "date_string = "
    "strftime_now('%d %b %Y') %}{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' }}"
    "{%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] | trim }}{% set messages = "
    "messages[1:] "
    "%}{%- endif %}{{- '<|eot_id|>' }}{%- for message in messages %}{{- '<|start_header_id|>' + "
    "message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
#: Thoughts of turns before the last question are left out, and the last turn has some, perhaps empty.
QWEN_3 = (
    "{%- set ns = namespace(last=0) %}{%- for message in messages %}{%- if message.role == 'user' %}"
    "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for message in messages %}{%- if message.role != 'assistant' %}{{- '<|im_start|>' + "
    "message.role + '\n' + "
    "message.content + '<|im_end|>\n' }}{%- else %}{%- set content = message.content %}{%- set "
    "thought = '' %}"
    "{%- if '</think>' in content %}{%- set thought = "
    "content.split('</think>')[0].rstrip('\n').split('<think>')"
    "[-1].lstrip('\n') %}{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last and (loop.last or thought) %}{{- '<|im_start|>assistant\n<think>\n' + "
    "thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}{%- else %}"
    "{{- '<|im_start|>assistant\n' + content }}{%- endif %}{{- '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
#: The system's text stands in the last message if that is a question, and nowhere else.
MISTRAL = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content'] %}{%- "
    "set messages = messages[1:] %}{%- endif %}{{- bos_token }}{%- for message in messages %}"
    "{%- if message['role'] == 'user' %}{%- if loop.last and system_message is defined %}"
    "{{- '[INST] ' + system_message + '\n\n' + message['content'] + '[/INST]' }}"
    "{%- else %}{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}{%- else %}{{- ' ' + "
    "message['content'] + eos_token }}{%- endif %}{%- endfor %}"
)
#: The system's text stands in the last question, and moves with every turn.
MOVING = MISTRAL.replace("loop.last and", "messages[loop.index0 + 1:] | length < 2 and")
PHI_3 = (
    "{% for message in messages %}{{'<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}\n{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token }}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)
#: Asks for thoughts, and leaves out those of all turns.
DEEPSEEK_R1 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '<|User|>' + "
    "message['content'] }}{% else %}{% set content = message['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}{{ '<|Assistant|>' + content + eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
#: The last turn ends otherwise than those before it.
GPT_OSS = (
    "{{ '<|start|>system<|message|>You help.<|end|>' }}{% for message in messages %}{% if message['role'] == "
    "'user' %}{{ '<|start|>user<|message|>' + message['content'] + '<|end|>' }}{% else %}{{ "
    "'<|start|>assistant"
    "<|channel|>final<|message|>' + message['content'] + ('<|return|>' if loop.last else '<|end|>') "
    "}}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
VICUNA = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' + message['content'] + '\n' "
    "}}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
GENERATION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == "
    "'assistant' %}{% generation %}{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>\n' }}{% else %}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOKENS = [
    "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]",
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|user|>", "<|assistant|>", "<|system|>",
    "<|end|>", "<|User|>", "<|Assistant|>", "<|start|>", "<|message|>", "<|channel|>", "<|return|>",
]  # fmt: skip

ON_A_DAY = Conventions(date="2026-02-03")
TURNS = [("How much?", "It is 2."), ("And now?", "Now it is 3.")]


@cache
def tokenizer_of(template: str):
    tokenizer = make_tokenizer(bos=True, chat_template=template)
    tokenizer.add_special_tokens({"additional_special_tokens": TOKENS})
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    return tokenizer


def messages_of(turns=TURNS, system=None):
    found = [] if system is None else [{"role": "system", "content": system}]
    for asked, said in turns:
        found += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return found


def section(tmp_path, *rows, **more):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = dict(
        task="chat", path=str(file), fields=None, template=None, max_length=4096, train_on="all",
        think_step_by_step=None,
    )  # fmt: skip
    return SimpleNamespace(**(settings | more))


def load(tmp_path, tokenizer, *rows, conventions=ON_A_DAY, **more):
    rows = [row if isinstance(row, dict) else {"messages": row} for row in rows]
    return load_split(section(tmp_path, *rows, **more), "train", tokenizer, conventions)


def learned(sample, tokenizer) -> list[str]:
    """The texts of the labels that stand together."""
    found, previous = [], IGNORE
    for label in sample.labels:
        if label != IGNORE:
            found += [[]] if previous == IGNORE else []
            found[-1].append(label)
        previous = label
    return [tokenizer.decode(part) for part in found]


def whole(tokenizer, messages, **more) -> list[int]:
    return tokenizer.apply_chat_template(messages, tokenize=True, **more)["input_ids"]


@pytest.mark.parametrize(
    "template, end",
    [
        (CHATML, "<|im_end|>"),
        (GEMMA, "<end_of_turn>"),
        (LLAMA_2, " <eos>"),
        (QWEN_3, "<|im_end|>"),
        (MISTRAL, "<eos>"),
        (ZEPHYR, "<eos>"),
        (DEEPSEEK_R1, "<eos>"),
        (GENERATION, "<|im_end|>"),
    ],
    ids=["chatml", "gemma", "llama-2", "qwen3", "mistral", "zephyr", "deepseek-r1", "generation"],
)
def test_the_assistants_turns_are_learned_with_their_end_as_the_template_renders_them(
    tmp_path, template, end
):
    tokenizer, messages = tokenizer_of(template), messages_of()
    (sample,) = load(tmp_path, tokenizer, messages).samples
    assert sample.input_ids == whole(tokenizer, messages)
    thought = "<think>\n\n</think>\n\n" if template == QWEN_3 else ""
    space = " " if template in (LLAMA_2, MISTRAL) else ""
    answers = [f"{space}{thought * (number == 1)}{said}{end}" for number, (_, said) in enumerate(TURNS)]
    assert learned(sample, tokenizer) == answers
    questions = load_questions(section(tmp_path, {"messages": messages}), "train", tokenizer)
    (item,) = questions.items
    assert item.prompt_ids == sample.prompt_ids == sample.input_ids[: len(item.prompt_ids)]
    assert item.answer == "Now it is 3."
    assert questions.ends == {tokenizer.convert_tokens_to_ids(end.strip())}


@pytest.mark.parametrize("template", [CHATML, GEMMA, LLAMA_2, QWEN_3, MISTRAL, MOVING, ZEPHYR, GENERATION])
def test_a_question_is_what_the_template_asks_with(tmp_path, template):
    tokenizer, messages = tokenizer_of(template), messages_of()
    (item,) = load_questions(section(tmp_path, {"messages": messages}), "train", tokenizer).items
    asked = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    assert item.prompt == asked and tokenizer.decode(item.prompt_ids) == asked


def test_a_turn_may_end_otherwise_where_others_follow(tmp_path):
    for template, ends, last in (
        (GPT_OSS, ["<|end|>", "<|return|>"], ["<|return|>"]),
        (PHI_3, ["<|end|>", "<|end|>\n<eos>"], ["<|end|>", "<eos>"]),
    ):
        tokenizer, messages = tokenizer_of(template), messages_of()
        (sample,) = load(tmp_path, tokenizer, messages).samples
        assert sample.input_ids == whole(tokenizer, messages)
        found = learned(sample, tokenizer)
        opened = "<|channel|>final<|message|>" if template == GPT_OSS else ""
        assert found == [f"{opened}{said}{end}" for (_, said), end in zip(TURNS, ends)]
        questions = load_questions(section(tmp_path, {"messages": messages}), "train", tokenizer)
        assert questions.ends == set(tokenizer.convert_tokens_to_ids(last))


def test_a_template_without_an_end_gets_the_end_of_sequence(tmp_path):
    tokenizer, messages = tokenizer_of(VICUNA), messages_of()
    (sample,) = load(tmp_path, tokenizer, messages).samples
    assert sample.input_ids == [*whole(tokenizer, messages), tokenizer.eos_token_id]
    assert learned(sample, tokenizer)[-1] == " Now it is 3.\n<eos>"


def test_thoughts_stay_where_the_template_shows_them(tmp_path):
    said = ["<think>\none\n</think>\n\nIt is 2.", "<think>\ntwo\n</think>\n\nNow it is 3."]
    messages = messages_of([(asked, text) for (asked, _), text in zip(TURNS, said)])
    tokenizer = tokenizer_of(QWEN_3)
    (sample,) = load(tmp_path, tokenizer, messages).samples
    assert sample.input_ids == whole(tokenizer, messages)
    assert learned(sample, tokenizer) == ["It is 2.<|im_end|>", f"{said[1]}<|im_end|>"]
    thought = tokenizer.convert_tokens_to_ids("<think>")
    assert sample.input_ids.count(thought) == sample.labels.count(thought) == 1


def test_thoughts_that_the_template_leaves_out_are_told(tmp_path, caplog):
    messages = messages_of([("How much?", "<think>\none and one\n</think>\n\nIt is 2."), TURNS[1]])
    for template, turns, told in (
        (DEEPSEEK_R1, messages[:2], True),
        (DEEPSEEK_R1, messages, False),  # those of an earlier turn
        (QWEN_3, messages[:2], False),
    ):
        caplog.clear()
        tokenizer = tokenizer_of(template)
        (sample,) = load(tmp_path, tokenizer, turns).samples
        assert sample.input_ids == whole(tokenizer, turns)
        assert ("leaves out the thoughts of the last answer of 1 sample" in caplog.text) == told


def test_the_head_of_a_turn_is_not_learned_where_the_template_has_no_prompt(tmp_path):
    tokenizer = tokenizer_of(CHATML[: CHATML.index("{% if add_generation_prompt")])
    (sample,) = load(tmp_path, tokenizer, messages_of()).samples
    assert learned(sample, tokenizer) == [f"{said}<|im_end|>" for _, said in TURNS]
    assert tokenizer.decode(sample.prompt_ids).endswith("<|im_start|>assistant\n")


def test_a_tokenizer_may_have_several_templates(tmp_path):
    tokenizer = tokenizer_of(CHATML + " ")  # one of its own
    try:
        tokenizer.chat_template = {"default": CHATML, "tool_use": "{{ tools[0].name }}" + CHATML}
        (sample,) = load(tmp_path, tokenizer, {"messages": messages_of(), "tools": [{"name": "add"}]}).samples
        assert tokenizer.decode(sample.input_ids).startswith("add<|im_start|>")
        tokenizer.chat_template = {"rag": CHATML}
        with pytest.raises(UserError, match="row 0 of .* chat template, which cannot be chosen"):
            load(tmp_path, tokenizer, messages_of())
    finally:
        tokenizer.chat_template = CHATML


@pytest.mark.parametrize("kind", ["trimmed", "metaspace", "normalised"])
@pytest.mark.parametrize("template", [CHATML, LLAMA_2], ids=["chatml", "llama-2"])
def test_turns_are_found_whatever_a_tokenizer_calls_the_places_of_its_tokens(tmp_path, kind, template):
    tokenizer = of_kind(kind)
    tokenizer.add_special_tokens({"additional_special_tokens": TOKENS, "bos_token": "<bos>"})
    turns = [("hello", "the answer"), ("hi", "not long")]  # in letters that it has
    tokenizer.chat_template, messages = template, messages_of(turns)
    (sample,) = load(tmp_path, tokenizer, messages).samples
    end = "<|im_end|>" if template == CHATML else "<eos>"
    assert sample.input_ids == whole(tokenizer, messages)
    found = [text.replace(" ", "") for text in learned(sample, tokenizer)]
    assert found == [f"{said}{end}".replace(" ", "") for _, said in turns]


@pytest.mark.parametrize("template", [CHATML, GEMMA, QWEN_3])
def test_a_tokenizer_without_places_learns_the_same(tmp_path, template):
    tokenizer = tokenizer_of(template)
    (sample,) = load(tmp_path, WithoutOffsets(tokenizer), messages_of()).samples
    (fast,) = load(tmp_path, tokenizer, messages_of()).samples
    assert (sample.input_ids, sample.labels) == (fast.input_ids, fast.labels)


def test_a_systems_text_may_move_from_question_to_question(tmp_path):
    tokenizer, messages = tokenizer_of(MOVING), messages_of(system="Be brief.")
    (sample,) = load(tmp_path, tokenizer, messages).samples
    assert sample.input_ids == whole(tokenizer, messages)
    assert learned(sample, tokenizer) == [" It is 2.<eos>", " Now it is 3.<eos>"]


def test_a_systems_text_that_only_prompts_show_stands_in_the_first_question(tmp_path):
    tokenizer, messages = tokenizer_of(MISTRAL), messages_of(system="Be brief.")
    (first, said), *others = TURNS
    merged = messages_of([(f"Be brief.\n\n{first}", said), *others])
    messages[2]["weight"] = 0
    (sample,) = load(tmp_path, tokenizer, messages).samples
    assert sample.input_ids == whole(tokenizer, merged)
    assert learned(sample, tokenizer) == [" Now it is 3.<eos>"]
    (item,) = load_questions(section(tmp_path, {"messages": messages[:3]}), "train", tokenizer).items
    asked = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert item.prompt == asked, "as the template itself asks"
    with pytest.raises(UserError, match=r"leaves out the text of message 0 \(system\)"):
        forgets = MISTRAL.replace("system_message + '\n\n' +", "")
        load(tmp_path, tokenizer_of(forgets), messages)


def test_an_assistant_may_speak_first(tmp_path):
    tokenizer = tokenizer_of(CHATML)
    messages = [{"role": "assistant", "content": "Hello."}, *messages_of(TURNS[:1])]
    (sample,) = load(tmp_path, tokenizer, messages).samples
    assert learned(sample, tokenizer) == ["Hello.<|im_end|>", "It is 2.<|im_end|>"]


def test_one_prompt_and_response_are_a_conversation(tmp_path):
    tokenizer = tokenizer_of(GEMMA)
    row = {"q": "How much? ", "a": " It is 2.\n"}
    data = dict(task="text", template="chat", fields={"prompt": "q", "response": "a"})
    (sample,) = load(tmp_path, tokenizer, row, **data).samples
    assert sample.input_ids == whole(tokenizer, messages_of([(row["q"], row["a"])]))
    assert learned(sample, tokenizer) == ["It is 2.<end_of_turn>"]
    cut = load(tmp_path, tokenizer, row, **data, max_length=len(sample.input_ids) - 3)
    assert cut.truncated == 1 and learned(cut.samples[0], tokenizer) == ["It is 2."[: -len(".")]]


def test_the_beginning_of_sequence_is_the_templates(tmp_path):
    for template, count in ((GEMMA, 1), (CHATML, 0), (LLAMA_2, 2)):
        tokenizer = tokenizer_of(template)
        (sample,) = load(tmp_path, tokenizer, messages_of()).samples
        assert sample.input_ids.count(tokenizer.bos_token_id) == count


def test_generation_marks_need_not_be_one_a_turn(tmp_path):
    twice = GENERATION.replace(
        "{% generation %}{{ message['content'] }}{% endgeneration %}",
        "{% generation %}{{ message['content'] }}{% endgeneration %}{% generation %}{{ '!' }}"
        "{% endgeneration %}",
    )
    tokenizer, messages = tokenizer_of(twice), messages_of()
    (sample,) = load(tmp_path, tokenizer, messages).samples
    assert sample.input_ids == whole(tokenizer, messages)
    assert learned(sample, tokenizer) == [f"{said}!<|im_end|>" for _, said in TURNS]
    empty = GENERATION.replace(
        "{{ message['content'] }}{% endgeneration %}", "{% endgeneration %}{{ message['content'] }}"
    )
    tokenizer = tokenizer_of(empty)
    (sample,) = load(tmp_path, tokenizer, messages).samples
    assert learned(sample, tokenizer) == [f"{said}<|im_end|>" for _, said in TURNS]


def test_contents_are_lists_of_parts_where_the_template_wants_them(tmp_path):
    parts = CHATML.replace("+ message['content'] +", "+ message['content'][0]['text'] +")
    tokenizer = tokenizer_of(parts)
    (sample,) = load(tmp_path, tokenizer, messages_of()).samples
    as_text = load(tmp_path, tokenizer_of(CHATML), messages_of()).samples[0]
    assert sample.input_ids == as_text.input_ids and sample.labels == as_text.labels
    listed = [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in messages_of()]
    for template in (parts, CHATML):
        (sample,) = load(tmp_path, tokenizer_of(template), listed).samples
        assert sample.input_ids == as_text.input_ids


def test_a_template_may_want_parts_and_a_conversation_that_begins_in_its_own_way(tmp_path):
    wants_a_system = "{{ '' if messages[0].role == 'system' else raise_exception('No system') }}"
    parts = CHATML.replace("+ message['content'] +", "+ message['content'][0]['text'] +")
    tokenizer, messages = tokenizer_of(wants_a_system + parts), messages_of(system="Be brief.")
    (sample,) = load(tmp_path, tokenizer, messages).samples
    assert learned(sample, tokenizer) == [f"{said}<|im_end|>" for _, said in TURNS]
    shows_all = CHATML.replace("message['content'] +", "message['content'] | string +")
    listed = [{**each, "content": [{"type": "text", "text": each["content"]}]} for each in messages]
    (sample,) = load(tmp_path, tokenizer_of(shows_all), listed).samples
    assert "'type'" not in tokenizer.decode(sample.input_ids)


@pytest.mark.parametrize(
    "template", [LLAMA_3, "{{ bos_token }}{{ strftime_now('%Y-%m-%d %H:%M') }}" + CHATML]
)
def test_a_template_that_reads_the_clock_sees_one_day(tmp_path, template):
    tokenizer = tokenizer_of(template)
    (sample,) = load(tmp_path, tokenizer, messages_of(TURNS[:1])).samples
    text = tokenizer.decode(sample.input_ids)
    assert "03 Feb 2026" in text or "2026-02-03 00:00" in text
    end = "<|eot_id|>" if template == LLAMA_3 else "<|im_end|>"
    assert learned(sample, tokenizer) == [f"It is 2.{end}"]


@pytest.mark.parametrize(
    "template, said",
    [
        (GEMMA, r"fails \(Conversation roles must alternate user/assistant\)"),
        ("{% for m in messages %}{{ m.content }", "fails"),
        (CHATML + "{{ nothing.at.all }}", "fails .*undefined"),
        (CHATML + "{{ 1 + 'a' }}", "fails .*unsupported operand"),
        (CHATML + "{{ 1 / 0 }}", "fails .*division"),
        (CHATML + "{{ raise_exception('Not today') }}", "fails .Not today"),
        (CHATML.replace("+ message['content'] +", "+"), r"leaves out the text of message 0 \(user\)"),
        (CHATML.replace("message['content']", "message['content'][:3]"), "leaves out the text of message 0"),
        (DEEPSEEK_R1.replace("+ content +", "+"), r"leaves out the text of message 1 \(assistant\)"),
        ("{{ messages[-1].content }}" + CHATML, "does not let tell which tokens are the assistant's"),
    ],
)
def test_a_template_that_refuses_or_forgets_is_one_sentence_with_the_row(tmp_path, template, said):
    good = messages_of([("Who?", "I do.")])
    bad = [{"role": "user", "content": "Well"}, *messages_of(TURNS[:1])]
    with pytest.raises(UserError, match=rf"row \d of .*rows.jsonl.* not fit the chat template, which {said}"):
        load(tmp_path, tokenizer_of(template), good, bad)


@pytest.mark.parametrize("number", [3, 4])
def test_a_template_that_fails_is_one_sentence_for_prompts_and_responses(tmp_path, number):
    tokenizer = tokenizer_of("{% if 'bad' in messages[0].content %}{{ 1 / 0 }}{% endif %}" + CHATML)
    rows = [{"prompt": "good", "response": "yes"}, {"prompt": "bad", "response": "no"}]
    data = dict(task="text", template="chat", fields={"prompt": "prompt", "response": "response"})
    with pytest.raises(UserError, match=r"row 1 of .* not fit the chat template, which fails \(division"):
        load(tmp_path, tokenizer, *rows, conventions=Conventions.of_format(number), **data)
