"""Evaluation: what a model makes of references, in numbers."""
