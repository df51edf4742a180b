"""The forms that a row can have, and how each becomes a record."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rwkv_peft.data.records import Record, Turn
from rwkv_peft.errors import DataError

Row = Mapping[str, Any]


class Form(NamedTuple):
    """A form: keys that each of its rows has, how a row is read, and an example."""

    keys: tuple[str, ...]
    read: Callable[[Row], dict[str, Any]]
    example: str


# role as other programs call it -> our name; a role that is not here keeps its name
ROLES = {
    **dict.fromkeys(("human", "prompter", "question", "query"), "user"),
    **dict.fromkeys(("gpt", "bot", "chatgpt", "model", "ai", "answer", "response"), "assistant"),
    **dict.fromkeys(("function", "observation", "tool_response", "ipython"), "tool"),
    "developer": "system",
}
# roles of the turns in sharegpt files that call a function
CALL_ROLES = ("function_call", "tool_call")
# keys under which programs keep the thoughts before an answer
THOUGHTS = ("reasoning_content", "reasoning", "thinking")


def read_row(row: object, data_type: str, sft_field: Sequence[str] = ()) -> Record:
    """The record of a row; its form is found from its keys where `data_type` names none.

    Raises:
        DataError: the row has no such form; the message lacks file and line.
    """
    if not isinstance(row, dict):
        raise DataError(
            f'a row must be an object such as {{"text": "..."}}, found {_name_type(row)}'
        )
    if sft_field:
        name, fields = "sft", _read_fields(row, sft_field)
    else:
        name = data_type if data_type in FORMS else _find_form(row)
        fields = FORMS[name].read(row)
    return Record(form=name, weight=_get_weight(row), state=_get_state(row), **fields)


def _find_form(row: Row) -> str:
    for name, form in FORMS.items():
        if all(row.get(key) is not None for key in form.keys):
            return name
    examples = ", ".join(form.example for form in FORMS.values())
    found = ", ".join(map(str, row)) or "none"
    raise DataError(f"no known form has the keys of this row ({found}); there are {examples}")


def _get_text(row: Row, key: str, *, may_lack: bool = False) -> str:
    value = row.get(key)
    if value is None and (may_lack or key in row):
        return ""
    if value is None:
        raise DataError(f'no "{key}" (found keys {", ".join(map(str, row)) or "none"})')
    if not isinstance(value, str):
        raise DataError(f'"{key}" must be a string, found {_name_type(value)}')
    return value


def _name_type(value: object) -> str:
    names = {dict: "an object", list: "a list", bool: "a truth value", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")


def _get_weight(row: Row) -> float:
    value = row.get("weight")
    if value is None:
        return 1.0
    try:
        weight = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    # a weight above the largest float16 is a mistake, beside which float32 sums lose all others
    if not 0 <= weight <= 65504:
        raise DataError(f'"weight" must be a number from 0 to 65504, found {value!r:.40}')
    return weight


def _get_state(row: Row) -> str:
    value = row.get("state")
    if value is None:
        return ""
    if not isinstance(value, (str, int)) or isinstance(value, bool):
        raise DataError(f'"state" must be a name, found {_name_type(value)}')
    name = str(value)
    if not name.isprintable():
        raise DataError(f'"state" must be a name that can be printed, found {name!r:.40}')
    return name


def _read_text(row: Row) -> dict[str, Any]:
    return {"text": _get_text(row, "text")}


def _read_messages(row: Row) -> dict[str, Any]:
    return {"turns": _read_turns(row, "messages")}


def _read_sharegpt(row: Row) -> dict[str, Any]:
    key = "conversation" if "conversation" in row else "conversations"
    return {"turns": _read_turns(row, key)}


def _read_turns(row: Row, key: str) -> tuple[Turn, ...]:
    messages = row.get(key)
    if isinstance(messages, Sequence) and not isinstance(messages, str):
        turns = [_read_turn(message, f"{key}[{i}]") for i, message in enumerate(messages)]
    else:
        raise DataError(f'"{key}" must be a list of messages, found {_name_type(messages)}')
    system = [turn.text for turn in turns[:1] if turn.role == "system"]
    turns = turns[len(system) :]
    system = [_get_text(row, "system", may_lack=True), *system, _write_tools(row.get("tools"))]
    if text := "\n".join(filter(None, system)):
        turns.insert(0, Turn("system", text))
    return tuple(turns)


def _read_turn(message: object, where: str) -> Turn:
    if not isinstance(message, dict):
        raise DataError(f"{where} must be an object, found {_name_type(message)}")
    role = message.get("role", message.get("from"))
    if not isinstance(role, str):
        raise DataError(f'{where} has no "role"')
    role = role.strip().lower()
    text = _read_content(message.get("content", message.get("value")), where)
    calls = message.get("tool_calls") or ([text] if role in CALL_ROLES else [])
    if role in CALL_ROLES:
        role, text = "assistant", ""
    if calls:
        text = "\n".join(filter(None, (text, _write_calls(calls, where))))
    thought = next((message[key] for key in THOUGHTS if message.get(key)), None)
    if thought is not None:
        text = f"<think>\n{_read_content(thought, where).strip()}\n</think>\n{text}"
    weight = _get_weight(message)
    if message.get("train") is False:
        weight = 0.0
    return Turn(ROLES.get(role, role), text, weight)


def _read_content(value: object, where: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise DataError(f"the content of {where} must be a string, found {_name_type(value)}")
    parts = []
    for part in value:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else _name_type(part)
            raise DataError(f"{where} has a part of type {kind}: only text can be trained")
        parts.append(text)
    return "".join(parts)


def _write_calls(calls: object, where: str) -> str:
    """The text of function calls as the official template has it: a block of JSON for each."""
    if not isinstance(calls, list):
        raise DataError(f"the tool_calls of {where} must be a list, found {_name_type(calls)}")
    blocks = []
    for call in calls:
        value = call.get("function", call) if isinstance(call, dict) else call
        if isinstance(value, dict):
            value = {key: value[key] for key in ("name", "arguments") if key in value} or value
            value = {key: _parse(x) for key, x in value.items()}
        blocks.append(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return "\n".join(f"```json\n{block.strip()}\n```" for block in blocks)


def _parse(value: object) -> object:
    """The value of a text that is a JSON object or list, as arguments often are, or `value`."""
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return found if isinstance(found, (dict, list)) else value


def _write_tools(tools: object) -> str:
    """The system text that offers functions, a line each: `- name(argument, …): what it does`."""
    tools = _parse(tools)
    if not tools:
        return ""
    if not isinstance(tools, list):
        raise DataError(f'"tools" must be a list of functions, found {_name_type(tools)}')
    lines = []
    for tool in tools:
        if not isinstance(tool, dict):
            lines.append(f"- {tool}")
            continue
        function = tool.get("function", tool)
        parameters = function.get("parameters") if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError('a function in "tools" has no name')
        properties = parameters.get("properties") if isinstance(parameters, dict) else None
        arguments = ", ".join(map(str, properties or ()))
        about = function.get("description")
        lines.append(f"- {function['name']}({arguments})" + (f": {about}" if about else ""))
    return "\n".join(["Tools:", *lines, "Return only a JSON function call."])


def _read_completion(row: Row) -> dict[str, Any]:
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return {"turns": _read_turns({**row, "messages": prompt + completion}, "messages")}
    turns = (
        Turn("user", _get_text(row, "prompt")),
        Turn("assistant", _get_text(row, "completion")),
    )
    return {"turns": turns, "is_verbatim": True}


def _read_alpaca(row: Row) -> dict[str, Any]:
    turns = [Turn("system", _get_text(row, "system", may_lack=True))]
    history = row.get("history") or []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, (list, tuple)) or not len(pair) == 2:
            raise DataError('"history" must be a list of [instruction, output] pairs')
        turns += [Turn("user", _read_content(pair[0], "history"))]
        turns += [Turn("assistant", _read_content(pair[1], "history"))]
    turns += [Turn("user", _get_text(row, "instruction"))]
    turns += [Turn("input", _get_text(row, "input", may_lack=True))]
    turns += [Turn("assistant", _get_text(row, "output"))]
    is_said = [turn.role not in ("system", "input") or turn.text for turn in turns]
    return {"turns": tuple(turn for turn, said in zip(turns, is_said, strict=True) if said)}


def _read_fields(row: Row, names: Sequence[str]) -> dict[str, Any]:
    """One field is a text; two are question and answer; three are question, input and answer."""
    if len(names) == 1:
        return {"text": _get_text(row, names[0])}
    roles = ("user", "assistant") if len(names) == 2 else ("user", "input", "assistant")
    turns = [Turn(role, _get_text(row, name)) for role, name in zip(roles, names, strict=True)]
    return {"turns": tuple(turn for turn in turns if turn.text or turn.role != "input")}


# data type -> form; without a data type, a row has the first form whose keys it has
FORMS = {
    "messages": Form(
        ("messages",),
        _read_messages,
        '{"messages": [{"role": "user", "content": "..."}, ...]}',
    ),
    "sharegpt": Form(
        ("conversations",),
        _read_sharegpt,
        '{"conversations": [{"from": "human", "value": "..."}, ...]}',
    ),
    "alpaca": Form(
        ("instruction", "output"), _read_alpaca, '{"instruction": "...", "output": "..."}'
    ),
    "completion": Form(
        ("prompt", "completion"), _read_completion, '{"prompt": "...", "completion": "..."}'
    ),
    "text": Form(("text",), _read_text, '{"text": "..."}'),
}
