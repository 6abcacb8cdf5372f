"""The model of size mini and the pictures that the tests of mova_core use."""

from tests.mova_core.conftest import mini_folder, pictures

__all__ = ["mini_folder", "pictures"]
