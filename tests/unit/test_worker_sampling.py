"""The tail's sampler and its random numbers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from molink_common.identity import sequence_id
from molink_common.messages import FinishReason, TokenEvent
from molink_common.sampling import SamplingOptions
from molink_common.wire import Opening
from molink_stage_worker.noise import philox, token_key
from molink_stage_worker.race import exponentials
from molink_stage_worker.sampling import Sampler, draw

EOS = 2
SIZE = 50


def sampler(size: int = SIZE) -> Sampler:
    return Sampler(eos_token_ids=(EOS,), vocabulary_size=size)


def open_one(
    made: Sampler, number: int = 1, prompt: tuple[int, ...] = (5, 6), generated: tuple[int, ...] = (), **options: Any
) -> str:
    wanted = SamplingOptions(**{"max_tokens": 1000, "temperature": 0.0, **options})
    made.open(Opening(sequence=sequence_id(number), prompt=prompt, generated=generated, options=wanted))
    return sequence_id(number)


def one_token(made: Sampler, logits: torch.Tensor, name: str) -> TokenEvent:
    events, failed = made.sample(logits[None], [name])
    assert failed == []
    return events[0]


def peaked(**peaks: float) -> torch.Tensor:
    """Logits 0 but at the tokens t<number>."""
    logits = torch.zeros(SIZE)
    for token, value in peaks.items():
        logits[int(token[1:])] = value
    return logits


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
@pytest.mark.parametrize("index", [0, 1, 77, 2**40])
def test_the_noise_is_philox_as_numpy_has_it(seed: int, index: int) -> None:
    # numpy counts up before it draws
    counter = [(index - 1) % 2**64] + ([2**64 - 1] * 3 if index == 0 else [0, 0, 0])
    generator = np.random.Philox(key=np.array([seed, 0], dtype=np.uint64), counter=np.array(counter, dtype=np.uint64))
    raw = [int(word) for word in generator.random_raw(4)]
    assert list(philox((index, 0, 0, 0), (seed, 0))) == raw
    assert token_key(seed, index) == raw[0]


def test_a_known_value_of_the_noise() -> None:
    # the first word of the published all-zero vector of philox4x64-10
    assert philox((0, 0, 0, 0), (0, 0))[0] == 0x16554D9ECA36314C


def test_greedy_takes_the_likeliest_and_counts_up() -> None:
    made = sampler()
    name = open_one(made, generated=(9, 9))
    event = one_token(made, peaked(t7=3), name)
    assert (event.index, event.token, event.finish, event.logprob) == (2, 7, None, None)


def test_it_stops_at_end_of_text_unless_told_otherwise() -> None:
    made = sampler()
    stops, goes_on = open_one(made, 1), open_one(made, 2, ignore_eos=True)
    also = open_one(made, 3, stop_token_ids=(7,))
    events, _ = made.sample(torch.stack([peaked(t2=3), peaked(t2=3), peaked(t7=3)]), [stops, goes_on, also])
    assert [event.finish for event in events] == [FinishReason.STOP, None, FinishReason.STOP]


def test_the_last_allowed_token_ends_with_length() -> None:
    made = sampler()
    name = open_one(made, max_tokens=3, generated=(1,))
    assert one_token(made, peaked(t7=1), name).finish is None
    assert one_token(made, peaked(t7=1), name).finish is FinishReason.LENGTH


def test_end_of_text_is_held_back_until_min_tokens() -> None:
    made = sampler()
    name = open_one(made, min_tokens=2, stop_token_ids=(7,))
    logits = peaked(t2=9, t7=8, t4=1)
    assert [one_token(made, logits, name).token for _ in range(3)] == [4, 4, EOS]


def test_penalties_act_on_what_was_said() -> None:
    made = sampler()
    presence = open_one(made, 1, presence_penalty=1.5)
    frequency = open_one(made, 2, frequency_penalty=0.6)
    repetition = open_one(made, 3, prompt=(7,), repetition_penalty=2.0)
    logits = peaked(t7=3, t8=2)
    assert [one_token(made, logits, presence).token for _ in range(3)] == [7, 8, 7]
    assert [one_token(made, logits, frequency).token for _ in range(4)] == [7, 7, 8, 7]
    assert one_token(made, logits, repetition).token == 8
    assert one_token(made, torch.full((SIZE,), -1.0) + peaked(t7=0.5), repetition).token not in (7, 8)


def test_logit_bias_forbids_and_forces() -> None:
    made = sampler()
    forbids = open_one(made, 1, logit_bias={7: -100})
    forces = open_one(made, 2, logit_bias={30: 100, 10**6: 5})
    logits = peaked(t7=50, t8=2)
    assert one_token(made, logits, forbids).token == 8
    assert one_token(made, logits, forces).token == 30


def test_log_probabilities_are_those_of_the_model_itself() -> None:
    made = sampler()
    name = open_one(made, temperature=0.0, logit_bias={8: 10}, top_logprobs=2)
    plain = open_one(made, 2, top_logprobs=0)
    logits = peaked(t7=3, t8=2)
    event = one_token(made, logits, name)
    wanted = torch.log_softmax(logits, dim=-1)
    assert event.token == 8
    assert event.logprob == pytest.approx(float(wanted[8]))
    assert [one.token for one in event.top_logprobs] == [7, 8]
    assert [one.logprob for one in event.top_logprobs] == pytest.approx(wanted[[7, 8]].tolist())
    bare = one_token(made, logits, plain)
    assert bare.top_logprobs == ()
    assert bare.logprob == pytest.approx(float(wanted[7]))


def test_the_same_seed_gives_the_same_text_in_any_company() -> None:
    torch.manual_seed(1)
    steps = [torch.randn(6, SIZE) * 2 for _ in range(12)]
    options: dict[str, Any] = {"temperature": 0.9, "top_p": 0.9, "seed": 42}
    alone, crowd = sampler(), sampler()
    name = open_one(alone, 1, **options)
    names = [open_one(crowd, number, temperature=0.3 * number, seed=number, top_k=number) for number in range(6)]
    names[3] = open_one(crowd, 1, **options)
    first = [one_token(alone, logits[3], name).token for logits in steps]
    second = [crowd.sample(logits[[2, 3, 4]], [names[2], names[3], names[4]])[0][1].token for logits in steps]
    assert first == second
    assert len(set(first)) > 3
    late = sampler()
    resumed = open_one(late, 1, **options, generated=tuple(first[:5]))
    assert [one_token(late, logits[3], resumed).token for logits in steps[5:]] == first[5:]


def test_draws_follow_the_distribution() -> None:
    weights = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = torch.full((SIZE,), -math.inf)
    logits[10:14] = weights.log()
    made = sampler()
    name = open_one(made, temperature=1.0, seed=3, max_tokens=10**6)
    counts = torch.zeros(SIZE)
    for _ in range(4000):
        counts[one_token(made, logits, name).token] += 1
    assert (counts[10:14] / 4000 - weights).abs().max() < 0.03
    assert counts.sum() == counts[10:14].sum()


def lowbias32(bits: int) -> int:
    bits = ((bits ^ bits >> 16) * 0x7FEB352D) & 0xFFFFFFFF
    bits = ((bits ^ bits >> 15) * 0x846CA68B) & 0xFFFFFFFF
    return bits ^ bits >> 16


@pytest.mark.parametrize("key", [0, 1, 0x16554D9ECA36314C, 2**64 - 1])
def test_the_noise_of_a_race_is_the_published_hash_and_exponential(key: int) -> None:
    times = exponentials(key, 49152, torch.device("cpu"))
    for token in (0, 1, 77, 49151):
        bits = lowbias32(lowbias32(token ^ key & 0xFFFFFFFF) ^ key >> 32) & 0x7FFFFFFF
        assert float(times[token]) == pytest.approx(-math.log1p(-(bits + 0.5) / 2**31), rel=1e-5, abs=1e-9)
    assert float(times.mean()) == pytest.approx(1.0, abs=0.03)
    assert float((times > 1.0).float().mean()) == pytest.approx(math.exp(-1), abs=0.01)


def test_noise_of_another_batch_changes_no_token_of_a_flat_tail() -> None:
    torch.manual_seed(2)
    logits = torch.randn(49152)
    moved = logits + 1e-5 * torch.randn(49152)
    options = [SamplingOptions(max_tokens=9, temperature=0.8)]
    draws = [draw(logits[None], options, [token_key(5, index)]) for index in range(300)]
    assert draws == [draw(moved[None], options, [token_key(5, index)]) for index in range(300)]


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 2}, {10, 11}),
        ({"top_p": 0.5}, {10}),
        ({"top_p": 0.51}, {10, 11}),
        ({"top_p": 0.85}, {10, 11, 12}),
        ({"min_p": 0.25}, {10, 11, 12}),
        ({"top_k": 3, "top_p": 0.55}, {10, 11}),
        ({"top_k": 1}, {10}),
        ({"top_k": 500}, {10, 11, 12, 13}),
        ({"top_p": 1e-9}, {10}),
    ],
)
def test_filters_keep_the_likeliest(options: dict[str, Any], kept: set[int]) -> None:
    logits = torch.full((SIZE,), -math.inf)
    logits[10:14] = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    made = sampler()
    seen = set()
    for seed in range(300):
        name = open_one(made, seed, temperature=1.0, seed=seed, **options)
        seen.add(one_token(made, logits, name).token)
    assert seen == kept


def test_top_p_of_a_flat_distribution_looks_beyond_the_likeliest() -> None:
    size = 5000
    made = sampler(size)
    logits = torch.linspace(0, -0.001, size)
    tokens = []
    for seed in range(200):
        name = open_one(made, seed, temperature=1.0, seed=seed, top_p=0.8)
        tokens.append(one_token(made, logits, name).token)
    assert 3000 < max(tokens) < 4010


def test_what_ties_with_the_last_kept_token_is_kept() -> None:
    made = sampler()
    seen = set()
    for seed in range(200):
        name = open_one(made, seed, temperature=1.0, seed=seed, top_k=1)
        seen.add(one_token(made, peaked(t7=9, t8=9), name).token)
    assert seen == {7, 8}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_fail_their_sequence_alone(bad: float) -> None:
    made = sampler()
    names = [open_one(made, number, temperature=float(number)) for number in range(3)]
    logits = torch.stack([peaked(t7=3), peaked(t7=3, t9=bad), peaked(t7=50)])
    events, failed = made.sample(logits, names)
    assert failed == [names[1]]
    assert [event.sequence for event in events] == [names[0], names[2]]
    nothing, all_failed = made.sample(torch.full((1, SIZE), -math.inf), names[:1])
    assert (nothing, all_failed) == ([], names[:1])


def test_a_tiny_temperature_is_as_good_as_greedy() -> None:
    made = sampler()
    name = open_one(made, temperature=1e-30, seed=9)
    assert one_token(made, peaked(t7=1, t8=0.9), name).token == 7


def test_closed_sequences_are_forgotten() -> None:
    made = sampler()
    name = open_one(made)
    made.close(name)
    made.close(name)
    assert made.num_open == 0
    assert not made.knows(name)
