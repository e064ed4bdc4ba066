"""The engine: some layers of a model, their KV blocks, and one call that runs a step through them."""

from molink_stage_worker.engine.loading import load_engine

__all__ = ["load_engine"]
