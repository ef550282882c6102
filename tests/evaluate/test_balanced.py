"""Balanced retrieval scores: by hand, against their definition, and named wherever they are written."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

import clipdistill as cd
from clipdistill.cli import main
from clipdistill.errors import InputError
from clipdistill.evaluate.balanced import PROMPTS, augmented
from clipdistill.models import build_student, save_model
from clipdistill.statistics.scores import Scores
from tests.evaluate.conftest import ColourPairs, colour_model
from tests.objective.plain import unit


def test_by_hand_an_image_that_is_near_to_everything_stops_winning() -> None:
    """Cosines 0.9 and 0.8; the prompt is at 0.9 and 0.2: shares 1 / 2 and e^0.8 / (e^0.8 + e^0.2) = 0.6457."""
    image = torch.tensor([[0.9, 0.9], [0.8, 0.2]], dtype=torch.float64)
    image = torch.cat([image, (2 - image.square().sum(1, keepdim=True)).sqrt()], dim=1)
    text, prompt = torch.eye(3).double()[:1], torch.eye(3).double()[1:2]
    rows, queries = augmented(image, text, prompt, 1.0)
    lengths = rows.norm(dim=1)
    assert lengths[0].item() == pytest.approx(lengths[1].item(), rel=1e-12)
    assert queries.tolist() == [[1, 0, 0, 1, 0]]
    first, second = (rows @ queries.T)[:, 0].tolist()
    # log odds of the shares: 0.9 - 0.9 = 0 and 0.8 - 0.2 = 0.6
    assert second - first == pytest.approx(0.6, rel=1e-12)
    shares = [1 / (1 + math.exp(-odds)) for odds in (0.0, 0.6)]
    assert shares == pytest.approx([0.5, 0.6457], abs=1e-4)
    assert (image @ text.T)[0] > (image @ text.T)[1]


def test_ranks_are_those_of_the_definition_in_both_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    image, text, prompts = (unit(torch.randn(n, 8, generator=generator).double()) for n in (30, 50, 4))
    scale, owner = 11.0, torch.arange(50) % 30
    shares = (scale * image @ text.T).exp()
    shares = shares / (shares + (scale * image @ prompts.T).exp().sum(1, keepdim=True))
    found = cd.retrieval(*augmented(image, text, prompts, scale), owner, per_query=True)["per_query"]
    own = shares[owner, torch.arange(50)]
    ranks = 1 + (shares > own[None, :]).sum(0)
    assert np.allclose(found["t2i_MRR"], 1 / ranks.numpy())
    plain = cd.retrieval(image, text, owner, per_query=True)["per_query"]
    assert np.allclose(found["i2t_MRR"], plain["i2t_MRR"])
    assert not np.allclose(found["t2i_MRR"], plain["t2i_MRR"])


def test_the_protocol_names_it_and_no_table_mixes_it(tmp_path) -> None:
    model, source = colour_model(noise=0.3), ColourPairs(per_colour=4)
    with pytest.raises(InputError, match="balanced scores need the model's logit scale, and 'colours' has none"):
        cd.evaluate(model, source, progress=False, score="bsap")
    model.module.logit_scale = torch.nn.Parameter(torch.tensor(3.0))
    plain = cd.evaluate(model, source, progress=False, intervals=False)
    other = cd.evaluate(model, source, progress=False, intervals=False, score="bsap")
    (protocol,) = other.protocols()
    said = f"retrieval, standard, scores balanced by {len(PROMPTS)} auxiliary prompts (BSAP, not plain cosines): "
    assert protocol.label().startswith(said)
    assert said in other.to_markdown()
    other.save(tmp_path / "scores.json")
    assert said in json.loads((tmp_path / "scores.json").read_text())["protocols"][0]["label"]
    assert said in Scores.load(tmp_path / "scores.json").to_markdown()
    with pytest.raises(InputError, match=r"different protocols.*BSAP"):
        Scores([*plain, *other]).table(split=False)
    prompts = tmp_path / "mine.txt"
    prompts.write_text("a red thing\n\na blue thing\na red thing\n")
    (own,) = cd.evaluate(model, source, progress=False, intervals=False, score=f"bsap:{prompts}").protocols()
    assert "balanced by 2 auxiliary prompts of mine.txt" in own.label()
    assert own.question() != protocol.question()


def test_the_command_and_what_it_refuses(tmp_path, capsys) -> None:
    save_model(build_student("scenes-student", seed=0, captions=["a red ball"]), tmp_path / "model")
    common = ["eval", str(tmp_path / "model"), "--quiet", "--no-intervals"]
    pairs = ["--data", "scenes:val?size=20"]
    (tmp_path / "empty.txt").write_text("\n")
    for options, message in (
        ([*pairs, "--score", "bsab"], "unknown way to score retrieval 'bsab' (did you mean 'bsap'?)"),
        ([*pairs, "--score", f"bsap:{tmp_path}/empty.txt"], "no prompt in it"),
        ([*pairs, "--score", f"bsap:{tmp_path}/none.txt"], "auxiliary prompts"),
        (["--data", "scenes:zeroshot", "--score", "bsap"], "--score is for image-caption pairs"),
    ):
        assert main([*common, *options]) != 0
        assert message in capsys.readouterr().err
    assert main([*common, *pairs, "--score", "bsap", "--json", str(tmp_path / "s.json")]) == 0
    assert "BSAP" in capsys.readouterr().out
