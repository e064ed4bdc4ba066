"""The scheduler: keeps the layer map and the sequences' state, admits, places, recovers."""
