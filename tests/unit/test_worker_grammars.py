"""Sampling within a grammar, over a real tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from llguidance import LLMatcher
from tokenizers import Tokenizer

from bench.json_schemas import json_schemas
from molink_common.identity import sequence_id
from molink_common.messages import FinishReason
from molink_common.sampling import SamplingOptions
from molink_common.wire import Opening
from molink_stage_worker.grammars import GrammarFailed, Grammars, Mask
from molink_stage_worker.sampling import Sampler, draw
from tests.integration.test_gateway_pool import make_tokenizer

EOS = 2
WIDTH = 320
"""Of the logits, which are wider than the tokenizer's 300 tokens, as in many models."""
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "s": {"type": "string", "maxLength": 5}},
    "required": ["n", "s"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
OBJECT = LLMatcher.grammar_from_json_schema(SCHEMA)
AB = LLMatcher.grammar_from_regex("a|b")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(place)
    return place


@pytest.fixture(scope="module")
def text_of(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def grammars(folder: Path) -> Grammars:
    return Grammars(lambda: folder, fingerprint="small", eos_token_ids=(EOS,))


@pytest.fixture
def sampler(grammars: Grammars) -> Sampler:
    return Sampler(eos_token_ids=(EOS,), vocabulary_size=WIDTH, grammars=grammars)


def logits_at(place: int) -> torch.Tensor:
    """Something else at each place, and the same each time."""
    return torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(place))


def open_one(sampler: Sampler, number: int, generated: Sequence[int] = (), **options: Any) -> str:
    wanted = SamplingOptions(**{"max_tokens": 100, "grammar": OBJECT, "seed": number, **options})
    name = sequence_id(number)
    sampler.open(Opening(sequence=name, prompt=(5,), generated=tuple(generated), options=wanted))
    return name


def run(
    sampler: Sampler, number: int = 1, generated: Sequence[int] = (), **options: Any
) -> tuple[list[int], FinishReason]:
    """All tokens until the sequence ends."""
    name = open_one(sampler, number, generated, **options)
    tokens = list(generated)
    while True:
        events, failed = sampler.sample(logits_at(len(tokens)), [name])
        assert failed == []
        tokens.append(events[0].token)
        if events[0].finish is not None:
            return tokens, events[0].finish


@pytest.mark.parametrize("number", range(8))
def test_what_is_drawn_at_temperature_1_follows_the_schema(sampler: Sampler, text_of: Tokenizer, number: int) -> None:
    tokens, finish = run(sampler, number)
    assert finish is FinishReason.STOP
    assert tokens[-1] == EOS
    answer = json.loads(text_of.decode(tokens))
    assert set(answer) == {"n", "s"}
    assert 0 <= answer["n"] <= 99
    assert len(answer["s"]) <= 5


def test_noise_drawn_within_a_schema_of_any_shape_is_a_valid_answer(sampler: Sampler, text_of: Tokenizer) -> None:
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    for number, schema in enumerate(json_schemas(25, seed=5)):
        grammar = LLMatcher.grammar_from_json_schema({**schema, "x-guidance": {"whitespace_flexible": False}})
        tokens, finish = run(sampler, number, grammar=grammar, max_tokens=2000)
        assert finish is FinishReason.STOP
        answer = json.loads(text_of.decode(tokens))
        jsonschema.Draft202012Validator(schema, format_checker=checker).validate(answer)


def test_a_sequence_goes_on_as_it_would_have_from_any_place(sampler: Sampler) -> None:
    whole, _ = run(sampler, 3)
    for place in range(1, len(whole)):
        assert run(sampler, 3, whole[:place]) == (whole, FinishReason.STOP)


def test_neighbours_change_nothing(sampler: Sampler) -> None:
    alone, _ = run(sampler, 1)
    names = [open_one(sampler, 1), open_one(sampler, 2, grammar=None), open_one(sampler, 3, grammar=AB)]
    tokens: list[int] = []
    while not tokens or tokens[-1] != EOS:
        rows = logits_at(len(tokens)).repeat(len(names), 1)
        events, failed = sampler.sample(rows, names)
        assert failed == []
        tokens.append(events[0].token)
        names = [event.sequence for event in events if event.finish is None]
    assert tokens == alone


def test_the_end_waits_until_the_grammar_accepts_it(sampler: Sampler) -> None:
    tokens, finish = run(sampler, temperature=0.0, logit_bias={EOS: 100.0})
    assert tokens.count(EOS) == 1
    assert tokens[-1] == EOS
    assert finish is FinishReason.STOP


@pytest.mark.parametrize("options", [{"ignore_eos": True}, {"min_tokens": 90}])
def test_a_grammar_that_is_complete_ends_the_answer_whatever_else_is_wished(
    sampler: Sampler, options: dict[str, Any]
) -> None:
    tokens, finish = run(sampler, grammar=AB, **options)
    assert len(tokens) == 2
    assert (tokens[-1], finish) == (EOS, FinishReason.STOP)


@pytest.mark.parametrize("options", [{"ignore_eos": True}, {"min_tokens": 30}])
def test_an_end_that_is_held_back_is_not_drawn_while_more_may_follow(sampler: Sampler, options: dict[str, Any]) -> None:
    many = LLMatcher.grammar_from_regex("[a-z]*")
    tokens, finish = run(sampler, grammar=many, logit_bias={EOS: 100.0}, max_tokens=40, **options)
    assert EOS not in tokens[:30]
    assert len(tokens) == (40 if "ignore_eos" in options else 31)
    assert finish is (FinishReason.LENGTH if "ignore_eos" in options else FinishReason.STOP)


def test_penalties_filters_and_bias_stay_within_the_grammar(sampler: Sampler, text_of: Tokenizer) -> None:
    hindered: dict[str, Any] = {
        "repetition_penalty": 2.0,
        "frequency_penalty": 2.0,
        "presence_penalty": 2.0,
        "top_k": 1,
        "top_p": 0.1,
    }
    tokens, _ = run(sampler, logit_bias=dict.fromkeys(range(3, WIDTH), -100.0), **hindered)
    assert set(json.loads(text_of.decode(tokens))) == {"n", "s"}


def test_log_probabilities_are_the_models_own(sampler: Sampler) -> None:
    name = open_one(sampler, 1, top_logprobs=3)
    logits = logits_at(0)
    events, _ = sampler.sample(logits, [name])
    expected = torch.log_softmax(logits[0], dim=-1)
    assert events[0].logprob == pytest.approx(float(expected[events[0].token]), abs=1e-5)
    assert [one.token for one in events[0].top_logprobs] == expected.topk(3).indices.tolist()


@pytest.mark.parametrize(
    ("grammar", "generated"), [('{"grammars": 5}', ()), ("start: nothing", ()), (AB, (EOS, EOS)), (AB, (90, 91))]
)
def test_a_grammar_that_fails_ends_its_own_sequence_only(
    sampler: Sampler, grammar: str, generated: tuple[int, ...]
) -> None:
    broken, sound = open_one(sampler, 1, generated, grammar=grammar), open_one(sampler, 2)
    events, failed = sampler.sample(logits_at(0).repeat(2, 1), [broken, sound])
    assert failed == [broken]
    assert [event.sequence for event in events] == [sound]


def test_without_a_tokenizer_only_sequences_with_grammars_fail(tmp_path: Path) -> None:
    empty = Grammars(lambda: tmp_path, fingerprint="none", eos_token_ids=(EOS,))
    for sampler in (
        Sampler(eos_token_ids=(EOS,), vocabulary_size=WIDTH),
        Sampler(eos_token_ids=(EOS,), vocabulary_size=WIDTH, grammars=empty),
    ):
        names = [open_one(sampler, 1), open_one(sampler, 2, grammar=None)]
        events, failed = sampler.sample(logits_at(0).repeat(2, 1), names)
        assert failed == names[:1]
        assert [event.sequence for event in events] == names[1:]


def test_many_sequences_of_many_grammars_at_once(sampler: Sampler, text_of: Tokenizer) -> None:
    words = [f"word{number}" for number in range(20)]  # more than are kept compiled
    names = {
        open_one(sampler, number, grammar=LLMatcher.grammar_from_regex(f"({word})+x")): word
        for number, word in enumerate(words)
    }
    texts: dict[str, list[int]] = {name: [] for name in names}
    running = list(names)
    for place in range(100):
        if not running:
            break
        events, failed = sampler.sample(logits_at(place).repeat(len(running), 1), running)
        assert failed == []
        for event in events:
            texts[event.sequence].append(event.token)
        running = [event.sequence for event in events if event.finish is None]
    for name, word in names.items():
        assert text_of.decode(texts[name]).startswith(word)


def test_a_mask_is_as_wide_as_the_logits(grammars: Grammars, text_of: Tokenizer) -> None:
    mask = grammars.follow(AB, ()).mask()
    allowed = {text_of.encode(letter).ids[0] for letter in "ab"}
    for width in (WIDTH, 300, 301, 1):
        forbidden = mask.forbidden(width, torch.device("cpu"))
        assert forbidden.shape == (width,)
        assert set((~forbidden).nonzero()[:, 0].tolist()) == {token for token in allowed if token < width}
    assert isinstance(mask, Mask)


def test_a_draw_among_few_is_the_draw_among_all(grammars: Grammars) -> None:
    mask = grammars.follow(AB, ()).mask()
    few = mask.few_of(WIDTH, torch.device("cpu"))
    assert few is not None
    assert few.tolist() == (~mask.forbidden(WIDTH, torch.device("cpu"))).nonzero()[:, 0].tolist()
    for key in range(50):
        logits = logits_at(key)
        among_all = logits.masked_fill(mask.forbidden(WIDTH, logits.device), -torch.inf)
        options = [SamplingOptions(max_tokens=1, temperature=1.5, top_p=0.9, top_k=key % 3)]
        assert draw(logits[:, few], options, [key << 20], of=few) == draw(among_all, options, [key << 20])


def test_a_wrong_token_is_heard_of_with_the_next_mask(grammars: Grammars) -> None:
    follower = grammars.follow(AB, ())
    grammars.go_on([(follower, EOS)])
    with pytest.raises(GrammarFailed):
        follower.mask()
