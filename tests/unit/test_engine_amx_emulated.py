"""The loops for AMX tiles compute what they should, on any processor: tiles are emulated, the loops are the real ones.

What is left to a processor with tiles is the instructions themselves (`test_engine_bf16` runs there as everywhere).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from molink_stage_worker.engine import amx_attention, amx_products, amx_tiles, bf16_attention, bf16_unit
from molink_stage_worker.engine.product_ends import Then

NO_BIAS = np.empty(0, np.float32)
WORDS = 16
"""Of a row of a tile."""


class Tiles:
    """Eight tiles as `amx_tiles.configuration` lays them out: 0 to 3 sums, 4 and 5 activations, 6 and 7 weights."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.sums = np.zeros((4, amx_tiles.ROWS, WORDS), np.float32)
        self.loaded: dict[int, Any] = {}

    def lines(self, array: Any, place: int, row_bytes: int, rows: int) -> Any:
        """Views of rows of 64 bytes, from an element on."""
        memory = array.reshape(-1).view(np.uint8)
        begins = [place * array.itemsize + row * row_bytes for row in range(rows)]
        assert begins[-1] + amx_tiles.ROW_BYTES <= memory.size, "a tile reaches over the end"
        return [memory[begin : begin + amx_tiles.ROW_BYTES] for begin in begins]

    def put_into(self, patch: pytest.MonkeyPatch) -> None:
        """Have the loops of `amx_products` use these tiles."""
        for number in range(4):
            patch.setattr(amx_products, f"clear_{number}", partial(self.sums[number].fill, 0))
            patch.setattr(amx_products, f"store_{number}", partial(self.store, number))
            patch.setattr(amx_products, f"load_{number + 4}", partial(self.load, number + 4))
        for numbers in ((0, 4, 6), (1, 4, 7), (2, 4, 6), (3, 4, 7), (2, 5, 6), (3, 5, 7)):
            patch.setattr(amx_products, "add_{}_of_{}_{}".format(*numbers), partial(self.add, *numbers))
        patch.setattr(amx_products, "configure", lambda _configuration: None)
        patch.setattr(amx_products, "release", lambda: None)

    def load(self, number: int, array: Any, place: int, row_bytes: int) -> None:
        rows = self.num_rows if number < 6 else amx_tiles.ROWS
        numbers = [line.view(np.uint16).copy() for line in self.lines(array, place, row_bytes, rows)]
        self.loaded[number] = (np.array(numbers).astype(np.uint32) << 16).view(np.float32)

    def add(self, number: int, activations: int, weights: int) -> None:
        x_RD = self.loaded[activations]
        w_PWN = self.loaded[weights].reshape(amx_tiles.ROWS, WORDS, 2)  # pairs of inputs, outputs, the two
        w_DW = w_PWN.transpose(0, 2, 1).reshape(amx_tiles.DEPTH, WORDS)
        with np.errstate(all="ignore"):  # there may be anything behind the last stretch
            self.sums[number, : self.num_rows] += x_RD @ w_DW

    def store(self, number: int, array: Any, place: int, row_bytes: int) -> None:
        for line, row in zip(self.lines(array, place, row_bytes, self.num_rows), self.sums[number], strict=False):
            line[:] = row.view(np.uint8)


def bits(tensor: torch.Tensor) -> Any:
    return tensor.contiguous().view(torch.uint16).numpy().reshape(-1)


@pytest.mark.parametrize("rows", [1, 5, 16, 17, 33, 48, 70])
def test_a_product(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(rows)
    outputs, inputs = 3 * amx_tiles.BLOCK, 64
    weight, x, other = (torch.randn(shape).bfloat16() for shape in ((outputs, inputs), (rows, inputs), (rows, outputs)))
    monkeypatch.setattr(bf16_unit, "BLOCK", amx_tiles.BLOCK)
    numbers = bf16_unit.in_blocks(weight).numpy()
    Tiles(min(rows, amx_tiles.ROWS)).put_into(monkeypatch)
    out = np.zeros(rows * outputs, np.uint16)
    run = amx_products._of_16 if rows <= amx_tiles.ROWS else amx_products._of_more
    configuration = amx_tiles.configuration(min(rows, amx_tiles.ROWS))
    run.py_func(configuration, bits(x), numbers, NO_BIAS, int(Then.PLUS), bits(other), out, rows, inputs, outputs)
    exact = x.double() @ weight.double().T + other.double()
    found = torch.from_numpy(out).view(torch.bfloat16).reshape(rows, outputs)
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("num_stretches", [1, 2, 5])
@pytest.mark.parametrize("num_rows", [1, 3, 16])
@pytest.mark.parametrize("size", [32, 96])
def test_scores_and_sums_of_a_head(
    num_stretches: int, num_rows: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(size + num_stretches)
    key_heads, num_slots, num_keys, head = 2, 160, 16 * num_stretches, 1
    slots_N = torch.randperm(num_slots // 16)[:num_stretches].numpy() * 16
    places = (slots_N[:, None] + np.arange(16)).reshape(-1)
    keys_TKD, values_TKD = (torch.randn(num_keys, key_heads, size).bfloat16() for _ in "kv")
    queries_RD, shares_RS = torch.randn(num_rows, size).bfloat16(), torch.rand(num_rows, num_keys).bfloat16()
    # into the store, as a step does it
    stored = [np.zeros((key_heads, num_slots, size), np.uint16) for _ in "kv"]
    rows_TW = torch.cat([part.reshape(num_keys, -1) for part in (keys_TKD, keys_TKD, values_TKD)], dim=1)
    bf16_attention.store(bits(rows_TW).reshape(num_keys, -1), places, *stored)
    # as attention sees it: room for four stretches at a time
    keys, values = (one.reshape(-1) for one in stored)
    copies = amx_attention.copies_of(-(-num_keys // 64) * 64, size)
    seen = (keys, values, slots_N * size, head * num_slots * size, 0, 0, 0, *copies)
    amx_attention.make_ready(seen, num_stretches, size)
    Tiles(num_rows).put_into(monkeypatch)
    monkeypatch.setattr(amx_products, "score", amx_products.score.py_func)
    monkeypatch.setattr(amx_products, "add_up", amx_products.add_up.py_func)
    width = -(-num_keys // 64) * 64 + 16
    scores = np.full(num_rows * width, np.nan, np.float32)
    amx_attention.score.py_func(bits(queries_RD), 0, size, num_rows, seen, num_stretches, size, scores, width)
    found = torch.from_numpy(scores.reshape(num_rows, width)[:, :num_keys].copy())
    exact = queries_RD.float() @ keys_TKD[:, head].float().T
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
    weights = torch.zeros(num_rows, width).bfloat16()
    weights[:, :num_keys] = shares_RS
    sums = np.full(num_rows * size, np.nan, np.float32)
    amx_attention.add_up.py_func(bits(weights), width, num_rows, seen, num_stretches, size, sums)
    exact = shares_RS.float() @ values_TKD[:, head].float()
    torch.testing.assert_close(torch.from_numpy(sums.reshape(num_rows, size)), exact, rtol=1e-4, atol=1e-4)
