"""Train and evaluate an image classifier, and write a report: `python main.py --help`."""

import sys

from cifar.main import main

if __name__ == "__main__":
    sys.exit(main())
