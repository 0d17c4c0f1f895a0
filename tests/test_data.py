import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.utils.class_weight import compute_class_weight
from torchvision.transforms import v2 as transforms
from torchvision.transforms.v2 import functional as reference

from cifar import data
from cifar.config import Config
from image_files import picture, random_images


def numbered(count: int, size: int = 8) -> data.Split:
    """Random images, each of which is a class."""
    return data.Split(random_images(count, size), torch.arange(count))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_batches(split: data.Split, seed: int = 0, **settings) -> data.Batches:
    none = {"crop": 0, "crop_mode": "reflect", "flip": "none"}
    config = Config(**{"recipe": "convnet", "epochs": 4, "batch_size": 10, "seed": seed, **none, **settings})
    return data.Batches(split, config, torch.device("cpu"), len(split))


def test_the_hash_changes_with_one_pixel_or_label():
    split, changed = numbered(3), random_images(3)
    changed[2, 1, 4, 4] ^= 1
    others = data.Split(changed, split.labels), data.Split(split.images, torch.tensor([0, 1, 1]))
    assert len({split.sha256(), *(other.sha256() for other in others)}) == 3


def test_mean_and_standard_deviation_are_those_of_all_pixels():
    images = random_images(50)
    mean, std = data.Split(images, torch.zeros(50)).mean_and_std
    pixels = images.numpy().transpose(1, 0, 2, 3).reshape(3, -1) / 255
    np.testing.assert_allclose(mean, pixels.mean(1), atol=1e-6)
    np.testing.assert_allclose(std, pixels.std(1), atol=1e-6)


def test_real_cifar10_has_its_published_statistics(real_cifar10):
    mean, std = real_cifar10.train.mean_and_std
    np.testing.assert_allclose(mean, (0.4914, 0.4822, 0.4465), atol=5e-5)
    np.testing.assert_allclose(std, (0.2470, 0.2435, 0.2616), atol=5e-5)
    assert real_cifar10.test.labels.bincount().tolist() == [1000] * 10


# Splitting


def test_the_validation_split_has_its_share_of_each_class_and_a_seed_draws_the_images_it_always_drew():
    labels = torch.arange(3).repeat_interleave(torch.tensor([3, 6, 9]))
    train, val = data.train_val_split(data.Split(torch.zeros(18, 3, 1, 1), labels), 6, seed=0)
    assert val.labels.bincount().tolist() == [1, 2, 3]
    assert val.rows.tolist() == [14, 11, 8, 3, 13, 0]  # on which earlier versions chose temperatures
    assert sorted([*train.rows.tolist(), *val.rows.tolist()]) == [*range(18)]


@pytest.mark.parametrize("own_val", [0, 37])
def test_no_validation_leaves_all_images_to_training(digits, own_val):
    split = data.Split(digits.train.images, digits.train.labels, own_val=own_val)
    assert [len(part) for part in data.train_val_split(split, 0, seed=0)] == [1437, 0]


# Augmenting


@pytest.mark.parametrize(("mode", "numpy_mode"), [("reflect", "reflect"), ("zeros", "constant")])
def test_each_crop_is_a_window_of_the_padded_image(mode, numpy_mode):
    split = numbered(200)
    (batch,) = make_batches(split, crop=2, crop_mode=mode, batch_size=200).epoch(1)
    crops = (batch.images * 255).round().to(torch.uint8).numpy()
    padded = np.pad(split.images[batch.indices].numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)), numpy_mode)
    seen = set()
    for crop, around in zip(crops, padded):
        places = [(y, x) for y in range(5) for x in range(5) if np.array_equal(around[:, y : y + 8, x : x + 8], crop)]
        assert len(places) == 1
        seen.update(places)
    assert len(seen) == 25


def test_with_a_crop_scale_training_images_are_resized_crops_of_which_no_two_are_alike():
    image = random_images(1, size=64)
    split = data.Split(image.expand(20, -1, -1, -1).contiguous(), torch.arange(20))
    for batch in make_batches(split, crop_scale=0.3).epoch(1):
        whole = data.to_float(split.images[batch.indices])
        assert batch.images.shape == whole.shape
        assert (batch.images != whole).flatten(1).any(1).sum() >= 9
        assert len({image.numpy().tobytes() for image in batch.images}) == len(batch.images)
        assert batch.images.mean((1, 2, 3)).sub(whole.mean((1, 2, 3))).abs().max() < 0.1  # of the same image


def test_the_crop_scale_is_the_minimum_fraction_of_the_area():
    ramp = (torch.arange(64) * 4).to(torch.uint8).expand(100, 3, 64, 64).contiguous()
    (batch,) = make_batches(data.Split(ramp, torch.arange(100)), crop_scale=0.9, batch_size=100).epoch(1)
    values = batch.images[:, 0, 32]
    assert (values.amax(1) - values.amin(1)).min() > 0.75  # a width of at least the root of 0.9 * 3 / 4


def by_label(batches: data.Batches, epoch: int) -> dict[int, torch.Tensor]:
    return {int(label): image for batch in batches.epoch(epoch) for image, label in zip(batch.images, batch.labels)}


def test_alternating_flip_flips_each_image_in_every_other_epoch():
    split = numbered(100)
    batches = make_batches(split, flip="alternating")
    epochs = [by_label(batches, epoch) for epoch in (1, 2, 3)]
    as_is = sum(torch.equal(epochs[0][n], data.to_float(split.images)[n]) for n in range(100))
    assert 30 < as_is < 70
    for n in range(100):
        assert torch.equal(epochs[1][n], epochs[0][n].flip(-1))
        assert torch.equal(epochs[2][n], epochs[0][n])


def test_random_flip_draws_again_in_each_epoch():
    batches = make_batches(numbered(100), flip="random")
    first, second = by_label(batches, 1), by_label(batches, 2)
    assert 30 < sum(torch.equal(first[n], second[n]) for n in range(100)) < 70


def test_color_jitter_scales_as_torchvision_does():
    images = data.to_float(random_images(5))
    factors = torch.empty(3, 5).uniform_(0.6, 1.4, generator=generator(3))
    jittered = data.color_jitter(images, factors)
    for image, expected, (brightness, contrast, saturation) in zip(jittered, images, factors.T.tolist()):
        expected = reference.adjust_brightness(expected, brightness)
        expected = reference.adjust_contrast(expected, contrast)
        expected = reference.adjust_saturation(expected, saturation)
        torch.testing.assert_close(image, expected, atol=2e-3, rtol=0)


def test_color_jitter_is_drawn_up_to_its_setting_in_both_directions():
    grey = data.Split(torch.full((200, 3, 8, 8), 120, dtype=torch.uint8), torch.arange(200))
    (batch,) = make_batches(grey, jitter=0.4, batch_size=200).epoch(1)
    brightness = batch.images[:, 0, 0, 0] * 255 / 120  # contrast and saturation change nothing in a grey image
    assert 0.6 <= brightness.min() < 0.65
    assert 1.35 < brightness.max() <= 1.4


def test_cutout_fills_one_square_of_each_image_anywhere_within_it_with_the_mean_color():
    split = data.Split((20 + torch.rand(400, 3, 8, 8) * 200).to(torch.uint8), torch.arange(400))
    (batch,) = make_batches(split, cutout=3, batch_size=400).epoch(1)
    color = split.mean_and_std[0]
    corners = set()
    for image, before in zip(batch.images, data.to_float(split.images[batch.indices])):
        rows, columns = (image != before).any(0).nonzero().T
        (top, bottom), (left, right) = (rows.min(), rows.max()), (columns.min(), columns.max())
        assert (bottom - top, right - left) == (2, 2)
        assert image[:, top : bottom + 1, left : right + 1].equal(color.view(3, 1, 1).expand(3, 3, 3))
        assert (image != before).any(0).sum() == 9
        corners.add((int(top), int(left)))
    assert corners == {(row, column) for row in range(6) for column in range(6)}


def test_a_transform_of_torchvision_is_drawn_by_the_seeds_alone():
    transform = transforms.RandAugment()
    images, seeds = random_images(40, size=32), torch.arange(20).repeat_interleave(2)
    torch.manual_seed(5)
    augmented = data.transform_by_seed(transform, images, seeds)
    after = torch.rand(1)
    for seed in range(20):
        torch.manual_seed(seed)
        pair = slice(2 * seed, 2 * seed + 2)
        assert torch.equal(augmented[pair], transform(images[pair]))
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), after)
    assert sum((image != before).any() for image, before in zip(augmented, images)) > 10


def test_batches_augment_few_neighbours_alike_with_new_operations_in_each_epoch():
    image = random_images(1, size=32)
    split = data.Split(image.expand(80, -1, -1, -1).contiguous(), torch.arange(80))
    batches = make_batches(split, auto_augment="trivialaugment", batch_size=40)
    epochs = [torch.cat([batch.images for batch in batches.epoch(epoch)]) for epoch in (1, 2)]
    kinds = [len({image.numpy().tobytes() for image in shown}) for shown in epochs]
    assert 12 < min(kinds) <= max(kinds) <= 20  # one for each four images
    assert not torch.equal(*epochs)


def test_mixup_adds_each_image_to_the_one_before_in_the_proportion_of_the_targets():
    images, labels, one_hot = torch.rand(3, 3, 8, 8), torch.arange(3), torch.eye(3, 4)
    mixed, targets = data.mix(images, labels, 4, mixup=1.0, cutmix=0.0, seed=3)
    share = targets[1, 1]
    assert 0.02 < share < 0.98
    torch.testing.assert_close(targets, share * one_hot + (1 - share) * one_hot.roll(1, 0))
    torch.testing.assert_close(mixed, share * images + (1 - share) * images.roll(1, 0))


def test_cutmix_pastes_a_rectangle_of_the_image_before_whose_area_is_its_share_of_the_targets():
    images, labels = torch.rand(3, 3, 16, 16), torch.arange(3)
    mixed, targets = data.mix(images, labels, 3, mixup=0.0, cutmix=1.0, seed=3)
    pasted = (mixed != images).any(1)
    assert 2 < pasted[0].sum() < 254
    assert torch.equal(mixed, torch.where(pasted[:, None], images.roll(1, 0), images))
    assert torch.equal(pasted[0], pasted[1])
    torch.testing.assert_close(targets, torch.eye(3) + pasted[0].sum() / 256 * (torch.eye(3).roll(1, 0) - torch.eye(3)))


def test_mixup_and_cutmix_together_take_turns():
    images, labels = torch.rand(2, 3, 16, 16), torch.arange(2)
    mixed = [data.mix(images, labels, 2, mixup=1.0, cutmix=1.0, seed=seed)[0] for seed in range(40)]
    pasted = [bool(((one == images) | (one == images.flip(0))).all()) for one in mixed]
    assert 8 < sum(pasted) < 32


def test_resize_averages_as_pillow_does():
    images = random_images(3, size=32)
    resized = data.resize(data.to_float(images), 24)
    for image, before in zip(resized, images):
        pillow = picture(before).resize((24, 24), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(image.permute(1, 2, 0) * 255, np.asarray(pillow), atol=1.5)


# Batches


def images_of(batches: data.Batches, epoch: int) -> torch.Tensor:
    return torch.cat([batch.images for batch in batches.epoch(epoch)])


def test_an_epoch_shows_each_image_once_but_for_an_incomplete_last_batch():
    split = numbered(95)
    batches = make_batches(split)
    for epoch in (1, 2):
        shown = list(batches.epoch(epoch))
        indices = torch.cat([batch.indices for batch in shown])
        assert len(shown) == len(batches) == batches.steps_per_epoch[epoch - 1] == 9
        assert len(indices) == len(set(indices.tolist())) == 90
        for batch in shown:
            assert torch.equal(batch.labels, split.labels[batch.indices])
            assert torch.equal((batch.images * 255).round().to(torch.uint8), split.images[batch.indices])


def test_the_last_epochs_take_the_images_of_the_highest_loss():
    batches = make_batches(numbered(95), epochs=4, hard_epochs=1, hard_share=0.33)
    losses, seen = torch.randperm(95, generator=generator()).float(), set()
    for batch in batches.epoch(3):
        batches.image_losses[batch.indices] = losses[batch.indices]
        seen.update(batch.indices.tolist())
    assert batches.steps_per_epoch == [9, 9, 9, 3]
    shown = torch.cat([batch.indices for batch in batches.epoch(4)]).tolist()
    hardest = sorted(seen, key=lambda index: -losses[index])[:25]
    assert set(shown) == {*range(95)} - seen | {*hardest}  # 5 were never seen


def test_class_weights_are_those_that_scikit_learn_calls_balanced():
    labels = torch.tensor([0] * 6 + [1] * 3 + [2])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels.numpy())
    np.testing.assert_allclose(data.class_weights(labels, 3), expected, rtol=1e-6)


def test_balanced_sampling_draws_all_classes_alike_also_of_the_hardest_images():
    labels = torch.tensor([0] * 900 + [1] * 90 + [2] * 10)
    batches = make_batches(data.Split(random_images(1000), labels), balance="sampling", hard_epochs=1, hard_share=0.5)
    shown = torch.cat([batch.labels for batch in batches.epoch(1)])
    assert len(shown) == 1000
    assert (shown.bincount() - 333).abs().max() < 75  # five standard deviations
    batches.image_losses = torch.arange(1000).float()  # the last half is the hardest: 400, 90 and 10 of the classes
    hard = [(batch.indices, batch.labels) for batch in batches.epoch(4)]
    indices, labels = map(torch.cat, zip(*hard))
    assert (len(indices), indices.min() >= 500) == (500, True)
    assert (labels.bincount() - 167).abs().max() < 53  # five standard deviations


def test_the_first_epochs_are_small():
    batches = make_batches(numbered(20, size=32), small_epochs=1, small_size=24)
    assert [images_of(batches, epoch).shape[-1] for epoch in (1, 2)] == [24, 32]


SETTINGS = {"crop": 2, "flip": "random", "jitter": 0.2, "cutout": 9, "auto_augment": "randaugment"}
SETTINGS |= {"mixup": 0.5, "cutmix": 1.0}


def test_batches_follow_their_generator_alone():
    split = numbered(100, size=32)

    def everything(seed):
        torch.manual_seed(np.random.default_rng().integers(2**31).item())
        return images_of(make_batches(split, seed, **SETTINGS), 1)

    assert torch.equal(everything(1), everything(1))
    assert not torch.equal(everything(1), everything(2))


@pytest.mark.parametrize("crop_scale", [None, 0.5])
def test_an_epoch_resumes_in_the_middle_with_the_batches_that_were_left(crop_scale):
    split = numbered(100, size=32)
    settings = {**SETTINGS, "crop_scale": crop_scale, "epochs": 4, "hard_epochs": 1, "hard_share": 0.5}

    def train_on(batches, epoch, steps=99, skip=0):
        shown = []
        for batch, _ in zip(batches.epoch(epoch, skip=skip), range(steps)):
            batches.image_losses[batch.indices] = batch.images.mean((1, 2, 3))
            shown.append(batch.images)
        return shown

    batches = make_batches(split, **settings)
    for epoch in (1, 2, 3):
        train_on(batches, epoch)
    shown = batches.epoch(4)
    for _ in range(2):
        batch = next(shown)
        batches.image_losses[batch.indices] = 99.0  # does not change what this epoch takes
    saved = {name: value.clone() for name, value in batches.state_dict().items()}
    rest = [batch.images for batch in shown]
    resumed = make_batches(split, 5, **settings)
    resumed.first_flip = batches.first_flip
    resumed.load_state_dict(saved)
    again = train_on(resumed, 4, skip=2)
    assert len(rest) == len(again) == 3
    assert all(map(torch.equal, again, rest))
    assert torch.equal(resumed.generator.get_state(), batches.generator.get_state())
