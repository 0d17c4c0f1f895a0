"""Train, evaluate and look at image classifiers on CIFAR-10."""
