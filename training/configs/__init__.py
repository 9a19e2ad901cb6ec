"""Recipes of `refalign-train run`, a YAML file each."""
