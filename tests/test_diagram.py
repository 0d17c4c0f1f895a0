import itertools
import json
from dataclasses import asdict

import pytest

from cifar import diagram, model
from cifar.config import MODELS
from drawn import boxes, figures
from handmade import LAYERS, make_dataset, make_run


@pytest.mark.parametrize("name", MODELS)
def test_the_blocks_hold_every_layer_once_and_fit_a_page(name):
    layers = json.loads(json.dumps([asdict(layer) for layer in model.layers(model.build(name, 10, 32), 32)]))
    blocks = diagram._blocks(layers)
    assert sum(block["parameters"] for block in blocks) == sum(layer["parameters"] for layer in layers)
    assert sum(block["multiply_adds"] for block in blocks) == sum(layer["multiply_adds"] for layer in layers)
    assert blocks[-1]["shape"] == "10"
    assert len({block["name"] for block in blocks}) == len(blocks) <= 12
    network = {"name": name, "parameters": 1_234_567, "multiply_adds": 89_000_000, "layers": layers}
    figure = diagram.architecture(network, "fast on digits")
    assert figure.get_suptitle().endswith("1,234,567 parameters, 89.0 million multiply-adds an image")
    drawn = boxes(figure, figure.axes[0].texts)
    assert not any(first.overlaps(second) for first, second in itertools.combinations(drawn, 2))
    for axes in figure.axes:
        assert all(box.x1 < axes.bbox.x1 for box in boxes(figure, axes.texts))


def test_layers_are_grouped_by_their_dotted_names():
    names = ["normalize", "stem.0", "stem.1", "stages.0.0.conv1.0", "stages.0.0.shortcut.0", "stages.0.1.norm2"]
    names += ["blocks.0.0.0", "blocks.0.2", "groups.1.conv1", "groups.1.pool", "head"]
    layers = [{**LAYERS[0], "name": name} for name in names]
    blocks = diagram._blocks(layers)
    expected = ["normalize", "stem", "stages.0.0", "stages.0.1", "blocks.0", "groups.1", "head"]
    assert [block["name"] for block in blocks] == expected
    assert blocks[1]["steps"] == "Conv2d → Conv2d"
    assert blocks[2]["steps"] == "Conv2d  +  shortcut Conv2d"
    assert (blocks[1]["shape"], blocks[1]["parameters"]) == ("4x8x8", 216)


def test_the_architecture_has_each_blocks_costs(tmp_path):
    _, parameters, work = figures(make_run(tmp_path), make_dataset())["architecture"].axes
    assert [bar.get_width() for bar in parameters.patches] == [108, 771]
    assert [text.get_text() for text in work.texts] == ["6,912", "768"]


def test_a_block_of_very_many_layers_names_the_first_and_counts_all():
    layer = {"kind": "BatchNorm2d", "output_shape": (8, 4, 4), "parameters": 1, "multiply_adds": 2}
    (block,) = diagram._blocks([{**layer, "name": f"features.dense{n}.norm"} for n in range(400)])
    assert block["steps"] == " → ".join(["BatchNorm2d"] * 6) + " → …, 400 layers"
    assert (block["parameters"], block["multiply_adds"]) == (400, 800)
