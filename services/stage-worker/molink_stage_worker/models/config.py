"""What a model's config.json says, under the names that the families give it.

A config on the hub may leave out what equals its family's default. Only then is transformers asked, because
asking it takes seconds and imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from molink_common.errors import ModelError

_NAMES: Mapping[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden size": ("hidden_size", "n_embd", "d_model"),
    "vocabulary size": ("vocab_size",),
    "attention heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
}
_CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len", "max_sequence_length", "n_ctx")
_WITHOUT_LIMIT_CONTEXT = 8192
_SANE_TOKENIZER_LIMIT = 10_000_000
#: The only kinds whose frequencies are stretched for good, whatever the length of the sequence at hand.
_STRETCHED = frozenset({"linear", "yarn"})
#: Names that a config carries for people and tools: they do not change what is computed.
_NOT_THE_MODEL = frozenset({"_name_or_path", "transformers_version", "_commit_hash", "torch_dtype", "dtype"})


class ModelConfig:
    """A config.json with defaults filled in where they are asked for."""

    def __init__(self, raw: Mapping[str, Any], complete: Callable[[], Mapping[str, Any]]) -> None:
        if not isinstance(raw.get("model_type"), str):
            raise ModelError("config.json names no model_type: it is not the config of a transformers model")
        self.family: str = raw["model_type"]
        self.raw = raw
        self._complete = complete
        self._defaults: Mapping[str, Any] | None = None

    def number(self, what: str) -> int:
        """``layers``, ``hidden size``, ``vocabulary size`` or ``attention heads``.

        Raises:
            ModelError: neither the config nor its family's defaults say.
        """
        value = self.optional(*_NAMES[what])
        if not isinstance(value, int) or value < 1:
            raise ModelError(f"config.json does not say the number of {what} ({_NAMES[what][0]})")
        return value

    def stated(self, *names: str) -> Any | None:
        """The first of `names` that stands in the file itself."""
        return next((self.raw[name] for name in names if self.raw.get(name) is not None), None)

    def optional(self, *names: str) -> Any | None:
        """The first of `names` that stands in the file, else in the family's defaults."""
        found = self.stated(*names)
        if found is not None:
            return found
        if self._defaults is None:
            self._defaults = self._complete()
        return next((self._defaults[name] for name in names if self._defaults.get(name) is not None), None)

    @property
    def quantization(self) -> str | None:
        """How the weights are packed, if they are not plain numbers."""
        packing = self.raw.get("quantization_config")
        return str(packing.get("quant_method", "unknown")) if isinstance(packing, Mapping) else None

    def context_length(self, tokenizer_limit: object) -> int:
        """Tokens that fit into one sequence, with the stretching of positions that the config asks for."""
        found = self.stated(*_CONTEXT_NAMES)
        if not isinstance(found, int) or found < 1:
            sane = isinstance(tokenizer_limit, int) and 0 < tokenizer_limit < _SANE_TOKENIZER_LIMIT
            return int(tokenizer_limit) if sane else _WITHOUT_LIMIT_CONTEXT  # type: ignore[call-overload, no-any-return]
        full = self.rope.get("full_attention")
        return _stretched(found, full if isinstance(full, Mapping) else self.rope, self.family)

    @property
    def rope(self) -> Mapping[str, Any]:
        """How positions are turned, in today's words: flat, or one part for each type of layer."""
        rope = self.stated("rope_parameters", "rope_scaling")
        if not isinstance(rope, Mapping):
            return {}
        # older files: another name for the kind, and the length before stretching beside the rope
        older = {"rope_type": rope.get("type", "default")}
        if (original := self.stated("original_max_position_embeddings")) is not None:
            older["original_max_position_embeddings"] = original
        return {**older, **rope}

    def canonical(self) -> dict[str, Any]:
        """What decides the model's behaviour, for fingerprints."""
        return {key: value for key, value in self.raw.items() if key not in _NOT_THE_MODEL}


def _stretched(positions: int, rope: Mapping[str, Any], family: str) -> int:
    kind, factor = rope.get("rope_type", "default"), rope.get("factor")
    original = rope.get("original_max_position_embeddings")
    if kind in ("longrope", "su") and isinstance(original, int):
        # beyond this the frequencies would change with the longest sequence of a pass, under its neighbours' feet
        return min(positions, original)
    if kind not in _STRETCHED or not isinstance(factor, int | float) or family.startswith("gemma3"):
        return positions
    return max(positions, int((original if isinstance(original, int) else positions) * factor))


def eos_token_ids(config: ModelConfig, generation: Mapping[str, Any]) -> tuple[int, ...]:
    """The tokens that end an answer: the generation config's, else the config's (as transformers does)."""
    for value in (generation.get("eos_token_id"), config.raw.get("eos_token_id")):
        ids = value if isinstance(value, list) else [value]
        known = sorted({one for one in ids if isinstance(one, int) and one >= 0})
        if known:
            return tuple(known)
    return ()
