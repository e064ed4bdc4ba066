"""The engine: some layers of a model, their KV blocks, and one call that runs a step through them. See `loading`."""
