"""One page from a comparison or a run."""
