"""Which tokens of a conversation are the assistant's, in templates that make this hard to tell."""

from dataclasses import replace

import pytest

from distlora.data import load_questions
from distlora.data.chat import Chat
from distlora.data.chat_template import Conversation, clock
from distlora.data.chat_turns import Turns
from distlora.errors import UserError
from tests.unit.test_chat_templates import (
    CHATML,
    GENERATION,
    GPT_OSS,
    ON_A_DAY,
    QWEN_3,
    TURNS,
    learned,
    load,
    messages_of,
    section,
    tokenizer_of,
    whole,
)
from tests.unit.test_data_encode import make_tokenizer

#: Marks one place more behind the last turn.
MARKED_END = GENERATION.replace(
    "{% if add_generation_prompt %}",
    "{% if not add_generation_prompt %}{% generation %}{{ eos_token }}{% endgeneration %}{% endif %}"
    "{% if add_generation_prompt %}",
)
#: Asks for an answer without thoughts, as Qwen 3.5's without thinking.
NO_THOUGHTS = QWEN_3.replace(
    "{{- '<|im_start|>assistant\n' }}", "{{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}"
)
#: Opens the next turn behind every conversation, as Command A's. Ends an answer with two tokens.
OPENS = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '<|start|><|User|>' + "
    "message['content'] + '<|end|>' }}{% else %}{{ '<|start|><|Assistant|>' + message['content'] + "
    "'<|return|><|end|>' }}{% endif %}{% endfor %}{{ '<|start|><|Assistant|>' }}"
)


def ends_of(template: str, answer: str, conventions=ON_A_DAY) -> list[str]:
    """The tokens that end a turn with this answer."""
    tokenizer = tokenizer_of(template)
    (found,) = Chat(tokenizer, conventions).encode([Conversation.of_texts("Why?", answer)])
    return sorted(tokenizer.convert_ids_to_tokens(sorted(found.turns[-1].ends)))


def test_a_place_that_is_marked_behind_the_last_turn_belongs_to_it(tmp_path):
    tokenizer, messages = tokenizer_of(MARKED_END), messages_of()
    first, last = "It is 2.<|im_end|>", "Now it is 3.<eos>"
    (sample,) = load(tmp_path, tokenizer, messages).samples
    assert sample.input_ids == whole(tokenizer, messages)
    assert learned(sample, tokenizer) == [first, "Now it is 3.", "<eos>"]
    (sample,) = load(tmp_path, tokenizer, messages, train_on="last").samples
    assert "".join(learned(sample, tokenizer)) == last
    messages[3]["weight"] = 0
    (sample,) = load(tmp_path, tokenizer, messages).samples
    assert learned(sample, tokenizer) == [first]
    (item,) = load_questions(section(tmp_path, {"messages": messages}), "train", tokenizer).items
    assert item.prompt.endswith("And now?<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("answer", ["a", "final", "<|end|>", "assistant", ""])
def test_what_ends_a_turn_does_not_depend_on_the_answer(answer):
    assert ends_of(GPT_OSS, answer) == ends_of(GPT_OSS, "It is 2.") == ["<|return|>"]


@pytest.mark.parametrize("answer", ["", "<think>\none\n</think>\n\n", "It is 2."])
def test_the_end_of_thoughts_ends_no_turn(answer):
    assert ends_of(QWEN_3, answer) == ["<|im_end|>"]
    thoughts = CHATML.replace(
        "message['content'] + '<|im_end|>' + '\n'", "'<think></think>' + message['content']"
    )
    assert thoughts != CHATML and ends_of(thoughts, answer) == []


def test_a_special_token_at_the_end_of_an_answer_is_no_end_of_turn():
    assert ends_of(CHATML, "It is <eos>", replace(ON_A_DAY, plain=False)) == ["<|im_end|>"]


@pytest.mark.parametrize("prompt", ["", "<|channel|>"])
def test_the_opening_of_a_next_turn_is_not_learned(tmp_path, prompt):
    template = OPENS + f"{{% if add_generation_prompt %}}{prompt}{{% endif %}}"
    template = template.replace("'<|start|><|Assistant|>' +", f"'<|start|><|Assistant|>{prompt}' +")
    tokenizer, messages = tokenizer_of(template), messages_of()
    (sample,) = load(tmp_path, tokenizer, messages).samples
    assert sample.input_ids == whole(tokenizer, messages)
    assert learned(sample, tokenizer) == [f"{said}<|return|><|end|>" for _, said in TURNS]
    assert ends_of(template, "It is 2.") == ["<|end|>", "<|return|>"]
    again = [*messages, {"role": "assistant", "content": "Or 4."}]
    (sample,) = load(tmp_path, tokenizer, again).samples
    assert learned(sample, tokenizer) == [
        f"{said}<|return|><|end|>" for said in ("It is 2.", "Now it is 3.", "Or 4.")
    ]


def test_the_clock_knows_the_directives_of_the_template_and_all_if_a_format_is_computed():
    def shown(template):
        tokenizer = tokenizer_of(template + CHATML)
        return Chat(tokenizer, ON_A_DAY).encode([Conversation.of_texts("Why?", "So.")])[0].text.split("<")[0]

    asked = "{% if strftime_now is defined %}"
    written = asked + "{{ strftime_now('%d %b %Y') }}{% endif %}"
    assert shown(written) == "03 Feb 2026" and clock("2026-02-03", written).count("replace") == 4
    for computed in (
        asked + "{{ strftime_now('%' + 'd %b ' + '%' + 'Y') }}{% endif %}",
        "{% set now = strftime_now %}{{ now('%' ~ 'd %b ' ~ '%' ~ 'Y') }}",
    ):
        assert shown(computed) == "03 Feb 2026"


def test_the_whole_conversation_is_not_rendered_again_for_its_last_turn():
    messages, rendered = messages_of(), []

    def render(some, prompting):
        rendered.append((len(some), prompting))
        lines = [f"{each['role']}: {each['content']}." for each in some]
        return "\n".join([*lines, "assistant: "] if prompting else lines)

    text = render(messages, False)
    rendered.clear()
    start, end = Turns(render, text, messages, lambda some: []).place(len(messages) - 1)
    assert text[start:end] == "Now it is 3.."
    assert (len(messages), False) not in rendered


@pytest.mark.parametrize("count", [1, 2])
def test_thoughts_are_learned_where_the_prompt_ends_in_an_empty_block_of_them(tmp_path, count):
    assert NO_THOUGHTS != QWEN_3
    tokenizer = tokenizer_of(NO_THOUGHTS)
    messages = messages_of([(asked, f"<think>\nI add.\n</think>\n\n{said}") for asked, said in TURNS[:count]])
    (sample,) = load(tmp_path, tokenizer, messages).samples
    assert sample.input_ids == whole(tokenizer, messages)
    last = f"\nI add.\n</think>\n\n{TURNS[count - 1][1]}<|im_end|>"
    assert learned(sample, tokenizer) == [*(f"{said}<|im_end|>" for _, said in TURNS[: count - 1]), last]
    plain = messages_of(TURNS[:count])
    (sample,) = load(tmp_path, tokenizer, plain).samples
    assert learned(sample, tokenizer) == [f"{said}<|im_end|>" for _, said in TURNS[:count]]


@pytest.mark.parametrize("head", ["### Response:\n", "<|start|>ai<|message|>", "Antwort: "])
def test_a_head_of_any_words_is_not_learned_where_the_template_has_no_prompt(tmp_path, head):
    template = (
        "{% for message in messages %}{% if message['role'] == 'user' %}{{ message['content'] + '\n' }}"
        f"{{% else %}}{{{{ {head!r} + message['content'] + eos_token }}}}{{% endif %}}{{% endfor %}}"
    )
    tokenizer, messages = tokenizer_of(template), messages_of()
    (sample,) = load(tmp_path, tokenizer, messages).samples
    assert sample.input_ids == whole(tokenizer, messages)
    assert [text.strip() for text in learned(sample, tokenizer)] == [f"{said}<eos>" for _, said in TURNS]
    assert tokenizer.decode(sample.prompt_ids).rstrip().endswith(head.rstrip())


def test_thoughts_are_no_head_of_a_turn(tmp_path):
    template = (
        "{% for message in messages %}{{ message['role'] + ': ' if message['role'] == 'user' else '' }}"
        "{{ '<think>' + message['reasoning_content'] + '</think>' if message['reasoning_content'] else '' }}"
        "{{ message['content'] + eos_token }}{% endfor %}"
    )
    tokenizer, messages = tokenizer_of(template), messages_of()
    messages[-1]["reasoning_content"] = "I add."
    (sample,) = load(tmp_path, tokenizer, messages).samples
    assert learned(sample, tokenizer)[-1] == f"<think>I add.</think>{TURNS[-1][1]}<eos>"


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_beside_the_content_that_the_template_leaves_out_are_told(tmp_path, caplog, key):
    messages = messages_of(TURNS[:1])
    messages[1][key] = "One and one."
    shows = CHATML.replace("message['content']", f"message.get('{key}', '') + message['content']")
    for template, told in ((CHATML, True), (shows, False)):
        caplog.clear()
        load(tmp_path, tokenizer_of(template), messages)
        assert ("leaves out the thoughts of the last answer of 1 samples" in caplog.text) == told


WITHOUT_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{% set messages = messages[1:] %}{% endif %}" + CHATML
)


@pytest.mark.parametrize(
    "turns", [[("Which?", "It.")], [("Which?", "Which? Which one.")], [("A", "Which"), ("B", "C")]]
)
def test_each_text_needs_a_place_of_its_own(tmp_path, turns):
    messages = messages_of(turns, system="Which")
    (sample,) = load(tmp_path, tokenizer_of(CHATML), messages).samples
    assert sample.input_ids == whole(tokenizer_of(CHATML), messages)
    with pytest.raises(UserError, match=r"leaves out the text of message 0 \(system\)"):
        load(tmp_path, tokenizer_of(WITHOUT_SYSTEM), messages)


@pytest.mark.parametrize("begin, end", [("<think>", "</think>"), ("[THINK]", "[/THINK]")])
def test_special_tokens_around_the_thoughts_of_the_assistant_stay_tokens(tmp_path, begin, end):
    tokenizer = make_tokenizer(chat_template=CHATML)
    names = ["<|im_start|>", "<|im_end|>", begin, end]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    answer = f"{begin}\nI add.\n{end}\n\nIt is <eos>"
    messages = messages_of([(f"How much, {begin}?", answer)])
    (sample,) = load(tmp_path, tokenizer, messages).samples
    assert learned(sample, tokenizer) == [f"{answer}<|im_end|>"]
    marks = tokenizer.convert_tokens_to_ids([begin, end])
    assert [token for token in sample.input_ids if token in marks] == marks, "none in the question"
    assert tokenizer.eos_token_id not in sample.input_ids
