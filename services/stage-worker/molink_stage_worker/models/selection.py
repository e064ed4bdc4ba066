"""Which tensors, and so which files, a stage needs. Pure.

Checkpoints name the tensors of layer 7 ``model.layers.7.…``, ``transformer.h.7.…``, ``gpt_neox.layers.7.…``,
``backbone.layers.7.…``, some without the first word. Everything else belongs to the head (embeddings), to the
tail (final norm, output head), or, when its name says neither, to both: a tensor too many costs a little time,
one too few a working model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from molink_common.errors import ModelError

_LAYER = re.compile(r"((?:[A-Za-z_]\w*\.)*?(?:layers|h|blocks|block))\.(\d+)\.")
_EMBEDDINGS = frozenset({"embed_tokens", "wte", "word_embeddings", "embed_in", "embeddings", "tok_embeddings"})
_HEAD_ONLY = frozenset({"wpe", "word_embeddings_layernorm", "embed_positions", "embedding_norm"})
_FINAL_NORMS = frozenset({"norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f", "final_norm"})
_OUTPUT_HEADS = frozenset({"lm_head", "embed_out", "output"})


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyMap:
    """What each key of a checkpoint is for."""

    num_layers: int
    layer_of: Mapping[str, int]
    """Keys of layers. Layers behind the last one (extra heads that guess further tokens) are left out."""
    embeddings: frozenset[str]
    """Token embeddings: the head's, and the tail's too when there is no output head."""
    head_only: frozenset[str]
    tail_only: frozenset[str]
    both: frozenset[str]

    def keys_for(self, first: int, last: int) -> frozenset[str]:
        """The keys that the stage with layers ``[first, last)`` needs."""
        if not 0 <= first < last <= self.num_layers:
            raise ValueError(f"layers [{first}, {last}) of {self.num_layers} are no stage")
        keys = {key for key, layer in self.layer_of.items() if first <= layer < last}
        if first == 0:
            keys |= self.embeddings | self.head_only | self.both
        if last == self.num_layers:
            keys |= self.tail_only | self.both | self.output_embeddings
        return frozenset(keys)

    @property
    def has_output_head(self) -> bool:
        """Whether the checkpoint carries an output head of its own."""
        return any(_words(key) & _OUTPUT_HEADS for key in self.tail_only)

    @property
    def output_embeddings(self) -> frozenset[str]:
        """The embeddings that serve as output head, if there is no other."""
        return frozenset() if self.has_output_head else self.embeddings


def map_keys(keys: Iterable[str], num_layers: int) -> KeyMap:
    """What each of a checkpoint's keys is for.

    Raises:
        ModelError: a layer has no tensors at all.
    """
    every = sorted(keys)
    prefix = _layers_prefix(every, num_layers)
    layer_of: dict[str, int] = {}
    embeddings, head_only, tail_only, both = set(), set(), set(), set()
    for key in every:
        found = _LAYER.match(key)
        words = _words(key)
        if found is not None and found[1] == prefix:
            if int(found[2]) < num_layers:
                layer_of[key] = int(found[2])
        elif words & _HEAD_ONLY:
            head_only.add(key)
        elif words & _OUTPUT_HEADS or words & _FINAL_NORMS:
            tail_only.add(key)
        elif words & _EMBEDDINGS:
            embeddings.add(key)
        else:
            both.add(key)
    missing = sorted(set(range(num_layers)) - set(layer_of.values()))
    if missing:
        raise ModelError(f"the checkpoint has no tensors for layer {missing[0]} of {num_layers}")
    return KeyMap(
        num_layers=num_layers,
        layer_of=layer_of,
        embeddings=frozenset(embeddings),
        head_only=frozenset(head_only),
        tail_only=frozenset(tail_only),
        both=frozenset(both),
    )


def _layers_prefix(keys: Iterable[str], num_layers: int) -> str | None:
    """What stands before the number; of several (a part beside the language model has layers too), the best fit."""
    numbers: dict[str, set[int]] = {}
    for key in keys:
        found = _LAYER.match(key)
        if found is not None:
            numbers.setdefault(found[1], set()).add(int(found[2]))
    wanted = set(range(num_layers))
    by_fit = sorted(numbers, key=lambda prefix: (-len(numbers[prefix] & wanted), len(prefix), prefix))
    return by_fit[0] if by_fit else None


def _words(key: str) -> frozenset[str]:
    return frozenset(key.split("."))


def shards_for(keys: Iterable[str], weight_map: Mapping[str, str]) -> tuple[str, ...]:
    """The files that hold `keys`, in order of name."""
    return tuple(sorted({weight_map[key] for key in keys}))
