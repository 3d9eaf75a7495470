import json
from pathlib import Path
from typing import Any

import pytest

from dflash_scale.config.run import Config, load_config, parse_config, resolve
from dflash_scale.config.sections import default_gamma
from dflash_scale.ops.softmax_loss import TERMS

MINIMAL: dict[str, Any] = {"verifier": {"model": "Qwen/Qwen3-8B"}, "data": {"path": "data/qwen3-8b"}}


def error_of(patch: dict[str, Any]) -> str:
    content = {**MINIMAL, **{k: {**MINIMAL.get(k, {}), **v} if isinstance(v, dict) else v for k, v in patch.items()}}
    with pytest.raises(ValueError, match="problem") as caught:
        parse_config(content, "run.json")
    return str(caught.value)


def write(folder: Path, content: Any) -> Path:
    path = folder / "run.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_defaults_are_the_papers_recipe() -> None:
    config = parse_config(MINIMAL)
    assert (config.drafter.layers, config.drafter.block_size, config.data.anchors_per_document) == (5, 16, 512)
    assert (config.train.lr, config.train.warmup_ratio, config.train.epochs, config.train.clip) == (6e-4, 0.04, 6, 1.0)
    assert config.gamma == 7.0
    assert config.zero_stage == 2
    assert parse_config({**MINIMAL, "deepspeed": {"zero_optimization": {"overlap_comm": True}}}).zero_stage == 2


def test_json_round_trip_keeps_everything() -> None:
    content = {
        **MINIMAL,
        "drafter": {"layers": 2, "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 64},
        "train": {"betas": [0.5, 0.75]},
        "deepspeed": {"zero_optimization": {"stage": 3}},
    }
    config = parse_config(content)
    again = parse_config(json.loads(config.dump()))
    assert again == config
    assert again.zero_stage == 3
    assert again.drafter.layer_types == ("full_attention", "sliding_attention")


def test_a_config_cannot_be_changed_after_loading() -> None:
    config = parse_config(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        config.train.lr = 1.0  # type: ignore[misc]


def test_every_field_is_documented() -> None:
    for name, field in Config.model_fields.items():
        kind = field.annotation
        if hasattr(kind, "model_fields"):
            undocumented = [key for key, sub in kind.model_fields.items() if not sub.description]
            assert not undocumented, f"section {name}: {undocumented}"


@pytest.mark.parametrize(
    ("patch", "text"),
    [
        ({"drafter": {"blocksize": 8}}, "drafter.blocksize: unknown key; did you mean drafter.block_size?"),
        ({"data": {"lr": 1.0}}, "data.lr: unknown key; did you mean train.lr?"),
        ({"verifer": {}}, "verifer: unknown key; did you mean verifier?"),
        ({"stream": {"servers": [{"htp": "x"}]}}, "did you mean stream.servers[0].http?"),
        ({"loss": {"terms": {"kld": 1.0}}}, "loss.terms.kld: unknown key; did you mean loss.terms.kl?"),
        ({"train": {"qqqq": 1}}, "known keys here: activation_checkpointing, betas"),
    ],
)
def test_unknown_key_names_the_nearest(patch: dict[str, Any], text: str) -> None:
    assert text in error_of(patch)


@pytest.mark.parametrize(
    ("patch", "text"),
    [
        ({"train": {"lr": "abc"}}, 'train.lr: got "abc", wanted a valid number (Peak learning rate'),
        ({"train": {"epochs": True}}, "train.epochs: got true, wanted a valid integer"),
        ({"train": {"precision": "fp8"}}, "train.precision: got \"fp8\", wanted 'bf16' or 'fp32'"),
        ({"train": {"betas": [0.9, 1.0]}}, "train.betas: got [0.9, 1.0], wanted two numbers in [0, 1)"),
        ({"drafter": {"block_size": 1}}, "drafter.block_size: got 1, wanted greater than or equal to 2"),
        (
            {"verifier": {"layer_ids": [3, 2]}},
            "verifier.layer_ids: got [3, 2], wanted at least one layer id, ascending",
        ),
        ({"verifier": {"layer_ids": []}}, "verifier.layer_ids: got [], wanted at least one"),
        ({"verifier": {"layer_ids": "2,10"}}, 'verifier.layer_ids: got "2,10", wanted a JSON list such as [2,10,18]'),
        ({"drafter": {"sliding_window": 5}}, "drafter.sliding_window: got 5, wanted null"),
        ({"drafter": {"layers": 1, "layer_types": ["sliding_attention"]}}, "drafter.sliding_window: got null"),
        ({"drafter": {"layer_types": ["full_attention"]}}, "got 1 entries, wanted drafter.layers = 5"),
        ({"drafter": {"heads": 6, "kv_heads": 4}}, "drafter.heads: got 6, wanted a multiple of"),
        ({"data": {"row_tokens": 8}}, "data.row_tokens: got 8, wanted at least drafter.block_size = 16"),
        ({"stream": {"servers": []}}, "stream.servers: got none"),
        ({"stream": {"servers": [], "mode": "hybrid", "cache": "c"}}, "stream.servers: got none"),
        ({"stream": {"mode": "ofline"}}, "stream.mode: got \"ofline\", wanted 'online', 'offline', 'hybrid' or 'fake'"),
        ({"stream": {"mode": "offline"}}, 'stream.cache: got none with stream.mode "offline", wanted a folder'),
        ({"stream": {"mode": "hybrid"}}, 'stream.cache: got none with stream.mode "hybrid", wanted a folder'),
        ({"stream": {"cache": "c"}}, 'stream.cache: got c with stream.mode "online", which reads and writes no cache'),
        ({"stream": {"mode": "hybrid", "cache": "c", "cache_bytes": 0}}, "stream.cache_bytes: got 0"),
        ({"stream": {"mode": "offline", "cache": "c", "transport": "fp8"}}, 'stream.transport: got "fp8" with'),
        ({"stream": {"credit_bytes": 5}}, "stream.server_credit_bytes: got 2147483648, wanted at most"),
        (
            {"loss": {"terms": {}}},
            "loss.terms: got no weight above 0, wanted at least one of ce, kl, reverse_kl, tv",
        ),
        ({"loss": {"terms": {"kl": -1.0}}}, "loss.terms.kl: got -1.0, wanted greater than or equal to 0"),
        ({"loss": {"kernel": "sm90"}}, 'loss.kernel: got "sm90"'),
        ({"deepspeed": {"zero_optimization": {"stage": 4}}}, "deepspeed.zero_optimization.stage: got 4"),
        ({"deepspeed": {"zero_optimization": {"stage": True}}}, "deepspeed.zero_optimization.stage: got true"),
    ],
)
def test_wrong_value_says_what_got_wanted(patch: dict[str, Any], text: str) -> None:
    message = error_of(patch)
    assert text in message
    assert "pydantic" not in message
    assert "Value error" not in message
    assert len(message.splitlines()) == 2  # the heading and one line for the one problem


def test_every_problem_gets_its_line() -> None:
    message = error_of({"train": {"lr": -1.0, "epochs": 0}, "loss": {"labels": "x"}})
    assert message.startswith("run.json: 3 problem(s)\n")
    assert len(message.splitlines()) == 4


def test_missing_section_is_named() -> None:
    with pytest.raises(ValueError, match="data: missing, wanted a value; give it in the file"):
        parse_config({"verifier": {"model": "x"}})


@pytest.mark.parametrize(
    ("key", "instead"),
    [
        ("train_batch_size", "train.rows_per_step"),
        ("gradient_accumulation_steps", "train.rows_per_step"),
        ("bf16", "train.precision"),
        ("gradient_clipping", "train.clip"),
        ("optimizer", "train.lr"),
        ("scheduler", "train.warmup_ratio"),
    ],
)
def test_derived_deepspeed_keys_are_refused(key: str, instead: str) -> None:
    message = error_of({"deepspeed": {key: {}}})
    assert f"deepspeed.{key}: do not set this, it is computed" in message
    assert f"set {instead}" in message


@pytest.mark.parametrize(
    ("http", "zmq", "text"),
    [
        ("127.0.0.1:8001", "tcp://127.0.0.1:1", "servers[0].http: got '127.0.0.1:8001', wanted http://HOST:PORT"),
        ("http://127.0.0.1", "tcp://127.0.0.1:1", "servers[0].http"),
        ("http://127.0.0.1:99999", "tcp://127.0.0.1:1", "servers[0].http"),
        ("http://127.0.0.1:1/v1", "tcp://127.0.0.1:1", "servers[0].http"),
        ("http://127.0.0.1:1", "http://127.0.0.1:1", "servers[0].zmq: got 'http://127.0.0.1:1', wanted tcp://"),
        ("http://127.0.0.1:1", "tcp://*:1", "servers[0].zmq: got 'tcp://*:1', wanted a loopback address"),
        ("http://10.0.0.7:1", "tcp://127.0.0.1:1", "or set stream.insecure to true"),
    ],
)
def test_bad_addresses_are_refused(http: str, zmq: str, text: str) -> None:
    assert text in error_of({"stream": {"servers": [{"http": http, "zmq": zmq}]}})


def test_remote_servers_need_insecure() -> None:
    servers = [{"http": "http://gpu7:8001", "zmq": "tcp://gpu7:5601"}]
    assert "stream.insecure" in error_of({"stream": {"servers": servers}})
    assert parse_config({**MINIMAL, "stream": {"servers": servers, "insecure": True}}).stream.insecure


def test_keys_open_the_wire_but_not_http() -> None:
    remote = {"http": "http://127.0.0.1:8001", "zmq": "tcp://gpu7:5601"}
    assert "name a folder of keys in stream.keys" in error_of({"stream": {"servers": [remote]}})
    assert parse_config({**MINIMAL, "stream": {"servers": [remote], "keys": "keys"}}).stream.keys == "keys"
    both = {"http": "http://gpu7:8001", "zmq": "tcp://gpu7:5601"}
    problem = error_of({"stream": {"servers": [both], "keys": "keys"}})
    assert "servers[0].http: got 'http://gpu7:8001', wanted a loopback address because HTTP has neither" in problem
    assert "stream.keys" not in problem


def test_servers_on_ipv6() -> None:
    server = {"http": "http://[::1]:8001", "zmq": "tcp://[::1]:5601"}
    assert parse_config({**MINIMAL, "stream": {"servers": [server]}}).stream.servers[0].zmq == server["zmq"]


def test_one_address_twice_is_refused() -> None:
    server = {"http": "http://127.0.0.1:1", "zmq": "tcp://127.0.0.1:2"}
    assert "'http" not in error_of({"stream": {"servers": [server, server]}})
    assert "got http://127.0.0.1:1 twice as http" in error_of({"stream": {"servers": [server, server]}})


def test_engines_of_a_server_share_its_http_address_under_different_ranks() -> None:
    def servers(*ranks: int | None) -> dict[str, Any]:
        entries = [
            {"http": "http://127.0.0.1:1", "zmq": f"tcp://127.0.0.1:{2 + i}", "data_parallel_rank": rank}
            for i, rank in enumerate(ranks)
        ]
        return {"stream": {"servers": entries}}

    parsed = parse_config({**MINIMAL, **servers(0, 1)}).stream.servers
    assert [server.name for server in parsed] == ["http://127.0.0.1:1 engine 0", "http://127.0.0.1:1 engine 1"]
    assert parse_config({**MINIMAL, **servers(None)}).stream.servers[0].name == "http://127.0.0.1:1"
    assert "got http://127.0.0.1:1 engine 1 twice as http" in error_of(servers(0, 1, 1))
    assert "with data_parallel_rank 1 and without one" in error_of(servers(None, 1))
    assert "data_parallel_rank" in error_of(servers(-1))
    twice = servers(0, 1)
    twice["stream"]["servers"][1]["zmq"] = "tcp://127.0.0.1:2"
    assert "got tcp://127.0.0.1:2 twice as zmq" in error_of(twice)


def test_overrides_are_json_or_bare_words(tmp_path: Path) -> None:
    overrides = [
        "train.lr=3e-4",
        "train.output_dir=runs/a=b",
        "verifier.layer_ids=[2, 4]",
        "drafter.causal_block=true",
        "deepspeed.zero_optimization.stage=2",
        "train.max_steps=null",
    ]
    config = load_config(write(tmp_path, MINIMAL), overrides)
    assert config.train.lr == 3e-4
    assert config.train.output_dir == "runs/a=b"
    assert config.verifier.layer_ids == (2, 4)
    assert config.drafter.causal_block is True
    assert config.zero_stage == 2
    assert config.train.max_steps is None


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("train.lr", "--set: got 'train.lr', wanted section.key=value"),
        ("lr=1", "wanted section.key=value"),
        ("train..lr=1", "wanted section.key=value"),
        ("train.lr.x=1", "train.lr: got"),
        ("verifier.model.x=1", "'model' holds a value"),
        ("train.learning=1", "train.learning: unknown key"),
    ],
)
def test_bad_overrides(tmp_path: Path, override: str, text: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 the text is compared below
        load_config(write(tmp_path, MINIMAL), [override])
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "not valid JSON"),
        ("[1]", "got a list, wanted an object"),
        ('{"train": {"lr": 1, "lr": 2}}', "got the key 'lr' twice"),
    ],
)
def test_unreadable_files(tmp_path: Path, content: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        load_config(write(tmp_path, content))


def test_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.json: cannot be read"):
        load_config(tmp_path / "nowhere.json")


def test_resolve_divides_rows_among_ranks() -> None:
    config = parse_config({**MINIMAL, "train": {"rows_per_step": 16}})
    assert resolve(config, 8).micro_steps == 2
    with pytest.raises(ValueError, match=r"got 16 with 3 ranks.*--set train\.rows_per_step=18"):
        resolve(config, 3)


def test_resolve_wants_room_for_two_of_the_longest_sample() -> None:
    config = parse_config({**MINIMAL, "stream": {"ring_bytes": 1000}, "data": {"path": "x", "row_tokens": 100}})
    assert resolve(config, 8).world_size == 8  # nothing known about bytes yet
    assert resolve(config, 8, token_bytes=5).world_size == 8
    with pytest.raises(ValueError, match=r"stream\.ring_bytes: got 1000, wanted at least 1200 bytes"):
        resolve(config, 8, token_bytes=6)
    assert resolve(config, 8, token_bytes=6, longest_sample=80).world_size == 8


def test_offline_needs_no_server() -> None:
    stream = {"mode": "offline", "cache": "states", "servers": [], "ring_bytes": 1200, "server_credit_bytes": 1}
    config = parse_config({**MINIMAL, "stream": stream, "data": {"path": "x", "row_tokens": 100}})
    assert resolve(config, 8, token_bytes=6).world_size == 8
    with pytest.raises(ValueError, match=r"stream\.ring_bytes: got 1200, wanted at least 1400 bytes"):
        resolve(config, 8, token_bytes=7)


FAKE: dict[str, Any] = {
    "verifier": {"model": "tiny-qwen3"},
    "drafter": {"mask_token_id": 63},
    "data": {},
    "stream": {"mode": "fake"},
}


def test_random_states_need_no_server_ring_or_data_set() -> None:
    stream = {**FAKE["stream"], "servers": [], "ring_bytes": 1, "credit_bytes": 1, "server_credit_bytes": 1}
    config = parse_config({**FAKE, "stream": stream})
    assert resolve(config, 8, token_bytes=1 << 20).world_size == 8
    assert parse_config({**FAKE, "data": {"path": "x", "exclude": "y"}}).data.folder == Path("x")
    with pytest.raises(ValueError, match=r"data\.path: got none, wanted a folder that `dflash-scale prepare` wrote"):
        _ = config.data.folder


@pytest.mark.parametrize(
    ("patch", "text"),
    [
        ({"stream": {"mode": "online"}}, "data.path: got none, wanted a folder"),
        ({"stream": {"mode": "fake", "cache": "c"}}, 'got c with stream.mode "fake", which reads and writes no cache'),
        ({"stream": {"mode": "fake", "keys": "k"}}, 'stream.keys: got k with stream.mode "fake", wanted none'),
        ({"stream": {"mode": "fake", "endpoints_file": "e"}}, "stream.endpoints_file: got e with"),
        ({"stream": {"mode": "fake", "transport": "fp8"}}, "stream.transport: got fp8 with"),
        ({"drafter": {}}, 'drafter.mask_token_id: got none with stream.mode "fake"'),
        ({"data": {"exclude": "q"}}, "data.exclude: got q for samples that are made up"),
    ],
)
def test_what_random_states_leave_without_meaning_is_refused(patch: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match="1 problem") as caught:
        parse_config({**FAKE, **patch})
    assert text in str(caught.value)


def test_gamma_is_the_papers_at_its_block_sizes() -> None:
    assert [default_gamma(size) for size in (8, 10, 16)] == [4.0, 5.0, 7.0]
    values = [default_gamma(size) for size in range(2, 40)]
    assert values == sorted(values)
    assert parse_config({**MINIMAL, "loss": {"gamma": 3.0}}).gamma == 3.0


def test_terms_that_are_not_named_have_no_weight() -> None:
    def weighted(config: Config) -> dict[str, float]:
        return {name: weight for name, weight in config.loss.terms.weights.items() if weight}

    assert weighted(parse_config(MINIMAL)) == {"ce": 1.0}
    terms = {"kl": 0.5, "tv": 0.1}
    assert weighted(parse_config({**MINIMAL, "loss": {"terms": terms}})) == terms


def test_the_verifiers_logits_are_needed_by_soft_terms_and_its_labels() -> None:
    for term in TERMS:
        assert parse_config({**MINIMAL, "loss": {"terms": {term.name: 0.5}}}).loss.needs_verifier == term.soft
    assert parse_config({**MINIMAL, "loss": {"labels": "verifier"}}).loss.needs_verifier


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[2].glob("configs/*.json")), ids=lambda p: p.name)
def test_shipped_configs_load(path: Path) -> None:
    assert load_config(path).dump()
