import os
from pathlib import Path

import pytest
import torch

from cifar import cache, data
from cifar.config import Config
from cifar.data import Split
from cifar.errors import UserError
from image_files import random_images


def make(place: Path, images: torch.Tensor) -> Split:
    """Write images to a cache, for training and testing, and map them."""
    place.mkdir()
    digests = cache.write(place, ((part, image) for part in cache.PARTS for image in images))
    labels = torch.arange(len(images))
    cache.seal(place, digests, dict.fromkeys(cache.PARTS, labels), {})
    return cache.read(place, "train", labels, images.shape[-1], cache.read_about(place))


def test_batches_from_a_file_are_those_from_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_AUGMENTED_TOGETHER", 20)  # several groups, of which the next is prefetched
    images = random_images(90, 33)
    mapped, memory = make(tmp_path / "cache", images), Split(images, torch.arange(90))
    assert mapped.mapping
    assert mapped.sha256() == memory.sha256()
    config = Config(recipe="convnet", epochs=2, batch_size=10)
    shuffled = torch.randperm(90, generator=torch.Generator().manual_seed(0))[:80]
    runs = [data.Batches(split[shuffled], config, torch.device("cpu"), 90) for split in (mapped, memory)]
    shown = [torch.cat([batch.images for batch in batches.epoch(1)]) for batches in runs]
    assert len(shown[0]) == 80
    assert shown[0].equal(shown[1])


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux says how much memory is used")
def test_images_that_have_been_read_do_not_stay_in_memory(tmp_path):
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[2]) * os.sysconf("SC_PAGE_SIZE")  # mapped from files

    split = make(tmp_path / "cache", torch.zeros(1, 3, 384, 384, dtype=torch.uint8).expand(300, -1, -1, -1))  # 133 MB
    next(split.chunks())
    before = resident()
    for _ in split.chunks():
        pass
    for indices in torch.arange(300).split(50):
        split.prefetch(indices)
        split.gather(indices)
    assert resident() - before < 60e6


def test_nothing_is_left_of_a_cache_that_could_not_be_written(tmp_path):
    def images():
        yield "train", torch.zeros(3, 8, 8, dtype=torch.uint8)
        raise UserError("too many damaged files")

    with pytest.raises(UserError, match="too many damaged"):
        cache.write(tmp_path, images())
    assert list(tmp_path.iterdir()) == []
