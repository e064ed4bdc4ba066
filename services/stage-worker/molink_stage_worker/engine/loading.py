"""From a checkpoint folder to an engine that runs one stage."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig
from transformers.utils import logging as transformers_logging

from molink_common.errors import ModelError
from molink_common.messages import Dtype
from molink_stage_worker.engine.attention import ATTENTION_NAME
from molink_stage_worker.engine.families import Family, Serving, family_of
from molink_stage_worker.engine.interface import Engine, Progress, StageSpec
from molink_stage_worker.engine.lean_model import make_lean
from molink_stage_worker.engine.packed import PackedEngine
from molink_stage_worker.engine.per_sequence import PerSequenceEngine
from molink_stage_worker.engine.pruning import cut, stage_class

TORCH_DTYPES = {
    Dtype.FLOAT32: torch.float32,
    Dtype.BFLOAT16: torch.bfloat16,
    Dtype.FLOAT16: torch.float16,
}


_ONE_AT_A_TIME = threading.Lock()
"""transformers exchanges parts of torch for the whole process while it loads: two loads at once disturb each other.
A worker may still be loading a stage when it is given another."""


def load_engine(spec: StageSpec, progress: Progress | None = None) -> Engine:
    """Load the stage's tensors, and no others, and make an engine of them.

    Raises:
        ModelError: the folder holds no model, one that is not served, or not all of the stage's tensors.
    """
    report = progress or _ignore
    report(0.0)
    config = read_config(spec.checkpoint)
    family = family_of(config)
    _check(config, spec)
    attention = ATTENTION_NAME if family.serving is Serving.PACKED else None
    model = _load_stage(config, spec, family, attention)
    report(0.9)
    cut(model, spec, family)
    model.to(spec.device)
    model.eval()
    model.requires_grad_(False)
    _accept_read_only_buffers()
    engine = _make_engine(model, spec, family)
    report(1.0)
    return engine


def read_config(checkpoint: Path) -> Any:
    """The transformers configuration in a folder. Code that the folder may bring is never run.

    Raises:
        ModelError: there is none, or transformers does not know its family.
    """
    try:
        return AutoConfig.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{checkpoint} holds no model that can be read: {error}") from error


def _check(config: Any, spec: StageSpec) -> None:
    if config.num_hidden_layers != spec.num_layers:
        raise ModelError(f"{spec.checkpoint} has {config.num_hidden_layers} layers, not {spec.num_layers}")
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        raise ModelError(f"{spec.checkpoint} is quantized ({method}); give an unquantized checkpoint")


def _load_stage(config: Any, spec: StageSpec, family: Family, attention: str | None) -> Any:
    model_class = stage_class(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], spec, family)
    # what other stages own is unexpected here, and that is no news
    model_class._keys_to_ignore_on_load_unexpected = [r"."]  # type: ignore[attr-defined]
    transformers_logging.disable_progress_bar()
    try:
        with _ONE_AT_A_TIME:
            model, info = model_class.from_pretrained(  # type: ignore[attr-defined]
                spec.checkpoint,
                config=config,
                dtype=TORCH_DTYPES[spec.dtype],
                attn_implementation=attention,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"the weights in {spec.checkpoint} cannot be loaded: {error}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(f"{spec.checkpoint} lacks {len(missing)} tensors of this stage, e.g. {missing[0]}")
    return model


def _make_engine(model: Any, spec: StageSpec, family: Family) -> Engine:
    if family.serving is Serving.PER_SEQUENCE:
        return PerSequenceEngine(model, spec, family)
    make_lean(model)
    return PackedEngine(model, spec)


def _accept_read_only_buffers() -> None:
    """Have torch say now, unheard, what it says once: that frames are read-only. Nothing writes to them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.frombuffer(bytes(4), dtype=torch.uint8)


def _ignore(_: float) -> None:
    pass
