"""Other engines, built and run here on the same machine and across the same links, to compare with."""
