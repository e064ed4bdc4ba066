"""What `bench.links` is made of: which cells there are, the load, the figures, the bounds, tables and plots."""
