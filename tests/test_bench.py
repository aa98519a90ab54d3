"""`make bench` end to end on tiny networks: its losses agree, its last line is JSON, its meter counts right."""

import json
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))


def test_the_quick_benchmark_compares_both_steps_and_ends_with_json(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "medart_step.py"), "--quick"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    document = json.loads(done.stdout.splitlines()[-1])
    ordinary, hldf = document["ordinary"]["steps"], document["hldf"]["steps"]
    # Counts don't depend on how busy the machine is.
    assert ordinary["ours"]["operations"] < 0.8 * ordinary["baseline"]["operations"]
    assert hldf["ours, full"]["operations"] < 0.8 * hldf["baseline"]["operations"]
    assert hldf["ours, full"]["operations"] < hldf["ours, full, adapters apart"]["operations"]  # even at M = 3
    assert {f"ours, {mode}" for mode in ("full", "last_k", "sparse", "one_step")} < hldf.keys()
    assert hldf["ours, full, all checkpointed"]["peak_mb"] < hldf["ours, full"]["peak_mb"]
    assert all(row["seconds_median"] > 0 for row in (*ordinary.values(), *hldf.values()))


def test_losses_that_differ_stop_the_benchmark():
    import medart_step
    import pytest

    steps = {"baseline": lambda: (1.0, 2.0), "ours": lambda: (1.0, torch.tensor(2.1))}
    with pytest.raises(SystemExit, match="ours: losses"):
        medart_step.check_losses(steps, torch.bfloat16)
    medart_step.check_losses({**steps, "ours": lambda: (1.001, 2.001)}, torch.bfloat16)


def test_the_meter_counts_operations_and_the_peak_of_living_tensors():
    from measure import count

    def step() -> None:
        a = torch.ones(1000)  # 4 kB
        b = a.view(10, 100) + 1
        del a
        c = b * b
        assert c.sum().item() == 4000

    counted = count(step)
    assert counted["operations"] == 5  # ones, add, mul, sum, item; no view
    assert counted["peak_mb"] == 0.0  # 8 kB
    assert count(lambda: torch.ones(10**6) + torch.ones(10**6))["peak_mb"] == 12.0


def test_the_quick_captioning_benchmark_counts_attempts_and_ends_with_json(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "vsg.py"), "--quick"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["attempts"] > document["images"] == 6
    sides = {f"{side}, {dtype}" for side in ("plain loop", "chunks of 32") for dtype in ("float32", "bfloat16")}
    assert sides < document["cases"].keys()
    assert all(row["images_per_sec"] > 0 for row in document["cases"].values())
    assert document["bars"]["captioning in float32, times faster"]["to_pass"] == 5


def test_the_quick_dit_benchmark_compares_all_parts_and_ends_with_json(capsys, monkeypatch):
    import dit

    monkeypatch.setattr(sys, "argv", ["dit.py", "--quick"])
    dit.main()
    said = capsys.readouterr().out
    document = json.loads(said.splitlines()[-1])
    assert document["parts"].keys() == dit.PARTS.keys() and len(document["bars"]) == 7
    assert said.count("losses of three steps") == 5
    assert (
        document["bars"]["npz: ours against baseline, fsynced"]["measured"] > 1
    )  # by far, however busy the machine is


def test_a_table_of_train_options_names_what_failed_and_what_was_published():
    import train_options_table as table

    measured = {"steps_per_sec": 1.5, "images_per_sec": 192.0, "peak_mem_gb": 30.25, "mfu_of_measured": 0.5}
    row = table.text((True, True, True), measured | {"mfu_of_data_sheet": None})
    assert row == "| yes | yes | yes | 1.500 | 192 | 30.25 | unknown | 50.0 % | 0.84 | 27,485 |"
    assert "| out of memory |  |" in table.text((False, False, False), {"failed": "out of memory"})
    other = table.text((False, True, True), measured | {"mfu_of_data_sheet": 0.1})
    assert "| 10.0 % |" in other and all(line.count("|") == len(table.COLUMNS) + 1 for line in (row, other))
