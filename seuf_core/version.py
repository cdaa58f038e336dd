"""The version of everything in this repository; torch-free."""

__version__ = "0.1.0"
