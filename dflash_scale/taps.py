"""Which of the verifier's layers are tapped, and where they are in Transformers' model of it.

Id k is the residual stream after k decoder layers (0 = embedding output). Imported by the server's launcher too, where
torch may not be installed: standard library only, until a model is asked for.
"""

from collections.abc import Sized
from typing import Any


def default_layer_ids(layers: int, count: int = 5) -> tuple[int, ...]:
    """The paper's taps: `count` layers, uniformly from the 2nd to the 3rd last, fewer where there are fewer.

    Id k is the residual after k decoder layers: 36 layers give 2, 10, 18, 26, 34, which configurations that count
    layer outputs from 0 write as 1, 9, 17, 25, 33.
    """
    if layers < 2:
        raise ValueError(f"verifier: got {layers} decoder layer(s), wanted at least 2; nothing can be tapped before n")
    first, last = 2, layers - 2
    count = min(count, last - first + 1)
    if count < 2:
        return (layers // 2,)
    return tuple(round(first + i * (last - first) / (count - 1)) for i in range(count))


def tapped_layers(configured: tuple[int, ...] | None, layers: int) -> tuple[int, ...]:
    """The ids to tap: `configured`, checked against the verifier, or the default."""
    ids = default_layer_ids(layers) if configured is None else configured
    if ids[-1] >= layers:
        raise ValueError(
            f"verifier.layer_ids: got {ids[-1]}, wanted ids below {layers}, the verifier's number of layers (its last "
            "residual is streamed in any case); lower it"
        )
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
