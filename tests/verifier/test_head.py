"""Of every family, the head of the last residual against the model's own logits; and where the tensors come from."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dflash_scale.drafter.model import block_inputs
from dflash_scale.verifier.head import VerifierHead, load_verifier_head
from tests.support.verifier_families import FAMILIES, HIDDEN, VOCABULARY, make_verifier, residuals_and_logits

IDS = list(range(10, 34))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_head_of_the_last_residual_is_the_models_logits(family: str, tied: bool, tmp_path: Path) -> None:
    model = make_verifier(family, tmp_path, tied=tied)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    residuals, logits = residuals_and_logits(model, IDS)
    head = load_verifier_head(str(tmp_path), torch.float32, "cpu")
    error = (head.logits(residuals[-1]) - logits).abs().max().item()
    assert error <= 1e-6 * logits.abs().max().item(), f"{family}, tied={tied}: {error}"
    assert torch.equal(head.embedding, model.get_input_embeddings().weight)
    assert torch.equal(head.weight, model.get_output_embeddings().weight)
    assert (head.weight is head.embedding) == tied
    assert not head.weight.requires_grad
    assert not any(parameter.requires_grad for parameter in head.norm.parameters())


@pytest.mark.parametrize("family", ["gemma2", "qwen3_next", "phi", "cohere"])
def test_the_test_would_notice_a_plain_norm(family: str, tmp_path: Path) -> None:
    """These norms are no RMSNorm of their weight: the comparison above fails by orders of magnitude with one."""
    residuals, logits = residuals_and_logits(make_verifier(family, tmp_path), IDS)
    head = load_verifier_head(str(tmp_path), torch.float32, "cpu")
    plain = nn.RMSNorm(HIDDEN)
    plain.weight = head.norm.weight  # type: ignore[assignment]
    head.norm = plain
    assert (head.logits(residuals[-1]) - logits).abs().max() > 0.01 * logits.abs().max()


@pytest.mark.parametrize("family", ["gemma2", "gemma4_text", "granite", "cohere", "phi", "phimoe"])
def test_the_test_would_notice_a_bare_product(family: str, tmp_path: Path) -> None:
    """Here a cap, a scale or a bias follows the product with the head."""
    residuals, logits = residuals_and_logits(make_verifier(family, tmp_path), IDS)
    head = load_verifier_head(str(tmp_path), torch.float32, "cpu")
    bare = VerifierHead(head.embedding, head.norm, head.weight)
    assert (bare.logits(residuals[-1]) - logits).abs().max() > 0.01 * logits.abs().max()


@pytest.mark.parametrize("family", ["gemma3_text", "granite"])
def test_the_drafter_sees_bare_rows_of_the_embedding(family: str, tmp_path: Path) -> None:
    """vLLM shares the embedding's matrix; the factor that these models put on its rows is not part of it."""
    model = make_verifier(family, tmp_path)
    head = load_verifier_head(str(tmp_path), torch.float32, "cpu")
    rows = head.embedding[torch.tensor(IDS)]
    assert not torch.allclose(residuals_and_logits(model, IDS)[0][0], rows)

    class Spec:
        block_size, mask_token_id = 2, 3

    slots = block_inputs(head.embedding, torch.tensor(IDS), Spec())  # type: ignore[arg-type]
    assert torch.equal(slots[::2], rows)
    assert torch.equal(slots[1], model.get_input_embeddings().weight[3])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["qwen3", "gemma3", "phi"])
def test_checkpoints_of_half_precision(family: str, dtype: str, tmp_path: Path) -> None:
    model = make_verifier(family, tmp_path, dtype=dtype).float()
    residuals, logits = residuals_and_logits(model, IDS)
    head = load_verifier_head(str(tmp_path), torch.float32, "cpu")
    assert (head.logits(residuals[-1]) - logits).abs().max() <= 1e-6 * logits.abs().max()
    half = load_verifier_head(str(tmp_path), torch.bfloat16, "cpu")
    assert half.weight.dtype == half.embedding.dtype == torch.bfloat16
    assert (half.logits(residuals[-1].bfloat16()) - logits).abs().max() <= 3e-2 * logits.abs().max()


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


def rename(folder: Path, names: dict[str, str], **tensors: torch.Tensor) -> None:
    """Rewrites a single-file checkpoint: prefixes exchanged, tensors replaced or added."""
    state = load_file(folder / "model.safetensors") | tensors
    for old, new in names.items():
        state = {new + name.removeprefix(old) if name.startswith(old) else name: t for name, t in state.items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "names",
    [
        {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head."},  # before 2025
        {"model.language_model.": "model."},
        {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head."},
    ],
)
def test_prefixes_of_older_wrappers(names: dict[str, str], tmp_path: Path) -> None:
    model = make_verifier("gemma3", tmp_path, shard="1GB")
    rename(tmp_path, names)
    head = load_verifier_head(str(tmp_path), torch.float32, "cpu")
    assert torch.equal(head.weight, model.lm_head.weight)
    assert torch.equal(head.norm.weight, model.model.language_model.norm.weight)  # type: ignore[arg-type]


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_fp8_layers_do_not_matter_and_a_quantised_head_does(tmp_path: Path) -> None:
    model = make_verifier("qwen3", tmp_path, shard="1GB")
    fp8 = {
        f"model.layers.0.mlp.{name}_proj.weight": torch.zeros(48, 32).to(torch.float8_e4m3fn) for name in ("gate", "up")
    }
    rename(tmp_path, {}, **fp8, **{f"{name}_scale_inv": torch.ones(1, 1) for name in fp8})
    edit_config(tmp_path, quantization_config={"quant_method": "fp8", "modules_to_not_convert": ["lm_head"]})
    assert torch.equal(load_verifier_head(str(tmp_path), torch.float32, "cpu").weight, model.lm_head.weight)
    rename(tmp_path, {}, **{"lm_head.weight": torch.zeros(VOCABULARY, HIDDEN).to(torch.float8_e4m3fn)})
    with pytest.raises(ValueError, match=r"got lm_head\.weight as torch\.float8_e4m3fn, wanted .* in full precision"):
        load_verifier_head(str(tmp_path), torch.float32, "cpu")
    rename(tmp_path, {"lm_head.weight": "lm_head.weight_packed"})
    with pytest.raises(ValueError, match=r"got lm_head\.weight_packed, wanted lm_head\.weight in full precision"):
        load_verifier_head(str(tmp_path), torch.float32, "cpu")
    rename(tmp_path, {"lm_head.weight_packed": "lm_head.qweight"})
    with pytest.raises(ValueError, match=r"got lm_head\.qweight, wanted lm_head\.weight in full precision"):
        load_verifier_head(str(tmp_path), torch.float32, "cpu")


def test_missing_head_and_wrong_shape_are_named(tmp_path: Path) -> None:
    make_verifier("qwen3", tmp_path, tied=True, shard="1GB")
    edit_config(tmp_path, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"got no tensor lm_head\.weight, looked for lm_head\.weight, language_model"):
        load_verifier_head(str(tmp_path), torch.float32, "cpu")
    edit_config(tmp_path, tie_word_embeddings=True, vocab_size=98)
    with pytest.raises(ValueError, match=r"shape \(97, 32\), wanted \(98, 32\)"):
        load_verifier_head(str(tmp_path), torch.float32, "cpu")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"got no model\.safetensors"):
        load_verifier_head(str(tmp_path), torch.float32, "cpu")


class Projected(LlamaForCausalLM):  # type: ignore[misc]
    """A family whose decoder does something between its layers and its norm that the norm alone does not repeat."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model.merge = nn.Linear(config.hidden_size, config.hidden_size)


class TwoNorms(LlamaForCausalLM):  # type: ignore[misc]
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model.other_norm = nn.RMSNorm(config.hidden_size)


@pytest.mark.parametrize(
    ("family", "reason"),
    [(Projected, r"got \['merge'\]; its children are .*merge"), (TwoNorms, r"got \['norm', 'other_norm'\]")],
)
def test_a_decoder_with_more_than_a_norm_is_refused(
    family: type, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_verifier("llama", tmp_path)
    monkeypatch.setattr("dflash_scale.verifier.head.AutoModelForCausalLM.from_config", family)
    with pytest.raises(ValueError, match=reason):
        load_verifier_head(str(tmp_path), torch.float32, "cpu")


def test_unknown_family_is_one_clear_error(tmp_path: Path) -> None:
    make_verifier("llama", tmp_path)
    edit_config(tmp_path, model_type="llama99")
    with pytest.raises(ValueError, match=r"got the family \(model_type\) 'llama99', wanted one that Transformers 5"):
        load_verifier_head(str(tmp_path), torch.float32, "cpu")
    edit_config(tmp_path, model_type="vit")
    with pytest.raises(ValueError, match=r"Transformers has none of AutoModelForCausalLM of vit"):
        load_verifier_head(str(tmp_path), torch.float32, "cpu")
