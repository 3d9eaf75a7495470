"""The verifier's aux layers, whose hidden states the drafter sees, and where layers are in Transformers' model of it.

vLLM calls them `aux_hidden_state_layer_ids`, DFlash's configurations `target_layer_ids`. Id k is the residual stream
after k decoder layers (0 = embedding output); the last layer's id is the number of layers. Imported by the server's
launcher too, where torch may not be installed.
"""

from collections.abc import Sized
from typing import Any

from dflash_scale.transport.layout import layer_ids_problem


def default_layer_ids(layers: int, count: int = 5) -> tuple[int, ...]:
    """The paper's aux layers: `count` of them, uniformly from the 2nd to the 3rd last, fewer where there are fewer.

    Id k is the residual after k decoder layers: 36 layers give 2, 10, 18, 26, 34, which configurations that count
    layer outputs from 0 write as 1, 9, 17, 25, 33.
    """
    if layers < 2:
        raise ValueError(f"verifier: got {layers} decoder layer(s), wanted at least 2: aux layers lie below the last")
    first, last = 2, layers - 2
    count = min(count, last - first + 1)
    if count < 2:
        return (layers // 2,)
    return tuple(round(first + i * (last - first) / (count - 1)) for i in range(count))


def aux_layers(configured: tuple[int, ...] | None, layers: int, option: str = "verifier.layer_ids") -> tuple[int, ...]:
    """The ids of the aux layers: `configured`, or the default of a verifier with that many layers.

    Raises:
        ValueError: the verifier does not have the layers that `option` names, or they are not in ascending order.
    """
    ids = default_layer_ids(layers) if configured is None else configured
    if problem := layer_ids_problem(ids, layers - 1):
        raise ValueError(f"{option}: {problem}; the last layer, id {layers}, is sent in any case")
    return ids


def causal_model(model: str, dtype: Any) -> Any:
    """A verifier in Transformers, in evaluation mode; a multimodal one with all its parts."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    text = type(AutoConfig.from_pretrained(model)) in AutoModelForCausalLM._model_mapping
    return (AutoModelForCausalLM if text else AutoModelForImageTextToText).from_pretrained(model, dtype=dtype).eval()


def decoder_layers(model: Any) -> tuple[Any, Any]:
    """Of a causal language model in Transformers, multimodal or not: the module that holds its layers, and the layers.

    Raises:
        ValueError: its decoder has no list of that many layers.
    """
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    decoder = model.get_decoder()
    for part in (decoder, getattr(model, "model", decoder)):  # get_decoder of Llama 4's text model gives the model
        for child in part.children():
            if isinstance(child, Sized) and len(child) == count and hasattr(child, "append"):  # an nn.ModuleList
                return part, child
    raise ValueError(
        f"{type(model).__name__}: got no list of {count} layers in its decoder, a {type(decoder).__name__} with "
        f"{', '.join(name for name, _ in decoder.named_children())}; serve it with vLLM"
    )
