"""Log probabilities of a prompt's own tokens, out of the logits of the places before them. Pure.

They are of the model's own distribution, before any sampling option, in float32, and do not depend on how the prompt
was cut into chunks: every reduction runs along the vocabulary of one row.

Shapes: R rows (tokens of a chunk), B rows of a block, V vocabulary, K likeliest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from molink_common.messages import PromptLogprobs, TokenLogprob

_BLOCK_ROWS = 16
"""At a time: the distributions of a whole chunk of a large vocabulary would take as much memory again as its logits."""
_LEAST_LOGPROB = -3.4e38
"""JSON has no infinity; the least float32 stands for a token that cannot occur."""


def told_by(
    logits_RV: torch.Tensor, *, sequence: str, prompt: Sequence[int], start: int, likeliest: int
) -> PromptLogprobs | None:
    """What the logits of a chunk that begins at place `start` tell of the prompt's tokens behind it.

    Row r speaks of the token at ``start + r + 1``; rows from the prompt's last token on speak of the answer and are
    left out. None: logits are not finite.
    """
    tokens = prompt[start + 1 : start + 1 + logits_RV.shape[0]]
    logprobs: list[float] = []
    ranks: list[int] = []
    places: list[tuple[TokenLogprob, ...]] = []
    for at in range(0, len(tokens), _BLOCK_ROWS):
        own = tokens[at : at + _BLOCK_ROWS]
        logits_BV = logits_RV[at : at + len(own)].float()
        # NaN and +inf win every comparison, and -inf is the largest only if all are
        if not bool(torch.isfinite(logits_BV.amax(dim=-1)).all()):
            return None
        logprobs_BV = torch.log_softmax(logits_BV, dim=-1)
        own_B1 = logprobs_BV.gather(1, torch.tensor(own, device=logprobs_BV.device)[:, None])
        logprobs += own_B1[:, 0].clamp(min=_LEAST_LOGPROB).tolist()
        ranks += (logprobs_BV > own_B1).sum(dim=-1).add(1).tolist()
        best_BK = logprobs_BV.topk(min(likeliest, logprobs_BV.shape[1]), dim=-1)
        values, ids = best_BK.values.clamp(min=_LEAST_LOGPROB).tolist(), best_BK.indices.tolist()
        # built without validation: there are many, and every value is our own
        places += [
            tuple(map(_token_logprob, place_ids, place_values))
            for place_ids, place_values in zip(ids, values, strict=True)
        ]
    return PromptLogprobs.model_construct(
        sequence=sequence, start=start + 1, logprobs=tuple(logprobs), ranks=tuple(ranks), likeliest=tuple(places)
    )


def _token_logprob(token: int, logprob: float) -> TokenLogprob:
    return TokenLogprob.model_construct(token=token, logprob=logprob)
