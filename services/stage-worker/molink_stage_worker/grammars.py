"""Grammars at the tail: which tokens may come next.

A grammar is compiled over the model's own tokenizer. As soon as a sequence's token is known, what may follow it is
worked out in a thread beside the pipeline; when the next logits arrive, the answer is there already, as a rule.

The answer depends on the grammar and the tokens so far alone: a sequence that opens anew with what it has generated,
after a loss or a preemption, goes on as if nothing had been.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from molink_common.deep_stack import call_on_deep_stack
from molink_common.errors import MolinkError
from molink_common.logs import get_logger

log = get_logger("worker.grammars")

_THREADS = 2
_LONGEST_WAIT_S = 8.0
"""For what comes next: the first time, for the tokenizer too. A pass that takes ten seconds passes for a fault."""
_COMPILED_KEPT = 8
_FEW = 4
"""Of the vocabulary, the share that makes a draw among few."""
_LIMITS = LLParserLimits(max_lexer_states=25_000, verbose_errors=False)
"""Wider than the gateway's: what compiled there compiles here. A state of the lexer takes up to 2 KB."""


class GrammarFailed(MolinkError):
    """A sequence's grammar cannot be followed any further."""


@dataclass(frozen=True, slots=True)
class Mask:
    """Which tokens may come next."""

    allowed: np.ndarray[tuple[int], np.dtype[np.bool_]]
    """Of each token that the tokenizer knows."""
    few: np.ndarray[tuple[int], np.dtype[np.int64]] | None
    """The tokens that may come, in rising order, where they are few."""

    @classmethod
    def of(cls, packed: bytes) -> Mask:
        """Bit t stands for token t, the least significant bit of a byte first."""
        allowed = np.unpackbits(np.frombuffer(packed, dtype=np.uint8), bitorder="little").view(np.bool_)
        is_few = np.count_nonzero(allowed) * _FEW < allowed.size
        return cls(allowed, np.flatnonzero(allowed) if is_few else None)

    def forbidden(self, vocabulary_size: int, device: torch.device) -> torch.Tensor:
        """Of each token of the logits, whether it may not come. Logits may be wider than the tokenizer knows."""
        forbidden_V = np.ones(vocabulary_size, dtype=np.bool_)
        np.logical_not(self.allowed[:vocabulary_size], out=forbidden_V[: self.allowed.size])
        return torch.from_numpy(forbidden_V).to(device)

    def few_of(self, vocabulary_size: int, device: torch.device) -> torch.Tensor | None:
        """The tokens of the logits that may come, where they are few: a draw among them takes less."""
        if self.few is None:
            return None
        return torch.from_numpy(self.few[: np.searchsorted(self.few, vocabulary_size)]).to(device)


class Follower(Protocol):
    """One sequence's way through its grammar."""

    def mask(self) -> Mask:
        """Which tokens may come next; waits for it.

        Raises:
            GrammarFailed: the grammar cannot be followed any further.
        """


Took = tuple[Follower, int]
"""A sequence goes on with a token that its mask allows."""


class Following(Protocol):
    """What follows grammars for a sampler. Its calls return at once."""

    def follow(self, grammar: str, generated: Sequence[int]) -> Follower:
        """Begin behind the tokens that were generated already."""

    def go_on(self, tooks: Sequence[Took]) -> None:
        """Work out what may come next, for all sequences of a step."""


class NoGrammars:
    """For where there is no tokenizer: whoever asks for a grammar fails."""

    def follow(self, _grammar: str, _generated: Sequence[int]) -> Follower:
        """See `Following.follow`."""
        way = _Way()
        way.next.set_exception(GrammarFailed("this stage follows no grammars"))
        return way

    def go_on(self, tooks: Sequence[Took]) -> None:
        """Nothing goes on."""


class Grammars:
    """Follows the grammars of one model's sequences.

    Nothing is loaded before the first grammar. Threads end with the last reference to this.
    """

    def __init__(self, folder: Callable[[], Path], *, fingerprint: str, eos_token_ids: Sequence[int]) -> None:
        """`folder` gives the model's folder with its tokenizer; it may take its time."""
        self._folder = folder
        self._fingerprint = fingerprint
        self._eos_token_ids = tuple(eos_token_ids)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="grammar")
        self._lock = threading.Lock()
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        """As they begin; copies share what their lexer has found out."""

    def follow(self, grammar: str, generated: Sequence[int]) -> Follower:
        """See `Following.follow`."""
        way = _Way()
        self._threads.submit(_settle, way.next, lambda: _after(self._fresh(grammar), list(generated)))
        return way

    def go_on(self, tooks: Sequence[Took]) -> None:
        """See `Following.go_on`. One job for all: waking a thread takes longer than most masks."""
        jobs = [way.taken(token) for way, token in tooks if isinstance(way, _Way)]
        if jobs:
            self._threads.submit(_go_on, jobs)

    def _fresh(self, grammar: str) -> LLMatcher:
        with self._lock:  # the others wait for the same tokenizer, and mostly for the same grammar
            made = self._compiled.pop(grammar, None)
            if made is None:
                tokenizer = _tokenizer_of(self._folder, self._fingerprint, self._eos_token_ids)
                made = call_on_deep_stack(lambda: LLMatcher(tokenizer, grammar, log_level=0, limits=_LIMITS))
                if made.is_error():
                    return made
            self._compiled[grammar] = made
            if len(self._compiled) > _COMPILED_KEPT:
                self._compiled.popitem(last=False)
            return made.deep_copy()


_Place = tuple[LLMatcher, Mask]
_Job = tuple["Future[_Place]", LLMatcher, int]


class _Way:
    """A `Follower` whose matcher is touched by one job at a time: each begins where the one before has ended."""

    def __init__(self) -> None:
        self.next: Future[_Place] = Future()

    def mask(self) -> Mask:
        """See `Follower.mask`."""
        return self._place()[1]

    def taken(self, token: int) -> _Job:
        """What is to be done next."""
        matcher = self._place()[0]
        self.next = Future()
        return self.next, matcher, token

    def _place(self) -> _Place:
        try:
            error = self.next.exception(_LONGEST_WAIT_S)
        except TimeoutError as late:
            raise GrammarFailed(f"what may come next was not known after {_LONGEST_WAIT_S} s") from late
        if error is None:
            return self.next.result()
        if isinstance(error, GrammarFailed):
            raise error
        raise GrammarFailed(f"{type(error).__name__}: {error}") from error  # the library's own mistakes, too


def _go_on(jobs: Sequence[_Job]) -> None:
    for next_place, matcher, token in jobs:
        _settle(next_place, partial(_after, matcher, [token]))


def _settle(place: Future[_Place], work: Callable[[], _Place]) -> None:
    try:
        place.set_result(work())
    except BaseException as error:  # for the sampler, which waits for it
        place.set_exception(error)


def _after(matcher: LLMatcher, tokens: list[int]) -> _Place:
    if tokens:
        matcher.consume_tokens(tokens)
    packed = matcher.compute_bitmask() if not matcher.is_error() else b""
    if matcher.is_error():
        raise GrammarFailed(matcher.get_error().strip().splitlines()[0][:300])
    return matcher, Mask.of(packed)


@lru_cache(maxsize=2)
def _loaded(folder: Path, _fingerprint: str, eos_token_ids: tuple[int, ...]) -> LLTokenizer:
    """One model's tokenizer with its tree of tokens: some ten MB, about a second. Stages of the same model share it."""
    from llguidance.hf import from_tokenizer  # noqa: PLC0415  loading takes a while, and few need it
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: PLC0415

    # as the gateway loads it, so that both mean the same tokens
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, OSError, ImportError):
        if not (folder / "tokenizer.json").is_file():
            raise
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    return from_tokenizer(tokenizer, eos_token=list(eos_token_ids) or None)


def _tokenizer_of(folder: Callable[[], Path], fingerprint: str, eos_token_ids: tuple[int, ...]) -> LLTokenizer:
    try:
        return _loaded(folder(), fingerprint, eos_token_ids)
    except Exception as error:  # many libraries read a tokenizer's files, each with errors of its own
        log.error("no grammar can be followed", problem=str(error))
        raise GrammarFailed(f"the model's tokenizer does not serve grammars: {error}") from error
