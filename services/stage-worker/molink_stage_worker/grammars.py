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
_LIMITS = LLParserLimits(max_lexer_states=25_000, verbose_errors=False)
"""Wider than the gateway's: what compiled there compiles here. A state of the lexer takes up to 2 KB."""


class GrammarFailed(MolinkError):
    """A sequence's grammar cannot be followed any further."""


@dataclass(frozen=True, slots=True)
class Mask:
    """Which tokens may come next: bit t of the packed bytes, the least significant bit first."""

    packed: np.ndarray[tuple[int], np.dtype[np.uint8]]

    def forbidden(self, vocabulary_size: int, device: torch.device) -> torch.Tensor:
        """Of each token of the logits, whether it may not come. Logits may be wider than the tokenizer knows."""
        allowed_V = np.zeros(vocabulary_size, dtype=np.uint8)
        bits = np.unpackbits(self.packed, count=min(self.packed.size * 8, vocabulary_size), bitorder="little")
        allowed_V[: bits.size] = bits
        return torch.from_numpy(allowed_V == 0).to(device)


class Follower(Protocol):
    """One sequence's way through its grammar."""

    def mask(self) -> Mask:
        """Which tokens may come next; waits for it. Of end-of-text tokens, all or none.

        Raises:
            GrammarFailed: the grammar cannot be followed any further.
        """

    def took(self, token: int) -> None:
        """The sequence goes on with `token`. Returns at once."""


Follow = Callable[[str, Sequence[int]], Follower]
"""Begins to follow a grammar, from behind the tokens that were generated already. Returns at once."""


def follow_nothing(_grammar: str, _generated: Sequence[int]) -> Follower:
    """A `Follow` for where there is no tokenizer: whoever asks for a grammar fails."""
    return _Unfollowed()


class _Unfollowed:
    def mask(self) -> Mask:
        raise GrammarFailed("this stage follows no grammars")

    def took(self, token: int) -> None:
        pass


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
        """See `Follow`."""
        return _Following(self._threads, partial(self._begin, grammar, list(generated)))

    def _begin(self, grammar: str, generated: list[int]) -> LLMatcher:
        matcher = self._fresh(grammar)
        if generated:
            matcher.consume_tokens(generated)
        return matcher

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


class _Following:
    """A `Follower` whose matcher is touched by one job at a time: each begins where the one before has ended."""

    def __init__(self, threads: ThreadPoolExecutor, begin: Callable[[], LLMatcher]) -> None:
        self._threads = threads
        self._next: Future[tuple[LLMatcher, Mask]] = threads.submit(lambda: _masked(begin()))

    def mask(self) -> Mask:
        """See `Follower.mask`."""
        return self._outcome()[1]

    def took(self, token: int) -> None:
        """See `Follower.took`."""
        matcher = self._outcome()[0]
        self._next = self._threads.submit(_after, matcher, token)

    def _outcome(self) -> tuple[LLMatcher, Mask]:
        try:
            error = self._next.exception(_LONGEST_WAIT_S)
        except TimeoutError as late:
            raise GrammarFailed(f"what may come next was not known after {_LONGEST_WAIT_S} s") from late
        if error is None:
            return self._next.result()
        if isinstance(error, GrammarFailed):
            raise error
        raise GrammarFailed(f"{type(error).__name__}: {error}") from error  # the library's own mistakes, too


def _after(matcher: LLMatcher, token: int) -> tuple[LLMatcher, Mask]:
    matcher.consume_token(token)
    return _masked(matcher)


def _masked(matcher: LLMatcher) -> tuple[LLMatcher, Mask]:
    packed = matcher.compute_bitmask() if not matcher.is_error() else b""
    if matcher.is_error():
        raise GrammarFailed(matcher.get_error().strip().splitlines()[0][:300])
    return matcher, Mask(np.frombuffer(packed, dtype=np.uint8))


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
