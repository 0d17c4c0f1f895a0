"""One run: create or resume it, then train, evaluate, visualize and report."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cifar import analysis, bench, console, datasets, device, evaluate, model, pretrained, runs, tracking, trainer
from cifar.config import DATASETS, LOCATIONS, MAX_IMAGE_SIZE, STAGES, Config, flag
from cifar.data import Dataset
from cifar.errors import UsageError, UserError
from cifar.records import ModelRecord
from cifar.runs import Run


def create(config: Config) -> tuple[Run, Dataset]:
    """Find the dataset, adapt the settings to it, and make the run's directory.

    Of several processes all must call it; rank 0 downloads, decides and writes.
    Raises UserError for a setting that does not fit the machine or the dataset, if the dataset or the network is not
    available, or if the directory cannot be made.
    """
    started = time.perf_counter()
    console.log_to(None)  # an earlier run's log has ended
    config, dataset = prepare(config)
    if config.minutes is not None:
        config = device.broadcast_object(bench.plan_epochs(config, dataset) if device.rank() == 0 else None)
    run = create_run(config, dataset) if device.rank() == 0 else None
    if run:
        run.update(note=dataset.note, seconds={"data": round(time.perf_counter() - started, 3)})
    return device.broadcast_object(run), dataset


def prepare(config: Config) -> tuple[Config, Dataset]:
    """Find the dataset and adapt the settings to it.

    For pretrained weights a folder's images have the size that they expect, unless --image-size names another.
    """
    device.require_precision(config.precision, device.choose(config.device))
    if config.device == "auto" and (problem := device.unused_gpu()):
        console.banner(f"Training on the CPU: {problem}. `{STAGES} doctor` says what to do.")
    model.require(config.model, config.is_pretrained)
    if config.weights and not Path(config.weights).is_file():
        raise UserError(f"cannot read {config.weights}: there is no such file")
    tracking.require(config.track)
    if config.is_pretrained and config.dataset not in DATASETS and "image_size" not in config.model_fields_set:
        config = config.replace(image_size=min(MAX_IMAGE_SIZE, pretrained.preprocessing(config.model).size))
    if device.rank() == 0:
        datasets.check_output_dir(config)
        runs.check_writable(config.output_dir)
        dataset = datasets.of_config(config)
    device.broadcast_object(None)  # the others wait for a download
    if device.rank():
        dataset = datasets.of_config(config)
    if dataset.test_files:  # a folder's: of other datasets, training must not open the test split
        datasets.say_class_sizes(dataset)
    return datasets.resolve(config, dataset), dataset


def create_run(config: Config, dataset: Dataset) -> Run:
    """Make the run's directory, with its settings and what is known before training."""
    hardware = device.choose(config.device)
    image_size = dataset.train.image_size
    network = model.build(config.model, len(dataset.classes), image_size, config.is_pretrained)
    if config.is_pretrained:  # a mistake in the weights is reported before there is a directory
        pretrained.load(trainer.new_network(config, dataset.train, len(dataset.classes)), config)
    layers = model.layers(network, image_size)
    return runs.create(
        config,
        device=hardware.type,
        hardware=device.describe(hardware),
        precision=device.resolve_precision(config.precision, hardware),
        threads=torch.get_num_threads(),
        processes=device.world_size(),
        seed=config.seed,
        dataset={"name": dataset.name, "train_sha256": dataset.train.sha256(), "classes": list(dataset.classes)},
        model=ModelRecord(
            name=config.model,
            parameters=sum(parameter.numel() for parameter in network.parameters()),
            multiply_adds=sum(layer.multiply_adds for layer in layers),
            layers=layers,
        ).model_dump(),
    )


def resume(name: str, given: Mapping[str, Any]) -> tuple[Run, Dataset]:
    """Find the run of that name, or for "" the newest that did not complete, and its dataset.

    given: the settings that the command line names, of which only locations are allowed, and the run's own --model,
    with which the user allows a network's code from elsewhere.
    Raises UserError if there is no such run, or if its settings or images have changed.
    """
    others = [field for field, value in given.items() if value is not None and field not in (*LOCATIONS, "model")]
    if others:
        raise UsageError(f"--resume takes the settings of the run: leave out {', '.join(map(flag, others))}")
    console.log_to(None)
    output_dir = Config.create({field: given.get(field) for field in LOCATIONS}).output_dir
    run = device.broadcast_object(runs.find_resumable(output_dir, name) if device.rank() == 0 else None)
    run.allow_model(given.get("model"))
    run.check_dataset(Path(run.config.dataset).name)  # config.json may have been edited
    dataset = datasets.of_run(run, given.get("data_dir"), given.get("mirror"))
    record = run.record
    if record.status != "completed":
        if record.threads and record.processes == device.world_size() and not device.user_sets_threads():
            torch.set_num_threads(record.threads)  # another number of threads sums in another order
        _report_differences(run)
    return run, dataset


def _report_differences(run: Run) -> None:
    """Say in which ways the machine or the program differs from what has trained so far; none prevents resuming."""
    record, provenance = run.record, runs.provenance()
    hardware = device.choose(run.config.device)
    has_comparable_threads = hardware.type == "cpu" and record.processes == device.world_size()
    then_and_now = {
        "hardware": (record.hardware, device.describe(hardware)),
        "precision": (record.precision, device.resolve_precision(run.config.precision, hardware)),
        "processes": (record.processes, device.world_size()),
        "number of threads": (record.threads if has_comparable_threads else None, torch.get_num_threads()),
        "PyTorch": ((record.versions or {}).get("torch"), provenance["versions"]["torch"]),
        "commit": (record.commit, provenance["commit"]),
    }
    for name, (then, now) in then_and_now.items():
        if then is not None and then != now:
            console.say(f"{name} was {then} and is {now}: the results can differ from an uninterrupted run's")


def run_stages(run: Run, dataset: Dataset) -> None:
    """Train, evaluate, visualize and report, all in the run's directory. Of several processes, all train."""
    is_complete = run.is_complete() and run.metrics.can_be_of(dataset.test.sha256())
    is_complete, is_trained = device.broadcast_object((is_complete, run.record.status == "completed"))
    if is_complete:
        console.say(f"{run.path.name} is complete: there is nothing to resume")
        return
    if device.rank():
        if not is_trained:
            trainer.fit(run, dataset)
        return

    with run.lifetime(), device.lost_process_errors():
        dataset.verify()
        if not is_trained:
            with run.stage("train"):
                trainer.fit(run, dataset)
        from cifar import report, visualize  # Matplotlib would keep the first step waiting

        with run.stage("evaluate"):
            evaluation = evaluate.evaluate(run, dataset, run.config.device)
            analysis.write(run, dataset, evaluation)
        report.show_metrics(evaluation.metrics)
        tracking.log_metrics(run, evaluation.metrics)
        with run.stage("visualize"):
            visualize.visualize(run, dataset)
        with run.stage("report"):
            report.write(run, dataset)
    report.show_run(run)
