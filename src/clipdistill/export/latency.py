"""How long one picture and one caption take: the exported tower and the model in torch, call by call in turns.

Taken on whatever machine the export is made on, beside whatever else it does: the ratio of the two holds there, the
milliseconds as far as the machine is quiet. `clipdistill bench` measures with intervals.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch

from clipdistill.bench.cost import sample_inputs
from clipdistill.export.gate import Runner
from clipdistill.models.clip_model import ClipModel
from clipdistill.models.parameters import evaluation_mode

CALLS = 9


def latency(model: ClipModel, runners: Mapping[str, Runner]) -> dict[str, dict[str, float]]:
    """Tower -> medians over CALLS of "ms" and "torch_ms", and "times_torch", of the ratios within a turn."""
    found, module = {}, model.module
    device = next(module.parameters()).device
    with evaluation_mode(module), torch.inference_mode():
        for tower, runner in runners.items():
            encode: Any = module.encode_image if tower == "image" else module.encode_text
            values = sample_inputs(model, tower, 1, torch.device("cpu"), torch.float32)
            array, own = values.numpy(), values.to(device)
            calls = (lambda runner=runner, array=array: runner(array)), (lambda e=encode, own=own: e(own).cpu())
            seconds: list[list[float]] = []
            for _ in range(CALLS + 1):  # the first warms up
                turn = []
                for call in calls:
                    start = time.perf_counter()
                    call()
                    turn.append(time.perf_counter() - start)
                seconds.append(turn)
            exported, plain = zip(*seconds[1:], strict=True)
            found[tower] = {
                "ms": round(1000 * statistics.median(exported), 3),
                "torch_ms": round(1000 * statistics.median(plain), 3),
                "times_torch": round(statistics.median(b / a for a, b in seconds[1:]), 3),
            }
    return found
