"""Layers that need the whole batch, where each process has but its share of it.

torch's SyncBatchNorm is for GPUs alone.
"""

import torch
from torch import Tensor, nn
from torch.autograd import Function

from cifar import distributed

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def convert(network: nn.Module, batch_size: int) -> None:
    """Have the network's BatchNorm and dropout compute as one process would with the whole batch.

    Attention's own dropout stays as it is: each process draws it for its share.
    """
    from torchvision.ops import StochasticDepth

    for module in network.modules():
        if type(module) in _NORMS:
            module.__class__ = BatchNorm
        elif type(module) in (*_DROPOUTS, StochasticDepth):
            module.batch_size = batch_size
            module.__class__ = type(f"Whole{type(module).__name__}", (_Drawing, type(module)), {})


class _Drawing:
    """Draws for the whole batch, as all processes do from equal generators, and takes what is for its share."""

    batch_size: int

    def forward(self, features: Tensor) -> Tensor:
        if not self.training or distributed.size() == 1:
            return super().forward(features)
        shape = features.shape[1:]
        if not isinstance(self, nn.Dropout):  # whole channels or images
            shape = (*shape[:1], *[1] * len(shape[1:]))
        noise = super().forward(features.new_ones(self.batch_size, *shape))
        return features * noise[distributed.share(self.batch_size)]


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm with the mean and variance of the whole batch."""

    def _check_input_dim(self, features: Tensor) -> None:
        pass

    def forward(self, features: Tensor) -> Tensor:
        is_training = self.training or self.running_mean is None
        if distributed.size() == 1 or not is_training:
            return super().forward(features)
        mean, variance, count = _statistics(features.detach())
        if self.training and self.running_mean is not None:
            self.num_batches_tracked += 1
            momentum = self.momentum if self.momentum is not None else 1 / self.num_batches_tracked.item()
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), momentum)
        return _Normalized.apply(features, self.weight, self.bias, mean, variance, count, self.eps)


def _statistics(features: Tensor) -> tuple[Tensor, Tensor, float]:
    """Mean and biased variance of each channel over the batches of all processes, and the values they are of.

    float32, however the features are; joined in float64, as the difference of two means of squares.
    """
    precise = torch.promote_types(features.dtype, torch.float32)
    scratch = [features.new_zeros(features.shape[1], dtype=precise) for _ in range(2)]  # makes torch compute so
    mean, variance = torch.batch_norm_update_stats(features, *scratch, 1.0)
    count = features.numel() / features.shape[1]
    moments = torch.stack([mean.new_ones(mean.shape), mean, variance]).double()
    moments[2] += moments[1].square()
    counts, mean, square = distributed.add_up(moments.mul_(count))
    mean, square = mean / counts, square / counts
    return mean.to(precise), (square - mean.square()).to(precise).clamp_(min=0), counts[0].item()


class _Normalized(Function):
    """(features - mean) / deviation * weight + bias, differentiated as if mean and variance were computed in it.

    By the passes over the features that torch's own takes, and one more on the way back: a fifth of BatchNorm's time.
    """

    @staticmethod
    def forward(context, features, weight, bias, mean, variance, count, eps):
        context.save_for_backward(features, weight, mean, variance)
        context.count, context.eps = count, eps
        return torch.native_batch_norm(features, weight, bias, mean, variance, False, 0.0, eps)[0]

    @staticmethod
    def backward(context, gradient):
        features, weight, mean, variance = context.saved_tensors
        gradient, for_weight, for_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, features, weight, mean, variance, None, None, False, context.eps, [True, True, True]
        )
        sums = distributed.add_up(torch.stack([for_weight, for_bias]))
        through = -(variance + context.eps).rsqrt() / context.count * sums
        if weight is not None:
            through = through * weight
        # Through variance and mean, which are of all processes' features.
        gradient += torch.native_batch_norm(features, *through.unbind(), mean, variance, False, 0.0, context.eps)[0]
        return gradient, for_weight if weight is not None else None, for_bias, None, None, None, None
