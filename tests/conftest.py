"""What every test may use: the real services of tests/services.py."""

import os

# Before torch is imported, here and in the processes that tests start: threads that share a tiny matrix mostly
# wait for each other (four times the time on two busy cores).
os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = ["tests.services"]
