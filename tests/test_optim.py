import copy
from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn

from cifar import config, model, optim

STEPS = [5] * 4  # of each epoch


def settings(optimizer: str, **changes) -> config.Config:
    common = {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.0, "schedule": "linear", "precision": "float32"}
    recipe = "fast" if optimizer == "muon" else "convnet"
    return config.Config(recipe=recipe, optimizer=optimizer, **{**common, **changes})


def learning_rates(steps: int, **changes) -> list[float]:
    network = model.build("convnet", 10, 32)
    optimizer = optim.build(network, settings("sgd", epochs=len(STEPS), **changes), STEPS)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.lr)
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    return seen


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", lambda step: 0.1 * (1 - step / 20)),
        ("exponential", lambda step: 0.1 * 0.5 ** (step / 10)),
        ("step", lambda step: 0.1 if step < 10 else 0.05),
    ],
)
def test_the_learning_rate_follows_its_schedule_step_by_step(schedule, expected):
    seen = learning_rates(20, schedule=schedule, decay_rate=0.5, decay_epochs=2)
    np.testing.assert_allclose(seen, [expected(step) for step in range(20)])


def test_a_learning_rate_too_small_for_a_number_freezes_nothing():
    network = nn.Linear(1, 1)
    optimizer = optim.build(network, config.Config(recipe="resnet18", schedule="step", decay_epochs=1e-3), [10, 10])
    optimizer.set_step(15)
    assert (optimizer.lr, network.weight.requires_grad) == (0, True)
    optimizer.set_step(20)
    assert not network.weight.requires_grad  # the end of the training


@pytest.mark.parametrize(
    ("changes", "epochs", "last"),
    [
        ({"epochs": 5}, [375] * 5, 624),  # 5 / 3 epochs are 625 steps
        ({"decay_epochs": 3.5}, [10, 10, 10, 6, 6], 32),  # the last epochs are shorter
    ],
)
def test_a_period_that_ends_within_an_epoch_ends_at_its_step(changes, epochs, last):
    settings = config.Config(recipe="resnet18", lr=0.1, schedule="step", **changes)
    optimizer, seen = optim.build(nn.Linear(1, 1), settings, epochs), []
    for step in (last, last + 1):
        optimizer.set_step(step)
        seen.append(optimizer.lr)
    assert seen == pytest.approx([0.1, 0.01])


def test_the_steps_are_at_thirds_of_the_training_unless_they_are_given():
    seen = learning_rates(20, schedule="step")
    np.testing.assert_allclose(seen, [0.1] * 7 + [0.01] * 7 + [0.001] * 6)  # 20 / 3 is 6.7, twice that 13.3


def test_the_warm_up_is_that_of_torchs_schedulers():
    reference = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    rising = torch.optim.lr_scheduler.LinearLR(reference, start_factor=1 / 6, total_iters=5)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(reference, T_max=15)
    scheduler = torch.optim.lr_scheduler.SequentialLR(reference, [rising, falling], milestones=[5])
    expected = []
    for _ in range(20):
        expected.append(reference.param_groups[0]["lr"])
        reference.step()
        scheduler.step()
    np.testing.assert_allclose(learning_rates(20, schedule="cosine", warmup_epochs=1), expected)


def test_gradients_are_clipped_to_their_common_norm():
    network = nn.Linear(2, 1)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    optimizer = optim.build(network, settings("sgd", momentum=0.0, clip_grad=1.0), STEPS)
    network.weight.grad, network.bias.grad = torch.tensor([[2.0, 4.0]]), torch.tensor([4.0])  # of norm 6
    optimizer.step()
    steps = [old - new.detach() for old, new in zip(before, network.parameters())]
    torch.testing.assert_close(steps[0], torch.tensor([[0.2, 0.4]]) / 6)
    torch.testing.assert_close(steps[1], torch.tensor([0.4]) / 6)


def test_the_average_starts_at_the_first_weights_and_follows_them_by_its_decay_after_a_warm_up():
    network = nn.BatchNorm1d(1)
    average = optim.build_ema(network, 0.2)
    # After one step the decay is 2/11, after two 3/12, of which 0.2 is left.
    for value, expected in ((1.0, 1.0), (12.0, 10.0), (15.0, 14.0)):
        nn.init.constant_(network.weight, value)
        network.running_mean.fill_(10 * value)
        average.update_parameters(network)
        assert average.module.weight.item() == pytest.approx(expected)
        assert average.module.running_mean.item() == pytest.approx(10 * expected)
    assert optim.build_ema(network, 0.0) is None


@pytest.mark.parametrize("shape", [(8, 30), (30, 8), (16, 16)])
def test_orthogonalizing_keeps_the_directions_and_evens_out_the_singular_values(shape):
    generator = torch.Generator().manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    wanted = torch.linspace(0.06, 1, min(shape))
    wanted /= wanted.norm()
    (orthogonal,) = optim.orthogonalize((left @ wanted.diag() @ right)[None])
    inner = left.T @ orthogonal @ right.T
    values = inner.diag()[wanted > 0.05]
    assert values.min() > 0.5
    assert values.max() < 1.3
    assert (inner - inner.diag().diag()).abs().max() < 1e-4


@pytest.mark.parametrize("shape", [(8, 32), (32, 8)])
def test_orthogonalizing_is_the_same_in_few_and_in_many_bits(shape):
    matrices = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrices /= matrices.flatten(1).norm(dim=1)[:, None, None]
    exact = optim.orthogonalize(matrices)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 0.03)):
        torch.testing.assert_close(optim.orthogonalize(matrices.to(dtype)).double(), exact, rtol=0, atol=bound)


def test_muon_normalizes_the_weight_and_steps_along_the_orthogonalized_nesterov_momentum():
    weight = nn.Parameter(torch.eye(4, 6))
    first, second = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1))
    muon = optim.Muon([weight], lr=0.1, momentum=0.5, dtype=torch.float32)
    for gradient in (first, second):
        before = weight.detach().clone()
        weight.grad = gradient.clone()
        muon.step()
    ahead = second + 0.5 * (0.5 * first + second)
    expected = before * 2 / before.norm() - 0.1 * optim.orthogonalize(ahead[None] / ahead.norm())[0]
    torch.testing.assert_close(weight.detach(), expected)


def test_muon_trains_the_convolutions_and_sgd_the_head_and_the_biases():
    network = model.build("airbench94", 10, 32)
    optimizer = optim.build(network, settings("muon"), STEPS)
    muon, sgd = optimizer.optimizers
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    trained_by = [[names[id(p)] for group in own.param_groups for p in group["params"]] for own in (muon, sgd)]
    assert len(trained_by[0]) == 6
    assert all(".conv" in name for name in trained_by[0])
    assert {"whiten.bias", "head.weight", "groups.2.norm2.bias"} <= set(trained_by[1])
    assert len(trained_by[0] + trained_by[1]) == sum(p.requires_grad for p in network.parameters())


def test_the_whitening_bias_is_frozen_after_three_epochs():
    network = model.build("airbench94", 10, 32)
    optimizer = optim.build(network, settings("muon"), STEPS)
    for step in range(16):
        assert network.whiten.bias.requires_grad == (step < 15)
        network(torch.rand(4, 3, 32, 32)).square().sum().backward()
        optimizer.step()
    assert network.groups[0].conv1.weight.requires_grad
    optimizer.set_step(1)  # as after falling back to an earlier checkpoint
    assert network.whiten.bias.requires_grad


def test_smaller_batches_have_smaller_learning_rates_but_for_muon():
    def rates(batch_size: int) -> list[float]:
        config = settings("muon", batch_size=batch_size)
        return [group["lr"] for group in optim.build(model.build("airbench94", 10, 32), config, STEPS).groups]

    muon, *others = rates(2000)
    assert others == [106, 1340, 106]  # Jordan's 0.053, 0.67 and 0.053 times 2,000
    assert rates(20) == pytest.approx([muon, 10.6, 134, 10.6])


def test_all_learning_rates_reach_zero_with_the_training_however_short_it_is():
    optimizer = optim.build(model.build("airbench94", 10, 32), settings("muon"), [5, 5])
    optimizer.set_step(9)
    assert min(group["lr"] for group in optimizer.groups) > 0
    optimizer.set_step(10)
    assert max(group["lr"] for group in optimizer.groups) == 0


@pytest.mark.parametrize(("name", "reference"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_adam_is_torchs_with_the_given_learning_rate_and_weight_decay(name, reference):
    torch.manual_seed(0)
    network = nn.Linear(3, 2)
    twin = nn.Linear(3, 2)
    twin.load_state_dict(network.state_dict())
    optimizer = optim.build(network, settings(name, weight_decay=0.1), STEPS)
    reference = reference(twin.parameters(), lr=0.1, weight_decay=0.1)
    for layer, step in ((network, optimizer.step), (twin, reference.step)):
        layer(torch.ones(1, 3)).square().sum().backward()
        step()
    torch.testing.assert_close(network.weight, twin.weight)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_a_restored_optimizer_continues_as_the_saved_one(name):
    def trained(optimizer, network, steps):
        for step in range(steps):
            images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(step))
            (1e-4 * network(images).square().mean()).backward()
            optimizer.step()

    def new():
        torch.manual_seed(0)
        network = model.build("airbench94" if name == "muon" else "mlp", 10, 32).eval()
        return optim.build(network, settings(name), STEPS), network

    optimizer, network = new()
    trained(optimizer, network, 3)
    restored, twin = new()
    twin.load_state_dict(network.state_dict())
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one in ((optimizer, network), (restored, twin)):
        trained(*one, 2)
    assert (restored.steps, restored.lr) == (5, optimizer.lr)
    assert all(map(torch.equal, network.parameters(), twin.parameters()))


def test_in_float16_a_step_that_overflows_is_left_out_and_the_scale_is_restored():
    def new():
        torch.manual_seed(0)
        network = nn.Linear(3, 2)
        return network, optim.build(network, settings("sgd", precision="float16"), STEPS)

    def step(network, optimizer, factor):
        optimizer.backward(network(torch.ones(1, 3)).sum() * factor)
        optimizer.step()

    network, optimizer = new()
    before, scale = network.weight.detach().clone(), 2.0**16
    step(network, optimizer, torch.finfo(torch.float32).max)
    assert torch.equal(network.weight, before)
    assert (optimizer.steps, optimizer.scaler.get_scale()) == (1, scale / 2)
    twin, restored = new()
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one in ((network, optimizer), (twin, restored)):
        step(*one, 1.0)
    assert restored.scaler.get_scale() == scale / 2
    assert torch.equal(twin.weight, network.weight)
    torch.testing.assert_close(network.weight.detach(), before - 0.1 * 19 / 20)  # all gradients are 1


def test_muon_treats_weights_alike_in_any_layout_and_order():
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(2, *shape, generator=generator) for shape in ((4, 2, 3, 3), (8, 4), (4, 2, 3, 3))]
    found = []
    for layout, order in ((torch.contiguous_format, (0, 1, 2)), (torch.channels_last, (1, 2, 0))):
        weights = [nn.Parameter(weight.clone()) for weight, _ in values]
        for weight in (weights[0], weights[2]):
            weight.data = weight.data.contiguous(memory_format=layout)
        for weight, (_, gradient) in zip(weights, values):
            weight.grad = gradient.clone()
        optim.Muon([weights[index] for index in order], lr=0.1, momentum=0.5, dtype=torch.float32).step()
        found.append([weight.detach() for weight in weights])
    torch.testing.assert_close(*found)


def test_optimizers_and_schedules_are_those_that_the_settings_allow():
    fields = config.Config.model_fields
    assert set(get_args(fields["optimizer"].annotation)) == set(optim.OPTIMIZERS)
    assert set(get_args(fields["schedule"].annotation)) == set(optim.SCHEDULES)
