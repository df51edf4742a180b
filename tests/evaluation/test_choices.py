"""Multiple choice: the official form, answers from logits; lm-eval gives the same."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import rwkv_peft
from rwkv_peft.errors import DataError
from rwkv_peft.evaluation.choices import Question, answer_questions, read_questions
from rwkv_peft.evaluation.continuations import find_likelihoods

Cli = Callable[..., SimpleNamespace]
ROWS = [
    {
        "question": f"What is {n} and {n}?",
        "choices": [str(2 * n), str(n), "字", "none"],
        "answer": n % 4,
        "subject": ("simple_sums", "hard_sums")[n % 2],
    }
    for n in range(12)
]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


def test_the_prompt_is_that_of_the_official_script() -> None:
    question = Question("How?\r\nWhy?", ("a", "b", "c", "d"), 0, "college_physics")
    assert question.prompt == (
        "User: You are a very talented expert in college physics. Answer this question:\n"
        "How?\nWhy?\nA. a\nB. b\nC. c\nD. d\n\nAssistant: The answer is"
    )


def score(model: Any, prompt: list[int], tokens: list[int]) -> float:
    whole = torch.tensor([[*prompt, *tokens]])
    with torch.no_grad():
        logits = model(whole[:, :-1])[0][0].log_softmax(-1)[len(prompt) - 1 :]
    return logits.gather(1, torch.tensor(tokens)[:, None]).sum().item()


def test_continuations_share_the_state_of_their_prompt(
    make_model_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rwkv_peft.evaluation.continuations.WINDOW", 5)
    model = rwkv_peft.load_model(make_model_file(dtype=torch.float32))
    prompt, others = list(range(20, 33)), [[65], [70, 71, 72], list(range(40, 57)), []]
    found = find_likelihoods(model, prompt, others)
    for tokens, likelihood in zip(others, found, strict=True):
        wanted = score(model, prompt, tokens) if tokens else 0.0
        assert likelihood.log_probability == pytest.approx(wanted, rel=1e-4)
    with torch.no_grad():
        best = int(model(torch.tensor([prompt]))[0][0, -1].argmax())
    assert find_likelihoods(model, prompt, [[best]])[0].is_greedy
    assert not find_likelihoods(model, prompt, [[best + 1]])[0].is_greedy


def test_the_likeliest_letter_is_the_answer(
    cli: Cli, make_model_file: Any, questions: Path
) -> None:
    path = make_model_file(dtype=torch.float32)
    model, tokenizer = rwkv_peft.load_model(path), rwkv_peft.Tokenizer(320)
    right = []
    for question in read_questions(questions):
        prompt = [0, *tokenizer.encode(question.prompt)]
        scores = [score(model, prompt, tokenizer.encode(f" {x}")) for x in "ABCD"]
        right.append(max(range(4), key=scores.__getitem__) == question.answer)
    done = cli("eval", path, questions, "--json", "true", "--precision", "fp32")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found["questions"] == 12 and found["accuracy"] == pytest.approx(sum(right) / 12)
    assert found["subjects"]["hard_sums"] == {"questions": 6, "accuracy": sum(right[1::2]) / 6}
    shown = cli("eval", path, questions, "--precision", "fp32", "--limit", 2).out
    assert f"accuracy: {100 * sum(right[:2]) / 2:.2f} % of 2 questions" in shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": 4}, "the answer must be the number of a choice"),
        ({"answer": "E"}, "the answer must be"),
        ({"answer": True}, "the answer must be"),
        ({"choices": ["one"]}, "choices must be a list"),
        ({"question": None}, "no question"),
    ],
)
def test_a_row_that_is_no_question_is_named(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(f"{json.dumps(ROWS[0])}\n{json.dumps({**ROWS[1], **changes})}\n")
    with pytest.raises(DataError, match=rf"q\.jsonl:2: {message}"):
        list(read_questions(path))


def test_a_file_whose_first_row_is_broken_is_named(
    model_file: Path, tmp_path: Path, cli: Callable[..., SimpleNamespace]
) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"text": \n{"text": "a"}\n')
    done = cli("eval", model_file, path)
    assert done.code == 2 and f"{path}:1: not JSON" in done.err


@pytest.mark.parametrize("answer", [2, "C", "c", "2", "字"])
def test_an_answer_is_a_number_a_letter_or_a_text(answer: object, tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({**ROWS[3], "answer": answer}) + "\n", encoding="utf-8")
    assert [x.answer for x in read_questions(path)] == [2]


def test_the_harness_gives_what_our_own_multiple_choice_gives(
    cli: Cli, make_model_file: Any, questions: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: rwkv-peft[eval]")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = make_model_file(dtype=torch.float32)
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    shared = f"dataset_path: json\ndataset_kwargs:\n  data_files: {{test: {questions}}}\n"
    (tasks / "sums.yaml").write_text(
        f"task: sums\n{shared}test_split: test\noutput_type: multiple_choice\n"
        "doc_to_text: !function prompt.write\ndoc_to_choice: ['A', 'B', 'C', 'D']\n"
        "doc_to_target: answer\nmetric_list: [{metric: acc}]\n"
    )
    (tasks / "prompt.py").write_text(
        "from rwkv_peft.evaluation.choices import Question\n"
        "def write(row):\n"
        "    found = Question(row['question'], tuple(row['choices']), 0, row['subject'])\n"
        "    return found.prompt\n"
    )
    (tasks / "rolling.yaml").write_text(
        f"task: rolling\n{shared}test_split: test\noutput_type: loglikelihood_rolling\n"
        "doc_to_text: ''\ndoc_to_target: '{{question}}'\n"
        "metric_list: [{metric: bits_per_byte}]\n"
    )
    (tasks / "answers.yaml").write_text(
        f"task: answers\n{shared}test_split: test\noutput_type: generate_until\n"
        "doc_to_text: '{{question}}'\ndoc_to_target: '{{subject}}'\n"
        "generation_kwargs: {until: ['\\n'], max_gen_toks: 4}\n"
        "metric_list: [{metric: exact_match}]\n"
    )
    names = "sums,rolling,answers"
    more = ["--include_path", tasks, "--precision", "fp32", "--json", "true"]
    done = cli("eval", path, "--tasks", names, *more)
    assert done.code == 0, done.err
    found = json.loads(done.out)["tasks"]
    model, tokenizer = rwkv_peft.load_model(path), rwkv_peft.Tokenizer(320)
    own = list(answer_questions(model, read_questions(questions)))
    assert found["sums"]["acc,none"] == pytest.approx(sum(x.chosen == x.right for x in own) / 12)
    texts = [row["question"] for row in ROWS]
    nats = -sum(score(model, [0], tokenizer.encode(text)) for text in texts)
    wanted = nats / torch.log(torch.tensor(2.0)).item() / sum(map(len, texts))
    assert found["rolling"]["bits_per_byte,none"] == pytest.approx(wanted, rel=1e-4)
    assert found["answers"]["exact_match,none"] == 0
    unknown = cli("eval", path, "--tasks", "no_such_task", "--include_path", tasks)
    assert unknown.code == 2 and "lm-eval knows no such task" in unknown.err


@pytest.mark.parametrize(
    ("context", "continuation", "crosses"),
    [
        ("好。", "\n\nUser", True),
        ("def f(x):\n", "    return x", True),
        ("The answer is", " A", False),
        ("two spaces ", "later", True),
    ],
)
def test_the_harness_splits_the_tokens_of_the_whole_text(
    context: str, continuation: str, crosses: bool
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: rwkv-peft[eval]")
    from rwkv_peft.evaluation.harness import harness_model

    model: Any = SimpleNamespace(model_config=SimpleNamespace(vocab_size=65536))
    before, after = harness_model(model)._encode_pair(context, continuation)
    tokenizer = rwkv_peft.Tokenizer()
    assert before[0] == 0 and [*before[1:], *after] == tokenizer.encode(context + continuation)
    assert context.startswith(tokenizer.decode_bytes(before[1:]).decode())
    assert (tokenizer.decode(before[1:]) != context) == crosses
