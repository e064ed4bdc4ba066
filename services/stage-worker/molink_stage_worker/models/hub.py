"""Models on the Hugging Face hub, file by file."""

from __future__ import annotations

from pathlib import Path

from molink_common.errors import ModelError
from molink_stage_worker.models.files import ModelFiles
from molink_stage_worker.models.reference import HubModel


def connect_hub(model: HubModel, downloads: Path) -> ModelFiles:
    """The files of a model on the hub."""
    raise ModelError(f"{model.repository}: the hub is not there yet ({downloads})")
