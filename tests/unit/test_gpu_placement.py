"""What ranks of GPU shapes do with devices, as far as it shows without a GPU."""

from __future__ import annotations

import os

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from trainer.distributed.sharding import copied_to_cpu, local_of
from trainer.distributed.world import _own_gpu, use_deterministic_kernels
from trainer.errors import LaunchError


@pytest.mark.parametrize(("rank", "visible", "index"), [(0, 8, 0), (7, 8, 7), (0, 1, 0), (5, 1, 0)])
def test_a_rank_takes_its_own_gpu(rank, visible, index):
    assert _own_gpu(rank, visible) == index


def test_more_ranks_than_gpus_are_refused():
    with pytest.raises(LaunchError, match="rank 2 of this machine has no GPU: 2 are visible"):
        _own_gpu(2, 2)


@pytest.fixture
def one_rank(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_a_copy_for_checkpoints_stays_on_the_cpu(one_rank):
    """`DTensor.from_local` moves a part to the device of its mesh, which a torch without CUDA refuses."""
    mesh = DeviceMesh("cuda", [0])
    values = torch.arange(6.0).view(3, 2)
    spec = DTensorSpec(mesh, (Shard(0),), TensorMeta(values.shape, values.stride(), values.dtype))
    sharded = DTensor(values, spec, requires_grad=False)
    copy = copied_to_cpu(sharded)
    assert isinstance(copy, DTensor)
    assert copy.device_mesh.device_type == "cpu"
    assert local_of(copy).device.type == "cpu"
    assert torch.equal(local_of(copy), values)
    assert local_of(copy).data_ptr() != values.data_ptr()


def test_deterministic_kernels(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    try:
        use_deterministic_kernels()
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
