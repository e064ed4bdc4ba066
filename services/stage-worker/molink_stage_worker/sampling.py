"""The tail's sampler: logits to tokens.

The same sequence gives the same token whatever else is in the batch: every reduction runs along the vocabulary
of one row, and the random number is a function of the seed and the token's index (see `noise`).

How a draw works. Every token of the vocabulary runs a race: its time is exponential noise divided by its weight, and
the first one is drawn (Gumbel-max in other words; Efraimidis and Spirakis, 2006). Filters (top-k, top-p, min-p) only
decide a least logit, and tokens that tie with it stay. Another batch or another machine moves logits by about 1e-6,
and with them each runner's time by as much: the winner changes only if two were that close. Looking one random number
up in the cumulative distribution costs less, but there the differences of all tokens add up, and in the tail, where
tokens are thin, they are enough to hit another one.

Shapes: R rows (sequences), G rows of a group, V vocabulary, K likeliest.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from molink_common.logs import get_logger
from molink_common.messages import FinishReason, TokenEvent, TokenLogprob
from molink_common.sampling import SamplingOptions
from molink_common.wire import Opening
from molink_stage_worker.grammars import Follower, Following, GrammarFailed, NoGrammars
from molink_stage_worker.noise import token_key
from molink_stage_worker.race import exponentials

log = get_logger("worker.sampling")

_LIKELIEST = (64, 1024)
"""Top-p is settled among so many tokens if they hold enough of the mass; sorting all of V takes far longer."""


@dataclass(slots=True)
class _State:
    id: str
    options: SamplingOptions
    prompt: tuple[int, ...]
    generated: list[int]
    stops: frozenset[int]
    """Tokens that end the sequence."""
    keeps_counts: bool
    """Whether a penalty needs to know what was generated."""
    bends_logits: bool
    """Whether the logits are changed before a token is chosen (beyond `min_tokens`)."""
    counts: Counter[int] = field(default_factory=Counter)
    """Of generated tokens."""
    prompt_ids: tuple[int, ...] = ()
    """Distinct ones; kept only if the repetition penalty needs them."""
    cached_tokens: int = 0
    """Of the prompt; told with the first token."""

    follower: Follower | None = None
    """If there is a grammar."""

    @property
    def holds_stops_back(self) -> bool:
        if not self.stops:
            return False
        is_too_short = len(self.generated) < self.options.min_tokens
        return is_too_short or (self.follower is not None and self.options.ignore_eos)


class Sampler:
    """Holds what it must know of every open sequence. Calls come from one thread."""

    def __init__(
        self, *, eos_token_ids: Sequence[int], vocabulary_size: int, grammars: Following | None = None
    ) -> None:
        """Without `grammars`, sequences that ask for one fail."""
        self._grammars = grammars or NoGrammars()
        self._eos_token_ids = frozenset(eos_token_ids)
        self._vocabulary_size = vocabulary_size
        self._states: dict[str, _State] = {}

    def open(self, opening: Opening) -> None:
        """Know a sequence, or know it anew."""
        options = opening.options
        penalizes = bool(options.presence_penalty or options.frequency_penalty or options.repetition_penalty != 1.0)
        # the end of a grammar is the end of the answer, whoever ignores what
        follower = None if options.grammar is None else self._grammars.follow(options.grammar, opening.generated)
        ends = follower is not None or not options.ignore_eos
        stops = frozenset(options.stop_token_ids) | (self._eos_token_ids if ends else frozenset())
        self._states[opening.sequence] = _State(
            id=opening.sequence,
            options=options,
            prompt=opening.prompt,
            generated=list(opening.generated),
            stops=frozenset(token for token in stops if 0 <= token < self._vocabulary_size),
            keeps_counts=penalizes,
            bends_logits=penalizes or bool(options.logit_bias),
            counts=Counter(opening.generated) if penalizes else Counter(),
            prompt_ids=tuple(sorted(set(opening.prompt))) if options.repetition_penalty != 1.0 else (),
            cached_tokens=opening.cached_tokens,
            follower=follower,
        )

    def knows(self, sequence: str) -> bool:
        """Whether the sequence is open."""
        return sequence in self._states

    def asked_of_prompt(self, sequence: str) -> tuple[tuple[int, ...], int | None]:
        """The prompt of an open sequence, and its option `prompt_logprobs`."""
        state = self._states[sequence]
        return state.prompt, state.options.prompt_logprobs

    def is_next(self, sequence: str, place: int) -> bool:
        """Whether the token at this place of an open sequence (prompt and answer) is the one to be chosen next."""
        state = self._states[sequence]
        return place == len(state.prompt) + len(state.generated)

    def close(self, sequence: str) -> None:
        """Forget a sequence; an unknown one is ignored."""
        self._states.pop(sequence, None)

    @property
    def num_open(self) -> int:
        """How many sequences are known."""
        return len(self._states)

    @torch.inference_mode()
    def sample(self, logits_RV: torch.Tensor, rows: Sequence[str]) -> tuple[list[TokenEvent], list[str]]:
        """The next token of each sequence, and the sequences that cannot go on because their logits are not finite.

        `rows` names the sequence of each row, every one open and at most once.
        """
        # NaN and +inf win every comparison, and -inf is the largest only if all are: one number tells
        best, choices = _likeliest(logits_RV)
        states = [self._states[name] for name in rows]
        sound = [row for row, value in enumerate(best) if math.isfinite(value)]
        failed = [rows[row] for row in range(len(rows)) if not math.isfinite(best[row])]
        special = [row for row in sound if _needs_work(states[row])]
        # on a CPU one row fits into the cache and a batch of them does not: row by row is several times as fast
        groups = [[row] for row in special] if logits_RV.device.type == "cpu" else [special] if special else []
        for group in groups:
            for row, token in self._choose(logits_RV, states, group):
                if token is None:
                    failed.append(rows[row])
                    sound.remove(row)
                else:
                    choices[row] = token
        # as early as can be: what may come next is worked out while the tokens go round the pipeline
        self._grammars.go_on(
            [
                (follower, choices[row])
                for row in sound
                if (follower := states[row].follower) is not None and choices[row] not in states[row].stops
            ]
        )
        logprobs = self._logprobs(logits_RV, states, [row for row in sound if _wants_logprobs(states[row])], choices)
        return [_advance(states[row], choices[row], logprobs.get(row)) for row in sound], failed

    def _choose(self, logits_RV: torch.Tensor, states: list[_State], rows: list[int]) -> list[tuple[int, int | None]]:
        """Tokens of the rows that need more than the largest raw logit; None where nothing is left to choose."""
        logits_GV = logits_RV[rows].float()  # a copy: the raw logits are still wanted for log probabilities
        few = None
        for place, row in enumerate(rows):
            if (follower := states[row].follower) is not None:
                few = _keep_to_grammar(logits_GV[place], follower, states[row].id)
            if states[row].bends_logits or states[row].holds_stops_back:
                _bend(logits_GV[place], states[row])
        tokens: list[int | None] = [None] * len(rows)
        finite = [place for place, value in enumerate(logits_GV.amax(dim=-1).tolist()) if math.isfinite(value)]
        greedy = [place for place in finite if states[rows[place]].options.is_greedy]
        if greedy:
            for place, token in zip(greedy, logits_GV[greedy].argmax(dim=-1).tolist(), strict=True):
                tokens[place] = token
        drawn = [place for place in finite if not states[rows[place]].options.is_greedy]
        if drawn:
            options = [states[rows[place]].options for place in drawn]
            keys = [token_key(states[rows[place]].options.seed, len(states[rows[place]].generated)) for place in drawn]
            of = few if len(rows) == 1 else None
            picked = logits_GV[:, of] if of is not None else logits_GV if len(drawn) == len(rows) else logits_GV[drawn]
            for place, token in zip(drawn, draw(picked, options, keys, of=of), strict=True):
                tokens[place] = token
        return list(zip(rows, tokens, strict=True))

    def _logprobs(
        self, logits_RV: torch.Tensor, states: list[_State], rows: list[int], choices: list[int]
    ) -> dict[int, tuple[float, tuple[TokenLogprob, ...]]]:
        """Of the model's own distribution: before penalties, bias, temperature and filters."""
        if not rows:
            return {}
        logprobs_GV = torch.log_softmax(logits_RV[rows].float(), dim=-1)
        chosen_G = torch.tensor([choices[row] for row in rows], device=logprobs_GV.device)
        chosen = logprobs_GV.gather(1, chosen_G[:, None])[:, 0].tolist()
        most = max(states[row].options.top_logprobs or 0 for row in rows)
        values, ids = (part.tolist() for part in logprobs_GV.topk(min(most, logprobs_GV.shape[1]), dim=-1))
        return {
            row: (
                chosen[place],
                tuple(
                    TokenLogprob.model_construct(token=token, logprob=_finite(value))
                    for token, value in zip(ids[place], values[place], strict=True)
                )[: states[row].options.top_logprobs],
            )
            for place, row in enumerate(rows)
        }


def draw(
    logits_GV: torch.Tensor,
    options: Sequence[SamplingOptions],
    keys: Sequence[int],
    *,
    of: torch.Tensor | None = None,
) -> list[int]:
    """A token for each row by its temperature, filters and 64-bit key. Each row has a finite maximum.

    `of` names the tokens that the columns stand for, where these are not all; what it leaves out could not win.
    """
    device = logits_GV.device
    temperature_G1 = torch.tensor([[max(one.temperature, 1e-4)] for one in options], device=device)
    best_G1 = logits_GV.amax(dim=-1, keepdim=True)
    scaled_GV = (logits_GV - best_G1).div_(temperature_G1)
    weights_GV = scaled_GV.exp()
    filtered = [place for place, one in enumerate(options) if _filters(one)]
    if filtered:
        least_G1 = torch.full_like(best_G1, -math.inf)
        least_G1[filtered] = _least_kept(scaled_GV[filtered], [options[place] for place in filtered])
        weights_GV.masked_fill_(scaled_GV < least_G1, 0.0)
    # a weight of 0 never wins: its time is infinite, and that of the likeliest token is not
    noise_GV = torch.stack([exponentials(key, logits_GV.shape[1], device, of=of) for key in keys])
    first_G = noise_GV.div_(weights_GV).argmin(dim=-1)
    tokens: list[int] = (first_G if of is None else of[first_G]).tolist()
    return tokens


def _least_kept(scaled_GV: torch.Tensor, options: list[SamplingOptions]) -> torch.Tensor:
    """Per row, the least scaled logit (0 is the largest) that top-k, then top-p, then min-p let pass."""
    least = []
    for scaled_V, one in zip(scaled_GV, options, strict=True):
        floor = math.log(one.min_p) if one.min_p > 0.0 else -math.inf
        top_k_V = scaled_V
        if 0 < one.top_k < scaled_V.shape[0]:
            top_k_V = scaled_V.topk(one.top_k).values
            floor = max(floor, float(top_k_V[-1]))
        if one.top_p < 1.0:
            floor = max(floor, _top_p_floor(top_k_V, one.top_p))
        least.append(floor)
    return torch.tensor(least, device=scaled_GV.device)[:, None]


def _top_p_floor(scaled_V: torch.Tensor, top_p: float) -> float:
    """The scaled logit of the last token that is needed to reach `top_p` of the mass."""
    size = scaled_V.shape[0]
    target = top_p * scaled_V.exp().sum()
    for width in (*(width for width in _LIKELIEST if width < size), size):
        likeliest_K = scaled_V.topk(width).values
        count = int((likeliest_K.exp().cumsum(dim=0) < target).sum())
        if count < width:
            return float(likeliest_K[count])
    return -math.inf


def _bend(logits_V: torch.Tensor, state: _State) -> None:
    """Apply penalties, bias and `min_tokens` to a row, in place."""
    options = state.options
    device, size = logits_V.device, logits_V.shape[0]
    if options.repetition_penalty != 1.0:
        ids = torch.tensor([token for token in {*state.prompt_ids, *state.counts} if token < size], device=device)
        values = logits_V[ids]
        logits_V[ids] = torch.where(
            values > 0, values / options.repetition_penalty, values * options.repetition_penalty
        )
    if state.counts and (options.presence_penalty or options.frequency_penalty):
        ids = torch.tensor(list(state.counts), device=device)
        counts = torch.tensor(list(state.counts.values()), dtype=logits_V.dtype, device=device)
        logits_V[ids] -= options.presence_penalty + options.frequency_penalty * counts
    bias = {token: value for token, value in options.logit_bias.items() if 0 <= token < size}
    if bias:
        logits_V[torch.tensor(list(bias), device=device)] += torch.tensor(list(bias.values()), device=device)
    if state.holds_stops_back:
        stops = torch.tensor(sorted(state.stops), device=device)
        values = logits_V[stops]
        logits_V[stops] = -math.inf
        if state.follower is not None and not math.isfinite(float(logits_V.max())):
            logits_V[stops] = values  # the grammar leaves nothing but the end


def _keep_to_grammar(logits_V: torch.Tensor, follower: Follower, sequence: str) -> torch.Tensor | None:
    """Take what the grammar does not allow out of a row, in place; everything if the grammar has failed.

    Returns the tokens that it allows where they are few.
    """
    try:
        mask = follower.mask()
    except GrammarFailed as error:
        log.warning("a sequence is given up: its grammar failed", sequence=sequence, problem=str(error))
        logits_V.fill_(-math.inf)
        return None
    logits_V.masked_fill_(mask.forbidden(logits_V.shape[0], logits_V.device), -math.inf)
    return mask.few_of(logits_V.shape[0], logits_V.device)


def _likeliest(logits_RV: torch.Tensor) -> tuple[list[float], list[int]]:
    """Each row's largest logit, and the first token that has it."""
    if logits_RV.device.type != "cpu":
        best_R, choice_R = logits_RV.max(dim=-1)
        return best_R.tolist(), choice_R.tolist()
    # torch looks at one number at a time on a CPU: 1.1 ms for 21 rows of 49,152 where numpy takes 0.06
    logits = logits_RV.numpy()
    choices = logits.argmax(axis=-1)
    return logits[np.arange(len(choices)), choices].tolist(), choices.tolist()


def _needs_work(state: _State) -> bool:
    return state.follower is not None or state.bends_logits or not state.options.is_greedy or state.holds_stops_back


def _wants_logprobs(state: _State) -> bool:
    return state.options.top_logprobs is not None


def _filters(options: SamplingOptions) -> bool:
    return options.top_k > 0 or options.top_p < 1.0 or options.min_p > 0.0


def _finite(logprob: float) -> float:
    """JSON has no infinity; the least float32 stands for a token that cannot occur."""
    return max(logprob, -3.4e38)


def _advance(state: _State, token: int, logprob: tuple[float, tuple[TokenLogprob, ...]] | None) -> TokenEvent:
    """Append the token and say so. Built without validation: this runs for every token."""
    index = len(state.generated)
    state.generated.append(token)
    if state.keeps_counts:
        state.counts[token] += 1
    finish = None
    if token in state.stops:
        finish = FinishReason.STOP
    elif index + 1 >= state.options.max_tokens:
        finish = FinishReason.LENGTH
    return TokenEvent.model_construct(
        sequence=state.id,
        index=index,
        token=token,
        finish=finish,
        logprob=None if logprob is None else _finite(logprob[0]),
        top_logprobs=() if logprob is None else logprob[1],
        cached_tokens=None if index else state.cached_tokens,
    )
