"""What every test may use: the real services of tests/services.py."""

pytest_plugins = ["tests.services"]
