"""medart.py from end to end on a tiny model: resume, processes, HLDF, errors, and what it leaves behind."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import medart
from medart_core import checkpoint, lora_layers, options, pretrained, trees
from medart_core.errors import UserError
from medart_core.medart_options import MedArtOptions

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def flags(tiny_pixart, x_rays):
    """The smallest run: two images a step, an HLDF update every second step."""
    return [
        f"--pretrained_model_name_or_path={tiny_pixart}", f"--dataset_name={x_rays}", "--resolution=32", "--rank=2",
        "--train_batch_size=2", "--learning_rate=1e-2", "--N_steps=2", "--M_times=3", "--max_train_steps=4",
        "--num_validation_images=1", "--validation_prompt=a chest", "--report_to=none", "--logging_steps=1",
    ]  # fmt: skip


@pytest.fixture
def run(monkeypatch):
    """Run medart.py in this process; returns its exit code."""
    from accelerate.state import AcceleratorState

    def call(*arguments: str) -> int:
        AcceleratorState._reset_state(True)
        monkeypatch.setattr(sys, "argv", ["medart.py", *arguments])
        return medart.main()

    return call


def adapters(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.glob("*_lora/*.safetensors"))}


def entries(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_run_leaves_adapters_log_samples_card_and_options(run, flags, tmp_path):
    out = tmp_path / "out"
    assert run(*flags, f"--output_dir={out}", "--checkpointing_steps=2") == 0
    assert len(adapters(out)) == 2
    assert [entry["step"] for entry in entries(out)] == [0, 1, 2, 3]
    hldf = [entry["step"] for entry in entries(out) if "loss_color" in entry]
    assert hldf == [0, 2]
    assert {"loss_noise", "generated_mean_r", "real_std_b", "grad_norm", "peak_mem_gb", "sec_per_hldf_step"} <= (
        entries(out)[0].keys()
    )
    assert sorted(p.name for p in (out / "samples").iterdir()) == ["step-000000.png", "step-000004.png"]
    assert "not for diagnosis" in (out / "README.md").read_text().lower()
    assert json.loads((out / "options.json").read_text())["N_steps"] == 2
    assert [step for step, _ in checkpoint.checkpoints(out)] == [2, 4]
    card = json.loads((out / "transformer_lora" / "adapter_config.json").read_text())
    assert card["base_model_name_or_path"].endswith("pixart")


def test_the_same_command_is_not_run_twice_and_another_one_not_in_its_folder(run, flags, tmp_path):
    out = f"--output_dir={tmp_path / 'out'}"
    run(*flags, "--max_train_steps=1", out)
    before = adapters(tmp_path / "out")
    with pytest.raises(UserError, match="finished"):
        run(*flags, "--max_train_steps=1", out)
    with pytest.raises(UserError, match="learning_rate"):
        run(*flags, "--max_train_steps=2", "--learning_rate=1e-3", out)
    assert adapters(tmp_path / "out") == before


def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(run, flags, tmp_path):
    """20 steps = 10 + kill -9 + 10, with shuffled data, HLDF noise, random crops and dropped captions."""
    long = [*flags, "--max_train_steps=20", "--checkpointing_steps=10", "--proportion_empty_prompts=0.3",
            "--lr_scheduler=cosine", "--lr_warmup_steps=3"]  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(*long, f"--output_dir={whole}")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "medart.py"), *long, f"--output_dir={parts}"], stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while not (parts / "checkpoint-10").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (parts / "finished.json").exists() and checkpoint.latest(parts) == parts / "checkpoint-10"
    run(*long, f"--output_dir={parts}")
    assert adapters(parts) == adapters(whole)
    timing = ("sec_per_step", "sec_per_hldf_step", "peak_mem_gb")
    drop = [[{k: v for k, v in entry.items() if k not in timing} for entry in entries(f)] for f in (whole, parts)]
    assert drop[0] == drop[1]


def test_sigterm_to_the_launcher_publishes_a_checkpoint_and_leaves_no_worker(flags, tmp_path):
    """`accelerate launch` orphans its child when it is killed; the child notices, saves and ends."""
    out = tmp_path / "out"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--cpu"]
    arguments = [*flags, "--max_train_steps=100000", "--no_hldf", f"--output_dir={out}"]
    launcher = subprocess.Popen(
        [*launch, str(ROOT / "medart.py"), *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    log = out / "log.jsonl"
    while not (log.exists() and log.stat().st_size) and time.monotonic() < deadline:  # in its loop
        time.sleep(0.05)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    if not children.exists():
        pytest.skip("needs Linux's /proc to find the worker")
    [worker] = [int(pid) for pid in children.read_text().split()]
    launcher.kill()
    launcher.wait()
    stat, deadline = Path(f"/proc/{worker}/stat"), time.monotonic() + 60
    while not (ended := not stat.exists() or stat.read_text().split()[2] == "Z") and time.monotonic() < deadline:
        time.sleep(0.1)
    if not ended:
        os.kill(worker, signal.SIGKILL)
    assert ended and checkpoint.latest(out) is not None


def first_moments(folder: Path) -> torch.Tensor:
    """Adam's first moments after one step: a tenth of the (clipped) gradient."""
    state = trees.load_tree(folder / "checkpoint-1" / "state")["optimizer"]["state"]
    return torch.cat([state[index]["exp_avg"].flatten() for index in sorted(state)])


def test_two_processes_compute_the_gradient_of_one_with_both_images(run, flags, tmp_path):
    shared = [*flags, "--max_train_steps=1", "--max_grad_norm=1e9", "--gradient_accumulation_steps=2"]
    run(*shared, "--train_batch_size=2", "--hldf_batch_size=2", f"--output_dir={tmp_path / 'one'}")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    arguments = [*shared, "--train_batch_size=1", "--hldf_batch_size=1", f"--output_dir={tmp_path / 'two'}"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(ROOT / "medart.py"), *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = first_moments(tmp_path / "one"), first_moments(tmp_path / "two")
    assert ((one - two).norm() / one.norm()).item() < 1e-5
    assert entries(tmp_path / "two")[0]["loss_color"] > 0


def test_a_colour_loss_without_gradient_stops_the_run(run, flags, tmp_path, monkeypatch):
    real = medart.sample_latents
    monkeypatch.setattr(medart, "sample_latents", lambda *a, **k: real(*a, **{**k, "gradient": "none"}))
    with pytest.raises(UserError, match="carries no gradient"):
        run(*flags, f"--output_dir={tmp_path / 'out'}")


@pytest.mark.parametrize("mode", ["last_k", "sparse", "one_step"])
def test_every_gradient_mode_trains(run, flags, tmp_path, mode):
    extra = [f"--hldf_gradient={mode}", "--hldf_k=2", "--max_train_steps=1", "--gradient_checkpointing"]
    run(*flags, *extra, f"--output_dir={tmp_path / 'out'}")
    assert entries(tmp_path / "out")[0]["grad_norm_hldf"] > 0


def test_hldf_runs_once_per_optimiser_step_not_per_micro_batch(run, flags, tmp_path, monkeypatch):
    calls = []
    real = medart.color_gradient
    monkeypatch.setattr(medart, "color_gradient", lambda *a: calls.append(1) or real(*a))
    run(*flags, "--gradient_accumulation_steps=3", f"--output_dir={tmp_path / 'out'}")
    assert len(calls) == 2
    run(*flags, "--no_hldf", f"--output_dir={tmp_path / 'plain'}")
    assert len(calls) == 2 and all("loss_color" not in entry for entry in entries(tmp_path / "plain"))


def test_the_colour_loss_weight_does_not_depend_on_the_number_of_images(run, flags, tmp_path, monkeypatch):
    weights = []
    monkeypatch.setitem(medart.COLOR_LOSSES, "paper", lambda g, r: weights.append(len(g)) or (g * 0 + g).mean())
    for size in (1, 2):
        run(*flags, "--max_train_steps=1", f"--hldf_batch_size={size}", f"--output_dir={tmp_path / str(size)}")
    assert weights == [1, 2]


def test_the_unbiased_colour_loss_samples_every_prompt_twice_and_trains(run, flags, tmp_path, monkeypatch):
    """Rollouts of a prompt stand side by side, so that processes draw the noise that a single one would."""
    calls = []
    real = medart.sample_with_gradient
    monkeypatch.setattr(medart, "sample_with_gradient", lambda model, *a: calls.append(a) or real(model, *a))
    extra = ["--color_loss=unbiased", "--hldf_batch_size=2", "--max_train_steps=1", "--mask_overlay"]
    run(*flags, *extra, f"--output_dir={tmp_path / 'out'}")
    [(captions, _, draws, _)] = calls
    assert captions[0::2] == captions[1::2] and len(captions) == draws.total == 4
    entry = entries(tmp_path / "out")[0]
    assert entry["loss_color"] > 0 and entry["grad_norm_hldf"] > 0
    assert MedArtOptions(color_loss="unbiased").repeated(["a", "b"]) == ["a", "a", "b", "b"]
    assert MedArtOptions(color_loss="unbiased").memory_options()["hldf_batch_size"] == 2


def test_mask_overlay_leaves_a_black_border_out_of_the_colours_and_trains(run, flags, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    frame = Image.new("RGB", (32, 32))
    frame.paste((190, 90, 70), (6, 6, 26, 26))
    for name in "ab":
        frame.save(data / f"{name}.png")
    (data / "metadata.csv").write_text("file_name,text\na.png,a polyp\nb.png,a polyp\n")
    first = {}
    for name, extra in (("plain", []), ("masked", ["--mask_overlay"])):
        out = tmp_path / name
        run(*flags, f"--dataset_name={data}", "--max_train_steps=1", *extra, f"--output_dir={out}")
        first[name] = entries(out)[0]
    assert first["masked"]["real_mean_r"] == pytest.approx(190 / 127.5 - 1, abs=0.01)
    assert first["masked"]["real_std_r"] == pytest.approx(0, abs=0.01) and first["plain"]["real_mean_r"] < 0
    assert first["masked"]["loss_color"] != first["plain"]["loss_color"]
    assert first["masked"]["grad_norm_hldf"] > 0


def test_cached_latents_train_alike(run, flags, tmp_path):
    for name, extra in (("cached", ["--cache_latents"]), ("plain", [])):
        run(*flags, "--center_crop", *extra, f"--output_dir={tmp_path / name}")
    losses = [[entry["loss_noise"] for entry in entries(tmp_path / name)] for name in ("cached", "plain")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_caching_random_crops_is_refused(run, flags, tmp_path):
    with pytest.raises(UserError, match="crops that never change"):
        run(*flags, "--cache_latents", "--random_flip", f"--output_dir={tmp_path / 'out'}")


def test_8bit_adam_runs_and_resumes(run, flags, tmp_path):
    out = [f"--output_dir={tmp_path / 'out'}", "--use_8bit_adam", "--rank=512"]
    run(*flags, *out, "--max_train_steps=2")
    saved = load_file(tmp_path / "out" / "checkpoint-2" / "state.safetensors")
    assert any(tensor.dtype == torch.uint8 for tensor in saved.values())
    run(*flags, *out, "--max_train_steps=3")
    whole = [f"--output_dir={tmp_path / 'whole'}", "--use_8bit_adam", "--rank=512"]
    run(*flags, *whole, "--max_train_steps=3")
    assert adapters(tmp_path / "out") == adapters(tmp_path / "whole")


def test_saved_adapters_draw_what_the_trained_model_draws(run, flags, tmp_path, tiny_pixart, monkeypatch):
    from medart_core.sampling import sample_images

    kept = {}
    real = medart.trainable.build
    monkeypatch.setattr(medart.trainable, "build", lambda **options: kept.setdefault("model", real(**options)))
    run(*flags, f"--output_dir={tmp_path / 'out'}")
    loaded = pretrained.load(tiny_pixart, torch.float32, torch.device("cpu"))
    base = next(iter(sample_images(loaded, ["a chest"], [3], num_inference_steps=3)))
    folders = lora_layers.find(tmp_path / "out")
    loaded.transformer = lora_layers.load(loaded.transformer, folders[0])
    loaded.text_encoder = lora_layers.load(loaded.text_encoder, folders[1])
    images = [next(iter(sample_images(m, ["a chest"], [3], num_inference_steps=3))) for m in (kept["model"], loaded)]
    assert torch.equal(*images) and not torch.equal(images[0], base)


def test_images_need_not_be_square_and_held_out_ones_are_measured(run, flags, tmp_path, x_rays):
    out = tmp_path / "out"
    extra = [
        "--resolution=48x32",
        f"--validation_data_dir={x_rays}",
        "--max_validation_samples=3",
        "--max_train_steps=2",
    ]
    run(*flags, *extra, "--validation_steps=1", f"--output_dir={out}")
    measured = [entry["loss_validation"] for entry in entries(out) if "loss_validation" in entry]
    assert len(measured) == 3 and measured[0] != measured[2]  # before the first step, and after each
    with Image.open(out / "samples" / "step-000002.png") as picture:
        assert picture.height > picture.width - 120  # the names take 120 pixels


def test_each_part_has_its_learning_rate_and_scale_lr_multiplies_both(run, flags, tmp_path):
    rates = {}
    for name, extra in (("plain", []), ("scaled", ["--scale_lr", "--gradient_accumulation_steps=2"])):
        out = tmp_path / name
        run(*flags, "--max_train_steps=1", "--no_hldf", "--text_encoder_lr=1e-3", *extra, f"--output_dir={out}")
        groups = trees.load_tree(out / "checkpoint-1" / "state")["optimizer"]["param_groups"]
        rates[name] = [group["initial_lr"] for group in groups]
    assert rates["plain"] == pytest.approx([1e-2, 1e-3])
    assert rates["scaled"] == pytest.approx([4e-2, 4e-3])


def test_wandb_is_asked_for_by_name_when_it_is_missing(run, flags, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        run(*flags, "--report_to=wandb", f"--output_dir={tmp_path / 'out'}")


def test_a_data_error_is_one_line_and_exit_code_2_before_any_model_loads(tmp_path, x_rays):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "metadata.csv").write_text("file_name,text\ngone.png,a chest\n")
    command = [sys.executable, str(ROOT / "medart.py"), f"--dataset_name={folder}",
               "--pretrained_model_name_or_path=/no/such/model", f"--output_dir={tmp_path / 'out'}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "'gone.png' does not exist" in line and not (tmp_path / "out").exists()


def test_the_published_command_is_understood(monkeypatch):
    command = """--pretrained_model_name_or_path=PixArt-alpha/PixArt-XL-2-512x512 --dataset_name=dataset/kvasir/train
      --caption_column="text" --resolution=512 --train_batch_size=1 --num_train_epochs=15 --rank=8 --use_8bit_adam
      --checkpointing_steps=12800 --learning_rate=1e-04 --lr_scheduler="constant" --lr_warmup_steps=0 --seed=42
      --output_dir="medart" --gradient_checkpointing --checkpoints_total_limit=10 --max_token_length=120 --M_times=20
      --N_steps=500"""
    opts = options.parse(MedArtOptions, None, shlex.split(command))
    assert (opts.N_steps, opts.M_times, opts.rank, opts.seed, opts.use_8bit_adam) == (500, 20, 8, 42, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--N_steps=0"], "--no_hldf"),
        (["--rank=0"], "--rank is 0"),
        (["--hldf_batch_size=3", "--train_batch_size=2"], "taken from the batch"),
        (["--proportion_empty_prompts=2"], "from 0 to 1"),
        (["--validation_steps=-5"], "0 or more"),
        (["--adam_beta1=1"], "less than 1"),
        (["--color_loss_weight=0"], "--no_hldf"),
        (["--hldf_gradient=last_k", "--hldf_k=9", "--M_times=4"], "--hldf_k 9"),
    ],
)
def test_impossible_options_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        options.parse(MedArtOptions, None, arguments)
