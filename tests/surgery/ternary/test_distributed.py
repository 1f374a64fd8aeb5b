"""Two processes, each with half of the batch, get the gradients of one: data parallel and sharded (FSDP2), in float32 and bfloat16."""

import socket
from itertools import product

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from downcycle.surgery.ternary.bitlinear import BitLinear, convert, set_strength  # noqa: E402

KINDS = ("data parallel", "sharded")
STRENGTHS = (0.0, 0.4, 1.0)
CLOSE = {torch.float32: {"rtol": 1e-5, "atol": 1e-7}, torch.bfloat16: {"rtol": 2e-2, "atol": 1e-3}}


def make_model(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8, bias=False)).to(dtype)
    convert(model[0])
    convert(model[2])
    return model


def gradients(model, batch):
    """Return the gradients of the mean over a batch, for several lambdas, whole, by name."""
    found = []
    for strength in STRENGTHS:
        set_strength(model, strength)
        model.zero_grad()
        model(batch).float().square().mean().backward()
        whole = {name: one.grad.full_tensor() if hasattr(one.grad, "full_tensor") else one.grad for name, one in model.named_parameters()}
        found.append({name.removeprefix("module."): one.clone() for name, one in whole.items()})
    return found


def work(rank, batch, port, file):
    """One of the two processes; the first saves what it found."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found = {kind: {dtype: gradients(spread(make_model(dtype), kind), batch.chunk(2)[rank].to(dtype)) for dtype in CLOSE} for kind in KINDS}
    if rank == 0:
        torch.save(found, file)
    dist.destroy_process_group()


def spread(model, kind):
    """Let the processes have a model together."""
    if kind == "data parallel":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for part in (model[0], model[2], model):
        fully_shard(part, mesh=mesh)
    assert isinstance(model[0], BitLinear) and model[0].weight.to_local().shape[0] == 12
    return model


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_two_processes_get_the_gradients_of_one(tmp_path):
    batch = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    torch.multiprocessing.spawn(work, (batch, free_port(), tmp_path / "found.pt"), nprocs=2)
    found = torch.load(tmp_path / "found.pt")
    for kind, (dtype, close) in product(KINDS, CLOSE.items()):
        for one, other in zip(found[kind][dtype], gradients(make_model(dtype), batch.to(dtype)), strict=True):
            assert one.keys() == other.keys()
            for name in one:
                assert float(other[name].norm()) > 0
                torch.testing.assert_close(one[name], other[name], **close)
