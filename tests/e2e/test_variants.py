"""Runs that leave the beaten track: a verifier of another family, a pruned vocabulary, a drafter to begin from."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import AUX_LAYERS, VOCAB, Embedded, Run, random_data, run_config, tiny_verifier, wait_for
from safetensors.torch import load_file
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from dflash_scale.data.dataset import load_prepared
from dflash_scale.evaluation.evaluate import EvaluateSpec, evaluate
from dflash_scale.receiver.status import read_status
from dflash_scale.training.export import export_checkpoint, named_checkpoint

pytestmark = pytest.mark.e2e

KEPT = 90


def gemma(folder: Path) -> Path:
    """A Gemma 3 in the place of the harness's Qwen3: scaled and tied embedding, (1 + w) norms, a soft cap."""
    tiny_verifier(folder)  # for its tokenizer
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=16,
        final_logit_softcapping=5.0,
    )
    Gemma3ForCausalLM(config).save_pretrained(folder)
    return folder


def train(folder: Path, verifier: Path, data: Path, server: Embedded, transport: str = "exact", **drafter: Any) -> Path:
    config = run_config(verifier, data, [server], folder, epochs=1)
    config["stream"]["transport"] = transport
    run = Run(folder, {**config, "drafter": {**config["drafter"], "vocab_size": KEPT, **drafter}})
    run.launch(ranks=1)
    assert run.wait() == 0, run.log[-4000:]
    assert f"the drafter's {KEPT} tokens are" in run.log
    return export_checkpoint(named_checkpoint(folder / "out"), folder / "drafter")


def test_gemma_with_a_pruned_vocabulary_and_from_a_drafter(tmp_path: Path) -> None:
    verifier = gemma(tmp_path / "verifier")
    data = random_data(tmp_path, verifier, 40)
    server = Embedded(verifier)
    server.start()
    try:
        wait_for(server.healthy, 60, "an embedded server")
        first = train(tmp_path / "first", verifier, data, server)
        second = train(tmp_path / "second", verifier, data, server, "fp8", init_from=str(first))
    finally:
        server.kill()
    tensors = load_file(first / "model.safetensors")
    kept = (np.arange(KEPT) + tensors["d2t"].numpy()).tolist()
    counts = load_prepared(data).train.token_counts(VOCAB)
    assert counts[[t for t in range(VOCAB) if t not in kept]].max() <= counts[kept].max()
    assert torch.equal(
        tensors["lm_head.weight"], load_file(verifier / "model.safetensors")["model.embed_tokens.weight"][kept]
    )
    assert json.loads((first / "config.json").read_text())["aux_hidden_state_layer_ids"] == list(AUX_LAYERS)
    lines = [json.loads(line) for line in (tmp_path / "first" / "out" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["outside_vocabulary"] < 1 for line in lines)
    status = read_status(next((tmp_path / "second" / "out" / "stream").glob("*-rank0.json")))
    exact = read_status(next((tmp_path / "first" / "out" / "stream").glob("*-rank0.json")))
    assert status.committed == exact.committed and status.quarantined == 0
    assert 0.25 < status.committed_bytes / exact.committed_bytes < 0.28  # a byte and 1/16 scale of four
    # One epoch further from where the first ended, and not from random weights.
    moved, fresh = (load_file(folder / "model.safetensors")["fc.weight"] for folder in (second, first))
    assert 0 < (moved - fresh).norm() < 0.9 * fresh.norm()
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt_ids": [5, 6, 7]}) + "\n" + json.dumps({"prompt_ids": [9, 8]}))
    result = evaluate(EvaluateSpec(str(verifier), second, prompts, max_new_tokens=24))
    assert result.equal == 1.0 and result.replay_gap == 0.0
