"""Precompute: fill a feature store in bulk, each expert in its own pools of Ray actors."""
