"""GGUF to safetensors, once. The only module of this room that needs torch, so it imports it late."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from molink_common.errors import ModelError
from molink_stage_worker.models.cache import Progress

RECIPE = "gguf to bfloat16, 1"
"""Changes whenever the same file would give other weights: part of caches' names and of fingerprints."""

_READ_SHARE = 0.8
"""How much of the time the reading takes; the rest is writing and the tokenizer."""


def convert_gguf(source: Path, folder: Path, progress: Progress) -> None:
    """Write config, tokenizer and bfloat16 weights of a GGUF file into `folder`.

    Takes about as much memory as three times the weights, for as long as it runs.

    Raises:
        ModelError: transformers cannot read the file, or does not know its family.
    """
    progress("converting", 0.0)
    import torch  # noqa: PLC0415  seconds and hundreds of megabytes, for a conversion only
    import transformers  # noqa: PLC0415

    place, name = str(source.parent), source.name
    with _reporting(progress):
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                place, gguf_file=name, dtype=torch.bfloat16, local_files_only=True
            )
            _forget_quantization(model)
            progress("converting", _READ_SHARE)
            model.save_pretrained(folder, max_shard_size="4GB")
            del model
            progress("converting", 0.9)
            tokenizer = transformers.AutoTokenizer.from_pretrained(place, gguf_file=name, local_files_only=True)
            tokenizer.save_pretrained(folder)
        # a damaged file fails anywhere inside the readers, with whatever error that place has
        except Exception as error:
            first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(f"{name} cannot be converted: {first_line}") from error
    progress("converting", 1.0)


def _forget_quantization(model: Any) -> None:
    """Loading has unpacked the weights; without this, saving them would be refused."""
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


@contextlib.contextmanager
def _reporting(progress: Progress) -> Iterator[None]:
    """Hear of the tensors that are read; no bars and notices of the libraries among our own lines."""
    from transformers import modeling_gguf_pytorch_utils as reader  # noqa: PLC0415
    from transformers.utils import logging as their_logging  # noqa: PLC0415

    def counted(tensors: Sequence[Any], **_settings: Any) -> Iterable[Any]:
        for number, tensor in enumerate(tensors):
            progress("converting", _READ_SHARE * number / max(1, len(tensors)))
            yield tensor

    logger = logging.getLogger("transformers")
    bar, level, had_bars = reader.tqdm, logger.level, their_logging.is_progress_bar_enabled()
    reader.tqdm = counted
    logger.setLevel(logging.ERROR)
    their_logging.disable_progress_bar()
    try:
        yield
    finally:
        reader.tqdm = bar
        logger.setLevel(level)
        if had_bars:
            their_logging.enable_progress_bar()
