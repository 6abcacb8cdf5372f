"""Evaluate: answers to a test set, compared with the truth."""
