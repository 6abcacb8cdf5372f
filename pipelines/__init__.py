"""What starts, works and ends: precompute, label, train, evaluate, demo; and the `mova` command."""
