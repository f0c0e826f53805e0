"""Models: loaded, proved to be the ones that were meant, their hooks named."""
