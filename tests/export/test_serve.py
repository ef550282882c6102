"""An export behind the service: the rows of the model it was made from, whatever runtime runs it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from clipdistill.embed.encode import Encoder

pytest.importorskip("starlette", reason="needs the extra 'serve'")

from clipdistill.serve.command import in_thread, served_name
from clipdistill.serve.limits import ServiceLimits
from tests.serve.conftest import Client, encoded


def test_an_export_is_served_by_its_folder(exported, tiny, squares):
    expected = Encoder(tiny, progress=False).images(squares)[0][:6].numpy()
    with in_thread(served_name(str(exported)), ServiceLimits(batch_size=4)) as found:
        client = Client(*found)
        images = encoded([squares.image_bytes(i) for i in range(6)])
        status, _, answer = client.post("/embed/images", {"images": images})
        assert status == 200, answer
        np.testing.assert_allclose(answer["embeddings"], expected, atol=1e-5)
        assert client.ask("GET", "/model")[2]["runtime"] == "onnx"
        assert str(exported) not in json.dumps(client.ask("GET", "/model")[2])
