import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config

from dflash_scale.config.run import Config, load_config, parse_config
from dflash_scale.data.prepare import prepare
from dflash_scale.drafter.model import Drafter, DrafterSpec
from dflash_scale.training.dry_run import make_dry_run, print_dry_run, size
from dflash_scale.training.memory import activation_bytes
from tests.support.chats import chat, save_tokenizer

ROOT = Path(__file__).parents[2]


def qwen3_8b(stage: int = 2, **sections: dict[str, Any]) -> Config:
    base: dict[str, Any] = {"verifier": {"model": "Qwen/Qwen3-8B"}, "data": {"path": "/nowhere"}}
    return parse_config({**base, "deepspeed": {"zero_optimization": {"stage": stage}}, **sections})


def test_qwen3_8b_on_8_gpus() -> None:
    dry = make_dry_run(qwen3_8b(), 8)
    # 5 layers: q, k, v, o, gate, up, down, two norms of H, two of D; fc over 5 aux layers, hidden_norm, norm.
    hidden, inner, queries, keys, depth = 4096, 12288, 32 * 128, 8 * 128, 5
    layer = 2 * hidden * queries + 2 * hidden * keys + 3 * hidden * inner + 2 * hidden + 2 * 128
    assert dry.trainable == depth * layer + 5 * hidden * hidden + 2 * hidden
    assert dry.frozen == 2 * 151936 * hidden + hidden
    assert dry.run.verifier.layouts.train.bytes_per_token == 5 * hidden * 2
    assert dry.run.verifier.layouts.validation.bytes_per_token == 6 * hidden * 2
    assert dry.run.verifier.layouts.validation.layer_ids == (2, 10, 18, 26, 34, 36)
    assert dry.micro_steps == 1


@pytest.mark.parametrize(("stage", "shares"), [(1, (1, 1, 8)), (2, (1, 8, 8)), (3, (8, 8, 8))])
def test_zero_divides_what_its_stage_says(stage: int, shares: tuple[int, int, int]) -> None:
    dry = make_dry_run(qwen3_8b(stage), 8)
    memory, number = dry.memory, dry.trainable
    whole = (2 * number, 4 * number, 12 * number)  # bf16, fp32 accumulation, fp32 master and two moments
    assert (memory.parameters, memory.gradients, memory.optimizer) == tuple(
        total // share for total, share in zip(whole, shares, strict=True)
    )


def test_fp32_has_no_second_master_copy() -> None:
    dry = make_dry_run(qwen3_8b(1, train={"precision": "fp32"}), 8)
    assert (dry.memory.parameters, dry.memory.optimizer) == (4 * dry.trainable, 8 * dry.trainable // 8)


def test_what_is_taken_over_and_what_is_set_are_both_printed() -> None:
    text = print_dry_run(qwen3_8b(), 8)
    for expected in (
        "32 query and 8 key heads of 128; blocks bidirectional",
        "all with full attention",
        "rope_type default, rope_theta 1000000.0",
        "unknown until the tokenizer is here",
        "all 151,936 tokens",
        "from random weights",
    ):
        assert expected in text, expected
    drafter = {
        "layers": 2,
        "heads": 16,
        "kv_heads": 4,
        "head_dim": 64,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 7, "factor": 2},
        "mask_token_id": 9,
        "vocab_size": 32000,
        "init_from": "drafters/old",
        "layer_types": ["full_attention", "sliding_attention"],
        "sliding_window": 512,
    }
    dry = make_dry_run(qwen3_8b(drafter=drafter), 8)
    assert dry.frozen == (2 * 151936 + 32000) * 4096 + 4096
    text = print_dry_run(dry.run.config, 8)
    for expected in (
        "16 query and 4 key heads of 64",
        "full, window 512",
        "rope_type linear, rope_theta 7.0, factor 2.0",
        "9, as configured",
        "32,000 of 151,936 tokens; what they cover is unknown until the data set is prepared",
        "from drafters/old",
    ):
        assert expected in text, expected


@pytest.mark.parametrize(
    ("transport", "dtype", "want"),
    [
        ("exact", "float16", "float16"),
        ("bf16", "float32", "bfloat16"),
        ("bf16", "bfloat16", "bfloat16"),
        ("fp8", "float32", "float8_e4m3fn"),
    ],
)
def test_the_transport_is_the_layouts_dtype(transport: str, dtype: str, want: str) -> None:
    dry = make_dry_run(
        qwen3_8b(stream={"transport": transport}, verifier={"model": "Qwen/Qwen3-8B", "dtype": dtype}), 8
    )
    assert (dry.run.verifier.layouts.train.dtype, dry.run.verifier.layouts.validation.dtype) == (want, want)
    if want == "float8_e4m3fn":
        assert dry.run.verifier.layouts.train.bytes_per_token == 5 * (4096 + 4)
        unpacked = 5 * 2 * 4096
        assert dry.memory.rows == 8192 * (6 * 6 * (4096 + 4) + unpacked), "as they came, and one in bfloat16"


def test_float16_is_not_sent_as_bf16() -> None:
    config = qwen3_8b(stream={"transport": "bf16"}, verifier={"model": "Qwen/Qwen3-8B", "dtype": "float16"})
    with pytest.raises(ValueError, match=r'stream\.transport: got "bf16" for hidden states in float16'):
        make_dry_run(config, 8)


def test_the_printout_says_all_of_it() -> None:
    text = print_dry_run(qwen3_8b(), 8)
    statistics = 4 * 5 * 32 * (512 * 8192 // 3072) * 16
    assert f"attention                {statistics / 1e6:.1f} MB of statistics, no scores" in text
    text_of_reference = print_dry_run(qwen3_8b(drafter={"attention_backend": "reference"}), 8)
    assert f"{2 * statistics * (8192 + 16) / 1e9:.1f} GB of dense scores" in text_of_reference
    for expected in (
        "training ranks           8, one per GPU",
        "receivers                1, one per node",
        "server 0                 http://127.0.0.1:8001, hidden states from tcp://127.0.0.1:5601",
        "mode                     online\n",
        "[2, 10, 18, 26, 34], and 36 for the verifier's logits",
        "40,960 bytes per token, bfloat16; 49,152 in validation, with the last layer",
        "shared memory per node   8.6 GB (8 rings, page-locked)",
        "hidden states of 6 rows  2.4 GB\n",
        "trainable parameters     1,048,626,432",
        "optimizer step           8 rows = 8 ranks × 1 micro-steps",
        "tokens per step          65,536 at most",
        "steps per epoch          unknown until prepared (/nowhere does not exist)",
        "(1/8 of all, ZeRO 2)",
    ):
        assert expected in text, expected


def test_the_loss_holds_a_chunk_and_the_verifiers_where_it_is_wanted() -> None:
    hidden, vocabulary = 4096, 151936
    for loss, chunk, matrices, slices in (
        ({}, 1024, 1, 5),
        ({"terms": {"kl": 1.0}}, 512, 2, 12),
        ({"labels": "verifier", "chunk_slots": 100}, 100, 2, 5),
    ):
        dry = make_dry_run(qwen3_8b(loss=loss), 8)
        wanted = matrices * chunk * vocabulary * 2 + slices * 4 * min(1 << 23, chunk * vocabulary)
        wanted += dry.anchors * 16 * hidden * 2 + chunk * hidden * 6
        assert dry.memory.loss == wanted, loss
        assert f"for chunks of {chunk} slots" in print_dry_run(dry.run.config, 8)


def test_two_nodes_have_two_receivers() -> None:
    text = print_dry_run(qwen3_8b(train={"rows_per_step": 16}), 16)
    assert "receivers                2, one per node" in text
    assert "8.6 GB (8 rings, page-locked)" in text


def test_a_world_that_does_not_divide_the_rows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"train\.rows_per_step: got 8 with 3 ranks"):
        print_dry_run(qwen3_8b(), 3)


def test_a_ring_too_small_for_two_rows_is_refused() -> None:
    with pytest.raises(ValueError, match=r"stream\.ring_bytes: got 800000000, wanted at least 805306368"):
        print_dry_run(qwen3_8b(stream={"ring_bytes": 800_000_000}), 8)


def test_a_prepared_data_set_gives_steps_and_anchors(tmp_path: Path) -> None:
    model = save_tokenizer(tmp_path / "tokenizer")
    source = tmp_path / "in.jsonl"
    source.write_text("".join(chat(f"q{i:02}", "x" * 40) + "\n" for i in range(50)))
    prepare([source], model, tmp_path / "data", validation_fraction=0.0)
    data = {"path": str(tmp_path / "data"), "row_tokens": 200, "anchors_per_document": 10}
    dry = make_dry_run(qwen3_8b(data=data, train={"rows_per_step": 4, "epochs": 2}), 2)
    assert dry.data is not None and dry.schedule is not None
    length = int(dry.data.train.lengths[0])
    per_row = 200 // length
    assert dry.most_anchors == dry.anchors == 10 * per_row
    assert dry.schedule.steps_per_epoch == math.ceil(math.ceil(50 / per_row) / 4)
    more = data | {"anchors_per_document": 1000}  # more than there are: all but the last token of each
    assert make_dry_run(qwen3_8b(data=more), 2).most_anchors == per_row * (length - 1)
    text = print_dry_run(dry.run.config, 2)
    assert f"steps per epoch          {dry.schedule.steps_per_epoch}" in text
    assert "samples                  50 to train on, 0 for validation" in text
    assert f"a whole cache            {50 * length * 49_152 / 1e6:.1f} MB" in text


def test_an_offline_run_names_its_cache_and_no_server() -> None:
    text = print_dry_run(qwen3_8b(stream={"mode": "offline", "cache": "states/x"}), 8)
    assert "mode                     offline, cache states/x" in text and "server 0" not in text


def test_a_run_on_random_states_has_no_receiver_ring_or_credit_and_knows_its_steps() -> None:
    config = load_config(ROOT / "configs" / "debug.json")
    dry = make_dry_run(config, 1)
    assert dry.schedule is not None
    per_token = dry.run.verifier.layouts.validation.bytes_per_token
    assert dry.memory.rows == 64 * per_token, "one row, and none ahead of it"
    text = " ".join(print_dry_run(config, 1).split())
    steps = f"steps {dry.schedule.total_steps} Memory"
    for expected in ("mode fake", "receivers none", "64 to train on, 16 for validation", steps):
        assert expected in text, text
    for absent in ("server 0", "ring of", "shared memory", "credit", "cache"):
        assert absent not in text


LAYERS = Qwen3Config(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4},
)
TOKENS, ANCHORS, BLOCK = 512, 64, 8


def kept_bytes(drafter: Drafter, dtype: torch.dtype) -> int:
    """The storages that a forward saves for the backward, and the output, which the loss keeps; without weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in drafter.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    at = torch.arange(TOKENS, dtype=torch.int32)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = drafter(
            torch.randn(ANCHORS * BLOCK, 64, dtype=dtype),
            torch.randn(TOKENS, 128, dtype=dtype),
            at,
            at[::8].contiguous(),
            torch.zeros_like(at),
        )
    saved = sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in weights)
    return saved + out.untyped_storage().nbytes()


@pytest.mark.parametrize(("dtype", "number"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_the_activation_formula_is_what_autograd_keeps(dtype: torch.dtype, number: int) -> None:
    spec, slots = DrafterSpec(LAYERS, (1, 2), 64, BLOCK, 5), ANCHORS * BLOCK
    statistics = 4 * LAYERS.num_attention_heads * slots  # of one layer's attention: in `attention_bytes`
    whole = kept_bytes(Drafter(spec, "cpu").to(dtype), dtype) - 3 * statistics
    estimate = activation_bytes(spec, slots, TOKENS, number)
    assert 0.999 <= whole / estimate <= 1.001, f"{dtype}: kept {whole}, estimated {estimate}"
    # With checkpointing the forward keeps the layers' inputs; in the backward one layer at a time is there besides.
    inputs = kept_bytes(Drafter(spec, "cpu", recompute=True).to(dtype), dtype)
    inputs += 2 * number * LAYERS.head_dim * (slots + TOKENS)  # cos and sin: arguments that no node saves
    peak, estimate = inputs + (whole - inputs) / 3, activation_bytes(spec, slots, TOKENS, number, recompute=True)
    assert inputs < whole / 3
    assert 0.999 <= peak / estimate <= 1.001, f"{dtype}: kept {peak}, estimated {estimate}"


def test_activation_checkpointing_makes_room_on_the_gpu() -> None:
    plain, less = (
        make_dry_run(qwen3_8b(train={"activation_checkpointing": chosen}), 8).memory for chosen in (False, True)
    )
    assert less.activations < 0.35 * plain.activations
    assert less.attention == plain.attention / 5
    assert less.total - less.activations - less.attention == plain.total - plain.activations - plain.attention


def test_sizes_are_decimal() -> None:
    assert [size(n) for n in (0, 999, 1000, 402_653_184, 19_327_352_832)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "402.7 MB",
        "19.3 GB",
    ]


def test_the_launcher_prints_a_plan_once_without_gpu_or_network() -> None:
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "1"]
    command += [str(ROOT / "launch" / "train.py"), "--config", str(ROOT / "configs" / "zero2_dflash.json"), "--plan"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("Run on 8 ranks") == 1


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_shipped_configs_can_be_planned(stage: int) -> None:
    config = load_config(ROOT / "configs" / f"zero{stage}_dflash.json")
    assert json.loads(config.dump())["deepspeed"]["zero_optimization"]["stage"] == stage
    assert f"ZeRO stage               {stage}" in print_dry_run(config, 8)
