"""From tensors to trained weights: options, batches, networks, the loop, and how a run goes on."""
