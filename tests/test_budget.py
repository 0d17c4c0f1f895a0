import json
import time

import pytest

from cifar import budget, datasets, evaluate, seeds, train
from cifar.errors import UserError
from conftest import quick_config

SECONDS = {24: 10.0, 32: 20.0}


@pytest.mark.parametrize(
    ("seconds", "small_share", "plan"),
    [
        (19, 0.5, (0, 0)),
        (25, 0.5, (1, 0)),
        (35, 0.5, (2, 1)),  # 10 + 20
        (50, 0.5, (3, 1)),  # 10 + 40, nearer than 20 + 20
        (49, 0.5, (3, 2)),
        (60, 0.0, (3, 0)),
        (95, 0.6, (6, 3)),  # 30 + 60, nearer than 40 + 40; the seven of 4.2 small ones would take 40 + 60
        (100, 0.6, (7, 4)),
        (1e300, 0.5, (100_000, 50_000)),  # which is the most there is
    ],
)
def test_the_plan_is_the_longest_that_fits_in_the_recipes_proportions(seconds, small_share, plan):
    assert budget.choose(seconds, SECONDS, small_share, lambda epochs: 0.0) == plan


def test_the_epochs_and_the_schedule_fit_the_minutes(digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(budget, "epoch_seconds", lambda config, dataset, side: SECONDS[side])
    config = quick_config(tmp_path, epochs=9, small_epochs=4, hard_epochs=2, minutes=2)
    fitted = budget.fit(config, digits)
    # Of 0.97 * 120 = 116.4 seconds, and shares of 4/9: eight epochs, three of them small, take 130, less 36% of two.
    assert (fitted.epochs, fitted.small_epochs, fitted.hard_epochs, fitted.minutes) == (8, 3, 2, None)
    assert datasets.settle(fitted, digits) == fitted
    expected = (
        "2 minutes are enough for 8 epochs: 3 at 24x24 of 10.0 s, 5 at 32x32 of 20.0 s, "
        "of which the last 2 take 64% of the images\n"
    )
    assert capsys.readouterr().out == expected


def test_a_run_of_some_minutes_has_the_epochs_that_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "epoch_seconds", lambda config, dataset, side: SECONDS[side])
    run, _ = train.begin(quick_config(tmp_path, epochs=9, minutes=1))
    assert (run.config.epochs, run.config.minutes) == (2, None)  # of 20 seconds each in 0.97 * 60


def test_too_few_minutes_are_told_with_those_that_it_takes(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "epoch_seconds", lambda config, dataset, side: SECONDS[side])
    with pytest.raises(UserError, match=r"--minutes 0\.2 is too little for one epoch, which takes 0\.34"):
        budget.fit(quick_config(tmp_path, minutes=0.2), digits)


def test_an_epochs_time_is_that_of_its_steps_and_its_validation(digits, tmp_path, monkeypatch):
    sides = []

    def half_a_second_a_step(state, side, *_):
        sides.append(side)
        return {"seconds": 0.5 * len(state.batches)}

    monkeypatch.setattr(train, "train_epoch", half_a_second_a_step)
    monkeypatch.setattr(evaluate, "infer", lambda *_, **__: time.sleep(0.2))
    config = datasets.settle(quick_config(tmp_path, val_size=237), digits)
    # 1,200 of 1,437 images are 20 steps of 60.
    assert 20 * 0.5 + 0.2 <= budget.epoch_seconds(config, digits, 24) < 20 * 0.5 + 5
    assert set(sides) == {24}


def test_seeds_share_the_epochs_that_the_budget_chose_and_a_killed_group_keeps_them(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "epoch_seconds", lambda config, dataset, side: SECONDS[side])
    group = seeds.begin(quick_config(tmp_path, minutes=2, seeds=2))
    assert group.config.epochs == json.loads((group.path / "summary.json").read_text())["config"]["epochs"] == 5
    monkeypatch.setattr(budget, "epoch_seconds", lambda config, dataset, side: SECONDS[side] / 2)
    again = seeds.begin(quick_config(tmp_path, minutes=2, seeds=2))
    assert (again.path, again.config) == (group.path, group.config)
    assert seeds.begin(quick_config(tmp_path, minutes=3, seeds=2)).path != group.path
