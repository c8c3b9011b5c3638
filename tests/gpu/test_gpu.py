"""The checks that need a GPU: `python -m pytest tests/gpu` on a machine that has one or two (docs/topologies.md)."""

import pytest
import torch

from tests.cli.test_verify import failed, run_verify


@pytest.mark.parametrize(("topology", "processes"), [("gpu", 1), ("multi_gpu", 2)])
def test_all_checks_pass_on_gpus(tmp_path, topology, processes):
    if torch.cuda.device_count() < processes:
        pytest.skip(f"needs {processes} GPUs")
    ended, rows = run_verify(tmp_path, topology, processes)
    assert failed(rows) == [], ended.stdout
    for name in ("masks, host and device", "fp16, overflow", "memory, a full GPU"):
        assert rows[name]["verdict"] == "ok", rows[name]
