"""The model's card, and the files that a worker hands out."""

from __future__ import annotations

import base64
from enum import StrEnum
from typing import Annotated

from pydantic import Base64Bytes, BaseModel, ConfigDict, Field

from molink_common.messages.codec import Count, Message


class FileOffer(BaseModel):
    """A file that a worker hands out on request (see `FetchFile`)."""

    model_config = ConfigDict(frozen=True)
    name: str
    size_bytes: Count
    sha256: str


class ModelCard(BaseModel):
    """What the parts need to know of a model without its weights.

    Parameter counts are numbers of scalars, so that memory follows from the pipeline's dtype.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    """Its real name in the API, e.g. ``SmolLM2-135M-Instruct``."""
    aliases: tuple[str, ...] = ()
    """Other names that the API accepts, e.g. ``demo``."""
    fingerprint: str
    """Equal fingerprints mean the same configuration and the same weights."""
    family: str
    """transformers' ``model_type``."""
    packed: bool
    """Whether steps of many sequences run as one packed pass; else sequence by sequence."""
    num_layers: Annotated[int, Field(ge=1)]
    hidden_size: Annotated[int, Field(ge=1)]
    vocabulary_size: Annotated[int, Field(ge=1)]
    context_length: Annotated[int, Field(ge=1)]
    checkpoint_dtype: str
    layer_parameters: tuple[int, ...]
    """Per layer."""
    embedding_parameters: Count
    """What the head holds beside its layers."""
    output_parameters: Count
    """What the tail holds beside its layers (final norm and output head, also when tied)."""
    kv_scalars_per_token: tuple[int, ...]
    """Per layer: keys and values of one token."""
    eos_token_ids: tuple[int, ...] = ()
    tokenizer_files: tuple[FileOffer, ...] = ()


class Dtype(StrEnum):
    """Number formats of weights and activations."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"

    @property
    def size_bytes(self) -> int:
        """Bytes of one scalar."""
        return 4 if self is Dtype.FLOAT32 else 2


class FetchFile(Message):
    """A piece of one of the card's `tokenizer_files`."""

    TYPE = "fetch_file"
    name: str
    offset_bytes: Count
    size_bytes: Annotated[int, Field(ge=1, le=512 * 1024)]


class FileChunk(Message):
    """The bytes asked for; fewer only at the end of the file."""

    TYPE = "file_chunk"
    data: Base64Bytes

    @classmethod
    def holding(cls, raw: bytes) -> FileChunk:
        """A chunk that carries `raw`."""
        return cls(data=base64.b64encode(raw))
