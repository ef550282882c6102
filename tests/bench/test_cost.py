"""FLOPs against hand counts, memory against hand counts and the profiler, sizes, fingerprints."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clipdistill.bench import device
from clipdistill.bench.backends import tensor_bytes
from clipdistill.bench.cost import count_flops, describe_model, peak_activation_bytes, sample_inputs
from clipdistill.bench.device import describe_device, describe_libraries
from clipdistill.models import build_student, build_words_tokenizer
from clipdistill.models.known import architecture_fingerprint
from tests.bench.synthetic import tiny

CPU = torch.device("cpu")


def test_flops_of_linear_towers() -> None:
    model = tiny(16)
    model.module.train()
    assert count_flops(model, "image") == 2 * 3 * 64 * 16
    assert count_flops(model, "text") == 2 * 6 * 16
    assert model.module.training


def test_flops_count_attention_that_fast_paths_would_hide() -> None:
    model = build_student("scenes-student", seed=0, tokenizer=build_words_tokenizer(["a red square"]))
    vision = model.architecture["vision_cfg"]
    layers, width, patch, size = vision["layers"], vision["width"], vision["patch_size"], model.image.size
    tokens = (size // patch) ** 2 + 1
    hidden = int(width * vision.get("mlp_ratio", 4.0))
    block = tokens * (4 * width * width + 2 * width * hidden) + 2 * tokens * tokens * width
    last = tokens * 2 * width * width + 2 * width * width + 2 * width * hidden + 2 * tokens * width  # one token is read
    stem = (tokens - 1) * 3 * patch * patch * width
    expected = 2 * ((layers - 1) * block + last + stem + width * model.embed_dim)
    counted = count_flops(model, "image")
    assert counted == pytest.approx(expected, rel=0.02)
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_models_description() -> None:
    model = tiny(16)
    facts = describe_model(model)
    assert facts["size_bytes"] == 4 * (3 * 64 * 16 + 16 + 6 * 16 + 16 + 1)
    assert facts["fingerprint"] == model.fingerprint()
    assert facts["architecture"] == architecture_fingerprint({"width": 16}) != architecture_fingerprint({"width": 17})
    assert facts["parameters"]["image"] == 3 * 64 * 16 + 16
    assert architecture_fingerprint(None) == ""


def test_shared_weights_are_stored_once() -> None:
    module = nn.Module()
    module.a = nn.Linear(4, 4, bias=False)
    module.b = nn.Linear(4, 4, bias=False)
    assert tensor_bytes(module) == 128
    module.b.weight = module.a.weight
    assert tensor_bytes(module) == 64


def test_peak_memory_of_a_chain_is_two_links() -> None:
    x = torch.randn(1000)

    def chain() -> torch.Tensor:
        y = x + 1
        for _ in range(5):
            y = y * 2  # the old and the new one live together
        return y

    assert peak_activation_bytes(chain, CPU) == 8000
    assert peak_activation_bytes(lambda: x.view(10, 100), CPU) is None  # nothing was allocated


def test_peak_memory_agrees_with_the_profiler() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        model(x)
        seen = peak_activation_bytes(lambda: model(x), CPU)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            model(x)
    current = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
    assert seen is not None
    assert seen <= peak <= 4 * seen  # the profiler also sees scratch memory inside the convolution


def test_inputs() -> None:
    model = tiny()
    images = sample_inputs(model, "image", 3, CPU, torch.bfloat16)
    assert images.shape == (3, 3, 8, 8)
    assert images.dtype == torch.bfloat16
    assert torch.equal(images, sample_inputs(model, "image", 3, CPU, torch.bfloat16))
    assert sample_inputs(model, "text", 5, CPU, torch.bfloat16).shape == (5, 6)


def test_the_device_and_its_threads_are_one_fingerprint() -> None:
    before = torch.get_num_threads()
    prints = set()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            facts = describe_device(CPU)
            assert facts["label"].endswith("1 thread" if threads == 1 else "2 threads")
            prints.add(facts["fingerprint"])
            assert describe_device(CPU)["fingerprint"] == facts["fingerprint"]
    finally:
        torch.set_num_threads(before)
    assert len(prints) == 2
    assert describe_libraries()["torch"] == torch.__version__


def test_a_busy_machine_is_told_from_an_idle_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def ticks(*values: tuple[int, int] | None) -> None:
        found = iter(values)
        monkeypatch.setattr(device, "_processor_ticks", lambda: next(found))

    ticks((100, 1000), (140, 1100))  # 40 of 100 ticks idle
    assert "other work kept 60 % of this machine's processors busy" in (device.busy_warning(0) or "")
    ticks((100, 1000), (190, 1100))
    assert device.busy_warning(0) is None
    ticks(None, None)
    assert device.busy_warning(0) is None
