"""Train, evaluate and explain image classifiers on CIFAR-10, CIFAR-100, digits or a folder of images."""
