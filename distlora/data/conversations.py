"""Conversations: what the rows of the task `chat` are made into.

A row has `messages` (each with a role and a content), `conversations` as ShareGPT's (each with from and
value), or a prompt and its completion, which are texts or lists of messages; beside them perhaps `tools`, and
`system` as a text.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from distlora.data import examples
from distlora.data.chat_template import Conversation, Message, text_of
from distlora.data.columns import found_in, is_not_finite, row_name
from distlora.data.examples import Example
from distlora.data.readers import is_finite_number, kind_of, plain
from distlora.data.sources import Row
from distlora.data.templates import CHAT
from distlora.errors import UserError
from distlora.sentences import nearest
from distlora.tasks import get_task

#: What a column can be used for.
ROLES = ("messages", "prompt", "response", "system", "tools")

#: The columns of each role in the data sets of the field.
_COLUMNS = {
    "messages": ("messages", "conversations", "conversation"),
    "prompt": ("prompt",),
    "response": ("completion", "response"),
    "system": ("system",),
    "tools": ("tools",),
}

#: The roles by the names that they have in the data sets of the field.
_SPEAKERS = {
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot", "ai"),
    "system": ("system", "developer"),
    "tool": ("tool", "observation", "function", "function_response", "tool_response", "ipython"),
}
_ROLE_OF = {name: role for role, names in _SPEAKERS.items() for name in names}
#: Of an assistant that calls a function: the content is the call.
_CALLS = ("function_call", "tool_call")
#: Where a message has its calls.
_CALL_KEYS = ("tool_calls", "function_call")
#: What this package itself puts into texts.
_NONCHARACTER = re.compile("[\ufdd0-\ufdef]")


class Wrong(Exception):
    """The message is the rest of a sentence that begins "row 3 of x.jsonl, counted from 0, has"."""


class ChatExamples:
    """The rows of a split as conversations, in order. To make one checks the section against the columns.

    Has what `Examples` has.
    """

    stops: tuple[str, ...] = ()
    by_steps = False

    def __init__(self, section: examples.DataSection, split: str):
        if section.template not in (None, CHAT):
            raise UserError(
                "data.template: the task chat has the tokenizer's chat template, "
                "remove the template or choose the task text"
            )
        if section.think_step_by_step:
            raise UserError(
                "data.think_step_by_step: the task chat shows messages as they are; set it to null"
            )
        self.rows = examples.load_rows(section, split)
        self.origin = examples.origin(section, split)
        self._extract = get_task(section.task).extract
        self._columns = self._assign_columns(section.fields or {})

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Example]:
        for position, row in enumerate(self.rows):
            try:
                yield self._example(row)
            except Wrong as wrong:
                row = row_name(position, self.origin)
                raise UserError(f"data: {row} has {wrong}; correct it") from None

    def _assign_columns(self, fields: dict[str, str]) -> dict[str, str]:
        for role, column in fields.items():
            if role not in ROLES:
                hint = nearest(role, ROLES) or f"; choose from {', '.join(ROLES)}"
                raise UserError(f"data.fields: unknown name {role!r}{hint}")
            examples.require_column(self.rows, column, f"data.fields: {role}", self.origin)
        columns = dict(fields)
        if not {"messages", "prompt", "response"} & set(fields):
            columns |= self._found("messages")
        if "messages" not in columns:
            columns = self._found("prompt", "response") | columns
        if "messages" not in columns and not {"prompt", "response"} <= set(columns):
            raise UserError(
                f"task chat: {self.origin} has neither messages nor conversations nor prompt and completion, "
                "name the column in data.fields, as in {messages: chat} "
                f"(it has {', '.join(map(str, examples.columns_of(self.rows)))})"
            )
        return columns

    def _found(self, *roles: str) -> dict[str, str]:
        """The columns of these roles that the data set has."""
        available = examples.columns_of(self.rows)
        named = {role: [name for name in _COLUMNS[role] if name in available] for role in roles}
        return {role: names[0] for role, names in named.items() if names}

    # ------------------------------------------------------------------ rows

    def _example(self, row: Row) -> Example:
        if "messages" not in self._columns and row.get(self._columns["response"]) is None:
            return Example("", None, None)
        messages, trained = self._messages(row)
        system = self._system(row)
        if system is not None and (not messages or messages[0]["role"] != "system"):
            messages, trained = [system, *messages], [False, *trained]
        last = max(
            (index for index, message in enumerate(messages) if message["role"] == "assistant"), default=None
        )
        if last is None:
            return Example("", None, None)
        messages, trained = messages[: last + 1], trained[: last + 1]  # nothing behind it is learned
        answer = text_of(messages[-1])
        conversation = Conversation(tuple(messages), tuple(trained), self._tools(row))
        return Example("", answer, self._extract(answer) or None, conversation=conversation)

    def _messages(self, row: Row) -> tuple[list[Message], list[bool]]:
        if "messages" in self._columns:
            column = self._columns["messages"]
            listed = self._listed(row, column)
            return _read(listed, column)
        prompt, response = self._columns["prompt"], self._columns["response"]
        asked, _ = self._side(row, prompt, "user")
        answered, trained = self._side(row, response, "assistant")
        return [*asked, *answered], [False] * len(asked) + trained

    def _side(self, row: Row, column: str, role: str) -> tuple[list[Message], list[bool]]:
        value = plain(row.get(column))
        if is_not_finite(value):
            raise Wrong(f"{found_in(value)} in column {column!r} where a text or messages are wanted")
        value = str(value) if isinstance(value, bool) or is_finite_number(value) else value
        if isinstance(value, str) and not _holds_messages(value):
            return _read([{"role": role, "content": value}], column)
        message = _parsed(value)
        return _read([message] if isinstance(message, dict) else self._listed(row, column), column)

    def _listed(self, row: Row, column: str) -> list:
        value = _parsed(row.get(column))
        if not isinstance(value, list) or not value:
            found = "no messages" if value is None or value == [] else kind_of(value)
            raise Wrong(f"{found} in column {column!r} where a list of messages is wanted")
        return value

    def _column(self, role: str) -> str:
        """Of a role that only some rows have."""
        return self._columns.get(role, _COLUMNS[role][0])

    def _system(self, row: Row) -> Message | None:
        """The message of the column for the system's text, if it has any."""
        column = self._column("system")
        text = row.get(column)
        if text is not None and not isinstance(text, str):
            raise Wrong(f"{found_in(text)} in column {column!r} where a text is wanted")
        return {"role": "system", **_content(text, f"column {column!r}")} if text and text.strip() else None

    def _tools(self, row: Row) -> list[dict] | None:
        column = self._column("tools")
        tools = _parsed(row.get(column))
        if not tools:
            return None
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise Wrong(f"no list of tools in column {column!r}")
        tools = [_without_nulls(tool) for tool in tools]
        for number, tool in enumerate(tools):
            function = tool.get("function", tool)
            where = f"tool {number} of column {column!r}"
            if not isinstance(function, dict):
                raise Wrong(f"{kind_of(function)} as the function of {where}, where an object is wanted")
            if not isinstance(function.get("name", ""), str):
                raise Wrong(f"{kind_of(function['name'])} as the name of {where}, where a text is wanted")
        return tools


def _read(listed: list, column: str) -> tuple[list[Message], list[bool]]:
    found = [_message(entry, f"message {number} of column {column!r}") for number, entry in enumerate(listed)]
    return [message for message, _ in found], [trained for _, trained in found]


def _message(entry: Any, where: str) -> tuple[Message, bool]:
    """A message, and whether there is a loss on it."""
    if not isinstance(entry, dict):
        raise Wrong(f"{kind_of(entry)} as {where}, where an object with role and content is wanted")
    keys = ("role", "content") if entry.get("role") is not None else ("from", "value")
    speaker, content = entry.get(keys[0]), entry.get(keys[1])
    if not isinstance(speaker, str):
        raise Wrong(f"no role in {where}")
    kept = {key: value for key, value in entry.items() if value is not None and key not in _OWN_KEYS}
    name = speaker.strip().lower()
    if name in _CALLS:
        message = {**kept, "role": "assistant", **_call(content, where)}
    elif name in _ROLE_OF:
        message = {**kept, **_legacy_call(entry, where), "role": _ROLE_OF[name], **_content(content, where)}
    else:
        raise Wrong(f"the role {speaker!r} in {where}{nearest(name, _ROLE_OF) or ''}")
    if message.get("tool_calls") == []:
        del message["tool_calls"]
    if "tool_calls" in message:
        message["tool_calls"] = _with_objects(message["tool_calls"], where)
    if "content" not in message and "tool_calls" not in message:
        raise Wrong(f"no content in {where}")
    return message, _is_trained(entry, message["role"], where)


#: What this file reads of a message; all else is handed to the template.
_OWN_KEYS = ("role", "content", "from", "value", "weight", "train", "function_call")


def _is_trained(entry: dict, role: str, where: str) -> bool:
    weight = entry.get("weight")
    if weight is not None and weight not in (0, 1):
        raise Wrong(f"the weight {weight!r} in {where}, where 0 or 1 is wanted")
    train = entry.get("train")
    if train is not None and train not in (0, 1):
        raise Wrong(f"train {train!r} in {where}, where true or false is wanted")
    wanted = [bool(value) for value in (weight, train) if value is not None]
    if len(set(wanted)) > 1:
        raise Wrong(f"a weight and a train that contradict each other in {where}")
    if role != "assistant":
        if wanted and wanted[0]:
            raise Wrong(f"a loss on {where}, which is not the assistant's")
        return False
    return wanted[0] if wanted else True


def _content(value: Any, where: str) -> Message:
    """A content as a text, or as a list of parts with texts."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"content": _whole(value, where)}
    if not isinstance(value, list):
        raise Wrong(f"{kind_of(value)} as the content of {where}, where a text is wanted")
    parts = []
    for part in value:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str) or isinstance(part, dict) and part.get("type", "text") != "text":
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise Wrong(f"a part of the kind {kind!r} in {where}, where only texts are read")
        parts.append({"type": "text", "text": _whole(text, where)})
    return {"content": parts}


def _whole(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can name half of a surrogate pair, and no text can hold it
        raise Wrong(f"an unpaired surrogate ({text[error.start]!a}) in {where}") from None
    if _NONCHARACTER.search(text):
        raise Wrong(f"a noncharacter (U+FDD0 to U+FDEF) in {where}")
    return text


def _legacy_call(entry: dict, where: str) -> Message:
    """OpenAI's `function_call`, which `tool_calls` replaces."""
    call = entry.get("function_call")
    return {} if call is None or entry.get("tool_calls") else _call(call, where)


def _call(value: Any, where: str) -> Message:
    """One call of a function or a list of them, perhaps as JSON in a text, as ShareGPT's function_call."""
    calls = _parsed(value)
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise Wrong(f"no call with a name and arguments in {where}")
    return {"tool_calls": [{"type": "function", "function": call} for call in calls]}


def _with_objects(calls: Any, where: str) -> list[dict]:
    """Calls of functions whose arguments are objects, as chat templates want them; OpenAI writes them as
    JSON in a text.
    """
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise Wrong(f"no list of calls as tool_calls of {where}")
    found = []
    for call in calls:
        call = {key: value for key, value in call.items() if value is not None}
        inner = call["function"] if isinstance(call.get("function"), dict) else call
        if not isinstance(inner.get("name"), str):
            raise Wrong(f"a call without a name in {where}")
        inner = {**inner, "arguments": _parsed(inner.get("arguments", {}))}
        found.append({**call, "function": inner} if "function" in call else inner)
    return found


def _parsed(value: Any) -> Any:
    """What a text holds as JSON; other values, and texts that are none, as they are."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _holds_messages(text: str) -> bool:
    """Whether a text is a message or a list of messages in JSON."""
    found = _parsed(text)
    found = found if isinstance(found, list) else [found]
    return bool(found) and all(_is_message(entry) for entry in found)


def _is_message(value: Any) -> bool:
    """Whether what a JSON text holds is a message. Answers in JSON may have keys such as role and from."""
    if not isinstance(value, dict):
        return False
    return {"from", "value"} <= set(value) or (
        "role" in value and bool({"content", *_CALL_KEYS} & set(value))
    )


def _without_nulls(value: Any) -> Any:
    """Without what parquet puts where an object lacks a key that another one has."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value
