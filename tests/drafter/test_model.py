"""The drafter's module: what a block may depend on, how weights start, and what its configuration leaves open."""

import pytest
import torch

from dflash_scale.config.run import DrafterSection
from dflash_scale.drafter.model import Drafter, DrafterSpec, block_inputs, drafter_spec
from dflash_scale.verifier.shape import VerifierShape

SHAPE = VerifierShape(
    "qwen3", 32, 6, 4, 2, 8, 48, 64, 128, 1e-6, {"rope_type": "default", "rope_theta": 1e4}, False, "float32"
)


def make(**section: object) -> tuple[DrafterSpec, Drafter]:
    spec = drafter_spec(DrafterSection(layers=2, block_size=4, **section), SHAPE, (1, 3), 63)  # type: ignore[arg-type]
    drafter = Drafter(spec)
    drafter.initialise(0)
    return spec, drafter


def inputs(spec: DrafterSpec) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    doc_ids = torch.tensor([0] * 10 + [1] * 12, dtype=torch.int32)
    anchors = torch.tensor([0, 6, 9, 15], dtype=torch.int32)
    return {
        "slots": block_inputs(torch.randn(64, 32), torch.tensor([3, 5, 7, 9]), spec),
        "states": torch.randn(22, 64),
        "positions": torch.cat([torch.arange(10), torch.arange(12)]).int(),
        "anchors": anchors,
        "doc_ids": doc_ids,
    }


def test_a_block_depends_on_what_serving_has_and_on_nothing_else() -> None:
    spec, drafter = make()
    given = inputs(spec)
    before = drafter(**given).view(4, 4, 32)
    for position in range(22):
        changed = {**given, "states": given["states"].clone()}
        changed["states"][position] += 1.0
        moved = (drafter(**changed).view(4, 4, 32) != before).flatten(1).any(1).tolist()
        document = given["doc_ids"][position]
        wanted = [
            bool(given["doc_ids"][anchor] == document and position < anchor) for anchor in given["anchors"].tolist()
        ]
        assert moved == wanted, f"states at {position}"


@pytest.mark.parametrize("kept", [None, [1, 2, 6, 15]])
def test_recomputed_layers_give_the_same_bits(kept: list[int] | None) -> None:
    spec, drafter = make(sliding_window=6, layer_types=["sliding_attention", "full_attention"])
    given = inputs(spec) | {"kept": None if kept is None else torch.tensor(kept)}
    results, runs = [], []
    for recompute in (False, True):
        drafter.recompute = recompute
        layer = drafter.layers[0]
        calls: list[int] = []
        hook = layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        slots = given["slots"].clone().requires_grad_()
        out = drafter(**given | {"slots": slots})
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), [slots, *drafter.parameters()])])
        hook.remove()
        runs.append(len(calls))
    assert runs == [1, 2], "the layer is run again in the backward"
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)
    with torch.no_grad():
        assert torch.equal(drafter(**given), results[0][0])


@pytest.mark.parametrize("causal", [False, True])
def test_slots_see_their_block(causal: bool) -> None:
    spec, drafter = make(causal_block=causal)
    given = inputs(spec)
    before = drafter(**given).view(4, 4, 32)
    changed = {**given, "slots": given["slots"].clone()}
    changed["slots"][4 + 2] += 1.0  # slot 2 of block 1
    moved = (drafter(**changed).view(4, 4, 32) != before).any(2)
    assert moved.tolist() == [[False] * 4, [not causal, not causal, True, True], [False] * 4, [False] * 4]


@pytest.mark.parametrize("kept", [[1, 2, 5, 9, 10, 11, 13], [3], []])
def test_kept_slots_have_the_output_and_the_gradients_of_all(kept: list[int]) -> None:
    spec, drafter = make()
    drafter.double()
    given = {name: x.double() if x.is_floating_point() else x for name, x in inputs(spec).items()}
    rows, direction = torch.tensor(kept, dtype=torch.int64), torch.randn(len(kept), 32, dtype=torch.float64)
    wanted = drafter(**given)[rows]
    wanted_gradients = torch.autograd.grad((wanted * direction).sum(), list(drafter.parameters()))
    got = drafter(**given, kept=rows)
    gradients = torch.autograd.grad((got * direction).sum(), list(drafter.parameters()))
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    for (name, _), gradient, want in zip(drafter.named_parameters(), gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-9, atol=1e-12, msg=f"{name} with {kept}")


def test_behind_the_last_attention_are_only_the_kept_slots() -> None:
    spec, drafter = make()
    seen: list[int] = []
    for layer in drafter.layers:
        for module in (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp):
            module.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    drafter(**inputs(spec), kept=torch.tensor([2, 7]))
    assert seen == [16, 16, 16, 16, 2, 2]


def test_a_row_without_anchors_gives_every_weight_a_zero_gradient() -> None:
    spec, drafter = make()
    given = inputs(spec)
    given |= {"anchors": given["anchors"][:0], "slots": given["slots"][:0]}
    out = drafter(**given)
    assert out.shape == (0, 32)
    out.sum().backward()
    for name, parameter in drafter.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_weights_start_by_width_and_by_seed() -> None:
    _, drafter = make()
    _, again = make()
    for (name, parameter), other in zip(drafter.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(parameter, other), name
        if parameter.dim() == 2:
            bound = parameter.shape[1] ** -0.5
            assert 0.9 * bound < parameter.abs().max() <= bound, name
        else:
            assert (parameter == 1).all(), name


def test_bfloat16_keeps_the_rotation_exact() -> None:
    _, drafter = make()
    positions = torch.tensor([0, 1, 1000, 4097])
    wanted = drafter.rotation(torch.zeros(1), positions)
    drafter.bfloat16()
    for got, want in zip(drafter.rotation(torch.zeros(1), positions), wanted, strict=True):
        assert torch.equal(got, want)


def test_what_the_section_leaves_open_is_the_verifiers() -> None:
    spec = drafter_spec(DrafterSection(layers=3, block_size=8), SHAPE, (1, 2), 63)
    layers = spec.layers
    assert (layers.num_attention_heads, layers.num_key_value_heads, layers.head_dim) == (4, 2, 8)
    assert (layers.intermediate_size, layers.num_hidden_layers, layers.vocab_size) == (48, 3, 64)
    assert [spec.window(i) for i in range(3)] == [None] * 3
    kinds = ("full_attention", "sliding_attention")
    spec = drafter_spec(DrafterSection(layers=2, layer_types=kinds, sliding_window=16, heads=8), SHAPE, (1, 2), 63)
    assert [spec.window(i) for i in range(2)] == [None, 16]
    assert spec.layers.num_attention_heads == 8
