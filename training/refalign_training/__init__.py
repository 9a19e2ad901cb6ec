"""RefAlign for diffusers: training with the reference alignment loss (arXiv 2603.25743)."""
