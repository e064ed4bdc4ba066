"""A stage of the synthetic 70B: it sleeps as long as a consumer GPU would compute. A part of benchmarks only.

It stands where a loaded model's layers stand, so that batches, frames, links, sampling and recovery are the real ones,
at the real sizes (80 layers, hidden 8192: 16 KiB a token), on a machine that holds no such model. It keeps no keys
and values, and says nothing that means anything: a sequence's tokens are letters that follow from its number and
their positions.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.cost_curve import CostCurve
from molink_common.errors import ProtocolError
from molink_common.messages import Dtype, ModelCard
from molink_common.wire import Entry
from molink_stage_worker.engine.interface import Progress, StageSpec, StepOutput
from molink_stage_worker.models import prepare as prepare_model
from molink_stage_worker.models.cache import Progress as Told
from molink_stage_worker.models.prepare import PreparedModel

NUM_LAYERS = 80
HIDDEN_SIZE = 8192
_KV_SCALARS_A_LAYER = 2 * 8 * 128
_LAYER_PARAMETERS = 2 * HIDDEN_SIZE**2 + 2 * HIDDEN_SIZE * 1024 + 3 * HIDDEN_SIZE * 28672

FIRST_LETTER, NUM_LETTERS = 81, 26
"""``a`` to ``z`` in the demo model's vocabulary: each is a whole character, none ends a text."""
_LOGITS_WIDTH = 128
"""The tail's rows are cut off behind the letters: a row of 49,152 would cost the sampler more than the network does."""
_FIRST_TOKENS = 512
_MOST_LATE_S = 0.0005
_LATE_GAIN = 0.05
_TORCH_DTYPES = {Dtype.FLOAT32: torch.float32, Dtype.BFLOAT16: torch.bfloat16, Dtype.FLOAT16: torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class SyntheticModel:
    """The card of the synthetic 70B, with the tokenizer of a real model."""

    card: ModelCard
    _tokenizer: PreparedModel

    def checkpoint_for(self, _first: int, _last: int, progress: Told) -> Path:
        """There are no tensors to fetch."""
        progress("nothing to fetch", 1.0)
        return self._tokenizer.folder

    def read_file(self, name: str, offset: int, size: int) -> bytes:
        """See `PreparedModel.read_file`."""
        return self._tokenizer.read_file(name, offset, size)


def parameters_per_s(curve: CostCurve) -> float | None:
    """The speed that a worker with this curve offers; None where reading weights takes no time."""
    return _LAYER_PARAMETERS / curve.layer_read_s if curve.layer_read_s else None


def prepare_synthetic(reference: str, cache: Path, told: Told) -> SyntheticModel:
    """The synthetic 70B; `reference` is the model whose tokenizer it speaks with, best the demo model.

    Raises:
        ModelError: that model cannot be had.
    """
    tokenizer = prepare_model(reference, cache=cache, progress=told)
    return SyntheticModel(card=synthetic_card(tokenizer.card), _tokenizer=tokenizer)


def synthetic_card(tokenizer: ModelCard) -> ModelCard:
    """A card with the sizes of Llama-3-70B and the vocabulary of `tokenizer`'s model."""
    return tokenizer.model_copy(
        update={
            "name": "synthetic-70b",
            "aliases": (),
            "fingerprint": f"synthetic-70b-{tokenizer.fingerprint}",
            "num_layers": NUM_LAYERS,
            "hidden_size": HIDDEN_SIZE,
            "checkpoint_dtype": "bfloat16",
            "layer_parameters": (_LAYER_PARAMETERS,) * NUM_LAYERS,
            "embedding_parameters": HIDDEN_SIZE * tokenizer.vocabulary_size,
            "output_parameters": HIDDEN_SIZE * tokenizer.vocabulary_size,
            "kv_scalars_per_token": (_KV_SCALARS_A_LAYER,) * NUM_LAYERS,
        }
    )


class TimedEngine:
    """See `molink_stage_worker.engine.interface.Engine`. Without state but for its buffers."""

    def __init__(self, spec: StageSpec, curve: CostCurve) -> None:
        self._spec = spec
        self._curve = curve
        self._num_layers = spec.last_layer - spec.first_layer
        self._row_bytes = HIDDEN_SIZE * spec.dtype.size_bytes
        self._hidden = memoryview(b"") if spec.is_tail else self._noise(_FIRST_TOKENS)
        self._logits_RV = torch.zeros(0, _LOGITS_WIDTH)
        self._chosen: list[int] = []
        self._late_s = 0.0

    @property
    def hidden_size(self) -> int:
        """H."""
        return HIDDEN_SIZE

    @property
    def weight_bytes(self) -> int:
        """As placement counts it, though nothing is held."""
        return self._num_layers * _LAYER_PARAMETERS * self._spec.dtype.size_bytes

    def reset(self, *, num_blocks: int, block_size: int) -> None:
        """No keys and values are kept."""

    @property
    def can_rewind(self) -> bool:
        """Whatever opens anywhere: nothing depends on what was before."""
        return True

    def run(
        self,
        entries: Sequence[Entry],
        closes: Sequence[int],
        *,
        token_ids: Sequence[int] | None = None,
        hidden: memoryview | None = None,
    ) -> StepOutput:
        """Take as long as the curve says, and give what has the right size. `closes` need no work.

        Raises:
            ProtocolError: what came in is not of the size that the entries announce.
        """
        del closes
        started_s = time.perf_counter()
        tokens = sum(entry.count for entry in entries)
        self._check(tokens, token_ids, hidden)
        context = sum(entry.start + entry.count for entry in entries)
        output = self._output(entries, tokens)
        ends_s = started_s + self._curve.step_s(layers=self._num_layers, tokens=tokens, context_tokens=context)
        self._sleep_until(ends_s)
        return output

    def _sleep_until(self, ends_s: float) -> None:
        """Asks to be woken as much earlier as the system wakes it late on average, so that the curve is met."""
        time.sleep(max(ends_s - self._late_s - time.perf_counter(), 0.0))
        surprise_s = min(max(time.perf_counter() - ends_s, -_MOST_LATE_S), _MOST_LATE_S)
        self._late_s = min(max(self._late_s + _LATE_GAIN * surprise_s, 0.0), _MOST_LATE_S)

    def _check(self, tokens: int, token_ids: Sequence[int] | None, hidden: memoryview | None) -> None:
        if self._spec.is_head:
            if token_ids is None or len(token_ids) != tokens:
                raise ProtocolError(f"{tokens} token ids were announced")
        elif tokens and (hidden is None or hidden.nbytes != tokens * self._row_bytes):
            raise ProtocolError(f"{tokens} hidden states of {self._row_bytes} bytes were announced")

    def _output(self, entries: Sequence[Entry], tokens: int) -> StepOutput:
        if self._spec.is_tail:
            return StepOutput(logits_RV=self._logits(letters(entries)))
        if tokens * self._row_bytes > self._hidden.nbytes:
            self._hidden = self._noise(tokens)
        return StepOutput(hidden=self._hidden[: tokens * self._row_bytes])

    def _logits(self, chosen: list[int]) -> torch.Tensor:
        """One-hot rows in a tensor that is used again and again."""
        if len(chosen) > len(self._logits_RV):
            self._logits_RV = torch.zeros(len(chosen), _LOGITS_WIDTH)
            self._chosen = []
        self._logits_RV[range(len(self._chosen)), self._chosen] = 0.0
        self._logits_RV[range(len(chosen)), chosen] = 1.0
        self._chosen = chosen
        return self._logits_RV[: len(chosen)]

    def _noise(self, tokens: int) -> memoryview:
        """Rows of normally distributed numbers: what a codec makes of them is what it makes of real ones, about."""
        generator = torch.Generator().manual_seed(0)
        scalars = torch.randn(tokens * HIDDEN_SIZE, generator=generator).to(_TORCH_DTYPES[self._spec.dtype])
        return scalars.view(torch.uint8).numpy().data.toreadonly()


def letters(entries: Sequence[Entry]) -> list[int]:
    """The token behind each token of which logits are wanted: a function of sequence and position."""
    chosen: list[int] = []
    for entry in entries:
        seed = entry.sequence * 7
        chosen += [FIRST_LETTER + (seed + position * 11) % NUM_LETTERS for position in entry.places_with_logits]
    return chosen


def load_timed(spec: StageSpec, curve: CostCurve, progress: Progress) -> TimedEngine:
    """An `EngineLoader`, given the curve."""
    engine = TimedEngine(spec, curve)
    progress(1.0)
    return engine
