"""Networks for torch.hub: `torch.hub.load("OWNER/REPOSITORY", "fast")`."""

from torch import nn

dependencies = ["torch", "torchvision", "numpy", "scipy", "PIL", "joblib", "pydantic", "rich", "httpx"]


def fast(pretrained: bool = True) -> nn.Module:
    """The network of the recipe `fast` for CIFAR-10: float images (N, 3, 32, 32) in 0..1 to logits (N, 10).

    pretrained: with the weights that come with this repository, in evaluation mode; otherwise with random ones, in
    training mode.
    """
    from cifar import evaluate, model, runs

    run = runs.Run(runs.SHIPPED / "fast")
    classes = run.dataset.classes
    if not pretrained:
        return model.build(run.config.model, len(classes), 32)
    return evaluate.load_network(run, classes)[0].eval()
