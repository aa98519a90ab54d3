"""Options from the command line and from files."""

import json

import pytest

from medart_core import options, plan
from medart_core.errors import UserError
from medart_core.medart_options import MedArtOptions, image_sides, resolution


def parse(*argv: str) -> MedArtOptions:
    return options.parse(MedArtOptions, None, argv)


def test_a_file_of_options_lies_under_the_command_line(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('rank = 4\nresolution = "384x640"\ncenter_crop = true\nvalidation_prompt = ["a", "b c"]\n')
    opts = parse(f"--config={file}", "--rank=16")
    assert (opts.rank, opts.resolution, opts.center_crop, opts.validation_prompt) == (
        16,
        "384x640",
        True,
        ["a", "b c"],
    )


def test_dashes_in_names_are_understood_and_those_in_values_kept():
    opts = parse("--random-weights", "--output-dir=a-b", "--validation_prompt", "x-ray")
    assert opts.random_weights and opts.output_dir == "a-b" and opts.validation_prompt == ["x-ray"]


def test_what_a_file_switches_off_stays_off_and_lists_are_replaced(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text('{"preset": "8gb", "gradient_checkpointing": false, "validation_prompt": ["a"]}')
    opts = options.parse(MedArtOptions, None, [f"--config={file}", "--validation_prompt=b"], plan.PRESETS)
    assert opts.text_encoder_quantization == "nf4" and not opts.gradient_checkpointing
    assert opts.validation_prompt == ["b"]


def test_a_switch_in_a_file_or_preset_can_be_switched_off_again(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("compile = true\nno_hldf = true\nno_text_encoder_lora = true\nrandom_flip = true\n")
    opts = parse(f"--config={file}", "--no-compile", "--hldf", "--text_encoder_lora")
    assert not (opts.compile or opts.no_hldf or opts.no_text_encoder_lora) and opts.random_flip
    opts = options.parse(MedArtOptions, None, ["--preset=8gb", "--no_gradient_checkpointing"], plan.PRESETS)
    assert not opts.gradient_checkpointing and opts.text_encoder_quantization == "nf4"
    assert parse("--no_hldf").no_hldf and parse("--no_text_encoder_lora").no_text_encoder_lora


def test_adapters_are_merged_in_the_rollout_where_memory_is_not_short():
    merged = {argv: parse(*argv).hldf_merge_lora for argv in [(), ("--hldf_checkpointing=blocks",)]}
    assert all(merged.values()) and not parse("--gradient_checkpointing").hldf_merge_lora
    assert parse("--gradient_checkpointing", "--hldf_merge_lora").hldf_merge_lora
    assert not parse("--no_hldf_merge_lora").hldf_merge_lora


def test_a_preset_lies_under_the_command_line():
    opts = options.parse(MedArtOptions, None, ["--preset=8gb", "--text_encoder_quantization=int8"], plan.PRESETS)
    assert opts.gradient_checkpointing and opts.hldf_checkpointing == "nested"
    assert opts.text_encoder_quantization == "int8"


def test_a_runs_options_repeat_it(tmp_path):
    argv = [
        "--seed=7",
        "--no_hldf",
        "--no_hldf_merge_lora",
        "--validation_steps=0",
        "--adam_weight_decay=0",
        "--preset=8gb",
        "--snr_gamma=5",
        "--resolution=64x32",
        '--validation_prompt=- a "quoted" one',
    ]
    first = parse(*argv)
    file = tmp_path / "options.json"
    file.write_text(json.dumps(vars(first) | {"precision": "torch.float32", "num_processes": 2}))
    assert parse(f"--config={file}") == first


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{"rnak": 4}', "there is no option rnak"),
        ("a.json", "[1]", "no table"),
        ("a.toml", "rank 4", "cannot be read"),
        ("gone.json", None, "cannot be read"),
    ],
)
def test_a_faulty_file_is_named(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        parse(f"--config={tmp_path / name}")


def test_a_value_of_a_wrong_type_in_a_file_is_an_error(tmp_path):
    (tmp_path / "a.json").write_text('{"rank": "many"}')
    with pytest.raises(UserError, match=r"--rank: invalid int value: 'many'; --help"):
        parse(f"--config={tmp_path / 'a.json'}")


def test_names_are_never_shortened_and_misspelt_ones_are_guessed():
    for wrong in ("--learning_rat=1", "--learning-rat", "--learnin_rate"):
        with pytest.raises(
            UserError, match=r"there is no option --learni\S+, perhaps --learning_rate is meant; --help"
        ):
            parse(wrong, "1")
    with pytest.raises(UserError, match="unrecognized arguments: --zzz; --help"):
        parse("--zzz")


def test_resolution_is_a_side_or_height_x_width():
    assert image_sides(resolution("512")) == 512 and image_sides(resolution("384x640")) == (384, 640)
    for wrong in ("500", "0", "64x-32"):
        with pytest.raises(UserError, match="multiple of 16"):
            parse(f"--resolution={wrong}")
    for wrong in ("64x64x64", "large"):
        with pytest.raises(ValueError, match="invalid literal"):
            resolution(wrong)
