"""A network laboratory: hosts as network namespaces, joined by links with rate, delay, queue and loss."""
