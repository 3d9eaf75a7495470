"""The verifier's shape as the drafter takes it over, where its config.json is found, and the mask token."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from dflash_scale.verifier.shape import mask_token_id, verifier_shape
from tests.support.verifier_families import FAMILIES, TINY


def save_config(family: str, folder: Path, **values: Any) -> Any:
    config = FAMILIES[family](False)
    config.save_pretrained(folder)
    edit_config(folder, **values)
    return config


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_shape_of_every_family(family: str, tmp_path: Path) -> None:
    save_config(family, tmp_path, dtype="bfloat16")
    shape = verifier_shape(str(tmp_path))
    latent = family == "deepseek_v3"
    assert (shape.layers, shape.hidden_size, shape.vocab_size) == (4, 32, 97)
    assert (shape.heads, shape.kv_heads, shape.head_dim) == ((4, 4, 8) if latent else (4, 2, 8))
    assert (shape.intermediate_size, shape.max_position_embeddings) == (48, 256)
    assert 0 < shape.rms_norm_eps < 1e-4
    assert isinstance(shape.rope_parameters["rope_theta"], float | int) and "rope_type" in shape.rope_parameters
    assert shape.stream_dtype("auto") == "bfloat16" or "text_config" in json.loads(
        (tmp_path / "config.json").read_text()
    )


def test_shape_of_a_folder_is_transformers_config(tmp_path: Path) -> None:
    config = save_config("qwen3", tmp_path)
    shape = verifier_shape(str(tmp_path))
    assert (shape.layers, shape.hidden_size, shape.heads, shape.kv_heads, shape.head_dim) == (4, 32, 4, 2, 8)
    assert dict(shape.rope_parameters) == config.rope_parameters
    assert shape.dtype == "float32"
    assert (shape.stream_dtype("auto"), shape.stream_dtype("float16")) == ("float32", "float16")


def write(folder: Path, **content: Any) -> str:
    (folder / "config.json").write_text(json.dumps(content))
    return str(folder)


def test_what_a_short_config_leaves_out_is_its_familys(tmp_path: Path) -> None:
    """The config.json of google/gemma-3-4b-it has no head count, no vocabulary and no norm's epsilon."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    model = write(tmp_path, model_type="gemma3", text_config=text, torch_dtype="bfloat16", vision_config={})
    shape = verifier_shape(model)
    assert (shape.model_type, shape.layers, shape.hidden_size, shape.vocab_size) == ("gemma3", 34, 2560, 262208)
    assert (shape.heads, shape.kv_heads, shape.head_dim, shape.intermediate_size) == (8, 4, 256, 10240)
    assert dict(shape.rope_parameters) == {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}
    assert (shape.dtype, shape.tie_word_embeddings) == ("bfloat16", True)


def test_latent_attention_gives_heads_of_its_values(tmp_path: Path) -> None:
    transformers.DeepseekV3Config().save_pretrained(tmp_path)  # 128 heads for 7168, as many for keys as for queries
    shape = verifier_shape(str(tmp_path))
    assert (shape.heads, shape.kv_heads, shape.head_dim) == (56, 8, 128)


def test_heads_that_differ_by_layer_give_the_smaller(tmp_path: Path) -> None:
    transformers.Gemma4TextConfig(head_dim=256, global_head_dim=512).save_pretrained(tmp_path)
    assert verifier_shape(str(tmp_path)).head_dim == 256


def test_experts_alone_give_three_times_the_hidden_size(tmp_path: Path) -> None:
    transformers.GPT2Config(n_embd=48, n_head=4).save_pretrained(tmp_path)
    shape = verifier_shape(str(tmp_path))
    assert (shape.intermediate_size, shape.heads, shape.rms_norm_eps) == (144, 4, 1e-5)


def test_no_causal_language_model_is_one_clear_error(tmp_path: Path) -> None:
    transformers.MambaConfig().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"no 'num_attention_heads' \(model_type 'mamba'\); wanted the config.json of a"
    ):
        verifier_shape(str(tmp_path))


def test_shape_reads_configs_of_transformers_4(tmp_path: Path) -> None:
    old = {**TINY, "model_type": "llama", "rope_theta": 5e5, "torch_dtype": "bfloat16"}
    del old["head_dim"]
    (tmp_path / "config.json").write_text(json.dumps({**old, "rope_scaling": {"type": "linear", "factor": 2.0}}))
    shape = verifier_shape(str(tmp_path))
    assert dict(shape.rope_parameters) == {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}
    assert (shape.head_dim, shape.dtype, shape.tie_word_embeddings) == (8, "bfloat16", False)


def test_qwen3_8b_is_known_without_network() -> None:
    shape = verifier_shape("Qwen/Qwen3-8B")
    assert (shape.hidden_size, shape.layers, shape.heads, shape.kv_heads, shape.head_dim) == (4096, 36, 32, 8, 128)
    assert (shape.intermediate_size, shape.vocab_size, shape.dtype) == (12288, 151936, "bfloat16")
    assert not shape.tie_word_embeddings


@pytest.mark.parametrize("model", ["nobody/nothing-at-all", "no/such/folder", "./absent", "plain"])
def test_absent_verifier_says_how_to_get_it(model: str) -> None:
    with pytest.raises(ValueError, match=r"verifier\.model: got .* wanted a folder with a config\.json"):
        verifier_shape(model)


class FakeTokenizer:
    def __init__(self, tokens: int, mask: int | None = None) -> None:
        self.mask_token_id = mask
        self._tokens = tokens

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(self._tokens)}


def test_mask_token_prefers_the_configured_then_its_own_then_an_unused_row() -> None:
    assert mask_token_id(FakeTokenizer(10, mask=3), 16, 7) == 7
    assert mask_token_id(FakeTokenizer(10, mask=3), 16, None) == 3
    assert mask_token_id(FakeTokenizer(10), 16, None) == 10
    assert mask_token_id(FakeTokenizer(10, mask=20), 16, None) == 10  # a mask token without an embedding row
    with pytest.raises(ValueError, match=r"drafter\.mask_token_id: the tokenizer has no mask token and uses all 10"):
        mask_token_id(FakeTokenizer(10), 10, None)
    with pytest.raises(ValueError, match=r"drafter\.mask_token_id: got 16, wanted an id below 16"):
        mask_token_id(FakeTokenizer(10), 16, 16)
