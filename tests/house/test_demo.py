"""The demo leaves nothing running, however it is stopped. (That it works is what `make demo` is for.)"""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys, time
from pathlib import Path
from examples import demo

def run():
    with demo.service(Path(sys.argv[1])):
        time.sleep(60)

demo.run = run
demo.main()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_demo_with_its_service(tmp_path: Path, number: int) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as demo:
        assert demo.stdout is not None
        found = re.search(r"http://127.0.0.1:\d+", demo.stdout.readline())
        assert found is not None
        assert httpx.get(found[0] + "/healthz").status_code == 200
        demo.send_signal(number)
        assert demo.wait(60) == 130
    with pytest.raises(httpx.ConnectError):
        httpx.get(found[0] + "/healthz")
