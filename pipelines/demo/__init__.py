"""The demo: the whole path on real pictures, on two CPU cores."""
