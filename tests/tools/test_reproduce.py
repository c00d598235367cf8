"""``vilma reproduce robosuite-table``: its cells, its statistics, and cells made by the real commands."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from vilma import config
from vilma.evaluation import wilson_interval
from vilma.tools import _robosuite_show as page
from vilma.tools import _robosuite_table as table
from vilma.tools import reproduce
from vilma.tools.train_policy import RunConfig

REQUIRED = [f"lift_{modality}_seed{seed}" for modality in ("rgb", "xyz", "cat", "dp3") for seed in (0, 1)] + [
    *("stack_rgb_seed0", "stack_cat_seed0", "moved_rgb_seed0", "moved_xyz_seed0", "moved_cat_seed0"),
    *(f"shift_{m}{v}_seed0{cm}" for m in ("rgb", "xyz", "cat") for v in ("", "-reposed")
      for cm in ("", "_5cm", "_10cm")),
]  # fmt: skip


def outcomes(wins: int, episodes: int = 50) -> str:
    return "1" * wins + "0" * (episodes - wins)


def figures(name: str, won: str) -> dict:
    """A cell's file, as far as the page reads it."""
    cell = next(cell for cell in table.CELLS if cell.name == name)
    plain = {"cell": name, "seed": cell.seed, "demos": cell.setting.demos, "steps": 1000, "batch_size": 32}
    return plain | {"outcomes": won, "successes": won.count("1"), "episodes": len(won)}


def made(**cells: str) -> dict:
    return {name.replace("__", "-"): figures(name.replace("__", "-"), won) for name, won in cells.items()}


def test_every_required_cell_is_in_the_table_and_comes_first():
    names = [cell.name for cell in table.CELLS]
    assert len(set(names)) == len(names)
    assert set(REQUIRED) <= {cell.name for cell in table.CELLS if not cell.is_optional}
    assert set(REQUIRED[:8]) < set(names[:14])
    for task in ("lift", "stack", "can"):
        there = {cell.modality for cell in table.CELLS if cell.setting.name == task}
        assert there == {"rgb", "depth", "xyz", "6ch", "add", "cat", "dp3"}


def test_one_budget_for_every_modality(tmp_path):
    """Batch, updates, learning rate, denoiser and demonstrations are the setting's, whatever is trained."""
    budgets: dict[str, set] = {}
    for cell in table.CELLS:
        plan = table.Plan(cell, tmp_path)
        words = plan.train()
        run = config.load(RunConfig, words[1], words[4:])
        assert run.policy.modality == cell.modality and run.train.seed == cell.seed
        assert run.data.path == str(plan.data) and run.train.threads == 1
        assert run.policy.augment.moves_cameras == (cell.variant == "reposed")
        assert run.policy.augment.moves_frame == (cell.variant == "displaced")
        policy = run.policy
        sizes = (
            policy.dim,
            policy.num_blocks,
            policy.noise_draws,
            str(policy.crops),
            policy.horizon,
            policy.execute,
        )
        training = (str(run.optim), str(run.schedule), str(run.ema), run.train.steps, run.train.batch_size)
        budgets.setdefault(cell.setting.name, set()).add((sizes, training, plan.collect(1)[4]))
    assert {name: len(found) for name, found in budgets.items()} == dict.fromkeys(budgets, 1)


def test_cells_that_share_a_training_ask_for_the_same_one(tmp_path):
    plans = {cell.name: table.Plan(cell, tmp_path) for cell in table.CELLS}
    still, moved = plans["shift_xyz-reposed_seed0"], plans["shift_xyz-reposed_seed0_5cm"]
    assert still.train() == moved.train() and still.collect(1) == moved.collect(1)
    assert still.result != moved.result and still.recipe() != moved.recipe()
    assert moved.evaluate()[-4:-2] == ["--env.camera_shift", "0.05"]
    assert "--env.camera_shift" not in still.evaluate()
    # Re-posing is a matter of training alone.
    plain = plans["shift_xyz_seed0_5cm"]
    assert [word for word in plain.evaluate() if str(tmp_path) not in word] == [
        word for word in moved.evaluate() if str(tmp_path) not in word
    ]


def test_a_recipe_changes_with_what_decides_the_figures(tmp_path, monkeypatch):
    cell = next(cell for cell in table.CELLS if cell.name == "lift_rgb_seed0")
    before = table.Plan(cell, tmp_path).recipe()
    assert table.Plan(cell, tmp_path / "elsewhere").recipe() == before
    assert table.Plan(cell, tmp_path, demos=3).recipe() != before
    assert table.Plan(cell, tmp_path, episodes=20).recipe() != before
    read = config.read(cell.setting.config)
    monkeypatch.setattr(table.config, "read", lambda path: read | {"optim": {**read["optim"], "lr": 0.002}})
    assert table.Plan(cell, tmp_path).recipe() != before


def test_mcnemar_is_the_exact_sign_test():
    # By hand: 3 against 0 discordant pairs, 2 * 1/8; 8 against 2, 2 * (1 + 10 + 45) / 1024.
    assert page.mcnemar("11100", "00000") == (3, 0, 0.25)
    first, second = "1" * 8 + "00" + "1100", "0" * 8 + "11" + "1100"
    assert page.mcnemar(first, second) == (8, 2, 2 * 56 / 1024)
    assert page.mcnemar(second, first) == (2, 8, 2 * 56 / 1024)
    assert page.mcnemar("1010", "1010") == (0, 0, 1.0)
    with pytest.raises(ValueError, match="of 2 and of 3 episodes"):
        page.mcnemar("11", "111")
    binomtest = pytest.importorskip("scipy.stats").binomtest
    for ours in range(12):
        for theirs in range(1, 9):
            p = page.mcnemar("1" * ours + "0" * theirs, "0" * ours + "1" * theirs)[2]
            assert p == pytest.approx(binomtest(ours, ours + theirs).pvalue, rel=1e-12)


def test_holm_by_hand():
    # 0.01 * 3, then max(0.03, 0.02 * 2), then max(0.04, 0.03): the worked example of step-down correction.
    assert page.holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert page.holm([0.9, 0.6]) == [1.0, 1.0] and page.holm([]) == []


def test_pairs_pool_the_seeds_that_both_have():
    cells = made(
        lift_rgb_seed0=outcomes(20),
        lift_rgb_seed1=outcomes(10),
        lift_cat_seed0=outcomes(45),
        lift_xyz_seed1=outcomes(9),
    )
    found = {pair[:2]: pair[2:4] for pair in page.compare(table.LIFT, cells)}
    # cat has no seed 1 and xyz no seed 0: they were never compared.
    assert found == {("cat", "rgb"): (25, 0), ("rgb", "xyz"): (1, 0)}
    text = page.show(cells)
    low, high = wilson_interval(20, 50)
    assert f"| rgb | 20/50 ({100 * low:.0f} to {100 * high:.0f} %) | 10/50" in text and "30/100 (" in text
    assert "| cat | 45/50" in text and "not run | not run |" in text
    assert "Significant: 1 of 2 pairs" in text and "- cat over rgb 25:0\n" in text
    assert "rgb over xyz" not in text
    assert f"**{table.CAN.title}**: not run" in text


def test_whether_reposing_halves_the_loss():
    cells = made(
        shift_xyz_seed0=outcomes(40),
        shift_xyz_seed0_5cm=outcomes(20),
        shift_xyz__reposed_seed0=outcomes(42),
        shift_xyz__reposed_seed0_5cm=outcomes(37),
        shift_cat_seed0=outcomes(40),
        shift_cat_seed0_5cm=outcomes(20),
        shift_cat__reposed_seed0=outcomes(40),
        shift_cat__reposed_seed0_5cm=outcomes(29),
        shift_rgb_seed0=outcomes(30),
    )
    lost = page.camera_shift(cells, 5)
    assert lost["xyz"] == pytest.approx({"": 40, "reposed": 10})
    assert lost["cat"] == pytest.approx({"": 40, "reposed": 22}) and "rgb" not in lost
    text = page.show(cells)
    assert "xyz: with re-posed views in training, 10 instead of 40 of 100 episodes are lost at 5 cm" in text
    assert "(at most half: met); there it wins 37/50 instead of 20/50 (exact McNemar p < 0.001)." in text
    assert "22 instead of 40 of 100 episodes are lost at 5 cm (at most half: missed)" in text
    assert "29/50 instead of 20/50 (exact McNemar p = 0.004)" in text  # 9 to 0: 2 / 2**9
    assert "| rgb | plainly | 30/50 (46 to 72 %) | not run | not run |" in text


def test_unknown_cells_and_impossible_options_are_named(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"no cell matches 'lfit\*'; cells: lift_rgb_seed0"):
        reproduce.main(["robosuite-table", "--only", "lfit*"])
    with pytest.raises(ValueError, match="--jobs is 0"):
        reproduce.main(["robosuite-table", "--jobs", "0"])
    with pytest.raises(ValueError, match="figures that mean nothing"):
        reproduce.main(["robosuite-table", "--trial"])
    out = ["--out", str(tmp_path), "--work", str(tmp_path / "work")]
    assert reproduce.main(["robosuite-table", "--list", "--only", "can_*", *out]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["can_rgb_seed0", "missing", "(optional)"]
    (tmp_path / "can_rgb_seed0.json").write_text("{")
    with pytest.raises(ValueError, match=r"can_rgb_seed0.json is not a cell of the table"):
        reproduce.main(["robosuite-table", "--list", "--only", "can_*", *out])


def test_a_cell_of_another_recipe_is_not_passed_off(tmp_path, capsys):
    out = ["--out", str(tmp_path), "--work", str(tmp_path / "work"), "--only", "lift_rgb_seed0"]
    cell = figures("lift_rgb_seed0", outcomes(5)) | {"recipe": "000000000000"}
    reproduce.write_whole(tmp_path / "lift_rgb_seed0.json", json.dumps(cell))
    assert reproduce.main(["robosuite-table", *out]) == 1
    assert "of another recipe; remove it" in capsys.readouterr().out
    assert reproduce.main(["robosuite-table", "--list", *out]) == 0
    assert "ANOTHER RECIPE" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["lift_rgb_seed0.json"]


def test_a_command_that_fails_is_told_and_the_others_go_on(tmp_path, capsys, monkeypatch):
    real = table.Plan.collect
    broken = lambda plan, workers: [*real(plan, workers), "--demos", "0"]  # noqa: E731
    monkeypatch.setattr(table.Plan, "collect", broken)
    out = ["--trial", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    assert reproduce.main(["robosuite-table", *out, "--only", "lift_rgb_seed0", "stack_rgb_seed0"]) == 1
    text = capsys.readouterr().out
    assert "vilma collect-robosuite ended with 1: vilma collect-robosuite: got --demos 0" in text
    assert "not made: lift_rgb_seed0, stack_rgb_seed0" in text and not (tmp_path / "out").exists()


needs_robosuite = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("gymnasium", "robosuite", "h5py")),
    reason="needs the extra robot",
)


@needs_robosuite
@pytest.mark.long
def test_a_cell_survives_being_ended_and_is_made_once(tmp_path):
    command = [sys.executable, "-m", "vilma.cli", "reproduce", "robosuite-table", "--trial"]
    command += ["--only", "shift_xyz-reposed_seed0", "shift_xyz-reposed_seed0_5cm", "--jobs", "2"]
    command += ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    demos = tmp_path / "work" / "data" / "shift.hdf5"

    child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    while not demos.exists():
        assert child.poll() is None, child.stdout.read()
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    assert child.wait(60) == 130
    collected = demos.stat().st_mtime_ns
    assert not (tmp_path / "out").exists()

    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert demos.stat().st_mtime_ns == collected, "collected again"
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["shift_xyz-reposed_seed0.json", "shift_xyz-reposed_seed0_5cm.json"]
    still, moved = (json.loads((tmp_path / "out" / name).read_text()) for name in names)
    assert still["checkpoint"] == moved["checkpoint"] and still["parameters"] == moved["parameters"] > 1e6
    assert moved["environment"] == {"placement": 0.12, "camera_shift": 0.05}
    assert len(still["outcomes"]) == still["episodes"] == 2 and still["demos"] == 3 and still["steps"] == 12
    assert still["outcomes"].count("1") == still["successes"]
    assert still["wilson95"] == pytest.approx(wilson_interval(still["successes"], 2), abs=1e-4)
    assert (
        still["train_seconds"] > 0
        and still["commit"]
        and still["commands"]["train"].startswith("vilma train-policy")
    )

    # Finished cells are left alone, also without anything but their files.
    shutil.rmtree(tmp_path / "work")
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0 and "2 of 2 cells are there, 0 to make" in again.stdout
    shown = subprocess.run([*command, "--show"], env=environment, capture_output=True, text=True, timeout=60)
    assert "| xyz | views re-posed |" in shown.stdout and shown.returncode == 0
