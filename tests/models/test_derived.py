"""Models reach another process by pickle: every class that is made out of open_clip's comes back as itself."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from clipdistill.models import build_student
from clipdistill.models.architecture import build_module, check_architecture
from clipdistill.models.prompts import with_prompts
from tests.models.test_blocks import READ_AT_ONE_PLACE, READ_WHOLE, architecture_of

CAPTIONS = ["a red ball", "two cats"]


def coca() -> dict[str, Any]:
    values: dict[str, Any] = open_clip.get_model_config("coca_ViT-B-32")
    values["vision_cfg"] |= {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "attn_pooler_heads": 2}
    values["text_cfg"] |= {"layers": 1, "width": 64, "heads": 1, "vocab_size": 50}
    values["multimodal_cfg"] |= {"layers": 1, "width": 64, "heads": 1}
    return check_architecture({**values, "embed_dim": 64})


ARCHITECTURES = {
    "coca": coca(),
    "network of timm": architecture_of() | {"vision_cfg": {"timm_model_name": "test_resnet", "image_size": 32}},
    **{name: architecture_of(**values) for name, values in {**READ_AT_ONE_PLACE, **READ_WHOLE}.items()},
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_modules_come_back_as_themselves(name: str) -> None:
    module: Any = build_module(ARCHITECTURES[name], seed=1).eval()
    back = pickle.loads(pickle.dumps(module))
    assert [type(part) for part in back.modules()] == [type(part) for part in module.modules()]
    with torch.no_grad():
        images, tokens = torch.rand(2, 3, 32, 32), torch.tensor([[3, 4, 39] + [0] * 9, [5, 39] + [0] * 10])
        torch.testing.assert_close(back.encode_image(images), module.encode_image(images), rtol=0, atol=0)
        torch.testing.assert_close(back.encode_text(tokens), module.encode_text(tokens), rtol=0, atol=0)


class OfSomebody(type(build_module(architecture_of(), seed=0))):  # type: ignore[misc]
    """A class that a program derives from a model's."""


def test_classes_derived_from_ours_stay_themselves() -> None:
    module = build_module(architecture_of(), seed=0)
    module.__class__ = OfSomebody
    assert type(pickle.loads(pickle.dumps(module))) is OfSomebody


@pytest.mark.slow
def test_a_whole_model_in_a_process_of_its_own(tmp_path: Path) -> None:
    model = with_prompts(build_student("scenes-student", seed=0, captions=CAPTIONS), 2, 1, seed=0)
    with torch.no_grad():
        expected = model.module.eval().encode_text(model.tokenizer(CAPTIONS)).double().sum().item()
    (tmp_path / "model").write_bytes(pickle.dumps(model))
    script = (
        "import pickle, sys; from pathlib import Path; model = pickle.loads(Path(sys.argv[1]).read_bytes());"
        "print(model.module.encode_text(model.tokenizer(sys.argv[2:])).double().sum().item())"
    )
    answer = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "model"), *CAPTIONS], capture_output=True, text=True, check=True
    )
    assert float(answer.stdout) == pytest.approx(expected, abs=1e-5)
