"""Rows that go through the model in chunks: truncated and exact gradients."""

import re
import signal
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import rwkv_peft
from rwkv_peft.checkpoint.pth import read_weights
from rwkv_peft.config import TrainConfig
from rwkv_peft.data.batching import IGNORE, Batch
from rwkv_peft.methods.attach import attach
from rwkv_peft.methods.state import LearnedStates
from rwkv_peft.models.base import RWKV
from rwkv_peft.models.compile import compile_blocks
from rwkv_peft.models.offload import HostStore
from rwkv_peft.state import RWKVState
from rwkv_peft.training.borders import BorderSizes, Room, count_passes, least_room, split
from rwkv_peft.training.choose import choose
from rwkv_peft.training.chunk_graphs import GraphedChunks
from rwkv_peft.training.infctx import InfctxStep
from rwkv_peft.training.memory import guess_memory
from rwkv_peft.training.prepare import find_facts
from rwkv_peft.training.run import train
from rwkv_peft.training.step import Step, StepOutput, full_step
from tests.conftest import make_model_config
from tests.training.test_packing import VERSIONS

Make = Callable[..., tuple[RWKV, dict[str, Tensor]]]
METHODS: dict[str, dict[str, Any]] = {
    "none": {},
    "lora": {"r": 4, "init_lora_weights": False},
    "miss": {"r": 4, "init_weights": False},
    "state": {},
}
T, CHUNK = 40, 8
# (rows, T) documents of rows: they begin inside a chunk, at its border, and one is a chunk alone
SEGMENTS = [[5, 3, 17, 15], [16, 8, 9, 7], [40]]
DIVISOR = 77.0


@pytest.fixture
def make(make_model_file: Callable[..., Path]) -> Make:
    """Makes a float64 model and what is trained in it."""

    def make(version: str, method: str, op: str = "torch", **options: Any) -> Any:
        path = make_model_file(dtype=torch.float32, **VERSIONS[version])
        model = rwkv_peft.load_model(path, dtype="float64", op=op)
        generator = torch.Generator().manual_seed(1)
        torch.manual_seed(1)
        if method == "state":
            states = LearnedStates(model, ("a", "b"), is_full=True)
            for parameter in states.values():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.data = 0.1 * noise
            return model, states
        trained = attach(model, method, METHODS[method] | options)
        for parameter in trained.values():
            parameter.data = parameter.data.double()
        return model, dict(trained)

    return make


def make_batch(*, packed: bool, width: int = T, seed: int = 0) -> Batch:
    """Three rows of weighted tokens, with masked stretches, padding and a chunk without a loss."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 320, (3, width), generator=generator)
    targets = torch.randint(1, 320, (3, width), generator=generator)
    targets[:, 8:16] = IGNORE
    targets[1, 17:20] = targets[0, width - 6 :] = IGNORE
    weights = torch.rand(3, width, generator=generator)
    segment_ids = None
    if packed:
        rows = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in SEGMENTS]
        segment_ids = torch.stack(rows).int()
    return Batch(tokens, targets, [1, 2, 3], weights, segment_ids, ["a", "b", "a"], 3 * width)


def gradients(
    step: Step, model: RWKV, trained: dict[str, Tensor], batch: Batch, scale: float = 1.0
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """The loss of a micro-batch and its gradients."""
    state = None
    if isinstance(trained, LearnedStates):
        assert batch.states is not None
        state = trained.rows(batch.states)
    for parameter in trained.values():
        parameter.grad = None
    output = step(
        model,
        batch,
        state=state,
        divisor=DIVISOR,
        l2wrap=1e-2,
        backward=lambda x: (x * scale).backward(),
    )
    assert output.num_tokens == batch.num_trained
    return output.loss_sum, {name: p.grad for name, p in trained.items()}


def assert_same(found: Any, expected: Any, scale: float = 1.0) -> None:
    """Losses and gradients agree to 1e-10 of the largest value of each tensor."""
    assert abs(found[0] - expected[0]) <= 1e-10 * expected[0]
    assert found[1].keys() == expected[1].keys()
    for name, wanted in expected[1].items():
        got = found[1][name]
        assert (got is None) == (wanted is None), name
        if wanted is not None:
            assert (got / scale - wanted).abs().max() <= 1e-10 * wanted.abs().max(), name


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("version", VERSIONS)
def test_exact_gradients_are_those_of_whole_rows(
    version: str, method: str, packed: bool, make: Make
) -> None:
    model, trained = make(version, method)
    batch = make_batch(packed=packed)
    expected = gradients(full_step, model, trained, batch)
    assert all(x is not None and x.abs().max() > 0 for x in expected[1].values())
    assert_same(gradients(InfctxStep(CHUNK, None), model, trained, batch), expected)


def by_hand(chunk: int, group: int | None) -> Step:
    """Chunks with one graph over all, in which states are detached behind every `group` chunks."""

    def step(
        model: RWKV, batch: Batch, *, state: Any, divisor: float, l2wrap: float, backward: Any
    ):  # type: ignore[no-untyped-def]
        objective = total = torch.zeros((), dtype=torch.float64)
        assert batch.weights is not None
        for number, start in enumerate(range(0, batch.tokens.shape[1], chunk)):
            part, ids = slice(start, start + chunk), batch.segment_ids
            if number and group and number % group == 0:
                state = state.detach()
            if number and ids is not None:
                goes_on = (ids[:, start] == ids[:, start - 1]).double()
                vectors, matrix = goes_on.view(1, -1, 1), goes_on.view(1, -1, 1, 1, 1)
                state = RWKVState(state[0] * vectors, state[1] * vectors, state[2] * matrix)
            inner = None if ids is None else ids[:, part]
            logits, state = model(batch.tokens[:, part], state, segment_ids=inner)
            losses = torch.nn.functional.cross_entropy(
                logits.mT, batch.targets[:, part], ignore_index=IGNORE, reduction="none"
            )
            weights = batch.weights[:, part] * (batch.targets[:, part] != IGNORE)
            total = total + (losses * weights).sum()
            pull = 0.5 * l2wrap * logits.amax(-1) ** 2
            objective = objective + ((losses + pull) * weights).sum()
        backward(objective / divisor)
        return StepOutput(total.detach(), batch.num_trained)

    return step


@pytest.mark.parametrize(
    ("version", "method", "packed", "group"),
    [
        ("x070", "none", True, 1),
        ("x060", "lora", False, 1),
        ("x052", "miss", True, 2),
        ("x070", "lora", False, 3),
        ("x060", "none", True, 2),
        ("x070", "state", False, 2),
        ("x070", "state", True, 1),
    ],
)
def test_truncated_gradients_are_those_of_states_detached_by_hand(
    version: str, method: str, packed: bool, group: int, make: Make
) -> None:
    model, trained = make(version, method)
    batch = make_batch(packed=packed)
    expected = gradients(by_hand(CHUNK, group), model, trained, batch)
    assert_same(gradients(InfctxStep(CHUNK, group), model, trained, batch), expected)
    exact = gradients(full_step, model, trained, batch)[1]
    norms = [sum(x.square().sum() for x in found.values()) for found in (exact, expected[1])]  # type: ignore[union-attr]
    assert abs(norms[0] / norms[1] - 1) > 1e-6


@pytest.mark.parametrize("chunk", [1, 7, 13, 39, 40, 4096])
def test_the_size_of_a_chunk_does_not_change_exact_gradients(chunk: int, make: Make) -> None:
    model, trained = make("x070", "lora", "reference")
    batch = make_batch(packed=True)
    expected = gradients(full_step, model, trained, batch)
    assert_same(gradients(InfctxStep(chunk, None), model, trained, batch), expected)


@pytest.mark.parametrize("bptt_chunks", [1, 2, None])
def test_padding_does_not_change_gradients(bptt_chunks: int | None, make: Make) -> None:
    model, trained = make("x070", "lora")
    batch = make_batch(packed=False)

    def padded(x: Tensor, value: int) -> Tensor:
        return torch.nn.functional.pad(x, (0, 29), value=value)

    assert batch.weights is not None
    wide = batch._replace(
        tokens=padded(batch.tokens, 0),
        targets=padded(batch.targets, IGNORE),
        weights=padded(batch.weights, 0),
    )
    step = InfctxStep(CHUNK, bptt_chunks)
    expected = gradients(step, model, trained, batch)
    assert_same(gradients(step, model, trained, wide), expected)


def test_the_state_of_a_model_file_begins_the_rows(make: Make) -> None:
    model, trained = make("x070", "lora")
    states = LearnedStates(model, is_full=True)
    generator = torch.Generator().manual_seed(2)
    for x in states.values():
        x.data = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    model.initial_state = states.rows([""]).detach()
    for x in trained.values():
        x.requires_grad_(True)
    batch = make_batch(packed=True)
    expected = gradients(full_step, model, trained, batch)
    assert_same(gradients(InfctxStep(CHUNK, None), model, trained, batch), expected)


@pytest.mark.parametrize(("method", "grad_cp"), [("lora", 1), ("miss", 0), ("lora", 2)])
def test_a_chunk_that_goes_forward_again_has_its_dropout_again(
    method: str, grad_cp: int, make: Make
) -> None:
    options = {"lora_dropout": 0.3} if method == "lora" else {"miss_dropout": 0.3}
    model, trained = make("x070", method, **options)
    model.train().grad_cp = grad_cp > 0
    model.host = HostStore() if grad_cp == 2 else None
    batch = make_batch(packed=True)
    # chunks behind the last trained token are not walked, so that they draw nothing
    steps = (by_hand(CHUNK, None), InfctxStep(CHUNK, None), InfctxStep(CHUNK, None, room=TINY))
    found = []
    for step in steps:
        torch.manual_seed(3)
        found.append((gradients(step, model, trained, batch), torch.rand(2)))
    for other, after in found[1:]:
        assert_same(other, found[0][0])
        assert torch.equal(after, found[0][1])
    torch.manual_seed(4)
    assert abs(gradients(steps[1], model, trained, batch)[0] - found[0][0][0]) > 1e-3


TINY = Room(0, 1)


def test_few_borders_at_once_change_nothing(make: Make) -> None:
    model, trained = make("x060", "lora")
    batch = make_batch(packed=True)
    step = InfctxStep(1, None, room=TINY)
    passes: list[tuple[int, int]] = []
    step.after_chunk = lambda done, total: passes.append((done, total))
    assert_same(gradients(step, model, trained, batch), gradients(full_step, model, trained, batch))
    total = count_passes(T, least_room(T))
    assert passes == [(i + 1, total) for i in range(total)]
    assert 2 * T - 1 < total < 3 * T


@pytest.mark.parametrize("count", [1, 2, 3, 5, 16, 17, 100, 256, 1000, 2048])
@pytest.mark.parametrize("room", [0, 3, 20, 90, 200, 1023, 4000])
def test_states_at_borders_are_never_more_than_have_room(count: int, room: int) -> None:
    """The walk of `InfctxStep`, with numbers in place of chunks."""
    room = max(room, least_room(count))
    held = most = 0
    learned: list[int] = []

    def learn(start: int, end: int, left: int) -> int:
        nonlocal held, most
        if end - start == 1:
            learned.append(start)
            return 1
        sizes = split(end - start, left)
        assert sum(sizes) == end - start and min(sizes) == sizes[-1] == 1
        starts = [start + sum(sizes[:i]) for i in range(len(sizes))]
        held += len(sizes) - 1
        most = max(most, held)
        passes = starts[-1] - start + learn(starts[-1], end, left)
        for number in reversed(range(len(sizes) - 1)):
            held -= 1
            passes += learn(starts[number], starts[number + 1], left - number)
        return passes

    passes = learn(0, count, room)
    assert learned == list(reversed(range(count)))
    assert most <= room
    assert passes == count_passes(count, room) <= 3 * count
    if room >= count - 1:
        assert passes == 2 * count - 1


def test_the_gradient_of_a_state_has_the_loss_scale_once(make: Make) -> None:
    model, trained = make("x070", "none")
    batch = make_batch(packed=False)
    expected = gradients(full_step, model, trained, batch)
    found = gradients(InfctxStep(CHUNK, None), model, trained, batch, scale=1024)
    assert_same(found, expected, scale=1024)


def test_a_row_without_a_loss_has_a_gradient_of_zero(make: Make) -> None:
    model, trained = make("x070", "lora")
    batch = make_batch(packed=False)
    batch = batch._replace(targets=torch.full_like(batch.targets, IGNORE))
    for step in (full_step, InfctxStep(CHUNK, None), InfctxStep(CHUNK, 1)):
        loss, found = gradients(step, model, trained, batch)
        assert loss == 0
        assert all(x is not None and not x.any() for x in found.values())


@dataclass(eq=False)
class Kept:
    tensor: Tensor


class Counter:
    """Bytes that autograd keeps at once for backward, each tensor's memory once."""

    def __init__(self) -> None:
        self.live: dict[int, list[int]] = {}
        self.most = 0

    def hold(self, x: Tensor) -> Any:
        # without its graph, which may hold what is returned here
        kept, storage = Kept(x.detach()), x.untyped_storage()
        key, size = storage.data_ptr(), storage.nbytes()
        self.live.setdefault(key, [0, size])[0] += 1
        self.most = max(self.most, sum(size for _, size in self.live.values()))

        def drop() -> None:
            self.live[key][0] -= 1
            if not self.live[key][0]:
                del self.live[key]

        weakref.finalize(kept, drop)
        return kept


@pytest.mark.parametrize("bptt_chunks", [1, 2, None])
def test_what_is_kept_for_backward_does_not_grow_with_the_row(
    bptt_chunks: int | None, make: Make
) -> None:
    model, trained = make("x070", "lora", "reference")

    def most_kept(width: int) -> int:
        counter = Counter()
        batch = make_batch(packed=False, width=width)
        with torch.autograd.graph.saved_tensors_hooks(counter.hold, lambda kept: kept.tensor):
            gradients(InfctxStep(CHUNK, bptt_chunks), model, trained, batch)
        assert not counter.live
        return counter.most

    sizes = [most_kept(width) for width in (48, 144)]
    assert max(sizes) <= 1.01 * min(sizes)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_chunk_that_goes_forward_again_gives_its_state_bit_for_bit(
    is_compiled: bool, make: Make
) -> None:
    model, trained = make("x070", "lora", lora_dropout=0.2)
    model.float().train()
    if is_compiled:
        torch._dynamo.reset()
        compile_blocks(model, backend="aot_eager")
    states: dict[tuple[int, ...], list[tuple[Tensor, ...]]] = {}
    hidden = model.hidden

    def noted(tokens: Tensor, *args: Any, **options: Any) -> Any:
        result = hidden(tokens, *args, **options)
        found = tuple(x.detach().clone() for layer in result[1] for x in layer)
        states.setdefault(tuple(tokens[0].tolist()), []).append(found)
        return result

    model.hidden = noted  # type: ignore[method-assign]
    gradients(InfctxStep(CHUNK, None), model, trained, make_batch(packed=True))
    assert [len(found) for found in states.values()] == [2, 2, 2, 2, 1]
    for first, *others in states.values():
        assert all(torch.equal(a, b) for x in others for a, b in zip(first, x, strict=True))


Run = Callable[..., Any]


@pytest.fixture
def run(
    make_model_file: Callable[..., Path], make_data_file: Callable[..., Path], tmp_path: Path
) -> Run:
    """Trains on texts of several chunks, and gives the result and what was saved."""
    model = make_model_file(dtype=torch.float32)
    data = make_data_file([f"row {i}: " + "words and 字 " * (1 + 5 * i % 9) for i in range(6)])
    base = TrainConfig(
        load_model=str(model),
        data_file=str(data),
        epoch_count=1,
        micro_bsz=1,
        ctx_len=70,
        accumulate_grad_batches=2,
        lr_init=1e-3,
        lr_final=1e-3,
        # so that what rounds to another sign does not become a whole step
        adam_eps=1e-3,
        warmup_steps=0,
        random_seed=1,
        precision="fp32",
        accelerator="cpu",
        grad_cp=0,
    )

    def start(name: str, step: Step | None = None, **changes: Any) -> tuple[Any, dict[str, Tensor]]:
        result = train(replace(base, proj_dir=str(tmp_path / name), **changes), step=step)
        return result, read_weights(result.weights) if result.weights else {}

    return start


@pytest.mark.parametrize(
    "changes",
    [
        {"peft": "lora", "peft_config": {"r": 4}, "dataload": "pack"},
        {"peft": "miss", "peft_config": {"r": 4}, "dataload": "get"},
        {"peft": "none", "dataload": "pad", "grad_cp": 1},
        {"peft": "state", "lr_init": 0.1},
    ],
    ids=lambda changes: changes["peft"],
)
def test_a_run_in_chunks_gives_the_weights_of_a_run_of_whole_rows(
    changes: dict[str, Any], run: Run
) -> None:
    whole, expected = run("whole", **changes)
    chunks = {"train_type": "infctx", "chunk_ctx": 24, "bptt_chunks": "all"}
    result, found = run("chunks", **changes, **chunks)
    assert result.steps == whole.steps > 1
    assert result.loss == pytest.approx(whole.loss, rel=1e-6)
    for name, x in expected.items():
        # three steps move a weight by 3e-3; float32 rounds weights below 1 to 6e-8
        assert (found[name] - x).abs().max() <= 1e-6, name


def test_a_truncated_run_learns_another_way_to_the_same_loss_at_first(run: Run) -> None:
    lora = {"peft": "lora", "peft_config": {"r": 4}, "merge": 1, "epoch_steps": 2}
    chunks = {"train_type": "infctx", "chunk_ctx": 24}
    exact, expected = run("exact", **lora, **chunks, bptt_chunks="all")
    truncated, found = run("truncated", **lora, **chunks)
    assert truncated.steps == exact.steps == 1
    # before the first step the loss is that of the base
    assert truncated.loss == pytest.approx(exact.loss, rel=1e-6)
    assert any((found[name] - x).abs().max() > 1e-5 for name, x in expected.items())


@pytest.fixture
def config(
    make_model_file: Callable[..., Path], make_data_file: Callable[..., Path]
) -> TrainConfig:
    """Of a run over one long document, and two short ones."""
    data = make_data_file(["words " * 1000, "few words", "some more words"])
    return TrainConfig(
        load_model=str(make_model_file()),
        data_file=str(data),
        train_type="infctx",
        accelerator="cpu",
        precision="fp32",
    )


def test_a_long_document_is_one_row_in_chunks_of_512(config: TrainConfig) -> None:
    facts = find_facts(config, read_weights(config.load_model))
    plan = choose(config, facts)
    settings = plan.settings
    assert settings.ctx_len >= facts.documents.longest > 4096
    assert (settings.peft, settings.chunk_ctx, settings.bptt_chunks) == ("lora", 512, 1)
    assert settings.is_infctx and settings.micro_bsz == 1
    plain = choose(replace(config, train_type="none"), facts).settings
    assert (plain.chunk_ctx, plain.is_infctx) == (0, False)
    assert plain.ctx_len == settings.ctx_len
    small = choose(replace(config, train_type="none"), replace(facts, memory=50 << 20)).settings
    assert small.ctx_len == 4096


@pytest.mark.parametrize(
    ("memory", "said", "chunk_ctx", "grad_cp"),
    [
        (1 << 30, {}, 4096, 0),
        # 2048 tokens keep 120 MiB for backward
        (200 << 20, {}, 2048, 0),
        (10 << 20, {}, 512, 1),
        (None, {}, 4096, 0),
        (1 << 30, {"ctx_len": 600}, 1024, 0),
        (200 << 20, {"grad_cp": 1}, 4096, 1),
        (200 << 20, {"chunk_ctx": 4000}, 4000, 1),
        (1 << 30, {"peft": "state", "bptt_chunks": 0}, 4096, 0),
        (1 << 30, {"peft": "state", "train_type": "none"}, 4096, 0),
    ],
)
def test_chunks_of_exact_gradients_are_the_longest_that_fit(
    memory: int | None, said: dict[str, Any], chunk_ctx: int, grad_cp: int, config: TrainConfig
) -> None:
    config = replace(config, **{"bptt_chunks": "all", **said})
    facts = replace(find_facts(config, read_weights(config.load_model)), memory=memory)
    settings = choose(config, facts).settings
    found = (settings.bptt_chunks, settings.chunk_ctx, settings.grad_cp)
    assert found == ("all", chunk_ctx, grad_cp)


def test_states_have_room_on_the_device_first_and_on_the_host_in_powers_of_two() -> None:
    # 2 layers of 128: two vectors in bf16 and 2 heads of 64 x 64 in float32, of 3 rows
    exact = 2 * 3 * (2 * 128 * 2 + 2 * 64 * 64 * 4)
    pinned = 2 * 2048 + 262144
    sizes = {
        name: BorderSizes(make_model_config(), 3, torch.bfloat16, torch.device(name))
        for name in ("cpu", "cuda")
    }
    assert sizes["cpu"].each == sizes["cuda"].each == exact
    room = Room(10 * exact + 1, 4 * pinned)
    assert sizes["cuda"].count(room) == 14
    assert sizes["cuda"].take(3, room) == (3 * exact, 0)
    assert sizes["cuda"].take(12, room) == (10 * exact, 2 * pinned)
    assert sizes["cpu"].count(Room(0, 7 * exact)) == 7
    assert sizes["cpu"].take(5, Room(0, 7 * exact)) == (0, 5 * exact)


def test_a_guess_of_memory_is_of_a_chunk(config: TrainConfig) -> None:
    facts = find_facts(config, read_weights(config.load_model))

    def guess(**said: Any) -> float:
        settings = choose(replace(config, grad_cp=0, micro_bsz=1, **said), facts).settings
        return guess_memory(settings, facts.model_config, "torch", facts.num_weights, 1000)

    long, longer = guess(chunk_ctx=512, ctx_len=5000), guess(chunk_ctx=512, ctx_len=1 << 20)
    assert long == longer == guess(train_type="none", ctx_len=512)
    assert guess(chunk_ctx=1024) > 1.5 * long


def test_a_run_says_its_chunks_before_and_while_it_goes(
    cli: Callable[..., SimpleNamespace],
    config: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rwkv_peft.training.display.PLAIN_INTERVAL", 0.0)
    line = ["train", config.load_model, config.data_file, "--accelerator", "cpu", "--merge", 0]
    line += ["--epoch_count", 1, "--ctx_len", 600, "--data_shuffle", 0, "--epoch_steps", 1]
    line += ["--proj_dir", tmp_path / "out"]
    done = cli(*line, "--train_type", "infctx", "--chunk_ctx", 150, "--bptt_chunks", 2)
    assert done.code == 0, done.err
    assert (
        "chunks: rows of up to 600 tokens go through in chunks of 150 (4), gradients back to the "
        "beginning of each group of 2 (--bptt_chunks 2)\n"
    ) in done.err
    kept = r"\nchunks: 1 states between chunks are kept at a time, \S+ MiB on the host; "
    assert re.search(kept + r"a chunk goes forward 1\.5 times\n", done.err)
    assert "\ntime: about " in done.err and " for 1 optimizer step (a guess)\n" in done.err
    # twice two chunks forward, the first of which again
    for number in range(1, 7):
        assert f"\nstep 1/1  chunk {number}/6\n" in done.err
    assert "chunk 7/6" not in done.err and "\nstep 1/1  loss " in done.err
    saved = (tmp_path / "out" / "config.yaml").read_text()
    assert "train_type: infctx\n" in saved and "bptt_chunks: 2\n" in saved
    without = cli(*line, "--chunk_ctx", 150, "--overwrite", 1)
    assert without.code == 0
    assert "rows: --chunk_ctx 150 has no effect, as rows go through the model whole" in without.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--bptt_chunks 2", "--bptt_chunks 2 is for rows in chunks: give --train_type infctx"),
        ("--train_type infctx --bptt_chunks -1", "--bptt_chunks must not be below 0, got -1"),
        ("--train_type infctx --chunk_ctx -1", "--chunk_ctx must not be below 0, got -1"),
        (
            "--train_type infctx --bptt_chunks many",
            "--bptt_chunks: got many, allowed is a whole number or all",
        ),
    ],
)
def test_a_flag_that_means_nothing_is_refused(
    flags: str, message: str, cli: Callable[..., SimpleNamespace], model_file: Path, data_file: Path
) -> None:
    done = cli("train", model_file, data_file, *flags.split())
    assert (done.code, done.err) == (2, f"error: {message}\n")


class Repeated:
    """In place of a CUDA graph: runs its function again on the same tensors."""

    def __init__(self, device: Any, pool: Any, function: Any, given: list[Tensor | None]) -> None:
        self._function, self._given = function, given

    def replay(self, given: Any) -> list[Tensor | None]:
        with torch.no_grad():
            for own, x in zip(self._given, given, strict=True):
                assert (own is None) == (x is None)
                if own is not None:
                    own.grad = None
                    assert own.shape == x.shape and own.dtype == x.dtype
                    own.copy_(x)
        with torch.enable_grad():
            return [None if x is None else x.clone() for x in self._function(self._given)]


@pytest.mark.parametrize("is_captured", [False, True])
@pytest.mark.parametrize(
    ("method", "packed", "bptt_chunks"),
    [("none", True, None), ("lora", False, 2), ("state", False, None)],
)
def test_chunks_in_few_shapes_give_the_same_gradients(
    method: str,
    packed: bool,
    bptt_chunks: int | None,
    is_captured: bool,
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rwkv_peft.training.chunk_graphs.Captured", Repeated)
    model, trained = make("x070", method)
    batches = [make_batch(packed=packed, seed=seed) for seed in range(3)]
    plain = InfctxStep(CHUNK, bptt_chunks)
    way = GraphedChunks(torch.device("cpu"), CHUNK, is_captured=False)
    way._is_captured = is_captured
    step = InfctxStep(CHUNK, bptt_chunks, way=way)
    for batch in batches:
        expected = gradients(plain, model, trained, batch)
        assert_same(gradients(step, model, trained, batch), expected)
    assert (way.num_graphs > 1) == is_captured
    # the first, an inner and the last chunk of a group, with several numbers of trained tokens
    assert way.num_graphs <= 12


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["lora", "none", "state"])
@pytest.mark.parametrize("version", VERSIONS)
def test_captured_chunks_give_the_bits_of_their_kernels(
    version: str, method: str, make_model_file: Callable[..., Path]
) -> None:
    device = torch.device("cuda")
    path = make_model_file(**VERSIONS[version])
    model = rwkv_peft.load_model(path, device=device, dtype="bfloat16").train()
    torch.manual_seed(1)
    trained: dict[str, Tensor]
    if method == "state":
        trained = LearnedStates(model, ("a", "b"))
        for parameter in trained.values():
            parameter.data.normal_(0, 0.1)
    else:
        options = {"lora_dropout": 0.2} if method == "lora" else {}
        trained = dict(attach(model, method, METHODS[method] | options))  # type: ignore[arg-type]
    found = []
    with torch.cuda.stream(torch.cuda.Stream()):
        for is_captured in (False, True):
            way = GraphedChunks(device, CHUNK, is_captured=is_captured)
            step = InfctxStep(CHUNK, None, way=way, room=Room(0, 1 << 30))
            for parameter in trained.values():
                parameter.grad = None
            torch.manual_seed(2)
            for seed in range(4):
                for parameter in trained.values():
                    if parameter.grad is not None:
                        parameter.grad.zero_()
                batch = make_batch(packed=method != "state", seed=seed)
                state = trained.rows(batch.states) if isinstance(trained, LearnedStates) else None
                output = step(
                    model,
                    batch,
                    state=state,
                    divisor=DIVISOR,
                    l2wrap=1e-3,
                    backward=Tensor.backward,
                )
            grads = {n: x.grad.clone() for n, x in trained.items() if x.grad is not None}
            found.append((output.loss_sum.item(), grads))
        assert way.num_graphs > 1
    (loss, expected), (other, got) = found
    assert other == loss and got.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(got[name], x), name


@pytest.mark.parametrize("chunks", [{}, {"chunk_ctx": 24, "bptt_chunks": "all"}])
def test_a_run_in_chunks_goes_on_where_it_was_stopped(chunks: dict[str, Any], run: Run) -> None:
    changes = {"peft": "lora", "peft_config": {"r": 4, "lora_dropout": 0.2}, **chunks}
    changes |= {"train_type": "infctx", "epoch_count": 2}
    whole, expected = run("whole", **changes)
    count, step = 0, InfctxStep(24, None) if chunks else InfctxStep(512, 1)

    def stopping(*args: Any, **options: Any) -> StepOutput:
        nonlocal count
        count += 1
        if count == 3:
            signal.raise_signal(signal.SIGTERM)
        return step(*args, **options)

    first, _ = run("parts", step=stopping, **changes)
    assert first.signal == signal.SIGTERM and first.steps == 2 < whole.steps
    torch.manual_seed(99)
    result, found = run("parts", resume="auto", **changes)
    assert result.steps == whole.steps
    assert all(torch.equal(found[name], x) for name, x in expected.items())
