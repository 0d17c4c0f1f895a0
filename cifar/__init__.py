"""Train, evaluate and explain image classifiers on CIFAR-10, CIFAR-100, digits or a folder of images.

The Python interface is `load` and `train`. It prints nothing, and raises `errors.UserError` for what the user can fix.
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from cifar.predict import Predictor
    from cifar.runs import Run

__version__ = "1.0.0"

# GNU OpenMP's threads wait for each other in a loop, by default for milliseconds, which stops a core that another
# program wants: beside two busy programs `convnet` trains 76 images a second on two cores, and 540 with this number of
# rounds, at the same 5,500 where nothing else runs. Read when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def load(
    run: "Run | Path | str" = "fast", *, model: str | None = None, device: str = "auto", output_dir: str | None = None
) -> "Predictor":
    """Load a network that predicts; its methods are `predict` and `probabilities`.

    run: what `train` returns, a run's directory, or its name in `output_dir`. "fast" comes with this package and knows
    the classes of CIFAR-10. model: the run's network, if that is package.module:factory, whose code may then run.
    Raises UserError if there is no such run, or it has not been evaluated.
    """
    from cifar import predict, runs
    from cifar.config import Config
    from cifar.errors import UserError

    config = Config.create({"device": str(device), "output_dir": output_dir})
    if run == "":
        raise UserError("the run needs a name or a path")
    found = run if isinstance(run, runs.Run) else runs.find(config.output_dir, os.path.expanduser(str(run)))
    found.allow_model(model)
    return predict.Predictor(found, config.device)


def train(
    recipe: str | None = None,
    dataset: str | None = None,
    epochs: int | None = None,
    *,
    config: str | None = None,
    verbose: bool = False,
    **settings: Any,
) -> "Run":
    """Train, evaluate, and draw figures and report into a new run directory, as `python main.py` does; returns the run.

    recipe: by default "fast" or, if there is one, that of `model`. settings: those of `python main.py --help`, with
    underscores. config: a file with more of them. verbose: print what the command prints; otherwise, `run.record.note`
    has what must not be overlooked, and `run.config` the settings as they were adapted to the dataset.
    Raises UserError for a setting that is invalid or does not fit, and KeyboardInterrupt, saved, for Ctrl-C.
    """
    from cifar import console
    from cifar.config import Config
    from cifar.errors import UserError
    from cifar.flags import load_settings

    given = load_settings({"recipe": recipe, "dataset": dataset, "epochs": epochs, **settings}, config)
    checked = Config.create(given)
    if checked.seeds > 1:
        raise UserError("train() makes one run: call it with seed=0, seed=1 and so on instead of seeds")
    if verbose:
        console.escape_unencodable()
    with console.silenced(not verbose):
        from cifar import pipeline

        run, found = pipeline.create(checked)
        pipeline.run_stages(run, found)
    return run
