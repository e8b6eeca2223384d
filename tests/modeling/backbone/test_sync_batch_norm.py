"""SyncBN in two CPU processes acts as BN on the batch of both."""

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing, nn

from selftrain_d2.modeling.backbone import EfficientNet, batch_norm_builder


def make(kind, **kwargs):
    torch.manual_seed(0)
    norm = batch_norm_builder(kind, device="cpu", eps=1e-3, momentum=0.01)
    model = EfficientNet(
        name="efficientnet-b0", out_features=["res3"], norm=norm, drop_connect_rate=0.0, **kwargs
    )
    return model.double()


def train_step(model, images, share):
    # Each process has a share of the mean over all images.
    (share * model(images)["res3"].square().mean()).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def work(rank, folder, checkpoint_activations):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = make("SyncBN", checkpoint_activations=checkpoint_activations)
    assert type(model._bn0) is not nn.BatchNorm2d
    gradients = train_step(model, torch.load(folder / "images.pt")[2 * rank : 2 * rank + 2], 0.5)
    for gradient in gradients.values():
        dist.all_reduce(gradient)
    if rank == 0:
        torch.save((gradients, model.state_dict()), folder / "result.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint_activations", [False, True])
def test_two_processes_normalize_together(checkpoint_activations, tmp_path):
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    torch.save(images, tmp_path / "images.pt")
    model = make("BN")
    expected = train_step(model, images, 1.0)
    multiprocessing.spawn(work, (tmp_path, checkpoint_activations), nprocs=2)
    gradients, state = torch.load(tmp_path / "result.pt")
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-9)
    for name, value in model.state_dict().items():
        if name.endswith("running_mean"):
            torch.testing.assert_close(state[name], value)
