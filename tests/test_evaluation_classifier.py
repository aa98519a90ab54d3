"""The small classifier: learns, repeats itself, keeps patients apart, and is read back only when it is whole."""

import hashlib
import json

import pytest
import torch

from medart_core.errors import UserError
from medart_core.evaluation import classifier, small_resnet

CLASSES = ("dark", "middle", "bright")


def examples(count: int = 60, side: int = 20, seed: int = 0) -> tuple[torch.Tensor, list[str]]:
    """Noisy images whose brightness is their class."""
    numbers = torch.arange(count) % 3
    noise = torch.randint(0, 60, (count, 3, side, side), generator=torch.Generator().manual_seed(seed))
    return (noise + 80 * numbers.view(-1, 1, 1, 1)).byte(), [CLASSES[number] for number in numbers]


def fit(seed: int = 0, epochs: int = 6) -> classifier.Classifier:
    return classifier.fit(*examples(), classes=CLASSES, seed=seed, epochs=epochs, side=32)


@pytest.fixture(scope="module")
def fitted() -> classifier.Classifier:
    return fit()


def test_it_learns_and_says_how_well(fitted):
    images, labels = examples(30, seed=1)
    assert (fitted.predict(images).argmax(dim=1) == classifier.numbers(labels, CLASSES)).float().mean() > 0.9
    assert fitted.facts["held_out_accuracy"] > 0.8
    assert fitted.facts["images"] + fitted.facts["held_out_images"] == 60


def test_the_same_seed_gives_the_same_weights_whatever_was_drawn_before(fitted):
    before = torch.random.get_rng_state()
    torch.rand(3)
    assert fit().sha256 == fitted.sha256 != fit(seed=1).sha256
    torch.rand(3)
    torch.random.set_rng_state(before)
    small_resnet.build(2, seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_it_gives_per_image(fitted):
    images, _ = examples(5)
    probabilities, features = fitted.predict(images), fitted(images)
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(5))
    assert features.shape == (5, fitted.num_features) and features.dtype == torch.float32
    torch.testing.assert_close(torch.cat([fitted(images[:2]), fitted(images[2:])]), features, rtol=1e-4, atol=1e-5)
    assert fitted.name == "domain-resnet-32"


def test_a_saved_one_is_the_same_and_a_damaged_one_is_refused(fitted, tmp_path):
    path = tmp_path / "new" / "extractor.safetensors"
    fitted.save(path)
    images, _ = examples(5)
    loaded = classifier.Classifier.load(path)
    assert torch.equal(loaded.predict(images), fitted.predict(images))
    assert loaded.classes == CLASSES and loaded.facts["data_sha256"] == fitted.facts["data_sha256"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == fitted.sha256 == loaded.sha256
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"extractor\.safetensors .*fit it again"):
        classifier.Classifier.load(path)
    fitted.save(path)
    record = path.with_suffix(".json")
    record.write_text(json.dumps(json.loads(record.read_text()) | {"classes": ["one"]}))
    with pytest.raises(UserError, match="no classifier"):
        classifier.Classifier.load(path)
    record.unlink()
    with pytest.raises(UserError, match="No such file"):
        classifier.Classifier.load(path)


def test_a_patient_is_on_one_side_of_the_held_out_line():
    labels = ["a"] * 40 + ["b"] * 40
    patients = [f"p{row // 4}" for row in range(80)]
    rows, out = classifier.held_out_rows(labels, patients, seed=0)
    assert sorted([*rows.tolist(), *out.tolist()]) == list(range(80))
    assert not {patients[row] for row in rows} & {patients[row] for row in out}
    assert sum(labels[row] == "a" for row in out) == len(out) / 2 == 8


def test_what_cannot_be_fitted_is_refused():
    images, labels = examples(12)
    with pytest.raises(UserError, match="labelled 'bright', the classes are dark, middle"):
        classifier.fit(images, labels, classes=CLASSES[:2], seed=0)
    with pytest.raises(UserError, match="no image is labelled 'odd'"):
        classifier.fit(images, labels, classes=[*CLASSES, "odd"], seed=0)
    with pytest.raises(UserError, match=r"'dark' has too few images \(2\)"):
        classifier.fit(images[:4], labels[:4], classes=CLASSES, seed=0)
    with pytest.raises(TypeError, match="float32"):
        small_resnet.shrink(images.float())


def test_the_data_hash_knows_pixels_labels_and_their_order():
    images, labels = examples(6)
    hashes = {
        small_resnet.data_sha256(images, labels),
        small_resnet.data_sha256(images.flip(0), labels),
        small_resnet.data_sha256(images, labels[::-1]),
        small_resnet.data_sha256(images + 1, labels),
    }
    assert len(hashes) == 4


def test_batches_are_shrunk_as_one_tensor_is():
    images, _ = examples(7, side=50)
    assert torch.equal(small_resnet.shrink([images[:3].numpy(), images[3:]]), small_resnet.shrink(images))
    assert torch.equal(
        small_resnet.shrink(torch.full((1, 3, 90, 70), 7, dtype=torch.uint8)).unique(),
        torch.tensor([7], dtype=torch.uint8),
    )


def test_augmentation_is_light_and_not_mirrored():
    ramp = torch.linspace(-1, 1, 32).expand(50, 3, 32, 32)
    changed = small_resnet.augment(ramp, torch.Generator().manual_seed(0))
    assert (changed - ramp).abs().mean() < 0.3 and not torch.equal(changed[0], changed[1])
    assert (changed[..., -8:].mean(dim=(1, 2, 3)) > changed[..., :8].mean(dim=(1, 2, 3))).all()
