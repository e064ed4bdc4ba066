"""An engine that fits on a screen: any step that is lost, doubled or out of order changes its text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from molink_common.errors import ModelError, ProtocolError
from molink_common.messages import ModelCard
from molink_common.wire import Entry, Logits
from molink_stage_worker.engine.interface import StageSpec, StepOutput
from molink_stage_worker.stage_loading import Told

VOCABULARY = 97
HIDDEN = 4
LAYERS = 6
BLOCK = 4


class CountingEngine:
    """A token's hidden state is (token, number of layers passed, position, checksum of the text up to there).

    Of each position the KV block holds (token, position, checksum). The tail's favourite after a token at a position
    comes from the sum of the sequence's tokens up to there, read out of the blocks: a step that is lost, doubled or out
    of order anywhere, and a block that holds another text or that nobody has filled, changes every token after it.
    """

    def __init__(self, spec: StageSpec, *, can_rewind: bool = True, loses_closes: bool = False) -> None:
        """`loses_closes`: a sequence may be known here for a while after another has got its blocks."""
        self.spec = spec
        self.loses_closes = loses_closes
        self.can_rewind = can_rewind
        self.known: dict[int, int] = {}
        """By sequence, how many tokens are in its blocks."""
        self.guessed: dict[int, int] = {}
        """Of these, the ones that may have been guessed wrongly."""
        self.tables: dict[int, list[int]] = {}
        self.memory = np.full((spec.num_blocks * BLOCK, 3), -1, np.int64)
        self.computed: Counter[int] = Counter()
        """Tokens, by sequence."""
        self.fail_with: Exception | None = None

    @property
    def hidden_size(self) -> int:
        return HIDDEN

    @property
    def weight_bytes(self) -> int:
        return 1

    def reset(self, *, num_blocks: int, block_size: int) -> None:
        assert block_size == BLOCK
        self.known, self.tables = {}, {}
        self.memory = np.full((num_blocks * BLOCK, 3), -1, np.int64)

    def run(
        self,
        entries: Sequence[Entry],
        closes: Sequence[int],
        *,
        token_ids: Sequence[int] | None = None,
        hidden: memoryview | None = None,
    ) -> StepOutput:
        if self.fail_with is not None:
            raise self.fail_with
        for sequence in closes:
            self.known.pop(sequence, None)
            self.tables.pop(sequence, None)
        total = sum(entry.count for entry in entries)
        hidden_TH = np.zeros((total, HIDDEN), np.float32)
        if token_ids is not None:
            assert self.spec.is_head
            hidden_TH[:, 0] = token_ids
            hidden_TH[:, 2] = [entry.start + at for entry in entries for at in range(entry.count)]
        elif total:
            assert hidden is not None
            hidden_TH = np.frombuffer(hidden, np.float32).reshape(total, HIDDEN).copy()
        hidden_TH[:, 1] += self.spec.last_layer - self.spec.first_layer
        logits: list[torch.Tensor] = []
        row = 0
        for entry in entries:
            if entry.opens and (entry.start == 0 or self.can_rewind):
                self.known[entry.sequence], self.tables[entry.sequence] = entry.start, []
                self.guessed[entry.sequence] = 0
            known = self.known.get(entry.sequence, -1)
            if not known - self.guessed.get(entry.sequence, 0) <= entry.start <= known:
                raise ProtocolError("not where the sequence goes on")
            self.guessed[entry.sequence] = entry.count - 1 if entry.logits is Logits.DRAFTS else 0
            table = self.tables[entry.sequence]
            table.extend(entry.new_blocks)
            end = self.known[entry.sequence] = entry.start + entry.count
            assert len(table) * BLOCK >= end, "tokens without a block"
            slots = [block * BLOCK + at for block in table for at in range(BLOCK)][:end]
            rows = hidden_TH[row : row + entry.count]
            assert rows[:, 2].tolist() == list(range(entry.start, end)), "hidden states of other positions"
            if not self.loses_closes:
                written = table[entry.start // BLOCK : (end - 1) // BLOCK + 1]
                others = [one for name, one in self.tables.items() if name != entry.sequence]
                assert not any(set(written) & set(one) for one in others), "it writes to a block of another"
            if token_ids is not None:
                before = int(self.memory[slots[entry.start - 1], 2]) if entry.start else 0
                rows[:, 3] = checksums(rows[:, 0].astype(int).tolist(), before)
            self.memory[slots[entry.start :]] = rows[:, [0, 2, 3]]
            self.computed[entry.sequence] += entry.count
            row += entry.count
            seen = self.memory[slots]
            assert seen[:, 1].tolist() == list(range(end)), "a position that nobody has filled"
            assert seen[:, 2].tolist() == checksums(seen[:, 0].tolist()), "a block that holds another text"
            for place in entry.places_with_logits:
                logits_V = torch.zeros(VOCABULARY)
                logits_V[expected_token(seen[: place + 1, 0].tolist())] = 5.0
                logits.append(logits_V)
        if self.spec.is_tail:
            assert total == 0 or bool((hidden_TH[:, 1] == LAYERS).all()), "a layer was left out or run twice"
            return StepOutput(logits_RV=torch.stack(logits) if logits else torch.empty(0, VOCABULARY))
        return StepOutput(hidden=memoryview(hidden_TH.tobytes()))


def checksums(tokens: Sequence[int], before: int = 0) -> list[int]:
    """Of the text up to each of the tokens."""
    sums: list[int] = []
    for token in tokens:
        before = (before * 31 + token + 1) % 65521
        sums.append(before)
    return sums


def expected_token(tokens: Sequence[int]) -> int:
    """Mostly one of three, so that what comes next can be guessed now and then."""
    total = sum(tokens)
    return 1 + total % 3 if total % 4 else total % VOCABULARY


def expected_text(prompt: Sequence[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(expected_token(tokens))
    return tokens[len(prompt) :]


CARD = ModelCard(
    name="counting",
    fingerprint="f" * 16,
    family="counting",
    packed=True,
    num_layers=LAYERS,
    hidden_size=HIDDEN,
    vocabulary_size=VOCABULARY,
    context_length=512,
    checkpoint_dtype="float32",
    layer_parameters=(1,) * LAYERS,
    embedding_parameters=1,
    output_parameters=1,
    kv_scalars_per_token=(1,) * LAYERS,
)


@dataclass
class CountingModel:
    card: ModelCard = CARD

    def checkpoint_for(self, _first: int, _last: int, progress: Told) -> Path:
        progress("nothing to fetch", 1.0)
        return Path("/nowhere")

    def read_file(self, name: str, offset: int, size: int) -> bytes:
        if name != "tokenizer.json":
            raise ModelError(f"{name} is not handed out")
        return b"0123456789"[offset : offset + size]
