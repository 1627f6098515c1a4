"""Whether a chat template shows what the data says."""

import json
import re

from distlora.data.chat_template import Message, TemplateProblem, text_of

#: Around the thoughts of models that think in their answers. Templates may leave thoughts out.
_BEGIN, _END = "<think>", "</think>"
#: The tokens around thoughts, of all models.
THOUGHT_MARKERS = (_BEGIN, _END, "[THINK]", "[/THINK]")

#: Where a message may have its thoughts beside its content.
_THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")

Place = tuple[int, int]


def require_texts(text: str, messages: list[Message], tools: list[dict] | None) -> None:
    """Raises TemplateProblem if a text, a call of a tool or a tool is missing. text: what the template has
    made of the messages. White space may differ, because templates trim and join.
    """
    dense = without_space(text)
    missing = _missing(dense, [_forms(message) for message in messages])
    for number, message in enumerate(messages):
        if number in missing and not _has_words(message, text):
            raise TemplateProblem(f"leaves out the text of message {number} ({message['role']})")
        for call in message.get("tool_calls", ()):
            if call.get("function", call)["name"] not in text:
                raise TemplateProblem(f"leaves out the tool call of message {number}")
        if isinstance(message.get("content"), list) and without_space(str(message["content"])) in dense:
            raise TemplateProblem("shows a list of parts as it is; write contents as texts")
    for tool in tools or ():
        if str(tool.get("function", tool).get("name", "")) not in text:
            raise TemplateProblem("leaves out the tools")


def without_thoughts(content: str) -> str:
    """The content of an answer behind its thoughts."""
    return content.rpartition(_END)[2]


def has_thoughts(text: str, message: Message) -> bool:
    """Whether a text has the thoughts of a message, if there are any."""
    inside = text_of(message).rpartition(_END)[0].rpartition(_BEGIN)[2]
    beside = [message[key] for key in _THOUGHT_KEYS if isinstance(message.get(key), str)]
    dense = without_space(text)
    return all(without_space(thoughts) in dense for thoughts in (inside, *beside))


def _forms(message: Message) -> tuple[str, str]:
    """How the text of a message may be written, without white space: as it is, and within a JSON text."""
    content = text_of(message)
    if message["role"] == "assistant":
        content = without_thoughts(content)
    return without_space(content), without_space(json.dumps(content, ensure_ascii=False)[1:-1])


def _missing(dense: str, texts: list[tuple[str, str]]) -> set[int]:
    """Which texts have no place of their own. Most templates show them in order; where they do not, each
    takes a place that no longer one has taken.
    """
    at = 0
    for forms in texts:
        ends = [place + len(form) for form in forms if (place := dense.find(form, at)) >= 0]
        if not ends:
            break
        at = ends[0]
    else:
        return set()
    missing, taken = set(), []
    for number in sorted(reversed(range(len(texts))), key=lambda number: -len(texts[number][0])):
        place = next(filter(None, (_free_place(dense, form, taken) for form in texts[number])), None)
        if place is None:
            missing.add(number)
        else:
            taken.append(place)
    return missing


def _free_place(dense: str, form: str, taken: list[Place]) -> Place | None:
    """The first place of a text that does not overlap with others."""
    start = dense.find(form)
    while start >= 0:
        end = start + len(form)
        behind = [other_end for other, other_end in taken if start < other_end and other < end]
        if not behind:
            return start, end
        start = dense.find(form, max(behind))
    return None


def _has_words(message: Message, text: str) -> bool:
    """Whether a text has all words of a tool's result, which the template may have read as JSON."""
    return message["role"] == "tool" and all(word in text for word in re.findall(r"\w+", text_of(message)))


def without_space(text: str) -> str:
    """Without white space."""
    return "".join(text.split())
