"""The forms that a row can have, and how each becomes a record."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rwkv_peft.data.records import Record, Turn, name_type
from rwkv_peft.data.tools import write_calls, write_tools
from rwkv_peft.errors import DataError

Row = Mapping[str, Any]


class Form(NamedTuple):
    """A form: keys that each of its rows has, how a row is read, and an example.

    A key with a null is there: it has no text.
    """

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
# keys of a message that may hold its text, and those that it may have besides
CONTENTS = ("content", "value", "text")
BESIDES = ("role", "from", "name", "id", "weight", "train", "loss")
BESIDES_CALLS = ("tool_calls", "function_call", "tool_call_id")
# keys of a question and its answer in rows of no other form; a third one beside them is what the
# question is about
PAIRS = (
    ("question", "answer"),
    ("query", "answer"),
    ("prompt", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("prompt", "response"),
    ("instruction", "response"),
    ("input", "response"),
    ("input", "output"),
    ("question", "output"),
    ("query", "output"),
    ("prompt", "output"),
    ("user", "assistant"),
)
ABOUT = ("input", "context")


def read_row(row: object, data_type: str, sft_field: Sequence[str] = ()) -> Record:
    """The record of a row; its form is found from its keys where `data_type` names none.

    Raises:
        DataError: the row has no such form; the message lacks file and line.
    """
    if isinstance(row, list) and row and all(_is_message(member) for member in row):
        row = {"messages": row}
    if not isinstance(row, dict):
        raise DataError(
            f'a row must be an object such as {{"text": "..."}}, found {name_type(row)}'
        )
    if sft_field:
        name, fields = "sft", _read_fields(row, sft_field)
    else:
        name = data_type if data_type in FORMS else _find_form(row)
        fields = _read_pair(row) if name == "pair" else FORMS[name].read(row)
    return Record(form=name, weight=_get_weight(row), state=_get_state(row), **fields)


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role", value.get("from")), str)


def _find_form(row: Row) -> str:
    """The first form whose keys all have values, or the one of which most keys have."""
    found = [name for name, form in FORMS.items() if all(key in row for key in form.keys)]
    values = {name: [row[key] is not None for key in FORMS[name].keys] for name in found}
    best = max(found, key=lambda name: (all(values[name]), sum(values[name])), default="")
    if best and any(values[best]):
        return best
    pairs = _find_pairs(row)
    has_value = any(row[key] is not None for pair in pairs for key in pair)
    if len(pairs) == 1 and (has_value or not best):
        return "pair"
    if best and len(pairs) <= 1:
        return best
    raise DataError(_explain_unknown(row, pairs))


def _explain_unknown(row: Row, pairs: list[tuple[str, str]]) -> str:
    """What to say of a row without a form, with the flag or the form that helps."""
    given = ", ".join(map(str, row)) or "none"
    if pairs:
        return (
            f"several keys of this row may be question and answer ({given}): name them, as in "
            f"--sft_field {' '.join(pairs[0])}"
        )
    if {"chosen", "rejected"} <= row.keys():
        return (
            f"this row prefers one answer to another (its keys are {given}), and one is trained: "
            f"name the columns, as in --sft_field {'prompt ' if 'prompt' in row else ''}chosen"
        )
    if _is_message(row):
        return (
            "this row is one message of a dialogue: a row holds all of them, as in "
            + FORMS["messages"].example
        )
    examples = ", ".join(form.example for form in FORMS.values())
    texts = [str(key) for key, value in row.items() if isinstance(value, str)][:2]
    cure = f"name the columns to learn, as in --sft_field {' '.join(texts)}; or " if texts else ""
    return (
        f"no known form has the keys of this row ({given}): {cure}give it one of these: {examples}"
    )


def _find_pairs(row: Row) -> list[tuple[str, str]]:
    """The keys of a row that are question and answer, with a value if any pair has one."""
    found = [pair for pair in PAIRS if all(key in row for key in pair)]
    # beside another question an input is what that is about
    answers = [answer for asked, answer in found if asked not in ABOUT]
    found = [pair for pair in found if pair[0] not in ABOUT or pair[1] not in answers]
    return [pair for pair in found if all(row[key] is not None for key in pair)] or found[:1]


def _get_text(row: Row, key: str, *, may_lack: bool = False) -> str:
    value = row.get(key)
    if value is None and (may_lack or key in row):
        return ""
    if value is None:
        raise DataError(f'no "{key}" (found keys {", ".join(map(str, row)) or "none"})')
    if not isinstance(value, str):
        raise DataError(f'"{key}" must be a string, found {name_type(value)}')
    return value


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
        raise DataError(f'"state" must be a name, found {name_type(value)}')
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
    if key not in row:
        raise DataError(f'no "{key}" (found keys {", ".join(map(str, row)) or "none"})')
    messages = [] if row[key] is None else row[key]
    if isinstance(messages, Sequence) and not isinstance(messages, str):
        turns = [_read_turn(message, f"{key}[{i}]") for i, message in enumerate(messages)]
    else:
        raise DataError(f'"{key}" must be a list of messages, found {name_type(messages)}')
    system = [turn.text for turn in turns[:1] if turn.role == "system"]
    turns = turns[len(system) :]
    system = [_get_text(row, "system", may_lack=True), *system, write_tools(row.get("tools"))]
    if text := "\n".join(filter(None, system)):
        turns.insert(0, Turn("system", text))
    return tuple(turns)


def _read_turn(message: object, where: str) -> Turn:
    if not isinstance(message, dict):
        raise DataError(f"{where} must be an object, found {name_type(message)}")
    role = message.get("role") or message.get("from")
    if not isinstance(role, str):
        raise DataError(f'{where} has no "role"')
    role = role.strip().lower()
    said = [message[key] for key in CONTENTS if message.get(key) is not None]
    others = [key for key in message if key not in (*CONTENTS, *BESIDES, *BESIDES_CALLS, *THOUGHTS)]
    if not message.keys() & CONTENTS and any(message[key] for key in others):
        raise DataError(f'{where} has no "content" (found keys {", ".join(map(str, message))})')
    text = _read_content(said[0] if said else None, where)
    calls = message.get("tool_calls") or ([text] if role in CALL_ROLES else [])
    if function := message.get("function_call"):
        calls = calls or [function]
    if role in CALL_ROLES:
        role, text = "assistant", ""
    if calls:
        text = "\n".join(filter(None, (text, write_calls(calls, where))))
    thought = next((message[key] for key in THOUGHTS if message.get(key)), None)
    if thought is not None:
        text = f"<think>\n{_read_content(thought, where).strip()}\n</think>\n{text}"
    weight = _get_weight(message)
    trains = message.get("train")
    if trains not in (None, True, False):
        raise DataError(f'"train" of {where} must be true or false, found {trains!r:.40}')
    if trains is not None and not trains:
        weight = 0.0
    return Turn(ROLES.get(role, role), text, weight)


def _read_content(value: object, where: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise DataError(f"the content of {where} must be a string, found {name_type(value)}")
    parts = []
    for part in value:
        text = _read_part(part) if isinstance(part, dict) else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else name_type(part)
            raise DataError(
                f"{where} has a part of type {kind}: only text can be trained; leave such rows out "
                "with --on_bad_row skip"
            )
        parts.append(text)
    return "".join(parts)


def _read_part(part: Row) -> object:
    """The text of a part of a message, whose key differs between programs."""
    keys = CONTENTS if str(part.get("type") or "text").endswith("text") else ("text",)
    return next((part[key] for key in keys if part.get(key) is not None), None)


def _read_completion(row: Row) -> dict[str, Any]:
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) or isinstance(completion, list):
        prompt, completion = prompt or [], completion or []
    if isinstance(prompt, list) and isinstance(completion, list):
        return {"turns": _read_turns({**row, "messages": prompt + completion}, "messages")}
    turns = (
        Turn("user", _get_text(row, "prompt")),
        Turn("assistant", _get_text(row, "completion")),
    )
    return {"turns": turns, "is_verbatim": True}


def _read_alpaca(row: Row) -> dict[str, Any]:
    return _read_answer(row, "instruction", "input", "output")


def _read_pair(row: Row) -> dict[str, Any]:
    asked, answer = _find_pairs(row)[0]
    about = next((key for key in ABOUT if key != asked and row.get(key) is not None), None)
    return _read_answer(row, asked, about, answer)


def _read_answer(row: Row, asked: str, about: str | None, answer: str) -> dict[str, Any]:
    """A question, what it is about, and its answer, after what was said before."""
    turns = [Turn("system", _get_text(row, "system", may_lack=True))]
    history = row.get("history") or []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, (list, tuple)) or not len(pair) == 2:
            raise DataError('"history" must be a list of [instruction, output] pairs')
        turns += [Turn("user", _read_content(pair[0], "history"))]
        turns += [Turn("assistant", _read_content(pair[1], "history"))]
    turns += [Turn("user", _get_text(row, asked))]
    turns += [Turn("input", _get_text(row, about, may_lack=True) if about else "")]
    turns += [Turn("assistant", _get_text(row, answer))]
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
