"""evaluate.py as a user runs it: the report, what is refused, what worsens a figure, and ADM's two files."""

import csv
import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from test_evaluation_features import TinyExtractor
from torch import Tensor

import evaluate
from medart_core import sources
from medart_core.errors import UserError
from medart_core.evaluation import adm, catalogue, figures, images
from medart_core.evaluation.distances import frechet_distance, kernel_distance, moments
from medart_core.evaluation.features import extract
from medart_core.evaluation.measured import Measured

ROOT = Path(__file__).resolve().parents[1]
CLASSES = ("benign", "malignant")


class TinyInception(TinyExtractor):
    """Stands in for the Inception: 8 pooled features with 8 spatial ones behind them, two classes."""

    def probabilities(self, features: Tensor) -> Tensor | None:
        return torch.cat([features[:, :1], 1 - features[:, :1]], dim=1).softmax(dim=1)


def lesion(random: np.random.Generator, label: str, side: int = 32) -> Image.Image:
    """A blot on skin: colours, place and size vary, sharp grain."""
    y, x = np.mgrid[:side, :side] / side - random.uniform(0.4, 0.6, 2)[:, None, None]
    blot = (np.hypot(x, y) < random.uniform(0.15, 0.3))[..., None]
    skin, dark = random.uniform(170, 220, 3), random.uniform(40, 110, 3)
    dark[0] += 60 * (label == "malignant")
    pixels = np.where(blot, dark, skin) + random.normal(0, 12, (side, side, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_set(folder: Path, count: int, seed: int, change=lambda image: image) -> Path:
    """`count` lesions in one folder per class."""
    random = np.random.default_rng(seed)
    for number in range(count):
        label = CLASSES[number % 2]
        (folder / label).mkdir(parents=True, exist_ok=True)
        change(lesion(random, label)).save(folder / label / f"{number:03d}.png")
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sets")
    counts = {"generated": 40, "real": 90, "train": 60}
    return {side: write_set(folder / side, count, seed) for seed, (side, count) in enumerate(counts.items())}


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    return evaluate.main()


def between(sets: dict[str, Path], tmp_path: Path, *more: object) -> list[object]:
    fixed = ["--out", tmp_path / "out", "--cache", tmp_path / "cache", "--resamples", 10, "--utility-seeds", 0]
    return ["--generated", sets["generated"], "--real", sets["real"], *fixed, *more]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args, **_kwargs):
        pytest.fail("a socket was opened")

    for name in ("connect", "connect_ex", "bind"):
        monkeypatch.setattr(socket.socket, name, refuse)


def test_whole_run_offline(sets, tmp_path: Path, monkeypatch, no_network, capsys) -> None:
    monkeypatch.setattr(evaluate, "find_inception", lambda options, **_: TinyInception())
    run(monkeypatch, *between(sets, tmp_path, "--train", sets["train"]))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["run"]["generated_images"] == 40 and report["run"]["seed"] == 0
    overall = ("fid", "kid", "precision", "recall", "density", "coverage", "inception_score")
    colours = ("colour_statistics_distance", "chroma_error", "colour_histogram_distance", "colour_diversity")
    for name in (*overall, *colours):
        figure = report[name]
        assert figure["low"] <= figure["value"] <= figure["high"] and figure["floor"] is not None, name
        assert (figure["n_generated"], figure["n_real"], figure["seed"]) == (40, 40, 0)
        assert figure["extractor"] and len(figure["sha256"]) == 64
    for name in ("fid_benign", "fid_malignant", "kid_benign", "kid_malignant"):
        assert (report[name]["n_generated"], report[name]["n_real"]) == (20, 20)
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| FID |" in text and "| KID, malignant |" in text and "Not for diagnosis" in text
    assert (
        report["authpct_gap"]["low"] <= 0 <= report["authpct_gap"]["high"] and report["duplicate_share"]["value"] == 0
    )
    assert report["utility_ratio"]["note"] == "left out by --utility-seeds 0"
    assert "fit-extractor" in report["domain_frechet"]["note"] and "fit-extractor" in report["class_agreement"]["note"]
    assert len((tmp_path / "out" / "closest.csv").read_text().splitlines()) == 25
    for name in ("grid.png", "colours.png", "closest.png"):
        assert f"]({name})" in text and min(Image.open(tmp_path / "out" / name).size) > 100
    said, page = capsys.readouterr().out, (tmp_path / "out" / "report.html").read_text()
    assert "report.html: a page" in said and "Do they look like real ones?" in said
    assert "Not for diagnosis" in page and page.count("<img") == page.count("src=") == 2 * 2 * 8 + 2 * 24
    assert "<script" not in page and "http" not in page and "url(" not in page and page.count("<svg") > 20
    first = (tmp_path / "out" / "report.json").read_bytes()
    with pytest.raises(UserError, match="holds a report already"):
        run(monkeypatch, *between(sets, tmp_path))
    (tmp_path / "out" / "report.json").unlink()
    run(monkeypatch, *between(sets, tmp_path, "--train", sets["train"]))
    assert (tmp_path / "out" / "report.json").read_bytes() == first


WORKER = """
import sys
sys.path.insert(0, "tests")
import evaluate
from test_evaluate import TinyInception
evaluate.find_inception = lambda options, **_: TinyInception()
sys.exit(evaluate.main())
"""


def test_two_processes_report_what_one_does(sets, tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    env |= {"OMP_NUM_THREADS": "1"}  # more threads may change the last bits
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for name, launcher in (("one", []), ("two", torchrun)):
        arguments = map(str, between(sets, tmp_path / name, "--train", sets["train"]))
        command = [sys.executable, *launcher, str(tmp_path / "worker.py"), *arguments]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("report.html: a page") == 1
    for kind in ("out/report.json", "cache/*.npy"):
        one, two = ([file.read_bytes() for file in sorted((tmp_path / name).glob(kind))] for name in ("one", "two"))
        assert one == two and one


def test_without_the_inception_the_rest_is_measured(sets, tmp_path: Path, monkeypatch, no_network) -> None:
    monkeypatch.setattr(sources, "INCEPTION_FILE", tmp_path / "none.pt")
    run(monkeypatch, *between(sets, tmp_path))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["fid"]["value"] is None and "python prepare.py inception" in report["fid"]["note"]
    assert report["chroma_error"]["value"] is not None
    lacking = "FID, KID, precision, recall, density, coverage, Inception score: there is no Inception; run python prep"
    assert all(lacking in (tmp_path / "out" / name).read_text() for name in ("report.md", "report.html"))
    with pytest.raises(UserError, match=r"absent\.pt does not exist"):
        run(monkeypatch, *between(sets, tmp_path / "again", "--inception", "absent.pt"))


def test_prompts_beside_the_samples_are_held_against_the_pixels(sets, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sources, "INCEPTION_FILE", tmp_path / "none.pt")
    folder = tmp_path / "v1.5-seed-0"
    folder.mkdir()
    rows = ["file_name,text,label"]
    for number in range(4):
        grey = Image.new("RGB", (24, 24), (40 + 50 * number,) * 3)  # dark, dark, balanced, bright
        grey.save(folder / f"{number:06d}.png")
        word = ("is darkly exposed", "is evenly exposed")[number % 2]
        rows.append(f'{number:06d}.png,"<b>An X-ray</b>, {CLASSES[number % 2]}. It {word}.",{CLASSES[number % 2]}')
    table = folder.with_name(f"{folder.name}.csv")
    table.write_text("\n".join(rows))
    np.savez(
        folder.with_name(f"{folder.name}.npz"), arr_0=np.stack([np.asarray(Image.open(f)) for f in folder.iterdir()])
    )
    for source in (folder, folder.with_name(f"{folder.name}.npz")):
        found = images.read(source, show_progress=False)
        assert found.labels == CLASSES * 2 and found.texts and "evenly" in found.texts[1]
    run(monkeypatch, *between(sets | {"generated": folder}, tmp_path))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    figure = report["attribute_agreement_exposure"]
    assert (figure["value"], figure["n_generated"], figure["floor"]) == (0.25, 4, None)
    table.write_text("\n".join([rows[0], *rows[2:]]))  # of other images
    assert images.read(folder, show_progress=False).labels is None
    asked = figures.described({"generated": images.read(sets["generated"]), "real": images.read(sets["real"])})
    assert "the prompts name no attribute" in asked["attribute_agreement"].note


def test_figures_are_ordered_by_question_and_put_in_words() -> None:
    half = Measured(0.5, 0.4, 0.6, 9, 9, 0.9)
    odd = {"odd_one": half, "coverage": half, "kid_b_a": half, "fid": Measured(90.0, floor=45.0), "kid": half,
           "precision": Measured(None, note="why")}  # fmt: skip
    groups = {question: list(found) for question, found in catalogue.by_question(odd).items()}
    assert list(groups.values()) == [["fid", "kid", "kid_b_a"], ["coverage"], ["odd_one"]]
    assert catalogue.title_of("kid_b_a").name == "KID, b a" and catalogue.title_of("domain_coverage").name
    assert catalogue.beside_floor("fid", odd["fid"]) == "2.0 times that of other real images, 45"
    assert catalogue.beside_floor("coverage", half) == "56 % of what other real images reach, 90 %"
    assert catalogue.beside_floor("kid", half) == "as low as other real images, 0.9"
    assert catalogue.beside_floor("duplicate_share", half) == "other real images: 90 %"
    assert catalogue.titles_of(["fid", "kid_a"]) == "FID, KID, a"
    assert catalogue.titles_of(["kid_a", "kid_b", "kid_c", "fid_a"]) == "KID, FID"
    assert list(catalogue.explanations({"kid_a": half, "kid_b": half})) == ["kid_a"]


def test_planted_copies_are_listed_first_and_can_fail_the_run(sets, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sources, "INCEPTION_FILE", tmp_path / "none.pt")
    generated = write_set(tmp_path / "generated", 30, 7)
    for number in range(6):
        file = next((sets["train"] / CLASSES[number % 2]).glob(f"{number:03d}.png"))
        Image.open(file).save(generated / CLASSES[number % 2] / f"{number:03d}.jpg", quality=90)
    arguments = between(sets | {"generated": generated}, tmp_path, "--train", sets["train"], "--fail-on-copies")
    assert run(monkeypatch, *arguments) == 4
    assert "6 of 36 images copy training images" in capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["duplicate_share"]["value"] == pytest.approx(6 / 36) and report["duplicate_share"]["floor"] == 0
    with open(tmp_path / "out" / "closest.csv", newline="") as file:
        pairs = [(Path(row["generated"]).stem, Path(row["train"]).stem) for row in csv.DictReader(file)]
    assert sorted(pairs[:6]) == [(f"{number:03d}", f"{number:03d}") for number in range(6)]
    assert run(monkeypatch, *between(sets, tmp_path / "none", "--train", sets["train"], "--fail-on-copies")) == 0


def test_extractor_of_the_domain_and_usefulness(sets, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sources, "INCEPTION_FILE", tmp_path / "none.pt")
    fit = ["fit-extractor", "--train", sets["train"], "--out", tmp_path / "lesions.safetensors", "--epochs", 2]
    assert run(monkeypatch, *fit) == 0 and "held-out images" in capsys.readouterr().out
    with pytest.raises(UserError, match="is there already"):
        run(monkeypatch, *fit)
    run(monkeypatch, *between(sets, tmp_path, "--extractor", tmp_path / "lesions.safetensors"))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    facts = json.loads((tmp_path / "lesions.json").read_text())
    for name in ("domain_frechet", "domain_density", "domain_coverage", "class_agreement"):
        assert report[name]["value"] is not None and report[name]["sha256"] == facts["sha256"], name
    assert (
        "give --train" in report["authpct"]["note"]
        and "give --train" in figures.usefulness({}, 1)["utility_ratio"].note
    )
    with pytest.raises(UserError, match=r"was fitted on .*train; fit one on"):
        arguments = between(sets | {"real": sets["train"]}, tmp_path / "leak")
        run(monkeypatch, *arguments, "--extractor", tmp_path / "lesions.safetensors")
    moles = write_set(tmp_path / "moles", 4, 8)
    (moles / "benign").rename(moles / "mole")
    with pytest.raises(UserError, match="knows benign, malignant, but not 'mole'"):
        arguments = between({"generated": moles, "real": moles}, tmp_path / "mole")
        monkeypatch.setattr(images, "refuse_overlap", lambda *_: None)
        run(monkeypatch, *arguments, "--extractor", tmp_path / "lesions.safetensors")
    known = figures.examples({side: images.read(path, show_progress=False) for side, path in sets.items()})
    found = figures.usefulness(known, 1, steps=2)
    assert found["utility_ratio"].value is not None and "utility_synthetic_recall_benign" in found


def test_refusals(sets, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sources, "INCEPTION_FILE", tmp_path / "none.pt")
    prepared = tmp_path / "prepared"
    write_set(prepared / "train", 4, 9)
    (prepared / "split.json").touch()
    mixed = write_set(tmp_path / "mixed", 2, 5)
    lesion(np.random.default_rng(7), "benign", 40).save(mixed / "benign" / "big.png")
    copied = write_set(tmp_path / "copied", 4, 1)  # the first four of `real`
    named = write_set(tmp_path / "named", 4, 6)
    (named / "benign").rename(named / "cow")
    for message, arguments in (
        ("nothing to measure", ["--generated", sets["generated"]]),
        ("holds 40 images, not the 41 asked for", between(sets, tmp_path, "--num-images", 41)),
        ("are both", between(sets, tmp_path, "--train", sets["real"])),
        ("is the training folder", between(sets | {"real": prepared / "train"}, tmp_path)),
        ("to one size", between(sets | {"generated": mixed}, tmp_path)),
        ("are the same image .and 3 more.; take real", between(sets | {"generated": copied}, tmp_path)),
        ("are the same image .and 3 more.; split again", between(sets, tmp_path, "--train", copied)),
        ("class 'cow'", between(sets | {"generated": named}, tmp_path)),
    ):
        with pytest.raises(UserError, match=message) as caught:
            run(monkeypatch, *arguments)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def blur(image: Image.Image, strength: int) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(0.4 * strength))


def noise(image: Image.Image, strength: int) -> Image.Image:
    grain = np.random.default_rng(0).normal(0, 15 * strength, (image.height, image.width, 3))
    return Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, strength: int) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=(60, 30, 12, 4)[strength - 1])
    return Image.open(stream).convert("RGB")


def tint(image: Image.Image, strength: int) -> Image.Image:
    return Image.fromarray((np.asarray(image) + np.array([8, 0, -8]) * strength).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("change", [blur, noise, jpeg, tint])
def test_each_fault_worsens_fid_and_kid_with_its_strength(tmp_path: Path, change) -> None:
    def rows(name: str, seed: int, strength: int = 0) -> np.ndarray:
        folder = write_set(tmp_path / name, 60, seed, lambda image: change(image, strength) if strength else image)
        return extract(images.read(folder, show_progress=False), TinyExtractor(), tmp_path / "cache")

    real = rows("real", 0)
    faulty = [rows(str(strength), 1, strength) for strength in range(5)]
    for distance in (frechet_distance, kernel_distance):
        values = [distance(found, real) for found in faulty]
        assert values == sorted(values) and values[-1] > values[0] + 1e-6, (distance, values)


# --- ADM's two files ---


@pytest.fixture
def small_adm(monkeypatch: pytest.MonkeyPatch) -> TinyInception:
    monkeypatch.setattr(adm, "NUM_FEATURES", 8)
    return TinyInception()


def write_npz(file: Path, count: int, seed: int) -> Path:
    random = np.random.default_rng(seed)
    np.savez(file, arr_0=np.stack([np.asarray(lesion(random, CLASSES[n % 2])) for n in range(count)]))
    return file


def test_adm_figures_agree_with_independent_code(small_adm, tmp_path: Path) -> None:
    paths = [write_npz(tmp_path / f"{seed}.npz", count, seed) for seed, count in enumerate((30, 50))]
    reference, samples = (adm.read_side(path, small_adm, tmp_path) for path in paths)
    found = {name: figure.value for name, figure in adm.figures(reference, samples, small_adm).items()}
    ref, gen = (np.asarray(side.features, np.float64) for side in (reference, samples))
    for name, columns in (("fid", slice(0, 8)), ("sfid", slice(8, 16))):
        covs = [np.cov(side[:, columns], rowvar=False) for side in (ref, gen)]
        roots = np.real(np.sqrt(np.linalg.eigvals(covs[0] @ covs[1]).astype(complex))).sum()
        shift = ref[:, columns].mean(axis=0) - gen[:, columns].mean(axis=0)
        assert found[name] == pytest.approx(shift @ shift + sum(map(np.trace, covs)) - 2 * roots, rel=1e-6)

    def inside(points: np.ndarray, manifold: np.ndarray) -> float:
        own = np.linalg.norm(manifold[:, None] - manifold, axis=2)
        radius = np.sort(own, axis=1)[:, 3]
        return float((np.linalg.norm(points[:, None] - manifold, axis=2) <= radius).any(axis=1).mean())

    assert found["precision"] == inside(gen[:, :8], ref[:, :8]) and found["recall"] == inside(ref[:, :8], gen[:, :8])
    p = small_adm.probabilities(torch.tensor(gen[:, :8])).numpy()
    assert found["inception_score"] == pytest.approx(np.exp((p * np.log(p / p.mean(axis=0))).sum(axis=1).mean()))


def test_adm_honours_moments_and_knows_identical_shifted_and_disjoint_sets(small_adm, tmp_path: Path) -> None:
    samples = adm.read_side(write_npz(tmp_path / "a.npz", 40, 0), small_adm, tmp_path)
    assert samples.features is not None
    (mu, sigma), (mu_s, sigma_s) = moments(samples.features[:, :8]), moments(samples.features[:, 8:])
    same = adm.figures(samples, samples, small_adm)
    assert same["fid"].value == pytest.approx(0, abs=1e-9) and same["sfid"].value == pytest.approx(0, abs=1e-9)
    assert (same["precision"].value, same["recall"].value) == (1, 1)
    np.savez(tmp_path / "stats.npz", mu=mu + 2, sigma=sigma, mu_s=mu_s, sigma_s=4 * sigma_s)
    moments_only = adm.figures(adm.read_side(tmp_path / "stats.npz", small_adm, tmp_path), samples, small_adm)
    assert moments_only["fid"].value == pytest.approx(8 * 4)
    assert moments_only["sfid"].value == pytest.approx(np.trace(sigma_s))  # (2 - 1)^2 of every standard deviation
    assert moments_only["precision"].value is None and "no images" in moments_only["precision"].note
    far = samples._replace(features=samples.features + 100)
    assert adm.figures(samples, far, small_adm)["precision"].value == 0
    with pytest.raises(UserError, match="no arr_0"):
        adm.figures(samples, samples._replace(features=None), small_adm)
    np.savez(tmp_path / "part.npz", mu=mu)
    with pytest.raises(UserError, match="has mu but no sigma"):
        adm.read_side(tmp_path / "part.npz", small_adm, tmp_path)
    np.savez(tmp_path / "small.npz", mu=mu[:3], sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    with pytest.raises(UserError, match="moments have the shapes"):
        adm.read_side(tmp_path / "small.npz", small_adm, tmp_path)


def test_adm_command(small_adm, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(evaluate, "find_inception", lambda options, **_: small_adm)
    one, other = (write_npz(tmp_path / f"{seed}.npz", 20, seed) for seed in range(2))
    run(monkeypatch, "adm", one, other, "--cache", tmp_path / "cache")
    last = capsys.readouterr().out.splitlines()[-1]
    assert set(json.loads(last)) == {"fid", "sfid", "inception_score", "precision", "recall"}
