"""What the tail makes of guesses: one stage that is head and tail, fed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from molink_common.identity import sequence_id
from molink_common.messages import Dtype, FinishReason, LinkCodec, StepTokens
from molink_common.sampling import SamplingOptions
from molink_common.wire import Entry, Extra, Logits, Opening, StepFrame
from molink_stage_worker.codec_choice import CodecChoice
from molink_stage_worker.compute import StageCompute
from molink_stage_worker.engine.interface import StageSpec
from molink_stage_worker.sampling import Sampler
from molink_stage_worker.stage_step import StageStep
from tests.integration.counting_engine import BLOCK, HIDDEN, LAYERS, VOCABULARY, CountingEngine, expected_text

PROMPT = (5, 9, 2)
TEXT = tuple(expected_text(PROMPT, 12))
NAME = sequence_id(1)


class Tail:
    """The whole model, with the prompt computed and the first token chosen."""

    text: list[int]

    def __init__(self, **options: Any) -> None:
        spec = StageSpec(
            checkpoint=Path("/nowhere"), first_layer=0, last_layer=LAYERS, num_layers=LAYERS, dtype=Dtype.FLOAT32,
            device="cpu", num_blocks=16, block_size=BLOCK,
        )  # fmt: skip
        sampler = Sampler(eos_token_ids=(), vocabulary_size=VOCABULARY)
        self._compute = StageCompute(CountingEngine(spec), sampler, codecs=CodecChoice(LinkCodec.RAW))
        self._compute.take_place(0, None)
        self._steps = 0
        opening = Opening(
            sequence=NAME, prompt=PROMPT, options=SamplingOptions(**{"max_tokens": 50, "temperature": 0.0, **options})
        )
        entry = Entry(
            sequence=1, start=0, count=len(PROMPT), opens=True, logits=Logits.LAST, new_blocks=tuple(range(16))
        )
        (first,) = self.run(entry, PROMPT, Extra(opens=(opening,))).events
        self.text = [first.token]

    def run(self, entry: Entry, tokens: tuple[int, ...], extra: Extra) -> StepTokens:
        self._steps += 1
        frame = StepFrame(
            pipeline=1, epoch=1, step=self._steps, entries=(entry,), extra=extra.encode(), hidden_size=HIDDEN,
            dtype=Dtype.FLOAT32, hidden=memoryview(b""),
        )  # fmt: skip
        (result,) = self._compute.run([StageStep(frame=frame, extra=extra, token_ids=tokens, ready_ns=0)])
        self.problem = result.problem
        assert result.tokens is not None
        return result.tokens

    def verify(self, guesses: tuple[int, ...], named: tuple[int, ...] | None = None) -> StepTokens:
        """The newest token with guesses behind it."""
        tokens = (self.text[-1], *guesses)
        start = len(PROMPT) + len(self.text) - 1
        entry = Entry(sequence=1, start=start, count=len(tokens), logits=Logits.DRAFTS)
        found = self.run(entry, tokens, Extra(drafts={NAME: guesses if named is None else named}))
        self.text += told(found)
        return found


def told(tokens: StepTokens) -> list[int]:
    return [event.token for event in tokens.events]


@pytest.mark.parametrize("right", range(5))
def test_as_many_tokens_come_as_guesses_were_right_and_one_more(right: int) -> None:
    tail = Tail()
    wrong = (VOCABULARY - 1,) * (4 - right)
    found = tail.verify((*TEXT[1 : 1 + right], *wrong))
    assert told(found) == list(TEXT[1 : 2 + right])
    assert [event.index for event in found.events] == list(range(1, 2 + right))
    assert told(tail.verify(TEXT[2 + right : 4 + right])) == list(TEXT[2 + right : 5 + right]), "it goes on behind them"


def test_what_ends_the_answer_ends_the_guesses() -> None:
    found = Tail(max_tokens=3).verify(TEXT[1:6])
    assert told(found) == list(TEXT[1:3])
    assert found.events[-1].finish is FinishReason.LENGTH
    stop = next(token for token in TEXT[2:] if token not in TEXT[:2])
    found = Tail(stop_token_ids=(stop,)).verify(TEXT[1:8])
    assert told(found) == list(TEXT[1 : TEXT.index(stop) + 1])
    assert found.events[-1].finish is FinishReason.STOP


def test_penalties_and_log_probabilities_are_those_of_one_token_after_the_other() -> None:
    options = {"frequency_penalty": 2.0, "top_logprobs": 2, "temperature": 1.0, "seed": 3}
    one_by_one, at_once = Tail(**options), Tail(**options)
    slow = [event for _ in range(4) for event in one_by_one.verify(()).events]
    assert at_once.text == one_by_one.text[:1] != [TEXT[0]], "the options change the text"
    assert at_once.verify(tuple(one_by_one.text[1:4])).events == tuple(slow)


@pytest.mark.parametrize("named", [(), TEXT[1:2], TEXT[1:5]])
def test_guesses_that_do_not_fit_their_entry_empty_the_step(named: tuple[int, ...]) -> None:
    tail = Tail()
    found = tail.verify(TEXT[1:4], named=named)
    assert found.events == ()
    assert "guesses" in tail.problem
