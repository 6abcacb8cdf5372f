"""The `mova` command."""
