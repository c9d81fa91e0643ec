"""Two processes of `accelerate launch` train as one with twice the passes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cmlora.adapters.tuners import store
from tests.training import bench

SCRIPT = """
import sys
from pathlib import Path
from tests.training import bench
bench.trainer(Path(sys.argv[1]), steps=3, tuner="svfit").run()
"""


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_passes(tmp_path: Path) -> None:
    bench.pictures(tmp_path / "data")
    alone = bench.trainer(tmp_path, steps=3, tuner="svfit", accumulate=2).run().path
    expected = store.read(alone)[1]["unet"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = tmp_path / "two.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "ACCELERATE_USE_CPU": "true"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path)],
            cwd=root,
            env={
                **environment,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            },
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    found = store.read(alone)[1]["unet"]
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6)
