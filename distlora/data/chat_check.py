"""Whether a chat template shows what the data says."""

import json
import re

from distlora.data.chat_template import Message, TemplateProblem, text_of

#: Around the thoughts of models that think in their answers. Templates may leave thoughts out.
_BEGIN, _END = "<think>", "</think>"


def require_texts(text: str, messages: list[Message], tools: list[dict] | None) -> None:
    """Raises TemplateProblem if a text, a call of a tool or a tool is missing. text: what the template has
    made of the messages. White space may differ, because templates trim and join.
    """
    squeezed = _squeezed(text)
    for number, message in enumerate(messages):
        if not _is_there(message, text, squeezed):
            raise TemplateProblem(f"leaves out the text of message {number} ({message['role']})")
        for call in message.get("tool_calls", ()):
            if call.get("function", call)["name"] not in text:
                raise TemplateProblem(f"leaves out the tool call of message {number}")
        if isinstance(message.get("content"), list) and _squeezed(str(message["content"])) in squeezed:
            raise TemplateProblem("shows a list of parts as it is; write contents as texts")
    for tool in tools or ():
        if str(tool.get("function", tool).get("name", "")) not in text:
            raise TemplateProblem("leaves out the tools")


def without_thoughts(content: str) -> str:
    """The content of an answer behind its thoughts."""
    return content.rpartition(_END)[2]


def has_thoughts(text: str, message: Message) -> bool:
    """Whether a text has the thoughts of a message, if there are any."""
    thoughts = _squeezed(text_of(message).rpartition(_END)[0].rpartition(_BEGIN)[2])
    return not thoughts or thoughts in _squeezed(text)


def _is_there(message: Message, text: str, squeezed: str) -> bool:
    content = text_of(message)
    if message["role"] == "assistant":
        content = without_thoughts(content)
    in_json = json.dumps(content, ensure_ascii=False)[1:-1]
    if _squeezed(content) in squeezed or _squeezed(in_json) in squeezed:
        return True
    # A result that the template reads as JSON.
    return message["role"] == "tool" and all(word in text for word in re.findall(r"\w+", content))


def _squeezed(text: str) -> str:
    """Without white space."""
    return "".join(text.split())
