"""Speculative decoding against plain greedy decoding, its counts, the replay, and vLLM's counters."""

import json
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from dflash_scale.commands import cli
from dflash_scale.config.run import DrafterSection
from dflash_scale.drafter.model import Drafter, DrafterSpec, block_inputs, drafter_spec
from dflash_scale.drafter.pretrained import export_drafter
from dflash_scale.evaluation import evaluate, speculative
from dflash_scale.evaluation.acceptance import Acceptance
from dflash_scale.evaluation.evaluate import EvaluateSpec, replayed, uniform_anchors, untrained_drafter
from dflash_scale.evaluation.speculative import GreedyVerifier, counted, cut, speculate
from dflash_scale.evaluation.vllm import ServerSpec, parse_counters, serving
from dflash_scale.verifier.shape import verifier_shape
from tests.support.verifier_families import make_verifier

SIZE, NEW = 5, 23


def make_model(ends: int | None = None) -> Qwen3ForCausalLM:
    """A random verifier that repeats itself often enough for drafts to be right now and then."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=128,
        initializer_range=0.4,
        eos_token_id=ends,
    )
    return Qwen3ForCausalLM(config).eval()


def make_drafter() -> Drafter:
    layers = Qwen3Config(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=128,
        layer_types=["full_attention", "full_attention"],
    )
    drafter = Drafter(DrafterSpec(layers, (1, 2), 32, SIZE, 39))
    drafter.initialise(0)
    return drafter.eval()


@pytest.fixture
def verifier() -> GreedyVerifier:
    return GreedyVerifier(make_model(), (1, 2))


def make_prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 39, (6 + i,), generator=generator).tolist() for i in range(count)]


def test_output_is_the_greedy_one(verifier: GreedyVerifier) -> None:
    drafter = make_drafter()
    for prompt in make_prompts(6):
        ids = torch.tensor([prompt])
        wanted = verifier.model.generate(ids, max_new_tokens=NEW, do_sample=False)[0, len(prompt) :].tolist()
        assert verifier.greedy(prompt, NEW) == wanted
        trace = speculate(verifier, drafter, prompt, NEW)
        assert list(trace.output) == wanted
        assert list(trace.tokens[: len(prompt) + NEW]) == prompt + wanted


def test_drafter_sees_what_a_plain_forward_shows(verifier: GreedyVerifier, monkeypatch: pytest.MonkeyPatch) -> None:
    """The states behind the cropped cache are those of the tokens before the anchor, in one piece."""
    seen: list[tuple[torch.Tensor, int]] = []
    original = speculative.draft

    def spy(drafter: Drafter, own: GreedyVerifier, states: torch.Tensor, token: int) -> list[int]:
        seen.append((states, token))
        return original(drafter, own, states, token)

    monkeypatch.setattr(speculative, "draft", spy)
    trace = speculate(verifier, make_drafter(), make_prompts(1)[0], NEW)
    for (states, token), (anchor, _) in zip(seen, trace.steps, strict=True):
        wanted = verifier.read(trace.tokens[:anchor])[1]
        assert states.shape == wanted.shape
        assert torch.allclose(states, wanted, atol=1e-4), f"anchor {anchor}: {(states - wanted).abs().max()}"
        assert token == trace.tokens[anchor]


@pytest.mark.parametrize("right", [0, 2, SIZE - 1])
def test_counts_with_an_oracle(verifier: GreedyVerifier, monkeypatch: pytest.MonkeyPatch, right: int) -> None:
    """Drafts whose first `right` tokens are the verifier's: every step must accept exactly those."""
    prompt = make_prompts(1)[0]
    truth = prompt + verifier.greedy(prompt, NEW + 2 * SIZE)

    def oracle(drafter: Drafter, own: GreedyVerifier, states: torch.Tensor, token: int) -> list[int]:
        after = truth[len(states) + 1 : len(states) + SIZE]
        return [token if k < right else (token + 1) % 40 for k, token in enumerate(after)]

    monkeypatch.setattr(speculative, "draft", oracle)
    trace = speculate(verifier, make_drafter(), prompt, NEW)
    steps = -(-(NEW - 1) // (right + 1))  # the prompt's own step gives the first token
    assert list(trace.output) == truth[len(prompt) : len(prompt) + NEW]
    assert trace.steps == tuple((len(prompt) + i * (right + 1), right) for i in range(steps))
    counts = counted([trace], SIZE)
    # The last step counts in full although the answer is cut inside it.
    assert counts == Acceptance(
        steps, 4 * steps, right * steps, tuple(steps if k < right else 0 for k in range(SIZE - 1))
    )
    assert counts.length == right + 1


def test_end_token_ends_the_answer(verifier: GreedyVerifier) -> None:
    prompt = make_prompts(1)[0]
    free = verifier.greedy(prompt, NEW)
    end = free[7]
    ending = GreedyVerifier(make_model(end), (1, 2))
    wanted = free[: free.index(end) + 1]
    assert ending.greedy(prompt, NEW) == wanted
    assert list(speculate(ending, make_drafter(), prompt, NEW).output) == wanted
    assert cut([4, 5, 6], frozenset({5}), 9) == [4, 5]
    assert cut([4, 5, 6], frozenset(), 2) == [4, 5]
    assert cut([4, 5, 6], frozenset(), 9) is None


def test_replay_counts_what_decoding_counted(verifier: GreedyVerifier, monkeypatch: pytest.MonkeyPatch) -> None:
    drafter = make_drafter()
    teach(drafter, verifier)
    monkeypatch.setattr(evaluate, "ROW_TOKENS", 90)  # several rows of several documents
    traces = [speculate(verifier, drafter, prompt, NEW) for prompt in make_prompts(8)]
    decoded = counted(traces, SIZE)
    assert decoded.accepted > 10, "drafts that are never right would test nothing"
    assert replayed(verifier, drafter, traces, [[anchor for anchor, _ in t.steps] for t in traces]) == decoded
    everywhere = replayed(verifier, drafter, traces, [uniform_anchors(t, SIZE) for t in traces])
    assert everywhere.drafts == sum(len(t.tokens) - len(t.prompt) - SIZE + 1 for t in traces)


def teach(drafter: Drafter, verifier: GreedyVerifier) -> None:
    """Some steps of plain training on other prompts' answers."""
    documents = [prompt + verifier.greedy(prompt, NEW) for prompt in make_prompts(8)]
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=3e-3)
    for step in range(150):
        tokens = torch.tensor(documents[step % len(documents)])
        states = verifier.read(tokens.tolist())[1].clone()
        anchors = torch.arange(6, len(tokens) - SIZE + 1, dtype=torch.int32)
        positions = torch.arange(len(tokens), dtype=torch.int32)
        slots = block_inputs(verifier.embedding, tokens[anchors], drafter.spec)
        hidden = drafter(slots, states, positions, anchors, torch.zeros_like(positions))
        logits = verifier.head.logits(hidden).view(len(anchors), SIZE, -1)[:, 1:]
        labels = tokens[anchors[:, None] + torch.arange(1, SIZE)]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_too_long_is_refused(verifier: GreedyVerifier) -> None:
    with pytest.raises(ValueError, match="wanted 1 to 100"):
        speculate(verifier, make_drafter(), [1] * 101, NEW)


def test_evaluation_of_a_folder(tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "verifier")
    drafter = make_drafter()
    export_drafter(drafter.state_dict(), drafter.spec, str(tmp_path / "verifier"), tmp_path / "drafter")
    lines = [json.dumps({"prompt_ids": prompt, "answer_ids": [1]}) for prompt in make_prompts(5)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    out = tmp_path / "results.json"
    arguments = {
        "--verifier": tmp_path / "verifier",
        "--drafter": tmp_path / "drafter",
        "--prompts": tmp_path / "prompts.jsonl",
        "--count": 3,
        "--max-new-tokens": NEW,
        "--out": out,
    }
    assert cli.main(["evaluate", *(str(part) for pair in arguments.items() for part in pair)]) == 0
    content = json.loads(out.read_text())
    assert (content["prompts"], content["equal"], content["replay_gap"]) == (3, 1.0, 0.0)
    assert content["speculative"] == content["untrained"], "an untrained drafter was evaluated"
    assert content["vllm"] is None
    spec = EvaluateSpec(str(tmp_path / "verifier"), tmp_path / "drafter", tmp_path / "empty.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="got none"):
        evaluate.evaluate(spec)


def test_counters_are_read_and_subtracted() -> None:
    page = """# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 10.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="m"} 2.0
vllm:spec_decode_num_drafts_created{engine="0",model_name="m"} 1.7e+09
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="m"} 48.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 1.8e+01
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="0"} 9.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="2"} 3.0
"""
    counts = parse_counters(page, 4)
    assert counts == Acceptance(12, 48, 18, (9, 0, 3, 0))
    assert counts.length == 2.5
    assert counts - counts == Acceptance(0, 0, 0, (0, 0, 0, 0))
    assert counts.gap(Acceptance(12, 48, 15, (9, 0, 0, 0))) == pytest.approx(25)
    assert Acceptance.of([0, 4, 2], 4) == Acceptance(3, 12, 6, (2, 2, 1, 1))


def test_server_that_cannot_start_is_explained(tmp_path: Path) -> None:
    spec = ServerSpec("verifier", tmp_path, "no-such-python", tmp_path / "vllm.log")
    with pytest.raises(ValueError, match=r"ended with status 2(.|\n)*no-such-python"), serving(spec):
        pass


@pytest.mark.parametrize("family", ["gemma3", "gpt_oss", "qwen3_5_text", "qwen3_next"])
def test_sliding_and_linear_attention_forget_rejected_drafts(family: str, tmp_path: Path) -> None:
    """Windows are passed, drafts rejected: the answer is still the greedy one, and so is every verify step."""
    model = make_verifier(family, tmp_path, shard="1GB")
    model.generation_config.eos_token_id = None
    spec = drafter_spec(DrafterSection(layers=1, block_size=4), verifier_shape(str(tmp_path)), (1, 2), 96)
    verifier = GreedyVerifier(model, spec.layer_ids)
    trace = speculate(verifier, untrained_drafter(spec, 0), list(range(5, 12)), 30)
    assert list(trace.output) == verifier.greedy(trace.prompt, 30)
    cache, prompt = verifier.new_cache(), list(range(5, 17))
    verifier.read(prompt, cache)
    before = verifier.before_step(cache)
    verifier.read([20, 30, 40, 50], cache)
    cache = verifier.take_back(cache, before, [20], 3)
    wanted = verifier.read([*prompt, 20, 60, 70])[1][-2:]
    torch.testing.assert_close(verifier.read([60, 70], cache)[1], wanted, rtol=1e-4, atol=1e-4)
    assert any(accepted < 3 for _, accepted in trace.steps)
