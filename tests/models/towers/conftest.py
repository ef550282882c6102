"""A small random pair of towers as files: a timm network's weights and text encoders as transformers saves them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from clipdistill.scenes.pairs import open_scenes

NETWORK = "test_efficientnet"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def make_encoder(folder: Path, kind: str = "bert", **changes: Any) -> Path:
    """A folder with config.json, model.safetensors and tokenizer.json of a tiny text encoder of one kind."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    source = open_scenes("train", 200)
    seen = sorted(
        {w for i in range(len(source)) for c in source.captions(i) for w in c.lower().replace(",", "").split()}
    )
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*WORDS, *seen, "photo", "two"]))}
    fast = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    fast.normalizer, fast.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    fast.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    shared = {"vocab_size": len(vocabulary), "pad_token_id": 0}
    usual = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    sizes = {
        "distilbert": {"dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 32},
        "t5": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 3, "num_heads": 2},
    }.get(kind, usual)
    config = transformers.AutoConfig.for_model(kind, **{**shared, **sizes, **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = transformers.T5EncoderModel(config) if kind == "t5" else transformers.AutoModel.from_config(config)
    model.save_pretrained(folder, safe_serialization=True)
    transformers.PreTrainedTokenizerFast(tokenizer_object=fast, **names).save_pretrained(folder)
    return folder


def make_network(path: Path, network: str = NETWORK) -> Path:
    """The weights of a tiny timm network in float16, its classifier included."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        tensors = timm.create_model(network, pretrained=False).state_dict()
    halves = {n: (t.half() if t.is_floating_point() else t).contiguous() for n, t in tensors.items()}
    save_file(halves, path)
    return path


def pooled(folder: Path, **mode: bool) -> Path:
    """The same folder with sentence-transformers' files."""
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 16, **mode}))
    kind = "sentence_transformers.models.Pooling"
    (folder / "modules.json").write_text(json.dumps([{"idx": 1, "path": "1_Pooling", "type": kind}]))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 24}))
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(weights file of the network, folder of a BERT)."""
    folder = tmp_path_factory.mktemp("towers")
    return make_network(folder / "net.safetensors"), make_encoder(folder / "bert")


@pytest.fixture
def name(files: tuple[Path, Path]) -> Callable[..., str]:
    """The name of the pair, with more settings."""

    def make(*settings: str, image: str = "", text: str = "") -> str:
        network, encoder = files
        parts = [f"image={image or f'timm:{NETWORK}@{network}'}", f"text={text or f'hf:{encoder}'}"]
        return "towers:" + ",".join([*parts, "dim=8", "hidden=16", "size=32", *settings])

    return make
