"""How a model reference becomes a card and a folder that an engine can load. See `prepare`."""

from molink_stage_worker.models.cache import Progress, no_progress
from molink_stage_worker.models.prepare import PreparedModel, prepare

__all__ = ["PreparedModel", "Progress", "no_progress", "prepare"]
