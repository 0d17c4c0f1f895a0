"""Training on a GPU, as far as it shows without one: on tensors with shapes, types and devices, but without values.

What needs a real card is marked `gpu`, and skipped without one.
"""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from cifar import bench, checkpoint, data, datasets, device, evaluate, model, optim, pipeline, trainer
from cifar.config import Config
from conftest import quick_config

GPU, META = torch.device("cuda:0"), torch.device("meta")
# Operations that start nothing on the GPU, beside views.
NO_LAUNCH = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh"),
    *("_unsafe_view", "_reshape_alias", "unsafe_split", "split", "split_with_sizes"),
}


class Watch(TorchDispatchMode):
    """Counts the operations that start something on the GPU, and those that have tensors of the CPU beside its."""

    def __init__(self):
        super().__init__()
        self.launches, self.copies = Counter(), Counter()

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        # The C++ code of PyTorch takes the GPU for the device "meta", as else it would ask CUDA's driver for streams.
        if operation is torch.ops.prim.device.default:
            return META if arguments[0].device == GPU else arguments[0].device
        options = options or {}
        if options.get("device") == META:
            options = {**options, "device": GPU}
        name = operation._schema.name.removeprefix("aten::")
        self.launches[name] += not (operation.is_view or name in NO_LAUNCH or operation.namespace == "profiler")
        if name.startswith("_fused_"):  # an optimizer's kernel, which changes tensors that have no values
            return None
        result = operation(*arguments, **options)
        if name == "convolution_backward" and result[1] is not None:  # cuDNN's has the layout of the weights
            result = (result[0], result[1].contiguous(memory_format=torch.channels_last), result[2])
        devices = {leaf.device for leaf in tree_leaves((arguments, options, result)) if isinstance(leaf, Tensor)}
        self.copies[name] += len(devices) > 1
        return result

    def clear(self) -> None:
        self.launches.clear()
        self.copies.clear()


class Autocast(TorchFunctionMode):
    """Casts the inputs of convolutions and products as torch.autocast does, which asks for CUDA's driver."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, function, types, arguments=(), options=None):
        if getattr(function, "__name__", "") in ("conv2d", "linear", "matmul"):
            arguments = tree_map_only(Tensor, lambda tensor: tensor.to(self.dtype), arguments)
        return function(*arguments, **(options or {}))


class Generator(torch.Generator):
    """A generator that says that it is the GPU's."""

    device = GPU

    def __new__(cls, _):
        return super().__new__(cls)


@pytest.fixture
def fake_gpu(monkeypatch):
    """A GPU whose tensors have no values; yields what watches it."""
    monkeypatch.setattr(torch, "Generator", Generator)
    random = SimpleNamespace(get_rng_state=lambda: None, set_rng_state=lambda state: None)
    monkeypatch.setattr(device, "random_module", lambda _: random)
    monkeypatch.setattr(device, "free_memory", lambda _: 1e12)
    monkeypatch.setattr(device, "autocast", lambda _, precision: Autocast(device.DTYPES[precision]))
    monkeypatch.setattr(data.Split, "mean_and_std", (torch.zeros(3), torch.ones(3)))
    with FakeTensorMode(allow_non_fake_inputs=True), Watch() as watch:
        yield watch


def new_training(recipe: str, images: int = 50_000) -> trainer.Training:
    """Build everything that a training needs on the GPU."""
    config = Config.create({"recipe": recipe, "precision": "bfloat16", "small_size": 24})
    network = model.build(config.model, 10, 32)
    for module in network.modules():  # Module.to swaps tensors, which these do not allow
        for tensors in (module._parameters, module._buffers):
            tensors |= {name: on_gpu(tensor) for name, tensor in tensors.items() if tensor is not None}
    split = data.Split(torch.zeros(images, 3, 32, 32, dtype=torch.uint8), torch.zeros(images, dtype=torch.int64))
    batches = data.Batches(split, config, GPU, 10)
    optimizer = optim.build(network, config, batches.steps_per_epoch)
    return trainer.Training(network.train(), optimizer, batches)


def on_gpu(tensor: Tensor) -> Tensor:
    layout = torch.channels_last if tensor.ndim == 4 else torch.contiguous_format
    copy = tensor.detach().to(GPU).contiguous(memory_format=layout)
    return nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy


def steps(training: trainer.Training, count: int, image_size: int = 32) -> None:
    """Train for so many steps, as `fit` does between two looks at the clock."""
    criterion = nn.CrossEntropyLoss(label_smoothing=0.2)
    order = torch.arange(count * training.batches.config.batch_size, device=GPU)
    for batch in training.batches._augmented(order, 1, image_size):
        results = trainer.train_step(training.network, training.optimizer, batch, criterion, "bfloat16")
        training.record_step(batch, *results)


def test_a_step_starts_at_most_200_operations_and_waits_for_none(fake_gpu):
    training = new_training("fast")
    steps(training, 1)  # makes the optimizers' states
    training.optimizer.set_step(200)  # freezes the whitening bias
    for image_size in (32, 24):
        fake_gpu.clear()
        steps(training, 2, image_size)  # .item() and nonzero() of a tensor without values raise an error
        assert 100 < fake_gpu.launches.total() / 2 <= 200  # two batches are augmented together
        assert not fake_gpu.copies.total()


def test_a_training_resumes_on_the_gpu_from_what_was_read_to_the_cpu(fake_gpu):
    first, second = new_training("fast"), new_training("fast")
    steps(first, 1)
    second.load_state_dict(tree_map_only(FakeTensor, lambda tensor: tensor.cpu(), first.state_dict()))
    assert (second.step, second.optimizer.steps) == (1, 1)
    assert (second.losses.device, second.correct.device) == (GPU, GPU)
    kept, restored = (tree_leaves(training.optimizer.state_dict()["optimizers"]) for training in (first, second))
    kinds = [
        [(leaf.shape, leaf.stride(), leaf.dtype, leaf.device) for leaf in leaves if isinstance(leaf, Tensor)]
        for leaves in (kept, restored)
    ]
    assert len(kinds[0]) == 6 + 8  # of the convolutions; of the head and the biases
    assert kinds[0] == kinds[1]
    steps(second, 1)


def test_evaluation_on_the_gpu_returns_logits_on_the_cpu(fake_gpu):
    network, images = new_training("fast").network, torch.zeros(4500, 3, 32, 32, dtype=torch.uint8)
    fake_gpu.clear()
    logits = evaluate.infer(network, images, precision="bfloat16")
    assert (logits.shape, logits.dtype, logits.device.type) == ((4500, 10), torch.float32, "cpu")
    assert fake_gpu.copies.total() == 4  # three batches to the GPU, and all logits back


def test_a_gpu_that_pytorch_cannot_use_is_said_at_the_start(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(device, "unused_gpu", lambda: "its driver is too old")
    for name, is_said in (("auto", True), ("cpu", False)):
        pipeline.prepare(quick_config(tmp_path, device=name))
        assert ("Training on the CPU: its driver is too old." in capsys.readouterr().out) == is_said


# On a card


@pytest.fixture
def train_on_card(make_run):
    settings = {"recipe": "fast", "device": "cuda", "epochs": 4, "deterministic": "on"}
    return lambda **changes: make_run(**settings | changes)


@pytest.fixture
def card_config(digits) -> Config:
    return datasets.resolve(Config.create({"recipe": "fast", "dataset": "digits", "device": "cuda"}), digits)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
class TestCard:
    def test_the_same_seed_repeats_bit_for_bit_if_it_is_asked_to(self, train_on_card):
        one, two = (checkpoint.load(train_on_card().checkpoints / "last.pt")["weights"] for _ in range(2))
        assert all(torch.equal(one[name], two[name]) for name in one)

    @pytest.mark.parametrize("precision", ["auto", "float16", "float32"])
    def test_a_network_learns_in_each_precision(self, train_on_card, precision):
        run = train_on_card(precision=precision, deterministic="off")
        assert run.record.device == "cuda"
        assert run.history()[-1].val_accuracy > 0.8

    def test_a_compiled_network_learns(self, train_on_card):
        assert train_on_card(compile="default").history()[-1].val_accuracy > 0.8

    def test_no_step_waits_for_the_gpu(self, card_config, digits):
        training = bench.training_steps(card_config, digits, 32)
        next(training)
        try:
            torch.cuda.set_sync_debug_mode("error")
            next(training)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_the_profile_names_kernels(self, card_config, digits):
        step = bench.profile(card_config, digits)["image_sizes"][32]
        assert 100 < sum(kernel["calls"] for kernel in step["kernels"]) < 400
