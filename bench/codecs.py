"""What a link's codecs save, cost and change, on real activations.

    python -m bench.codecs                   tables
    python -m bench.codecs --json            the same, and one JSON object as the last line
    python -m bench.codecs --alternatives    also the encodings that were not chosen

The model is cut once in the middle, in this process, without a network. Bytes and times are those of the hidden
states at the cut: of a text in prompt chunks, and of 20 greedy conversations in decode steps. One thread. Tensors of
hidden size 8192 are the same scalars in wider rows. The break-even rate is that of a link on which the bytes saved
would take as long as encoding and decoding: on a slower link the codec pays, even if nothing overlaps.

Tokens: all conversations go through in the same steps, once as they are and once encoded and decoded at the cut.
`changed` is the share of conversations with another token anywhere, `mean_first_change` where the first is, on
average; `token_changed` is the share of single tokens that would change if all before them were the same. The
same conversations computed in smaller batches, not encoded, show how much of that rounding alone does.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from transformers import AutoTokenizer

from bench.load import chat_prompts
from molink_common.folders import cache_folder
from molink_common.messages import Dtype
from molink_common.wire import Codec, Entry, Logits
from molink_stage_worker.activation_codec import EXACTNESS, decode_hidden, encode_hidden
from molink_stage_worker.engine.interface import Engine, StageSpec
from molink_stage_worker.engine.loading import TORCH_DTYPES, load_engine
from molink_stage_worker.models import prepare

CONVERSATIONS = 20
NEW_TOKENS = 48
CHUNK = 512
_BLOCK_SIZE = 16
_NUM_BLOCKS = 512
_ROOT = Path(__file__).parent.parent
_TEXTS = ("docs/architecture.md", "docs/performance.md", "README.md")
_SHAPES = ((1, 0), (32, 0), (CHUNK, 0), (1, 8192), (32, 8192), (CHUNK, 8192))
"""Tokens and hidden size; 0 stands for the model's."""
_MEASURE_S = 0.25

AtTheCut = Callable[[memoryview], memoryview]


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    dtype = Dtype(arguments.dtype)
    prepared = prepare(arguments.model, cache=cache_folder(), progress=lambda *_: None)
    num_layers = prepared.card.num_layers
    folder = prepared.checkpoint_for(0, num_layers)
    cut = num_layers // 2
    head, tail = (_load(folder, first, last, num_layers, dtype) for first, last in ((0, cut), (cut, num_layers)))
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    conversations = [_prompt(tokenizer, messages) for messages in chat_prompts(CONVERSATIONS)]
    text = tokenizer("\n".join((_ROOT / name).read_text() for name in _TEXTS))["input_ids"]
    rows = np.concatenate([_states(head, text[at : at + CHUNK]) for at in range(0, len(text) - CHUNK, CHUNK)])

    codecs = [
        _measure(rows, num_tokens, hidden_size or head.hidden_size, dtype, codec)
        for codec in (Codec.LOSSLESS, Codec.INT8)
        for num_tokens, hidden_size in _SHAPES
    ]
    report: dict[str, Any] = {"dtype": dtype, "cut": [cut, num_layers], "codecs": codecs}
    report["tokens"] = _effects(head, tail, conversations, dtype, with_row_scale=arguments.alternatives)
    if arguments.alternatives:
        report["alternatives"] = list(_alternatives(rows, head.hidden_size, dtype))
    return report


def _load(folder: Path, first_layer: int, last_layer: int, num_layers: int, dtype: Dtype) -> Engine:
    return load_engine(
        StageSpec(
            checkpoint=folder, first_layer=first_layer, last_layer=last_layer, num_layers=num_layers, dtype=dtype,
            device="cpu", num_blocks=_NUM_BLOCKS, block_size=_BLOCK_SIZE,
        )
    )  # fmt: skip


def _prompt(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[int]:
    """A base model, which has no template, continues the bare text."""
    if tokenizer.chat_template is None:
        ids: list[int] = tokenizer(" ".join(message["content"] for message in messages))["input_ids"]
    else:
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    return ids


def _states(head: Engine, token_ids: Sequence[int]) -> np.ndarray[Any, Any]:
    """The hidden states of a prompt as bytes, a row a token."""
    blocks = tuple(range(-(-len(token_ids) // _BLOCK_SIZE)))
    entry = Entry(sequence=0, start=0, count=len(token_ids), opens=True, logits=Logits.NONE, new_blocks=blocks)
    hidden = head.run([entry], (), token_ids=token_ids).hidden
    head.run((), [0], token_ids=())
    return np.frombuffer(bytes(hidden or b""), np.uint8).reshape(len(token_ids), -1)


# --- bytes and times ------------------------------------------------------------------------------------------------


def _tensor(rows: np.ndarray[Any, Any], num_tokens: int, hidden_size: int, dtype: Dtype) -> memoryview:
    """Of neighbouring rows for a chunk; from all over the text, as in a decode step, for a few tokens."""
    size_bytes = num_tokens * hidden_size * dtype.size_bytes
    shuffled = rows if num_tokens >= CHUNK else rows[np.random.default_rng(1).permutation(len(rows))]
    return memoryview(np.resize(shuffled, size_bytes).tobytes())


def _measure(
    rows: np.ndarray[Any, Any], num_tokens: int, hidden_size: int, dtype: Dtype, codec: Codec
) -> dict[str, Any]:
    hidden = _tensor(rows, num_tokens, hidden_size, dtype)
    encoded = encode_hidden(hidden, hidden_size=hidden_size, dtype=dtype, codec=codec)
    encode_s = _seconds(lambda: encode_hidden(hidden, hidden_size=hidden_size, dtype=dtype, codec=codec))
    decode_s = _seconds(
        lambda: decode_hidden(encoded, num_tokens=num_tokens, hidden_size=hidden_size, dtype=dtype, codec=codec)
    )
    saved_bytes = len(hidden) - len(encoded)
    return {
        "codec": codec.name.lower(),
        "num_tokens": num_tokens,
        "hidden_size": hidden_size,
        "ratio": round(len(encoded) / len(hidden), 3),
        "encode_us": round(encode_s * 1e6, 1),
        "decode_us": round(decode_s * 1e6, 1),
        "encode_mb_per_s": round(len(hidden) / encode_s / 1e6),
        "decode_mb_per_s": round(len(hidden) / decode_s / 1e6),
        "break_even_mbit_per_s": round(saved_bytes * 8 / (encode_s + decode_s) / 1e6),
    }


def _seconds(call: Callable[[], object]) -> float:
    """The median of calls: on a busy machine neither the mean nor the least says what is usual."""
    call()
    times: list[float] = []
    end = time.perf_counter() + _MEASURE_S
    while time.perf_counter() < end or len(times) < 5:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _alternatives(rows: np.ndarray[Any, Any], hidden_size: int, dtype: Dtype) -> Iterator[dict[str, Any]]:
    """What the lossless codec could have been: ratio and time to encode, for a decode step and for a chunk."""
    width = dtype.size_bytes
    for num_tokens in (1, 32, CHUNK):
        raw = _tensor(rows, num_tokens, hidden_size, dtype)
        planes = np.frombuffer(raw, np.uint8).reshape(-1, width)
        highest = planes[:, -1].copy()
        steps = highest.reshape(num_tokens, hidden_size)
        delta = np.concatenate([steps[:1], np.diff(steps, axis=0)])
        words = np.frombuffer(raw, f"<u{width}")
        exponents = (((words << 1) | (words >> (8 * width - 1))) >> (8 * width - 8)).astype(np.uint8)
        chosen = zstandard.ZstdCompressionParameters.from_level(
            1, strategy=zstandard.STRATEGY_FAST, min_match=7, hash_log=6
        )
        subjects: dict[str, tuple[Any, int]] = {
            # what is compressed, and how many bytes travel beside it
            "whole": (raw, 0),
            "all planes": (np.ascontiguousarray(planes.T), 0),
            "highest bytes": (highest, len(raw) - highest.size),
            "exponents": (exponents, len(raw) - highest.size),
            "highest bytes, delta to the row before": (delta, len(raw) - highest.size),
        }
        compressors: dict[str, Callable[[Any], bytes]] = {
            "zstd 1": zstandard.ZstdCompressor(level=1).compress,
            "zstd -5": zstandard.ZstdCompressor(level=-5).compress,
            "zstd 9": zstandard.ZstdCompressor(level=9).compress,
            "zstd 1, few matches": zstandard.ZstdCompressor(compression_params=chosen).compress,
            "zlib 1": lambda data: zlib.compress(data, 1),
            "zlib huffman": _huffman,
        }
        for subject, (data, beside_bytes) in subjects.items():
            for name, compress in compressors.items():
                ratio = (len(compress(data)) + beside_bytes) / len(raw)
                encode_us = _seconds(partial(compress, data)) * 1e6
                yield {
                    "num_tokens": num_tokens, "what": subject, "how": name, "ratio": round(ratio, 3),
                    "compress_us": round(encode_us, 1),
                }  # fmt: skip


def _huffman(data: bytes) -> bytes:
    compressor = zlib.compressobj(1, zlib.DEFLATED, -15, 8, zlib.Z_HUFFMAN_ONLY)
    return compressor.compress(data) + compressor.flush()


# --- tokens ---------------------------------------------------------------------------------------------------------


def _effects(
    head: Engine, tail: Engine, prompts: Sequence[Sequence[int]], dtype: Dtype, *, with_row_scale: bool
) -> dict[str, Any]:
    hidden_size = head.hidden_size

    def through(codec: Codec) -> AtTheCut:
        def there_and_back(hidden: memoryview) -> memoryview:
            num_tokens = len(hidden) // (hidden_size * dtype.size_bytes)
            encoded = encode_hidden(hidden, hidden_size=hidden_size, dtype=dtype, codec=codec)
            return decode_hidden(encoded, num_tokens=num_tokens, hidden_size=hidden_size, dtype=dtype, codec=codec)

        return there_and_back

    def row_scale(hidden: memoryview) -> memoryview:
        rows_TH = torch.frombuffer(bytearray(hidden), dtype=TORCH_DTYPES[dtype]).float().view(-1, hidden_size)
        unit_T1 = rows_TH.abs().amax(1, keepdim=True) / 127
        back_TH = ((rows_TH / unit_T1).round() * unit_T1).to(TORCH_DTYPES[dtype])
        return memoryview(back_TH.view(torch.uint8).numpy().tobytes())

    raw = _greedy(head, tail, prompts, through(Codec.RAW))
    batch = len(prompts)
    cases = {
        "lossless": (through(Codec.LOSSLESS), batch),
        "int8": (through(Codec.INT8), batch),
        "raw, batches of 5": (through(Codec.RAW), 5),
    }
    if with_row_scale:
        cases["int8, one scale a row"] = (row_scale, batch)
    return {name: _effect(head, tail, prompts, at_the_cut, size, raw) for name, (at_the_cut, size) in cases.items()}


def _effect(
    head: Engine,
    tail: Engine,
    prompts: Sequence[Sequence[int]],
    at_the_cut: AtTheCut,
    batch: int,
    raw: list[list[int]],
) -> dict[str, Any]:
    free: list[list[int]] = []
    forced: list[list[int]] = []
    for at in range(0, len(prompts), batch):
        part = slice(at, at + batch)
        free += _greedy(head, tail, prompts[part], at_the_cut)
        forced += _greedy(head, tail, prompts[part], at_the_cut, raw[part])
    firsts = [
        next(index for index, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        for ours, theirs in zip(free, raw, strict=True)
        if ours != theirs
    ]
    changes = [a != b for ours, theirs in zip(forced, raw, strict=True) for a, b in zip(ours, theirs, strict=True)]
    return {
        "changed": round(len(firsts) / len(prompts), 3),
        "mean_first_change": round(statistics.mean(firsts), 1) if firsts else None,
        "token_changed": round(statistics.mean(changes), 4),
    }


def _greedy(
    head: Engine,
    tail: Engine,
    prompts: Sequence[Sequence[int]],
    at_the_cut: AtTheCut,
    forced: Sequence[Sequence[int]] | None = None,
) -> list[list[int]]:
    """The likeliest next token, `NEW_TOKENS` times, of all prompts in one step; `forced` tokens go in where given."""
    chosen: list[list[int]] = [[] for _ in prompts]
    blocks = iter(range(_NUM_BLOCKS))
    held = [0] * len(prompts)
    for step in range(NEW_TOKENS):
        entries: list[Entry] = []
        token_ids: list[int] = []
        for index, prompt in enumerate(prompts):
            tokens = prompt if step == 0 else [(forced or chosen)[index][step - 1]]
            start = 0 if step == 0 else len(prompt) + step - 1
            needed = -(-(start + len(tokens)) // _BLOCK_SIZE) - held[index]
            held[index] += needed
            entries.append(
                Entry(
                    sequence=index, start=start, count=len(tokens), opens=step == 0, logits=Logits.LAST,
                    new_blocks=tuple(next(blocks) for _ in range(needed)),
                )
            )  # fmt: skip
            token_ids += tokens
        hidden = head.run(entries, (), token_ids=token_ids).hidden
        logits_RV = tail.run(entries, (), hidden=at_the_cut(hidden or memoryview(b""))).logits_RV
        assert logits_RV is not None
        for tokens_so_far, token in zip(chosen, logits_RV.argmax(-1).tolist(), strict=True):
            tokens_so_far.append(token)
    head.run((), range(len(prompts)), token_ids=())
    tail.run((), range(len(prompts)))
    return chosen


def _print(report: dict[str, Any]) -> None:
    print(f"{report['dtype']}, cut at layer {report['cut'][0]} of {report['cut'][1]}")
    for case in report["codecs"]:
        print(
            f"{case['codec']:9} {case['num_tokens']:4} × {case['hidden_size']:<5} ratio {case['ratio']:.3f}  "
            f"encode {case['encode_us']:8.1f} µs {case['encode_mb_per_s']:5} MB/s  "
            f"decode {case['decode_us']:8.1f} µs {case['decode_mb_per_s']:5} MB/s  "
            f"pays below {case['break_even_mbit_per_s']} Mbit/s"
        )
    for codec, effect in report["tokens"].items():
        print(
            f"{codec:22} conversations changed {effect['changed']:.0%}, first change at token "
            f"{effect['mean_first_change']}, single tokens changed {effect['token_changed']:.2%}"
        )
    for case in report.get("alternatives", ()):
        print(
            f"{case['num_tokens']:4} tokens  {case['what']:39} {case['how']:20} ratio {case['ratio']:.3f}  "
            f"{case['compress_us']:8.1f} µs"
        )
    for codec, exactness in EXACTNESS.items():
        print(f"{codec.name.lower():9} {exactness}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.codecs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--alternatives", action="store_true", help="also what was not chosen")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="bfloat16", choices=[str(dtype) for dtype in Dtype])
    return parser.parse_args(argv)


if __name__ == "__main__":
    settings = parse(sys.argv[1:])
    outcome = main(settings)
    _print(outcome)
    if settings.json:
        print(json.dumps(outcome))
