"""The parts of `bench.faults`: what is broken and when, the system that it is done to, its clients, and the judge."""
