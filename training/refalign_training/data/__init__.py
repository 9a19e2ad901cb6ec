"""From datasets to [`Sample`]s, and from a sample to what a training step sees: `source -> Sample -> Example`."""
