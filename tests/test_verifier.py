import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dflash_scale.verifier import (
    FINAL_NORM,
    load_verifier_head,
    mask_token_id,
    verifier_shape,
)

TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
CONFIGS = {
    "llama": "LlamaConfig",
    "mistral": "MistralConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "qwen3_moe": "Qwen3MoeConfig",
}


def make_verifier(family: str, folder: Path, tied: bool = False, shard: str = "8KB") -> Any:
    """A tiny random verifier, saved in shards, whose final norm is not the identity."""
    torch.manual_seed(0)
    extra = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16} if family == "qwen3_moe" else {}
    config = getattr(transformers, CONFIGS[family])(**TINY, **extra, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        model.model.norm.weight.normal_(1.0, 0.3)
        model.model.embed_tokens.weight.normal_()
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def last_residual_and_logits(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    caught: list[torch.Tensor] = []

    def keep(_module: Any, _args: Any, out: Any) -> None:
        caught.append(out[0] if isinstance(out, tuple) else out)

    handle = model.model.layers[-1].register_forward_hook(keep)
    with torch.no_grad():
        logits = model(ids).logits[0]
    handle.remove()
    return caught[0].reshape(-1, TINY["hidden_size"]), logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", sorted(FINAL_NORM))
def test_head_of_the_last_residual_is_the_models_logits(family: str, tied: bool, tmp_path: Path) -> None:
    model = make_verifier(family, tmp_path, tied)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    residual, logits = last_residual_and_logits(model, torch.arange(24)[None])
    head = load_verifier_head(str(tmp_path), torch.float32, "cpu")
    error = (head.logits(residual) - logits).abs().max().item()
    assert error <= 1e-6 * logits.abs().max().item(), f"{family}, tied={tied}: {error}"
    assert torch.equal(head.argmax(residual, chunk=5), logits.argmax(-1).int())
    assert torch.equal(head.embedding, model.model.embed_tokens.weight)
    assert (head.weight is head.embedding) == tied
    assert not head.weight.requires_grad
    assert not any(parameter.requires_grad for parameter in head.norm.parameters())


def test_argmax_of_nothing_is_nothing(tmp_path: Path) -> None:
    make_verifier("qwen3", tmp_path)
    assert load_verifier_head(str(tmp_path), torch.float32, "cpu").argmax(torch.zeros(0, 32)).shape == (0,)


def test_only_the_needed_shards_are_read(tmp_path: Path) -> None:
    make_verifier("qwen3", tmp_path)
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {weight_map[name] for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")}
    for shard in set(weight_map.values()) - needed:
        (tmp_path / shard).unlink()
    assert load_verifier_head(str(tmp_path), torch.bfloat16, "cpu").weight.dtype == torch.bfloat16


def test_one_unsharded_file(tmp_path: Path) -> None:
    model = make_verifier("llama", tmp_path, shard="1GB")
    assert not (tmp_path / "model.safetensors.index.json").exists()
    assert torch.equal(load_verifier_head(str(tmp_path), torch.float32, "cpu").weight, model.lm_head.weight)


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_unknown_family_is_one_clear_error(tmp_path: Path) -> None:
    make_verifier("llama", tmp_path)
    edit_config(tmp_path, model_type="gemma2")
    with pytest.raises(ValueError, match="got the family 'gemma2', wanted one of llama, mistral"):
        load_verifier_head(str(tmp_path), torch.float32, "cpu")


def test_missing_head_and_wrong_shape_are_named(tmp_path: Path) -> None:
    make_verifier("qwen3", tmp_path, tied=True, shard="1GB")
    edit_config(tmp_path, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"got no tensor lm_head\.weight in model\.safetensors"):
        load_verifier_head(str(tmp_path), torch.float32, "cpu")
    edit_config(tmp_path, tie_word_embeddings=True, vocab_size=98)
    with pytest.raises(ValueError, match=r"shape \(97, 32\), wanted \(98, 32\)"):
        load_verifier_head(str(tmp_path), torch.float32, "cpu")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"got no model\.safetensors"):
        load_verifier_head(str(tmp_path), torch.float32, "cpu")


def test_the_test_would_notice_a_plain_norm(tmp_path: Path) -> None:
    """The comparison above is worth something: without the norm's weight it fails by orders of magnitude."""
    model = make_verifier("qwen3", tmp_path, shard="1GB")
    residual, logits = last_residual_and_logits(model, torch.arange(24)[None])
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, "model.norm.weight": torch.ones(32)}, tmp_path / "model.safetensors", {"format": "pt"})
    head = load_verifier_head(str(tmp_path), torch.float32, "cpu")
    assert (head.logits(residual) - logits).abs().max() > 0.1 * logits.abs().max()


def test_shape_of_a_folder_is_transformers_config(tmp_path: Path) -> None:
    model = make_verifier("qwen3", tmp_path)
    shape = verifier_shape(str(tmp_path))
    assert (shape.layers, shape.hidden_size, shape.heads, shape.kv_heads, shape.head_dim) == (2, 32, 4, 2, 8)
    assert dict(shape.rope_parameters) == model.config.rope_parameters
    assert shape.dtype == "float32"
    assert (shape.stream_dtype("auto"), shape.stream_dtype("float16")) == ("float32", "float16")


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
