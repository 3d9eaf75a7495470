"""The KV connector that runs inside vLLM and sends the hidden states of finished requests to receivers.

vLLM's `extract_hidden_states` method writes every token's residual stream after the aux layers into a KV cache layer of
its own, with as many "heads" as layers. vLLM builds this class twice: in the scheduler process, where it sees requests
begin and end, and in each worker process, where the cache is. Life of a request that carries a ticket:

    scheduler  request_finished_all_groups   ticket + tokens + block ids -> the next step's metadata; blocks are kept
    worker     get_finished                  takes a piece of the host pool and starts the copy (GPU: on a side stream)
    worker     get_finished, once copied     hands the copy to the Sender; vLLM may reuse the blocks
    Sender     once sent or dropped          gives the piece back to the pool

While the pool has no piece for the oldest waiting request, its blocks stay, and so does everything behind it: vLLM's
scheduler runs out of blocks and lets new requests wait. So a slow receiver slows the server down, and nothing is
refused. Data for a receiver that is gone is dropped after the Sender's AWAY_S.

Sent are the prompt's tokens, for which max_tokens 1 is enough, or, if the ticket says `answer`, the tokens of prompt
and answer. The last of them was sampled and never fed to the verifier: zeros stand for its hidden states.
`launch/serve_vllm.py` writes the configuration for this.
What may be imported here stands in docs/design.md.

Shape letters: L aux layers · H hidden size · B cache blocks · P tokens in one cache block.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.platforms import current_platform

from dflash_scale.server.host_pool import HostPool
from dflash_scale.server.kv_copy import Finished, KvCopier
from dflash_scale.server.sender import Offer, Sender
from dflash_scale.transport import messages
from dflash_scale.transport.addresses import engine_address
from dflash_scale.transport.keys import server_keys
from dflash_scale.transport.layout import Layout, WireError
from dflash_scale.verifier.identity import origin_of

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

log = logging.getLogger("vllm.dflash_scale")  # below vLLM's own logger, so that its handlers show it

TRIED: Final = "vLLM 0.25 to 0.32"  # by benchmarks/vllm_compatibility.py
POOL_BYTES_GPU: Final = 4 << 30
POOL_BYTES_CPU: Final = 1 << 30


@dataclass
class FinishedRequests(KVConnectorMetadata):
    requests: list[Finished] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _CacheLayer:
    """Where the hidden states are: KV cache group, layer name, tokens per block."""

    group: int
    name: str
    block_size: int


class HiddenStatesConnector(KVConnectorBase_V1, SupportsHMA):
    """See the module's docstring. kv_connector_extra_config: zmq (address to bind), insecure, keys, pool_bytes, and
    engines: how many engines share the server's HTTP port, each with an address of its own made from zmq."""

    def __init__(self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig") -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        extra = self._kv_transfer_config.kv_connector_extra_config
        unknown = extra.keys() - {"zmq", "insecure", "keys", "pool_bytes", "engines"}
        if unknown or "zmq" not in extra:
            raise ValueError(
                f"kv_connector_extra_config needs zmq and allows insecure, keys, pool_bytes and engines, got "
                f"{sorted(extra)}"
            )
        self._extra: dict[str, Any] = extra
        self._rank = _data_parallel_rank(vllm_config, int(extra.get("engines", 1)))
        _check_parallelism(vllm_config)
        self._layer_ids = _layer_ids(vllm_config)
        self._layer = _hidden_state_layer(kv_cache_config)
        self._to_worker: list[Finished] = []  # scheduler side, as the next
        self._kept: set[str] = set()  # finished requests whose blocks the worker has not let go of
        self._kv_copier: KvCopier | None = None  # TP rank 0 only

    # -- scheduler side ---------------------------------------------------------------------------------------

    def get_num_new_matched_tokens(self, request: "Request", num_computed_tokens: int) -> tuple[int, bool]:
        return 0, False  # nothing is ever loaded

    def update_state_after_alloc(self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int) -> None:
        assert num_external_tokens == 0

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> FinishedRequests:
        meta, self._to_worker = FinishedRequests(self._to_worker), []
        return meta

    def update_connector_output(self, connector_output: "KVConnectorOutput") -> None:
        self._kept -= connector_output.finished_sending or set()

    def has_pending_block_frees(self) -> bool:
        """Blocks will come back: a running request that lacks some waits, which is cheaper than to compute it again."""
        return bool(self._kept)

    def request_finished(self, request: "Request", block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: "Request", block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """True, that is "keep the blocks", if the worker will copy them.

        A ticket that is not one is the client's mistake and must not end the engine: it is told in the reply.
        """
        try:
            ticket = messages.Ticket.from_request(request.kv_transfer_params)
        except WireError as error:
            log.warning("Request %s asks for hidden states with a bad ticket: %s", request.request_id, error)
            return False, {"dflash_error": str(error)}
        if ticket is None:
            return False, None
        blocks = block_ids[self._layer.group] if self._layer.group < len(block_ids) else []
        tokens = _wanted_tokens(request, ticket)
        fed = len(tokens) - ticket.answer
        refusal = self._why_not(request, ticket, fed, len(blocks))
        if refusal is not None:
            self._to_worker.append(Finished(request.request_id, ticket, (), (), refusal))
            return False, {"dflash_error": refusal}
        whole = tuple(blocks[: -(-fed // self._layer.block_size)])
        self._to_worker.append(Finished(request.request_id, ticket, tokens, whole))
        self._kept.add(request.request_id)
        return True, None

    def _why_not(self, request: "Request", ticket: messages.Ticket, tokens: int, blocks: int) -> str | None:
        """The reason for which this request's hidden states are not whole in the cache, None if they are."""
        if not set(ticket.layer_ids) <= set(self._layer_ids):
            return f"this server has the layers {list(self._layer_ids)}, asked for {list(ticket.layer_ids)}"
        if request.status.name not in ("FINISHED_STOPPED", "FINISHED_LENGTH_CAPPED"):
            return f"the request ended with {request.status.name}"
        if not request.prompt_token_ids:
            return "the prompt was given as embeddings, not as token ids"
        if request.num_computed_tokens < tokens or blocks * self._layer.block_size < tokens:
            return f"{request.num_computed_tokens} of {tokens} tokens were computed, {blocks} cache blocks are left"
        return None

    # -- worker side ------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Checks the cache tensor and, on TP rank 0, binds the ROUTER: a wrong set-up ends the server's start."""
        if get_tensor_model_parallel_rank() != 0:
            return
        cache = kv_caches[self._layer.name]
        layout, by_token = _layout(self._vllm_config, self._layer_ids, self._layer.block_size, cache)
        on_cpu = cache.device.type == "cpu"
        pool_bytes = int(self._extra.get("pool_bytes", POOL_BYTES_CPU if on_cpu else POOL_BYTES_GPU))
        pool = HostPool(pool_bytes, pinned=not on_cpu)
        zmq = self._extra["zmq"]
        model = self._vllm_config.model_config
        origin = origin_of(model.model, model.revision)
        sender = Sender(
            zmq if self._rank is None else engine_address("zmq", zmq, self._rank),
            Offer(layout, model.served_model_name or model.model, origin, self._rank),
            insecure=bool(self._extra.get("insecure", False)),
            keys=server_keys(Path(self._extra["keys"])) if "keys" in self._extra else None,
        )
        self._kv_copier = KvCopier(by_token, sender, pool)
        log.info("Hidden states of layers %s go out at %s", list(layout.layer_ids), sender.endpoint)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        return None  # nothing is ever loaded

    def wait_for_layer_load(self, layer_name: str) -> None:
        return None

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        return None  # the extraction layer has written the cache itself; get_finished copies whole requests

    def wait_for_save(self) -> None:
        return None

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Starts the copies that this step's metadata asks for; returns the requests whose copies are done.

        vLLM calls this every step, and keeps stepping while a request waits here, so polling is enough.
        """
        if self._kv_copier is None:  # not TP rank 0
            return None, None
        meta = self._connector_metadata
        return self._kv_copier.step(meta.requests if isinstance(meta, FinishedRequests) else []) or None, None

    def get_finished_count(self) -> int:
        return 1  # only TP rank 0 reports; the default waits for every rank and never frees the blocks

    def shutdown(self) -> None:
        if self._kv_copier is not None:
            self._kv_copier.close()

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: "VllmConfig") -> str | None:
        """On a GPU a token's layers side by side, so that the gather reads whole rows; a CPU has its own layout.

        Newer releases call this one LBNHC, and know the old name.
        """
        return "NHD" if current_platform.is_cuda_alike() else None


def _wanted_tokens(request: "Request", ticket: messages.Ticket) -> tuple[int, ...]:
    """The tokens that the ticket wants; none if the prompt has no token ids."""
    if not request.prompt_token_ids:
        return ()
    return tuple(request.all_token_ids if ticket.answer else request.prompt_token_ids)


def _check_parallelism(config: "VllmConfig") -> None:
    parallel = config.parallel_config
    if parallel.pipeline_parallel_size != 1:
        raise ValueError(
            "hidden states cannot be extracted with pipeline parallelism, because no worker sees all the layers: "
            f"got pipeline_parallel_size {parallel.pipeline_parallel_size}, use tensor parallelism."
        )
    if config.cache_config.enable_prefix_caching:
        raise ValueError("prefix caching leaves hidden states out: start vLLM with --no-enable-prefix-caching.")


def _data_parallel_rank(config: "VllmConfig", engines: int) -> int | None:
    """This engine's, None if it is the server's only one. vLLM tells an engine of a dense model its index alone."""
    rank: int = config.parallel_config.data_parallel_index
    if rank >= engines:
        raise ValueError(
            f"this is the engine with data-parallel rank {rank}, expected {engines} in all: give --data-parallel-size "
            "to launch/serve_vllm.py, and not through the environment or a file."
        )
    return rank if engines > 1 else None


def _hidden_state_layer(config: "KVCacheConfig") -> _CacheLayer:
    """The extraction layer: in a group of its own, or beside the attention layers if their blocks are alike.

    By name, because the scheduler is shown one spec for a group of several kinds of layers; the worker then checks
    the tensor of this name.
    """
    found = [
        _CacheLayer(i, name, group.kv_cache_spec.block_size)
        for i, group in enumerate(config.kv_cache_groups)
        for name in group.layer_names
        if "cache_only_layers" in name.split(".")
    ]
    if len(found) != 1:
        names = [name for group in config.kv_cache_groups for name in group.layer_names]
        raise ValueError(
            f"expected one KV cache layer named cache_only_layers.N, got {len(found)} among {names}: start vLLM with "
            "the speculative method extract_hidden_states."
        )
    return found[0]


def _layer_ids(config: "VllmConfig") -> tuple[int, ...]:
    """What `launch/serve_vllm.py` wrote for the extraction: the aux layers, and the last layer."""
    assert config.speculative_config is not None
    layer_ids = tuple(config.speculative_config.draft_model_config.hf_config.eagle_aux_hidden_state_layer_ids)
    layers = config.model_config.get_total_num_hidden_layers()
    if layer_ids[-1] != layers:
        raise ValueError(f"the last layer id must be the verifier's {layers} layers, got {list(layer_ids)}")
    return layer_ids


def _layout(
    config: "VllmConfig", layer_ids: tuple[int, ...], block_size: int, cache: torch.Tensor
) -> tuple[Layout, torch.Tensor]:
    """The wire's layout, and the cache as (B, P, L+1, H): older releases make it so, newer ones (B, L+1, P, H)."""
    hidden_size, layers = config.model_config.get_hidden_size(), len(layer_ids)
    layout = Layout(layer_ids, hidden_size, str(cache.dtype).removeprefix("torch."))
    shape = tuple(cache.shape[1:])
    if block_size == layers:
        raise ValueError(
            f"blocks of {block_size} tokens and {layers} layers cannot be told from each other in the cache: start "
            "vLLM with another --block-size."
        )
    if shape == (layers, block_size, hidden_size):
        return layout, cache.transpose(1, 2)
    if shape == (block_size, layers, hidden_size):
        return layout, cache
    raise ValueError(
        f"the cache of hidden states has the shape {tuple(cache.shape)}, expected (blocks, layers, block size, hidden "
        f"size) = (*, {layers}, {block_size}, {hidden_size}), or layers and block size the other way round: this "
        f"version of vLLM orders it in an unknown way, use {TRIED}."
    )
