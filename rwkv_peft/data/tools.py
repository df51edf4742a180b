"""The text of the functions that a dialogue offers, and of the calls in it."""

import json

from rwkv_peft.data.records import name_type
from rwkv_peft.errors import DataError


def write_calls(calls: object, where: str) -> str:
    """The text of function calls as the official template has it: a block of JSON for each.

    Args:
        calls: a list of them, as {"function": {"name", "arguments"}}, its inner part, or a text.
        where: what to call the message in an error.
    Raises:
        DataError: it is no list.
    """
    if not isinstance(calls, list):
        raise DataError(f"the tool_calls of {where} must be a list, found {name_type(calls)}")
    blocks = []
    for call in calls:
        value = call.get("function", call) if isinstance(call, dict) else call
        if isinstance(value, dict):
            value = {key: value[key] for key in ("name", "arguments") if key in value} or value
            value = {key: _parse(x) for key, x in value.items()}
        blocks.append(value if isinstance(value, str) else _write_json(value))
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


def _write_json(value: object) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except (RecursionError, TypeError, ValueError) as error:
        raise DataError(f"a function is not usable as JSON: {type(error).__name__}") from error


def write_tools(tools: object) -> str:
    """The system text that offers functions: `- name(argument, …): what it does` for each.

    Below it stands the schema of its arguments, where that says more than their names.

    Raises:
        DataError: it is no list of functions, or their parameters are no schema.
    """
    tools = _parse(tools)
    if not tools:
        return ""
    tools = [tools] if isinstance(tools, dict) else tools
    if not isinstance(tools, list):
        raise DataError(f'"tools" must be a list of functions, found {name_type(tools)}')
    lines = [line for tool in tools for line in _write_tool(_parse(tool))]
    return "\n".join(["Tools:", *lines, "Return only a JSON function call."])


def _write_tool(tool: object) -> list[str]:
    if not isinstance(tool, dict):
        return [f"- {tool}"]
    function = _parse(tool.get("function", tool))
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError('a function in "tools" has no name')
    schema = _parse(function.get("parameters") or function.get("input_schema") or {})
    properties = schema.get("properties") if isinstance(schema, dict) else None
    if properties is None and isinstance(schema, dict):
        # some programs give the arguments without a schema around them
        is_bare = all(isinstance(value, dict) for value in schema.values())
        properties = schema if is_bare else {}
    if not isinstance(schema, dict) or not isinstance(properties, dict):
        raise DataError(f'the parameters of {function["name"]} in "tools" are no JSON schema')
    about = function.get("description")
    lines = [f"- {function['name']}({', '.join(properties)})" + (f": {about}" if about else "")]
    says_more = schema.keys() - {"type", "properties"} or any(properties.values())
    return [*lines, f"  {_write_json(schema)}"] if says_more else lines
