"""``vilma show-gpu``: the committed results are read, and a figure beyond its aim is told as missed."""

import copy
import json

from vilma.tools import show_gpu


def test_every_line_has_its_row_and_follows_it():
    measured = json.loads(show_gpu.RESULTS.read_text())
    lines = {line.name: line for line in show_gpu.lines(measured)}
    name = "mLSTM, ViL-T 224, batch 256, forward"
    assert lines[name].met and not lines["the rest of the TFLA table"].met
    slower = copy.deepcopy(measured)
    (row,) = show_gpu.rows(slower, "mlstm", "ViL-T 224")
    row["vilma exp forward"] = 3.1 * row["floor forward"]
    changed = {line.name: line for line in show_gpu.lines(slower)}
    assert not changed[name].met and "3.10 times the floor" in changed[name].figure
    assert {n for n in lines if lines[n] != changed[n]} == {name}
