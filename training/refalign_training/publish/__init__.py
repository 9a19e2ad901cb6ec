"""From trained weights to a repo: exports and their model cards."""
