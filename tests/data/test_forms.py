"""The shapes of rows that programs write: read where they are plain, refused with the cure."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rwkv_peft.config import DataConfig
from rwkv_peft.data.documents import Documents
from rwkv_peft.data.forms import read_row
from rwkv_peft.data.prepare import read_documents
from rwkv_peft.data.records import Record
from rwkv_peft.data.tokenizer import Tokenizer
from rwkv_peft.errors import DataError

TOKENIZER = Tokenizer()
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SAID = [("user", "q"), ("assistant", "a")]
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "Where.", "enum": ["Rome", "Oslo"]},
    },
    "required": ["city"],
}
ADD = {"properties": {"a": {}, "b": {}}}


def turns(record: Record) -> list[tuple[str, str]]:
    return [(turn.role, turn.text) for turn in record.turns]


def read(path: Path, **settings: Any) -> Documents:
    return read_documents(DataConfig(data_file=str(path), **settings), TOKENIZER)


def text(documents: Documents, i: int = 0) -> str:
    return TOKENIZER.decode(documents.tokens[documents.starts[i] : documents.starts[i + 1]])


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "q", "answer": "a"}, SAID),
        ({"input": "q", "output": "a"}, SAID),
        ({"prompt": "q", "response": "a"}, SAID),
        ({"query": "q", "response": "a"}, SAID),
        ({"user": "q", "assistant": "a"}, SAID),
        ({"instruction": "q", "response": "a", "context": ""}, SAID),
        (
            {"instruction": "q", "context": "c", "response": "a", "category": "open"},
            [SAID[0], ("input", "c"), SAID[1]],
        ),
        ({"instruction": "q", "input": "c", "response": "a"}, [SAID[0], ("input", "c"), SAID[1]]),
        ({"question": "q", "context": "c", "answer": "a"}, [SAID[0], ("input", "c"), SAID[1]]),
        ({"system": "s", "question": "q", "answer": "a"}, [("system", "s"), *SAID]),
        ({"text": None, "question": "q", "answer": "a"}, SAID),
        ({"": "0", "input": "q", "output": "a"}, SAID),
        (TURNS, SAID),
        ([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], SAID),
        ({"messages": [{"role": "user", "text": "q"}, TURNS[1]]}, SAID),
        ({"messages": [{"role": None, "from": "human", "value": "q"}, TURNS[1]]}, SAID),
        *(
            ({"messages": [{"role": "user", "content": [part]}, TURNS[1]]}, SAID)
            for part in (
                "q",
                {"type": "text", "text": "q"},
                {"type": "text", "value": "q"},
                {"type": "text", "content": "q"},
                {"type": "input_text", "text": "q"},
            )
        ),
        (
            {
                "messages": [
                    TURNS[0],
                    {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
                ]
            },
            [SAID[0], ("assistant", '```json\n{"name": "f", "arguments": {}}\n```')],
        ),
    ],
)
def test_a_plain_shape_is_read(row: object, expected: list[tuple[str, str]]) -> None:
    assert turns(read_row(row, "auto")) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"content": "x"},
            r"\(content\): name the columns to learn, as in --sft_field content; or",
        ),
        ({"title": "x", "body": "y", "n": 1}, "--sft_field title body; or"),
        ({"n": 1}, r"keys of this row \(n\): give it one of these: {"),
        ({}, r"\(none\): give it one"),
        (
            {"question": "q", "answer": "a", "response": "b"},
            r"several keys .* \(question, answer, response\): .* --sft_field question answer",
        ),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "--sft_field prompt chosen"),
        ({"chosen": "a", "rejected": "b"}, "--sft_field chosen"),
        ({"role": "user", "content": "q"}, "one message of a dialogue: a row holds all of them"),
        ({"question": "q", "answer": 42}, '"answer" must be a string, found a int'),
        ({"question": "q", "answer": float("nan")}, "found NaN, which pandas writes for nothing"),
        ({"messages": [{"role": "user", "words": "q"}]}, r'messages\[0\] has no "content" .*words'),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "part of type image_url: only text can be trained; .* --on_bad_row skip",
        ),
        (["a"], "a row must be an object .*found a list"),
        ([], "a row must be an object .*found a list"),
    ],
)
def test_another_shape_is_refused_with_what_helps(row: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_row(row, "auto")


NULLS: list[dict[str, Any]] = [
    {"text": None},
    {"messages": None},
    {"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": None}]},
    {"conversations": None},
    {"instruction": None, "output": None},
    {"instruction": None, "input": None, "output": None},
    {"prompt": None, "completion": None},
    {"question": None, "answer": None},
    {"text": None, "messages": None, "instruction": None, "output": None},
]


@pytest.mark.parametrize("row", NULLS)
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
def test_null_is_no_text_in_every_form_and_file(
    row: dict[str, Any], ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    rows = [{"text": "b"}, row]
    path = tmp_path / f"a{ending}"
    if ending == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    else:
        lines = [json.dumps(each) for each in rows]
        path.write_text("\n".join(lines) if ending == ".jsonl" else f"[{','.join(lines)}]")
    documents = read(path)
    assert len(documents) == 1
    assert documents.report.empty.table.tolist() == [[0, 2]]


@pytest.mark.parametrize(
    ("data_type", "row"),
    [
        ("text", {"text": None}),
        ("messages", {"messages": None}),
        ("sharegpt", {"conversations": None}),
        ("alpaca", {"instruction": None, "output": None}),
        ("completion", {"prompt": None, "completion": None}),
    ],
)
def test_null_means_the_same_where_the_form_is_named(data_type: str, row: dict[str, None]) -> None:
    assert read_row(row, data_type).is_empty and read_row(row, "auto").is_empty
    with pytest.raises(DataError, match='no "'):
        read_row({"other": 1}, data_type)


def test_the_empty_cells_of_a_table_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('question,answer\nq,a\n,\n"",""\n', encoding="utf-8")
    documents = read(tmp_path / "a.csv")
    assert text(documents) == "User: q\n\nAssistant: a\n\n"
    assert documents.report.empty.table.tolist() == [[0, 3], [0, 4]]


def as_jsonl(rows: list[Any], path: Path) -> Path:
    path = path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def as_parquet(rows: list[Any], path: Path) -> Path:
    from datasets import Dataset

    Dataset.from_list(rows).to_parquet(str(path / "a.parquet"))
    return path / "a.parquet"


def as_saved(rows: list[Any], path: Path) -> Path:
    from datasets import Dataset

    Dataset.from_list(rows).save_to_disk(str(path / "saved"))
    return path / "saved"


def as_arrow(rows: list[Any], path: Path) -> Path:
    import pyarrow as pa

    table = pa.Table.from_pylist(rows)
    file = pa.OSFile(str(path / "a.arrow"), "wb")
    with file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return path / "a.arrow"


def call(name: str, **arguments: object) -> dict[str, Any]:
    return {
        "role": "assistant",
        "tool_calls": [{"function": {"name": name, "arguments": arguments}}],
    }


WEATHER = {"name": "get_weather", "description": "Weather.", "parameters": SCHEMA}
CLOCK = {
    "name": "get_time",
    "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}},
}


@pytest.mark.parametrize("write", [as_jsonl, as_parquet, as_saved, as_arrow])
def test_what_arrow_adds_to_objects_is_not_trained(
    write: Callable[[list[Any], Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    tools = [{"type": "function", "function": tool} for tool in (WEATHER, CLOCK)]
    ask = {"role": "user", "content": "?"}
    rows = [
        {"tools": tools, "messages": [ask, call("get_weather", city="Rome"), ask,
                                      call("get_time", zone="CET", deep={"a": [{"b": 1}]})]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]},
                      {"role": "assistant", "content": [{"type": "text", "value": "a"}],
                       "reasoning_content": "hm", "weight": 0.5}]},
    ]  # fmt: skip
    documents = read(write(rows[:1], tmp_path))
    said = text(documents)
    assert "- get_weather(city): Weather.\n  {" in said and "- get_time(zone)\n  {" in said
    assert '"arguments": {"city": "Rome"}}' in said
    assert '"arguments": {"zone": "CET", "deep": {"a": [{"b": 1}]}}}' in said.replace(
        '{"deep": {"a": [{"b": 1}]}, "zone": "CET"}', '{"zone": "CET", "deep": {"a": [{"b": 1}]}}'
    )
    assert "null" not in said
    assert text(read(write(rows[1:], tmp_path))).startswith("User: q\n\nAssistant: <think>\nhm\n")


def tools_of(*tools: object) -> str:
    return read_row({"messages": TURNS, "tools": list(tools)}, "auto").turns[0].text


@pytest.mark.parametrize(
    ("tool", "expected"),
    [
        # a schema that says no more than the names is not repeated
        ({"name": "add", "parameters": ADD}, "- add(a, b)"),
        ({"name": "now", "description": "Time."}, "- now(): Time."),
        ({"name": "now", "parameters": {"type": "object", "properties": {}}}, "- now()"),
        (WEATHER, f"- get_weather(city): Weather.\n  {json.dumps(SCHEMA)}"),
        ({"type": "function", "function": WEATHER},
         f"- get_weather(city): Weather.\n  {json.dumps(SCHEMA)}"),
        ({"name": "w", "input_schema": SCHEMA}, f"- w(city)\n  {json.dumps(SCHEMA)}"),
        ({"name": "w", "parameters": json.dumps(SCHEMA)}, f"- w(city)\n  {json.dumps(SCHEMA)}"),
        ({"name": "w", "parameters": SCHEMA["properties"]},
         f"- w(city)\n  {json.dumps(SCHEMA['properties'])}"),
        ({"name": "w", "parameters": {**ADD, "required": ["a"]}},
         f"- w(a, b)\n  {json.dumps({**ADD, 'required': ['a']})}"),
        (json.dumps(WEATHER), f"- get_weather(city): Weather.\n  {json.dumps(SCHEMA)}"),
        ("f(x)", "- f(x)"),
    ],
)  # fmt: skip
def test_the_schema_of_a_function_is_kept(tool: object, expected: str) -> None:
    assert tools_of(tool) == f"Tools:\n{expected}\nReturn only a JSON function call."


@pytest.mark.parametrize(
    "function", [{"name": "f", "parameters": {"properties": 5}}, {"name": "f", "parameters": [1]}]
)
def test_parameters_that_are_no_schema_are_refused(function: dict[str, Any]) -> None:
    with pytest.raises(DataError, match='parameters of f in "tools" are no JSON schema'):
        tools_of(function)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"text": "a"}] x', "not one JSON array: Extra data: line 1 column 17"),
        ("a.json", '[{"text": "a"}][{"text": "b"}]', "Extra data: line 1 column 16"),
        ("a.json", '[{"text": "a"}]\n\n{"text": "b"}', "Extra data: line 3 column 1"),
        ("a.json", '[{"text": "a"},]', "not one JSON array: "),
        ("a.json", '{"text": "a"}{"text": "b"}', r"a.json:1: not JSON \(Extra data at column 14\)"),
        ("a.jsonl", '{"text": "a"}{"text": "b"}', r"a.jsonl:1: not JSON \(Extra data at column 14"),
        ("a.jsonl", '{"text": "a"} {"text": "b"}\n', r"a.jsonl:1: not JSON \(Extra data"),
        ("a.jsonl", '{"text": "a"},\n{"text": "b"}\n', r"a.jsonl:1: not JSON \(Extra data"),
        ("a.jsonl", '{"text": "a",}\n', r"a.jsonl:1: not JSON"),
        ("a.jsonl", '{"text": NaN}\n', r'a.jsonl:1: "text" must be a string, found NaN'),
        ("a.json", '[{"text": "a"}, {"text": "b", "weight": NaN}]', r'a.json:2: "weight" must be'),
    ],
)
def test_json_behind_json_is_an_error_and_never_dropped(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_rows_of_an_array_on_one_line_are_counted_in_every_list(tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"text": ""}, 7, {"text": "a"}, {"text": "b", "weight": 0}]
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    report = read(tmp_path / "a.json", on_bad_row="skip", max_untrained=1.0).report
    assert report.empty.table.tolist() == [[0, 2]]
    assert [bad.split(": ")[0] for bad in report.bad] == [f"{tmp_path / 'a.json'}:3"]
    assert report.duplicates.table.tolist() == [[0, 4]]
    assert report.untrained.table.tolist() == [[0, 5]]
