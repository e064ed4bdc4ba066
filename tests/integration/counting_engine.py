"""An engine that fits on a screen: any step that is lost, doubled or out of order changes its text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
    """A token's hidden state is (token, number of layers passed, position, 0).

    The tail's favourite after a token at a position is (sum of the sequence's tokens up to there) mod V: a step
    that is lost, doubled or out of order anywhere changes every token after it.
    """

    def __init__(self, spec: StageSpec) -> None:
        self.spec = spec
        self.known: dict[int, list[int]] = {}
        self.tables: dict[int, list[int]] = {}
        self.fail_with: Exception | None = None

    @property
    def hidden_size(self) -> int:
        return HIDDEN

    @property
    def weight_bytes(self) -> int:
        return 1

    def reset(self, *, num_blocks: int, block_size: int) -> None:
        assert num_blocks > 0
        assert block_size == BLOCK
        self.known, self.tables = {}, {}

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
        hidden_TH = torch.zeros(total, HIDDEN)
        if token_ids is not None:
            assert self.spec.is_head
            hidden_TH[:, 0] = torch.tensor(token_ids)
        elif total:
            assert hidden is not None
            hidden_TH = torch.frombuffer(bytearray(hidden), dtype=torch.float32).reshape(total, HIDDEN)
        hidden_TH[:, 1] += self.spec.last_layer - self.spec.first_layer
        logits: list[torch.Tensor] = []
        at = 0
        for entry in entries:
            if entry.opens:
                self.known[entry.sequence], self.tables[entry.sequence] = [], []
            if entry.sequence not in self.known or entry.start != len(self.known[entry.sequence]):
                raise ProtocolError("not where the sequence goes on")
            tokens, table = self.known[entry.sequence], self.tables[entry.sequence]
            table.extend(entry.new_blocks)
            tokens.extend(int(token) for token in hidden_TH[at : at + entry.count, 0])
            at += entry.count
            assert len(table) * BLOCK >= len(tokens), "tokens without a block"
            if entry.logits is not Logits.NONE:
                row = torch.zeros(VOCABULARY)
                row[expected_token(tokens)] = 5.0
                logits.append(row)
        owners = [block for table in self.tables.values() for block in table]
        assert len(owners) == len(set(owners)), "two sequences in one block"
        if self.spec.is_tail:
            assert total == 0 or bool((hidden_TH[:, 1] == LAYERS).all()), "a layer was left out or run twice"
            return StepOutput(logits_RV=torch.stack(logits) if logits else torch.empty(0, VOCABULARY))
        return StepOutput(hidden=memoryview(hidden_TH.numpy().tobytes()) if total else memoryview(b""))


def expected_token(tokens: Sequence[int]) -> int:
    return sum(tokens) % VOCABULARY


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
