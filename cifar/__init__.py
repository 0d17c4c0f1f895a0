"""Train, evaluate and explain image classifiers on CIFAR-10, CIFAR-100, digits or a folder of images."""

import os

# GNU OpenMP's threads wait for each other in a loop, by default for milliseconds, which stops a core that another
# program wants: beside two busy programs `convnet` trains 76 images a second on two cores, and 540 with this number of
# rounds, at the same 5,500 where nothing else runs. Read when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
