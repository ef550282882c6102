"""Encoding: batches, workers, bad images, cut captions, cached texts, shared work."""

from __future__ import annotations

import json
import multiprocessing
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from clipdistill.embed.encode import Encoder, encode_pairs
from clipdistill.errors import InputError
from clipdistill.evaluate.retrieval import retrieval
from clipdistill.models.clip_model import ClipModel
from tests.evaluate.conftest import ColourPairs, as_arrays, colour_model


def test_rows_are_unit_length_and_in_order(model: ClipModel) -> None:
    source = ColourPairs()
    encoded = encode_pairs(model, source, batch_size=3, progress=False)
    assert encoded.keys == [source.key(i) for i in range(10)]
    assert encoded.captions[2:4] == list(source.captions(1))
    assert encoded.text_to_image.tolist() == np.repeat(np.arange(10), 2).tolist()
    assert encoded.caption_indices.tolist() == [0, 1] * 10
    for rows in as_arrays(encoded):
        assert rows.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    # every text retrieves its colour; the two shades of one colour compete
    found = retrieval(encoded.image, encoded.text, encoded.text_to_image, ks=(1, 2))
    assert found["t2i_R@2"] == 1.0


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (4, 0), (100, 0), (3, 2)])
def test_batches_and_workers_change_nothing(model: ClipModel, batch_size: int, workers: int) -> None:
    expected = encode_pairs(model, ColourPairs(per_colour=14, bad=[3, 40]), progress=False)
    found = encode_pairs(
        model, ColourPairs(per_colour=14, bad=[3, 40]), batch_size=batch_size, workers=workers, progress=False
    )
    torch.testing.assert_close(found.image, expected.image, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.text, expected.text, atol=1e-6, rtol=0)
    assert found.keys == expected.keys
    assert sorted(found.problems) == sorted(expected.problems)


def test_unreadable_images_are_left_out_with_their_captions(model: ClipModel) -> None:
    source = ColourPairs(bad=[0, 7])
    encoded = encode_pairs(model, source, batch_size=3, progress=False)
    assert encoded.problems == [("red-0", "truncated image: 3 of 9 bytes"), ("grey-1", "truncated image: 3 of 9 bytes")]
    assert encoded.keys == [source.key(i) for i in range(10) if i not in (0, 7)]
    assert len(encoded.captions) == 16
    assert encoded.text_to_image.max() == 7
    with pytest.raises(InputError, match=r"no image of colours/val can be read \(the first, red-0: truncated"):
        encode_pairs(model, ColourPairs(bad=range(10)), progress=False)


@pytest.mark.parametrize(("rule", "count"), [("all", 20), ("first", 10), ("first 5", 20), ("first 1", 10)])
def test_caption_rules(model: ClipModel, rule: str, count: int) -> None:
    encoded = encode_pairs(model, ColourPairs(), captions=rule, progress=False)
    assert len(encoded.captions) == len(encoded.text) == count
    with pytest.raises(InputError, match="captions must be 'all', 'first' or 'first 5', got 'second'"):
        encode_pairs(model, ColourPairs(), captions="second", progress=False)


def test_cut_captions_are_counted(model: ClipModel) -> None:
    # 'a red square of the dark photo of a square' needs 12 tokens with start and end, the model takes 9
    assert encode_pairs(model, ColourPairs(), progress=False).truncated == 5
    assert encode_pairs(model, ColourPairs(), captions="first", progress=False).truncated == 0


def test_texts_are_embedded_once(model: ClipModel) -> None:
    encoder = Encoder(model, progress=False)
    first = encoder.texts(["red", "blue", "red"])
    assert model.module.passes == 1
    torch.testing.assert_close(first[0], first[2], atol=0, rtol=0)
    again = encoder.texts(["blue", "green", "red"])
    assert model.module.passes == 2
    torch.testing.assert_close(again[[2, 0]], first[:2], atol=0, rtol=0)
    assert encoder.texts([]).shape == (0, 4)


def test_number_formats_and_training_mode(model: ClipModel) -> None:
    model.module.train()
    expected = encode_pairs(model, ColourPairs(), progress=False)
    assert model.module.training
    half = encode_pairs(model, ColourPairs(), progress=False, dtype="bfloat16")
    assert half.image.dtype == torch.float32
    assert not torch.equal(half.image, expected.image)
    torch.testing.assert_close(half.image, expected.image, atol=0.02, rtol=0)
    with pytest.raises(InputError, match=r"unknown number format 'bfloat61' .*'bfloat16'"):
        encode_pairs(model, ColourPairs(), dtype="bfloat61")


def test_a_damaged_model_is_named(model: ClipModel) -> None:
    with torch.no_grad():
        model.module.mix[0, 0] = float("nan")
    with pytest.raises(InputError, match="embeddings of colours/val are not finite"):
        encode_pairs(model, ColourPairs(), progress=False)


def test_progress_goes_to_the_error_stream(model: ClipModel, capsys: pytest.CaptureFixture[str]) -> None:
    encode_pairs(model, ColourPairs(), progress=True)
    assert capsys.readouterr().out == ""


def one_rank(rank: int, world: int, port: int, folder: str) -> None:
    """Encode and score on one of `world` ranks; writes what it got."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    encoded = encode_pairs(
        colour_model(noise=0.5), ColourPairs(per_colour=7, bad=[5, 12]), progress=False, distributed=True
    )
    found = retrieval(encoded.image, encoded.text, encoded.text_to_image, distributed=True)
    result = {"scores": found, "keys": encoded.keys, "problems": sorted(encoded.problems), "cut": encoded.truncated}
    Path(folder, f"{rank}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


def test_ranks_share_the_work_and_all_get_the_whole_result(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    ranks = [context.Process(target=one_rank, args=(rank, 2, port, str(tmp_path))) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0
    encoded = encode_pairs(colour_model(noise=0.5), ColourPairs(per_colour=7, bad=[5, 12]), progress=False)
    expected = {
        "scores": retrieval(encoded.image, encoded.text, encoded.text_to_image),
        "keys": encoded.keys,
        "problems": [list(problem) for problem in sorted(encoded.problems)],
        "cut": encoded.truncated,
    }
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == expected


def test_gradients_and_modes_are_as_before_whatever_is_left_in_the_middle(model):
    source = ColourPairs(per_colour=14)
    model.module.train()
    encoder = Encoder(model, batch_size=8, progress=False)

    def untouched():
        return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), model.module.training

    encoder.pairs(source)  # captions are encoded while pictures are waited for
    assert untouched() == (True, False, True)
    for steps in (encoder.stream(source, range(len(source))), encoder.text_batches([["a"], ["b"]], "texts")):
        next(steps)
        assert untouched() == (True, False, True)
        steps.close()
        assert untouched() == (True, False, True)
