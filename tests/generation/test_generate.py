from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rwkv_peft
from rwkv_peft.data.records import Turn
from rwkv_peft.data.templates import TEMPLATES
from rwkv_peft.errors import ConfigError, DataError
from rwkv_peft.generation.chat import Chat
from rwkv_peft.generation.engine import Session, count_known_tokens, cut_at_stop, stream
from rwkv_peft.generation.sampling import Sampler, Sampling


def test_greedy_generation_equals_the_argmax_of_whole_forwards(model_file: Path) -> None:
    model = rwkv_peft.load_model(model_file)
    tokenizer = rwkv_peft.Tokenizer(320)
    tokens = tokenizer.encode("some prompt")
    text = rwkv_peft.generate(model, "some prompt", max_tokens=12, sampling=Sampling(temperature=0))
    for _ in range(12):
        with torch.inference_mode():
            token = int(model(torch.tensor([tokens]))[0][0, -1].argmax())
        if token == 0:
            break
        tokens.append(token)
    assert text == tokenizer.decode(tokens[len(tokenizer.encode("some prompt")) :])


@torch.inference_mode()
def test_a_long_prompt_read_in_stretches_leaves_the_state_of_one_forward(
    model_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rwkv_peft.generation.engine.PREFILL", 7)
    model = rwkv_peft.load_model(model_file, dtype="float64")
    session = Session(model, rwkv_peft.Tokenizer(320))
    tokens = list(range(1, 31))
    session.read(tokens)
    _, state = model(torch.tensor([tokens]))
    assert session.state is not None
    torch.testing.assert_close(session.state.wkv, state.wkv, rtol=0, atol=1e-10)
    torch.testing.assert_close(session.state.ffn_shift, state.ffn_shift, rtol=0, atol=1e-10)


def test_one_token_costs_the_same_after_any_text(model_file: Path) -> None:
    model = rwkv_peft.load_model(model_file)
    seen: list[int] = []
    model.register_forward_pre_hook(lambda module, args: None)
    original = model.hidden

    def watching(tokens: torch.Tensor, state: object = None) -> object:
        seen.append(tokens.shape[1])
        return original(tokens, state)  # type: ignore[arg-type]

    model.hidden = watching  # type: ignore[method-assign, assignment]
    list(stream(model, "x" * 50, max_tokens=6, sampling=Sampling(temperature=0)))
    assert seen[1:] == [1] * (len(seen) - 1) and len(seen) > 1


def test_ids_without_text_are_never_drawn(make_model_file: Callable[..., Path]) -> None:
    model = rwkv_peft.load_model(make_model_file(vocab_size=65536, n_embd=64, dim_att=64))
    tokenizer = rwkv_peft.Tokenizer(65536)
    assert count_known_tokens(model, tokenizer) == 65530
    logits = torch.zeros(65536)
    logits[65533] = 100.0
    logits[7] = 1.0
    assert Sampler(Sampling(temperature=0), 65530).draw(logits) == 7


def test_top_p_draws_from_the_likeliest_tokens_alone() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    drawn = {
        p: {Sampler(Sampling(1.0, top_p=p), 4, seed=s).draw(logits) for s in range(300)}
        for p in (0.4, 0.7, 0.9, 1.0)
    }
    assert drawn == {0.4: {0}, 0.7: {0, 1}, 0.9: {0, 1, 2}, 1.0: {0, 1, 2, 3}}


def test_draws_follow_the_probabilities() -> None:
    logits = torch.log(torch.tensor([0.6, 0.3, 0.1]))
    sampler = Sampler(Sampling(1.0, top_p=1.0), 3, seed=0)
    counts = torch.bincount(torch.tensor([sampler.draw(logits) for _ in range(4000)]))
    # three standard deviations of a binomial count are below 0.024
    torch.testing.assert_close(counts / 4000, torch.tensor([0.6, 0.3, 0.1]), rtol=0, atol=0.024)


def draw_of_all(logits: torch.Tensor, s: Sampling, generator: torch.Generator) -> int:
    """By a sort of the whole vocabulary and PyTorch's own draw."""
    ordered, ids = torch.softmax(logits / s.temperature, -1).sort(descending=True)
    ordered[ordered.cumsum(-1) - ordered >= s.top_p] = 0
    return int(ids[torch.multinomial(ordered, 1, generator=generator)])


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1.0])
def test_looking_at_the_likeliest_draws_what_a_sort_of_all_draws(top_p: float) -> None:
    for seed, spread in enumerate((0.1, 1.0, 4.0)):
        for temperature in (0.5, 1.5):
            sampling = Sampling(temperature, top_p)
            sampler = Sampler(sampling, 65530, seed)
            generator = torch.Generator().manual_seed(seed)
            noise = torch.Generator().manual_seed(seed)
            for _ in range(3):
                # none as likely as another, which a sort may order either way
                logits = torch.randperm(65536, generator=noise).float() / 65536
                logits = torch.erfinv(logits * 1.99 - 0.99) * spread
                assert sampler.draw(logits) == draw_of_all(logits[:65530], sampling, generator)


def test_tokens_that_are_as_likely_as_others_are_not_left_out() -> None:
    logits = torch.full((7000,), -30.0)
    logits[torch.arange(0, 7000, 70)] = 5.0  # a hundred, more than are looked at first
    sampler = Sampler(Sampling(1.0, top_p=0.999), 7000, seed=0)
    drawn = [sampler.draw(logits) for _ in range(1500)]
    assert {token % 70 for token in drawn} == {0}
    counts = torch.bincount(torch.tensor(drawn) // 70, minlength=100)
    # fifteen of each, with a standard deviation below four
    assert counts.min() > 0 and counts.max() < 15 + 6 * 4


@pytest.mark.parametrize("version", ["x070", "x060"])
def test_the_step_of_a_token_in_memory_of_its_own_is_the_models(
    version: str, make_model_file: Callable[..., Path]
) -> None:
    changes: dict[str, Any] = {}
    if version == "x060":
        changes = {"version": version, "ranks": {"maa": 16, "decay": 32}, "dim_ffn": 448}
    model = rwkv_peft.load_model(make_model_file(**changes))
    tokenizer = rwkv_peft.Tokenizer(320)
    plain, own = Session(model, tokenizer), Session(model, tokenizer)
    # where there are graphs, they hold what runs here as it is
    own._step.is_used = True
    for session in (plain, own):
        session.read(tokenizer.encode("a prompt"))

    def answer(session: Session) -> list[int]:
        return list(session.generate(Sampler(Sampling(1.0, 0.9), 320, seed=1), 6))

    before = [session.snapshot() for session in (plain, own)]
    first = answer(plain)
    assert answer(own) == first and len(first) > 1
    after = [session.snapshot() for session in (plain, own)]
    # a snapshot is not overwritten by what is read after it
    for session, snapshot in zip((plain, own), before, strict=True):
        session.restore(snapshot)
        assert answer(session) == first
        session.read(tokenizer.encode("more text"))
    for (state, logits), (other, others) in (before, after):
        assert state is not None and other is not None
        assert all(torch.equal(x, y) for x, y in zip(state, other, strict=True))
        assert logits is not None and others is not None and torch.equal(logits, others)
    assert answer(own) == answer(plain)


def test_penalties_turn_from_tokens_already_drawn() -> None:
    logits = torch.tensor([1.0, 0.9, 0.0])
    sampler = Sampler(Sampling(temperature=0, presence=0.5), 3)
    assert [sampler.draw(logits) for _ in range(3)] == [0, 1, 0]
    counting = Sampler(Sampling(temperature=0, frequency=0.6), 3)
    assert [counting.draw(logits) for _ in range(4)] == [0, 1, 0, 1]


@pytest.mark.parametrize("settings", [{"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}])
def test_impossible_sampling_is_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="got"):
        Sampling(**settings)


@pytest.mark.parametrize("width", [1, 2, 3, 100])
def test_text_ends_before_a_stop_that_spans_pieces(width: int) -> None:
    text = "An answer.\n\nUse it.\n\nUser: more"
    pieces = [text[i : i + width] for i in range(0, len(text), width)]
    got = "".join(cut_at_stop(iter(pieces), ["\n\nUser", "\n\nSystem"]))
    assert got == "An answer.\n\nUse it."
    assert "".join(cut_at_stop(iter(pieces), [])) == text
    assert "".join(cut_at_stop(iter(["ends in \n\nUs"]), ["\n\nUser"])) == "ends in \n\nUs"


ENDED = [
    ("chat", "An answer.\n\nUser: more", "An answer."),
    ("chat", "An answer. \n \t\n\n  System: more", "An answer. "),
    ("chat", "a\n\nAssistant: more", "a"),
    ("chat", "a\n\nUser: Function output:\n3", "a"),
    ("think", "think>\nx\n\ny\n</think>\nb\n\nUser:", "think>\nx\n\ny\n</think>\nb"),
    ("function", "\n{}\n```\n\nUser: Function output:\n3", "\n{}\n```"),
    ("document", "a\n\nInstruction: more", "a"),
    ("alpaca", "a\n\n### Instruction:\nmore", "a"),
    ("chat", "\n\nUser: more", ""),
    # the end-of-document token came after the turn's blank line
    ("chat", "a\n\n", "a"),
    ("alpaca", "a\r\n\r\n", "a\r"),
]
GOES_ON = [
    ("chat", "For it:\n\nUsers wait.\n\nUser wait.\n\nSystems:\n\nSystem \n\nUse"),
    ("chat", "one\nUser: a\nSystem: b, and User: c\n"),
    ("chat", "\n\n### Instruction:\nx\n\nInput: y\n\n### One"),
    ("alpaca", "Steps:\n\n### One\n\nDo.\n\n### Instructions\n\n### Response: x\n\n## T\n\n###"),
    ("document", "a\n\nInstructions: b\n\nInput b\n\nResponses\n\nResp"),
    ("think", "think>\n\n</think>\nb\n\nUs"),
    ("chat", "ends in \n\nUse"),
]


@pytest.mark.parametrize("width", [1, 2, 5, 1000])
@pytest.mark.parametrize(
    ("name", "text", "kept"),
    [*ENDED, *((name, text, text.rstrip()) for name, text in GOES_ON)],
)
def test_a_turn_ends_at_a_whole_heading_after_a_blank_line_and_nowhere_else(
    name: str, text: str, kept: str, width: int
) -> None:
    template = TEMPLATES[name]
    pieces = [text[i : i + width] for i in range(0, len(text), width)]
    assert "".join(cut_at_stop(iter(pieces), template.stops)) == kept
    # the same rule when the text is read
    prompt = template.prompt([Turn("user", "x")]).removesuffix(template.opening)
    turns = template.parse(prompt + template.opening + text)
    answer = next(i for i, p in enumerate(turns) if p.role == "assistant" and p.part == "head")
    body = [p.text for p in turns[answer + 1 : answer + 2] if p.part == "body"]
    assert "".join(body) == (template.opening + kept).rstrip()


def test_text_that_turns_out_to_be_no_heading_is_shown_as_soon_as_that_is_known() -> None:
    pieces, given = iter(["a\n", "\n", "Use", "r", "s b", "\n\nUser", ": c", "d"]), []
    shown = cut_at_stop((given.append(p) or p for p in pieces), TEMPLATES["chat"].stops)
    assert [(piece, len(given)) for piece in shown] == [("a", 1), ("\n\nUsers b", 5), ("", 7)]


def test_a_run_of_line_breaks_costs_no_more_than_other_text() -> None:
    text = "\n" * 3000 + "x"
    assert "".join(cut_at_stop(iter(text), TEMPLATES["chat"].stops)) == text


def test_an_empty_prompt_is_refused(model_file: Path) -> None:
    with pytest.raises(DataError, match="no prompt"):
        rwkv_peft.generate(rwkv_peft.load_model(model_file), "")


def test_a_users_turn_holds_no_blank_line_and_the_prompt_no_space_at_its_end() -> None:
    assert (
        TEMPLATES["chat"].prompt([Turn("user", " a\r\n\r\nb \n\n\nc ")])
        == "User: a\nb \nc\n\nAssistant:"
    )


def test_a_dialogue_has_the_state_of_its_text(model_file: Path) -> None:
    model = rwkv_peft.load_model(model_file, dtype="float64")
    chat = Chat(model, Sampling(temperature=0))
    answers = ["".join(chat.reply(text, max_tokens=5)) for text in ("hello", "again")]
    tokenizer = rwkv_peft.Tokenizer(320)
    tokens = [
        *tokenizer.encode("User: hello\n\nAssistant:" + answers[0].rstrip()),
        *tokenizer.encode("\n\nUser: again\n\nAssistant:" + answers[1].rstrip()),
    ]
    with torch.inference_mode():
        _, state = model(torch.tensor([tokens]))
    assert chat._session.state is not None
    torch.testing.assert_close(chat._session.state.wkv, state.wkv, rtol=0, atol=1e-10)
