"""Batches: which target is trained when, for every way to lay documents out."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_peft.data.batching import IGNORE, Batch, Batches, Turn, load, share
from rwkv_peft.data.documents import Documents, first_documents
from rwkv_peft.data.packing import pack, pack_in_order
from rwkv_peft.errors import DataError

DATALOADS = ("pack", "pad", "only", "get")


def make_documents(sizes: list[int], **changes: Any) -> Documents:
    """Documents of so many targets; every token is another number, in the order of the file."""
    starts = np.cumsum([0, *(size + 1 for size in sizes)])
    values = {
        "paths": ("a.jsonl",),
        "tokens": np.arange(1, starts[-1] + 1, dtype=np.int32),
        "starts": starts,
        "lines": np.arange(1, len(sizes) + 1),
        "sources": np.zeros(len(sizes), dtype=np.uint8),
    }
    return Documents(**{**values, **changes})


def make_batches(documents: Documents, **changes: Any) -> Batches:
    values = {"dataload": "pack", "ctx_len": 16, "micro_bsz": 3, "seed": 0, "is_shuffled": True}
    return Batches(documents, **{**values, **changes})


def pairs(batch: Batch) -> list[tuple[int, int]]:
    """Each trained target behind the token that it follows."""
    kept = batch.targets != IGNORE
    return list(zip(batch.tokens[kept].tolist(), batch.targets[kept].tolist(), strict=True))


def expected_pairs_of_each(documents: Documents) -> list[list[tuple[int, int]]]:
    borders = pairwise(documents.starts.tolist())
    return [list(pairwise(documents.tokens[start:end].tolist())) for start, end in borders]


def expected_pairs(documents: Documents) -> list[tuple[int, int]]:
    return [pair for found in expected_pairs_of_each(documents) for pair in found]


def assert_same(one: Batch, other: Batch) -> None:
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


sizes_of_documents = st.lists(st.integers(1, 50), min_size=1, max_size=40)


@settings(max_examples=150, deadline=None)
@given(
    sizes=sizes_of_documents,
    dataload=st.sampled_from(DATALOADS),
    ctx_len=st.integers(1, 40),
    micro_bsz=st.integers(1, 5),
    accumulate=st.integers(1, 3),
    world_size=st.integers(1, 8),
    num_workers=st.integers(0, 3),
    is_shuffled=st.booleans(),
    seed=st.integers(0, 3),
    data=st.data(),
)
def test_every_target_is_trained_exactly_once_a_pass_whatever_ranks_workers_and_restarts(
    sizes: list[int],
    dataload: str,
    ctx_len: int,
    micro_bsz: int,
    accumulate: int,
    world_size: int,
    num_workers: int,
    is_shuffled: bool,
    seed: int,
    data: st.DataObject,
) -> None:
    documents = make_documents(sizes)
    settings_ = {
        "dataload": dataload,
        "ctx_len": ctx_len,
        "micro_bsz": 1 if dataload == "only" else micro_bsz,
        "accumulate": accumulate,
        "seed": seed,
        "is_shuffled": is_shuffled,
    }
    number = data.draw(st.integers(0, 2))
    trained = []
    counts = set()
    for rank in range(world_size):
        batches = make_batches(documents, **settings_)
        start, end = number * len(batches), (number + 1) * len(batches)
        # steps of a few micro-batches for each rank, and a last one of what is left
        steps = range(start, end, size := 2 * world_size)
        turns = [t for at in steps for t in share(range(at, min(at + size, end)), rank, world_size)]
        stop = data.draw(st.integers(0, len(turns)))
        # a run that is stopped anywhere and taken up by another process with other workers
        first = list(load(batches, turns[:stop], num_workers))
        again = make_batches(documents, **settings_)
        rest = list(load(again, turns[stop:], 3 - num_workers))
        counts.add(len(first) + len(rest))
        for batch in [*first, *rest]:
            trained += pairs(batch)
            assert batch.tokens.shape[1] <= ctx_len
            if batches.is_static:
                assert batch.tokens.shape == (batches.micro_bsz, ctx_len)
    assert len(counts) == 1
    assert sorted(trained) == expected_pairs(documents)


@settings(max_examples=100, deadline=None)
@given(
    sizes=sizes_of_documents,
    is_shuffled=st.booleans(),
    ctx_len=st.integers(1, 40),
    position=st.integers(0, 9),
)
def test_a_packed_row_numbers_its_documents_and_never_joins_two(
    sizes: list[int], is_shuffled: bool, ctx_len: int, position: int
) -> None:
    documents = make_documents(sizes)
    batch = make_batches(documents, ctx_len=ctx_len, is_shuffled=is_shuffled)[position]
    assert batch.segment_ids is not None and batch.segment_ids.dtype == torch.int32
    document_of = np.repeat(np.arange(len(documents)), np.diff(documents.starts))
    real = 0
    for tokens, ids in zip(batch.tokens, batch.segment_ids, strict=True):
        assert ((ids[1:] - ids[:-1]).clamp(0, 1) == ids[1:] - ids[:-1]).all()
        for number in range(int(ids[-1]) + 1):
            inside = tokens[ids == number]
            inside = inside[inside != 0]
            real += len(inside)
            # one document, its tokens in their order without a gap
            assert len(np.unique(document_of[(inside - 1).numpy()])) <= 1
            assert (inside[1:] - inside[:-1] == 1).all()
    assert real == batch.num_tokens


@pytest.mark.parametrize("dataload", DATALOADS)
def test_the_order_depends_on_seed_and_pass_alone(dataload: str) -> None:
    documents = make_documents([1 + i * i % 30 for i in range(60)])
    options = {"dataload": dataload, "micro_bsz": 1 if dataload == "only" else 3}
    one, again = make_batches(documents, **options), make_batches(documents, **options)
    per_pass = len(one)
    for position in (3 * per_pass + 1, 0, per_pass, per_pass - 1):
        assert_same(one[position], again[position])
    other = make_batches(documents, seed=1, **options)
    orders = [
        [pairs(batches[start + i]) for i in range(per_pass)]
        for batches, start in ((one, 0), (one, per_pass), (other, 0))
    ]
    assert orders[0] != orders[1] and orders[0] != orders[2]


@pytest.mark.parametrize("dataload", DATALOADS)
def test_without_a_shuffle_the_order_of_the_file_is_kept(dataload: str) -> None:
    documents = make_documents([1 + i * i % 30 for i in range(60)])
    batches = make_batches(documents, dataload=dataload, micro_bsz=1, is_shuffled=False, ctx_len=32)
    for start in (0, len(batches)):
        found = [pair for i in range(len(batches)) for pair in pairs(batches[start + i])]
        assert found == expected_pairs(documents)


def test_neighbours_in_a_packed_row_change_from_pass_to_pass() -> None:
    documents = make_documents([3, 5, 5, 6, 7, 7, 8, 9] * 40)
    batches = make_batches(documents, micro_bsz=1)
    rows = [{tuple(sorted(batches[p].lines)) for p in range(n, n + len(batches))} for n in (0, 999)]
    assert len(rows[0] & rows[1]) < len(batches) / 4


@pytest.mark.parametrize("count", [1, 3, 8, 9, 16])
@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_ranks_take_as_many_micro_batches_of_a_step_and_count_each_once(
    count: int, size: int
) -> None:
    window = range(20, 20 + count)
    shares = [share(window, rank, size) for rank in range(size)]
    assert {len(turns) for turns in shares} == {-(-count // size)}
    counted = [turn.position for turns in shares for turn in turns if turn.is_counted]
    assert sorted(counted) == list(window)
    assert all(turn.position in window for turns in shares for turn in turns)


def test_a_micro_batch_that_is_not_counted_has_the_shape_of_the_other_and_trains_nothing() -> None:
    batches = make_batches(make_documents([10] * 7), micro_bsz=2)
    counted, other = load(batches, [Turn(0), Turn(0, is_counted=False)])
    assert torch.equal(other.tokens, counted.tokens) and counted.num_trained
    assert (other.num_trained, other.weight, other.num_tokens, other.lines) == (0, 0, 0, [])


def test_rows_of_like_lengths_are_padded_together_and_waste_little() -> None:
    rng = np.random.default_rng(0)
    documents = make_documents(rng.integers(1, 200, 2000).tolist())
    options = {"dataload": "pad", "ctx_len": 200, "micro_bsz": 8}
    assert make_batches(documents, **options).share_of_tokens() > 0.93
    assert make_batches(documents, is_shuffled=False, **options).share_of_tokens() < 0.6
    # the steps are not sorted: what is trained first is not what is short
    batches = make_batches(documents, **options)
    widths = [batches[i].tokens.shape[1] for i in range(len(batches))]
    assert abs(np.corrcoef(range(len(widths)), widths)[0, 1]) < 0.2


def test_packed_rows_of_chat_are_more_than_98_percent_tokens() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.lognormal(np.log(150) - 0.18, 0.6, 5000).astype(int).clip(8, 3000)
    batches = make_batches(make_documents(sizes.tolist()), ctx_len=1024, micro_bsz=1)
    assert batches.share_of_tokens() > 0.98


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 64), min_size=1, max_size=300), st.integers(64, 80))
def test_packing_places_every_piece_once_and_overfills_no_row(
    lengths: list[int], capacity: int
) -> None:
    array = np.array(lengths)
    for packing in (pack(array, capacity), pack_in_order(array, capacity)):
        assert sorted(packing.lengths.tolist()) == sorted(lengths)
        sizes = np.add.reduceat(packing.lengths, packing.begins[:-1])
        assert sizes.max() <= capacity and sizes.min() > 0
    # never more rows than best fit decreasing, placed one by one
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [room for room in rooms if room >= length]
        room = min(fits, default=capacity)
        if fits:
            rooms.remove(room)
        rooms.append(room - length)
    assert len(pack(array, capacity).begins) - 1 == len(rooms)


def test_a_million_documents_are_packed_in_seconds() -> None:
    import time

    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 4096, 1_000_000)
    started = time.perf_counter()
    packing = pack(lengths, 4096)
    assert time.perf_counter() - started < 5
    assert lengths.sum() / (4096 * (len(packing.begins) - 1)) > 0.99


@pytest.mark.parametrize("dataload", DATALOADS)
def test_masked_targets_are_ignored_and_weights_go_with_their_target(dataload: str) -> None:
    documents = make_documents([5, 20, 9])
    weights = np.random.default_rng(0).choice([0, 0.5, 1, 2], len(documents.tokens))
    documents = make_documents([5, 20, 9], weights=weights.astype(np.float32))
    batches = make_batches(documents, dataload=dataload, micro_bsz=1)
    expected = {y: weights[y - 1] for _, y in expected_pairs(documents) if weights[y - 1]}
    found: dict[int, float] = {}
    for position in range(len(batches)):
        batch = batches[position]
        assert batch.weights is not None
        kept = batch.targets != IGNORE
        assert (batch.weights[~kept] == 0).all()
        values = zip(batch.targets[kept].tolist(), batch.weights[kept].tolist(), strict=True)
        found |= dict(values)
        assert batch.weight == pytest.approx(batch.weights.sum().item())
    assert found == expected


def test_weights_of_0_and_1_need_no_tensor_and_a_piece_without_targets_no_row() -> None:
    weights = np.ones(1 + 40, dtype=np.uint8)
    weights[:17] = 0
    batches = make_batches(make_documents([40], weights=weights), micro_bsz=1)
    assert batches.num_rows == 2
    assert batches[0].weights is None
    assert sum(batches[i].num_trained for i in range(2)) == 24
    with pytest.raises(DataError, match=r"a.jsonl: no trainable token"):
        make_batches(make_documents([40], weights=np.zeros(41, dtype=np.uint8)))


def test_the_files_of_a_mixture_have_their_shares_in_every_pass_and_are_used_up_evenly() -> None:
    sources = np.array([0] * 70 + [1] * 30 + [2] * 200, dtype=np.uint8)
    documents = make_documents(
        [15] * 300, paths=("a", "b", "c"), sources=sources, shares=(0.5, 0.3, 0.2)
    )
    batches = make_batches(documents, micro_bsz=1)
    assert batches.rows_of_pass == [50, 30, 20]
    uses = np.zeros(300, dtype=int)
    for number in range(10):
        lines = [batches[number * 100 + i].lines[0] for i in range(100)]
        assert np.bincount(sources[np.array(lines) - 1]).tolist() == [50, 30, 20]
        # no file comes first
        assert len(set(sources[np.array(lines[:20]) - 1])) == 3
        np.add.at(uses, np.array(lines) - 1, 1)
    for source in range(3):
        of_file = uses[sources == source]
        assert of_file.max() - of_file.min() <= 1
    again = make_batches(documents, micro_bsz=1)
    assert_same(again[777], batches[777])
    in_order = make_batches(documents, micro_bsz=1, is_shuffled=False)
    first = [in_order[i].lines[0] for i in range(10)]
    assert np.bincount(sources[np.array(first) - 1]).tolist() == [5, 3, 2]


def test_states_are_named_row_by_row() -> None:
    names = np.array(["x", "y", "", "x"])
    documents = make_documents([3, 4, 5, 6], states=names)
    batches = make_batches(documents, dataload="pad", micro_bsz=8)
    batch = batches[0]
    assert batch.states == [names[line - 1] for line in batch.lines]


def test_windows_are_cut_wherever_they_fall_and_are_full() -> None:
    documents = make_documents([7] * 50)
    batches = make_batches(documents, dataload="get", micro_bsz=1, ctx_len=32)
    first = {int(batches[number * len(batches)].tokens[0, 0]) % 8 for number in range(30)}
    assert len(first) > 4
    assert batches[0].segment_ids is None
    widths = [batches[i].num_tokens for i in range(len(batches))]
    assert sorted(widths)[1:] == [32] * (len(batches) - 1)


def test_the_first_documents_alone_are_used_when_samples_are_counted() -> None:
    documents = make_documents([3, 4, 5], weights=np.ones(15, dtype=np.uint8))
    first = first_documents(documents, 2)
    assert len(first) == 2 and first.num_tokens == 9 and first.num_trained == first.num_targets == 7
    assert first.longest == 4
    assert len(first_documents(documents, 9)) == 3


@pytest.mark.parametrize("dataload", DATALOADS)
@pytest.mark.parametrize("is_shuffled", [True, False])
def test_a_pass_over_chosen_documents_trains_exactly_these(
    dataload: str, is_shuffled: bool
) -> None:
    sizes = np.random.default_rng(0).integers(1, 40, 30).tolist()
    chosen = np.array([0, 1, 4, 5, 6, 11, 17, 18, 29])
    documents = make_documents(sizes, chosen=chosen)
    kept = [pair for i, pair in enumerate(expected_pairs_of_each(documents)) if i in chosen]
    expected = sorted(pair for found in kept for pair in found)
    micro_bsz = 1 if dataload == "only" else 3
    batches = make_batches(
        documents, dataload=dataload, is_shuffled=is_shuffled, micro_bsz=micro_bsz
    )
    for number in range(3):
        first = number * len(batches)
        passed = [batches[first + i] for i in range(len(batches))]
        found = [pair for batch in passed for pair in pairs(batch)]
        assert sorted(found) == expected
    assert documents.num_targets == documents.num_trained == len(expected)


def test_static_batches_keep_their_width_with_fewer_rows_if_asked_to() -> None:
    documents = make_documents([3, 4])
    wide = make_batches(documents, micro_bsz=4, keeps_width=True)
    assert len(wide) == 1 and wide[0].tokens.shape == (4, 16)
    assert sorted(pairs(wide[0])) == sorted(expected_pairs(documents))
    assert make_batches(documents, micro_bsz=4)[0].tokens.shape == (1, 16)


def test_a_batch_is_lengthened_by_what_trains_nothing_and_begins_no_document() -> None:
    ids = torch.tensor([[0, 0, 1], [0, 1, 1]], dtype=torch.int32)
    tokens, weights = torch.tensor([[5, 6, 7], [8, 9, 4]]), torch.full((2, 3), 0.5)
    batch = Batch(tokens, tokens + 1, [1, 2], weights, ids, num_tokens=6)
    longer = batch.lengthened(5)
    assert longer.tokens.tolist() == [[5, 6, 7, 0, 0], [8, 9, 4, 0, 0]]
    assert longer.targets.tolist() == [[6, 7, 8, IGNORE, IGNORE], [9, 10, 5, IGNORE, IGNORE]]
    assert longer.segment_ids is not None
    assert longer.segment_ids.tolist() == [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]]
    assert (longer.weight, longer.num_trained, longer.num_tokens) == (batch.weight, 6, 6)
    assert batch.lengthened(2).tokens.shape == (2, 3)
