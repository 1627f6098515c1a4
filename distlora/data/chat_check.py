"""Whether a chat template shows what the data says."""

import json
import re

from distlora.data.chat_template import Message, TemplateProblem, text_of

#: Around the thoughts of models that think in their answers. Templates may leave thoughts out.
_BEGIN, _END = "<think>", "</think>"
#: The tokens around thoughts, of all models.
THOUGHT_MARKERS = (_BEGIN, _END, "[THINK]", "[/THINK]")


def require_texts(text: str, messages: list[Message], tools: list[dict] | None) -> None:
    """Raises TemplateProblem if a text, a call of a tool or a tool is missing. text: what the template has
    made of the messages. White space may differ, because templates trim and join.
    """
    dense = without_space(text)
    for number, message in enumerate(messages):
        if not _is_there(message, text, dense):
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
    thoughts = without_space(text_of(message).rpartition(_END)[0].rpartition(_BEGIN)[2])
    return not thoughts or thoughts in without_space(text)


def _is_there(message: Message, text: str, dense: str) -> bool:
    content = text_of(message)
    if message["role"] == "assistant":
        content = without_thoughts(content)
    in_json = json.dumps(content, ensure_ascii=False)[1:-1]
    if without_space(content) in dense or without_space(in_json) in dense:
        return True
    # A result that the template reads as JSON.
    return message["role"] == "tool" and all(word in text for word in re.findall(r"\w+", content))


def without_space(text: str) -> str:
    """Without white space."""
    return "".join(text.split())
