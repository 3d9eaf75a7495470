"""The KV connector's own logic, with stand-ins for the five names that it takes from vLLM.

The real vLLM runs it in tests/e2e/test_extraction.py. L aux layers · H hidden size · B cache blocks · P block size.
"""

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import zmq

from dflash_scale.transport import keys, messages, sockets
from dflash_scale.transport.layout import Layout
from tests.support.data_messages import decode_data

BLOCKS, LAYERS, BLOCK_SIZE, HIDDEN = 9, 3, 4, 8
TICKET = messages.Ticket("run-1", "rx", 0, 5, 0, (1, 3, 6), "float32")


class Base:
    """What the connector uses of KVConnectorBase_V1."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        self._vllm_config, self._kv_cache_config = vllm_config, kv_cache_config
        self._kv_transfer_config = vllm_config.kv_transfer_config
        self._connector_metadata: Any = None


@pytest.fixture
def connector(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    names = {
        "vllm": {},
        "vllm.distributed": {},
        "vllm.distributed.kv_transfer": {},
        "vllm.distributed.kv_transfer.kv_connector": {},
        "vllm.distributed.kv_transfer.kv_connector.v1": {},
        "vllm.distributed.kv_transfer.kv_connector.v1.base": {
            "KVConnectorBase_V1": Base,
            "KVConnectorMetadata": object,
            "KVConnectorRole": object,
            "SupportsHMA": type("SupportsHMA", (), {}),
        },
        "vllm.distributed.parallel_state": {"get_tensor_model_parallel_rank": lambda: 0},
        "vllm.platforms": {"current_platform": SimpleNamespace(is_cuda_alike=lambda: False)},
    }
    for name, content in names.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules.pop("dflash_scale.server.connector", None)
    yield importlib.import_module("dflash_scale.server.connector")
    sys.modules.pop("dflash_scale.server.connector", None)


def vllm_config(**changes: Any) -> Any:
    extra = changes.pop("extra", {"zmq": "tcp://127.0.0.1:*"})
    draft = SimpleNamespace(hf_config=SimpleNamespace(eagle_aux_hidden_state_layer_ids=[1, 3, 6]))
    parallel = {"pipeline_parallel_size": 1, "data_parallel_index": 0, **changes.pop("parallel", {})}
    return SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_connector_extra_config=extra),
        parallel_config=SimpleNamespace(**parallel),
        cache_config=SimpleNamespace(enable_prefix_caching=changes.pop("prefix_caching", False)),
        speculative_config=SimpleNamespace(draft_model_config=draft),
        model_config=SimpleNamespace(
            get_hidden_size=lambda: HIDDEN,
            get_total_num_hidden_layers=lambda: changes.get("layers", 6),
            served_model_name="model-1",
            model="model-1",
            revision=None,
        ),
    )


def cache_config(*groups: list[str]) -> Any:
    spec = SimpleNamespace(block_size=BLOCK_SIZE)
    groups = groups or (["model.layers.0"], ["cache_only_layers.6"])
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec, layer_names=g) for g in groups])


def request(tokens: int, params: Any, **changes: Any) -> Any:
    fields = {
        "request_id": f"request-{tokens}",
        "kv_transfer_params": params,
        "status": SimpleNamespace(name="FINISHED_LENGTH_CAPPED"),
        "prompt_token_ids": list(range(100, 100 + tokens)),
        "num_computed_tokens": tokens,
        **changes,
    }
    answer = fields.pop("answer", [7])
    return SimpleNamespace(**fields, all_token_ids=[*(fields["prompt_token_ids"] or []), *answer])


def cache_tensor() -> torch.Tensor:
    shape = (BLOCKS, LAYERS, BLOCK_SIZE, HIDDEN)
    return torch.arange(BLOCKS * LAYERS * BLOCK_SIZE * HIDDEN, dtype=torch.float32).view(shape)


def build(connector: ModuleType, **changes: Any) -> Any:
    return connector.HiddenStatesConnector(vllm_config(**changes), None, cache_config())


@pytest.mark.parametrize("layer_ids", [(1, 3, 6), (1, 3), (3, 6), (1, 6), (3,)])
def test_a_finished_request_reaches_its_receiver(connector: ModuleType, layer_ids: tuple[int, ...]) -> None:
    """Some layers or all; blocks out of order, the last one not full: token t is row t % P of block ids[t // P]."""
    ticket = replace(TICKET, layer_ids=layer_ids)
    scheduler, worker = build(connector), build(connector)
    cache = cache_tensor()
    worker.register_kv_caches({"model.layers.0": torch.empty(0), "cache_only_layers.6": cache})
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    address = worker._kv_copier._sender.endpoint
    socket = sockets.connect_dealer(context, address, "rx", max_message_bytes=1 << 20)
    try:
        blocks = [7, 2, 5]
        keep, reply = scheduler.request_finished_all_groups(
            request(10, {"dflash": ticket.to_params()}), ([0, 0, 0], blocks)
        )
        assert (keep, reply) == (True, None)
        worker._connector_metadata = scheduler.build_connector_meta(None)
        assert scheduler.build_connector_meta(None).requests == []
        assert worker.get_finished({"request-10"}) == ({"request-10"}, None)
        cache.zero_()  # the blocks may be reused from here on
        worker._connector_metadata = None
        assert worker.get_finished(set()) == (None, None)
        layout = Layout(layer_ids, HIDDEN, "float32")
        assert socket.poll(10_000), "nothing arrived"
        header, ids, raw = decode_data(socket.recv_multipart(), layout=layout, max_tokens=10)
        assert header.ticket == ticket
        assert memoryview(ids).cast("i").tolist() == list(range(100, 110))
        got = torch.frombuffer(bytearray(raw), dtype=torch.float32).view(10, len(layer_ids), HIDDEN)
        whole = cache_tensor()[:, [(1, 3, 6).index(layer) for layer in layer_ids]]
        for token in range(10):
            assert torch.equal(got[token], whole[blocks[token // BLOCK_SIZE], :, token % BLOCK_SIZE]), f"token {token}"
    finally:
        worker.shutdown()
        socket.close(0)
        context.term()


@pytest.mark.parametrize(
    ("answer", "wanted", "blocks"),
    [(False, list(range(100, 106)), 2), (True, [*range(100, 106), 7, 8, 9, 10], 3)],
)
def test_the_tokens_that_are_sent(connector: ModuleType, answer: bool, wanted: list[int], blocks: int) -> None:
    """The prompt's, or all; and just the blocks that hold those that were fed, of the five that vLLM has reserved."""
    scheduler = build(connector)
    ticket = replace(TICKET, answer=answer)
    done = request(6, {"dflash": ticket.to_params()}, answer=[7, 8, 9, 10], num_computed_tokens=9)
    assert scheduler.request_finished_all_groups(done, ([0], [8, 1, 6, 2, 4])) == (True, None)
    (finished,) = scheduler.build_connector_meta(None).requests
    assert finished.token_ids == tuple(wanted)
    assert finished.block_ids == (8, 1, 6, 2, 4)[:blocks]


def test_an_answer_that_was_not_computed_is_refused(connector: ModuleType) -> None:
    scheduler = build(connector)
    ticket = replace(TICKET, answer=True)
    done = request(6, {"dflash": ticket.to_params()}, answer=[7, 8, 9, 10], num_computed_tokens=8)
    keep, reply = scheduler.request_finished_all_groups(done, ([0], [8, 1, 6]))
    assert keep is False
    assert "8 of 9 tokens" in reply["dflash_error"]


def test_the_scheduler_knows_that_blocks_will_come_back(connector: ModuleType) -> None:
    """Between the end of a request and the report of its copy, and not for a request that is refused."""
    scheduler = build(connector)
    params = {"dflash": TICKET.to_params()}
    assert not scheduler.has_pending_block_frees()
    scheduler.request_finished_all_groups(request(4, params, num_computed_tokens=3), ([0], [1]))
    assert not scheduler.has_pending_block_frees()
    scheduler.request_finished_all_groups(request(4, params), ([0], [1]))
    scheduler.request_finished_all_groups(request(5, params), ([0], [2, 3]))
    scheduler.update_connector_output(SimpleNamespace(finished_sending=None))
    scheduler.update_connector_output(SimpleNamespace(finished_sending={"request-4"}))
    assert scheduler.has_pending_block_frees()
    scheduler.update_connector_output(SimpleNamespace(finished_sending={"request-5"}))
    assert not scheduler.has_pending_block_frees()


def test_the_pools_size_is_the_configurations(connector: ModuleType) -> None:
    for extra, wanted in (({}, 1 << 30), ({"pool_bytes": 4096}, 4096)):
        worker = build(connector, extra={"zmq": "tcp://127.0.0.1:*", **extra})
        worker.register_kv_caches({"cache_only_layers.6": cache_tensor()})
        assert worker._kv_copier._pool.nbytes == wanted
        worker.shutdown()


def test_requests_without_a_ticket_are_left_alone(connector: ModuleType) -> None:
    scheduler = build(connector)
    for params in (None, {}, {"other": 1}):
        assert scheduler.request_finished_all_groups(request(4, params), ([0], [1])) == (False, None)
    assert scheduler.build_connector_meta(None).requests == []


def test_a_bad_ticket_is_told_to_the_client_and_ends_nothing(connector: ModuleType) -> None:
    scheduler = build(connector)
    for params in ({"dflash": None}, {"dflash": {"run_id": "r"}}, {"dflash": {**TICKET.to_params(), "sample": "5"}}):
        keep, reply = scheduler.request_finished_all_groups(request(4, params), ([0], [1]))
        assert keep is False
        assert reply["dflash_error"]
    assert scheduler.build_connector_meta(None).requests == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"status": SimpleNamespace(name="FINISHED_ABORTED")}, "FINISHED_ABORTED"),
        ({"prompt_token_ids": None}, "embeddings"),
        ({"num_computed_tokens": 3}, "3 of 4 tokens"),
    ],
)
def test_incomplete_requests_are_refused(connector: ModuleType, changes: dict[str, Any], reason: str) -> None:
    scheduler = build(connector)
    params = {"dflash": TICKET.to_params()}
    keep, reply = scheduler.request_finished_all_groups(request(4, params, **changes), ([0], [1]))
    assert keep is False, "nothing will be copied, so the blocks must not be held"
    assert reason in reply["dflash_error"]
    (finished,) = scheduler.build_connector_meta(None).requests
    assert (finished.ticket, finished.block_ids) == (TICKET, ())
    assert reason in finished.refusal


def test_layers_that_the_server_has_not_are_refused(connector: ModuleType) -> None:
    scheduler = build(connector)
    params = {"dflash": replace(TICKET, layer_ids=(1, 2)).to_params()}
    keep, reply = scheduler.request_finished_all_groups(request(4, params), ([0], [1]))
    assert keep is False
    assert "has the layers [1, 3, 6], asked for [1, 2]" in reply["dflash_error"]
    (finished,) = scheduler.build_connector_meta(None).requests
    assert finished.refusal == reply["dflash_error"]


def test_requests_that_never_ran_have_no_blocks(connector: ModuleType) -> None:
    scheduler = build(connector)
    keep, reply = scheduler.request_finished_all_groups(request(4, {"dflash": TICKET.to_params()}), ())
    assert keep is False
    assert "0 cache blocks" in reply["dflash_error"]


def test_other_tensor_parallel_ranks_send_nothing(connector: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connector, "get_tensor_model_parallel_rank", lambda: 1)
    worker = build(connector)
    worker.register_kv_caches({})
    assert worker.get_finished({"x"}) == (None, None)
    assert worker.get_finished_count() == 1
    worker.shutdown()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"parallel": {"pipeline_parallel_size": 2}}, "pipeline parallelism"),
        ({"parallel": {"data_parallel_index": 1}}, "rank 1, expected 1 in all: give --data-parallel-size"),
        (
            {"parallel": {"data_parallel_index": 2}, "extra": {"zmq": "tcp://127.0.0.1:1", "engines": 2}},
            "rank 2, expected 2 in all",
        ),
        ({"prefix_caching": True}, "no-enable-prefix-caching"),
        ({"extra": {}}, "needs zmq"),
        ({"extra": {"zmq": "tcp://127.0.0.1:*", "unsafe": 1}}, "needs zmq"),
    ],
)
def test_configurations_that_cannot_work(connector: ModuleType, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        build(connector, **changes)


@pytest.mark.parametrize("groups", [(["model.layers.0"],), (["cache_only_layers.6", "cache_only_layers.7"],)])
def test_caches_without_one_extraction_layer(connector: ModuleType, groups: tuple[list[str], ...]) -> None:
    with pytest.raises(ValueError, match="extract_hidden_states"):
        connector.HiddenStatesConnector(vllm_config(), None, cache_config(*groups))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3)])
def test_both_orders_of_the_cache(connector: ModuleType, order: tuple[int, ...]) -> None:
    """Older releases of vLLM put a block's tokens before the layers."""
    worker = build(connector)
    worker.register_kv_caches({"cache_only_layers.6": cache_tensor().permute(order)})
    assert torch.equal(worker._kv_copier._cache, cache_tensor().transpose(1, 2))
    worker.shutdown()


@pytest.mark.parametrize("shape", [(2, BLOCKS, LAYERS, BLOCK_SIZE, HIDDEN), (BLOCKS, LAYERS, BLOCK_SIZE, 2 * HIDDEN)])
def test_unknown_cache_layouts(connector: ModuleType, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"unknown way, use vLLM 0\."):
        build(connector).register_kv_caches({"cache_only_layers.6": torch.empty(shape)})


def test_as_many_layers_as_tokens_in_a_block(connector: ModuleType) -> None:
    config = cache_config()
    config.kv_cache_groups[1].kv_cache_spec.block_size = LAYERS
    worker = connector.HiddenStatesConnector(vllm_config(), None, config)
    with pytest.raises(ValueError, match="another --block-size"):
        worker.register_kv_caches({"cache_only_layers.6": torch.empty(BLOCKS, LAYERS, LAYERS, HIDDEN)})


def test_the_last_id_is_the_verifiers_last_layer(connector: ModuleType) -> None:
    with pytest.raises(ValueError, match="last layer id"):
        build(connector, layers=8).register_kv_caches({"cache_only_layers.6": cache_tensor()})


def test_each_engine_of_a_server_binds_its_own_address_and_says_its_rank(connector: ModuleType, tmp_path: Path) -> None:
    workers = []
    for rank in range(2):
        extra = {"zmq": f"ipc://{tmp_path}/states", "engines": 2}
        workers.append(build(connector, extra=extra, parallel={"data_parallel_index": rank}))
        workers[-1].register_kv_caches({"cache_only_layers.6": cache_tensor()})
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        for rank in range(2):
            address = f"ipc://{tmp_path}/states.{rank}"
            socket = sockets.connect_dealer(context, address, "rx", max_message_bytes=1 << 20)
            socket.send(messages.encode(messages.Hello("run-1", "rx")))
            assert socket.poll(10_000), f"no engine at {address}"
            reply = messages.decode(socket.recv(), max_tokens=0)
            assert isinstance(reply, messages.HelloReply)
            assert reply.data_parallel_rank == rank
    finally:
        for worker in workers:
            worker.shutdown()
        context.destroy(linger=0)


def test_engines_need_a_port_that_is_known(connector: ModuleType) -> None:
    worker = build(connector, extra={"zmq": "tcp://127.0.0.1:*", "engines": 2}, parallel={"data_parallel_index": 1})
    with pytest.raises(ValueError, match="wanted a port from 1 to 65534"):
        worker.register_kv_caches({"cache_only_layers.6": cache_tensor()})


def test_open_addresses_end_the_start(connector: ModuleType) -> None:
    with pytest.raises(ValueError, match="loopback"):
        build(connector, extra={"zmq": "tcp://*:5601"}).register_kv_caches({"cache_only_layers.6": cache_tensor()})


def test_the_server_of_a_folder_of_keys_serves_its_receivers_only(connector: ModuleType, tmp_path: Path) -> None:
    keys.make_keys(tmp_path / "keys")
    extra = {"zmq": "tcp://127.0.0.1:*", "keys": str(tmp_path / "keys")}
    worker = build(connector, extra=extra)
    worker.register_kv_caches({"model.layers.0": torch.empty(0), "cache_only_layers.6": cache_tensor()})
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        answered = []
        for given in (None, keys.receiver_keys(tmp_path / "keys")):
            address = worker._kv_copier._sender.endpoint
            socket = sockets.connect_dealer(context, address, "rx", max_message_bytes=1 << 20, keys=given)
            socket.send(messages.encode(messages.Hello("run-1", "rx")))
            answered.append(bool(socket.poll(10_000 if given else 500)))
        assert answered == [False, True]
    finally:
        worker.shutdown()
        context.destroy(linger=0)
