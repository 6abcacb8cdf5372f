"""Bytes from local paths and URLs."""
