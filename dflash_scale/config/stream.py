"""The section `stream` of the configuration: where hidden states come from, and the bounds of the stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from dflash_scale.config.drafter import Positive, Section
from dflash_scale.transport.addresses import check_server

GIB = 1 << 30


class ServerAddress(Section):
    http: str = Field(description="Address of the server's OpenAI API, http://HOST:PORT.")
    zmq: str = Field(
        description="Address that the server's connector binds, tcp://HOST:PORT or, on one machine, ipc://PATH."
    )
    data_parallel_rank: int | None = Field(
        default=None,
        ge=0,
        description="Engine of a vLLM server with --data-parallel-size, from 0: its requests name this number, and zmq "
        "is that engine's own address. null = the server has one engine.",
    )

    @property
    def name(self) -> str:
        """What logs and the status file call it."""
        return self.http if self.data_parallel_rank is None else f"{self.http} engine {self.data_parallel_rank}"


class StreamSection(Section):
    mode: Literal["online", "offline", "hybrid", "fake"] = Field(
        default="online",
        description="Where hidden states come from: the servers; the cache alone; the cache, and the servers for what "
        "it lacks; or nowhere: random ones under random weights of the verifier, to try the training alone.",
    )
    cache: str | None = Field(
        default=None, min_length=1, description="Folder of hidden states, for the modes offline and hybrid."
    )
    keep: bool = Field(default=True, description="In mode hybrid: write to the cache what the servers sent.")
    cache_bytes: Positive | None = Field(
        default=None,
        description="In mode hybrid: total size of the cache in bytes, at most; samples beyond it are not written. "
        "null = no bound.",
    )
    transport: Literal["exact", "bf16", "fp8"] = Field(
        default="exact",
        description="How hidden states are sent and buffered: in verifier.dtype; rounded to bfloat16; or in fp8 (e4m3) "
        "with a scale for each token and layer.",
    )
    servers: tuple[ServerAddress, ...] = Field(
        default=(ServerAddress(http="http://127.0.0.1:8001", zmq="tcp://127.0.0.1:5601"),),
        strict=False,
        description="The fleet of vLLM servers, all with the same verifier.",
    )
    keys: str | None = Field(
        default=None,
        min_length=1,
        description="Folder that `dflash-scale keys` wrote: hidden states are encrypted, and only servers with that "
        "key are trusted; null = no keys. HTTP is not encrypted.",
    )
    endpoints_file: str | None = Field(
        default=None,
        min_length=1,
        description="JSON file with a list of more servers, as in stream.servers. It is watched: servers join and "
        "leave while the run goes on, and stream.servers may be [].",
    )
    insecure: bool = Field(
        default=False, description="Allow servers that are not on loopback, over HTTP and, without keys, ZeroMQ."
    )
    ring_bytes: Positive = Field(default=GIB, description="Shared memory of one training rank's ring, in bytes.")
    credit_bytes: Positive = Field(
        default=8 * GIB, description="Bytes in flight from all servers to one receiver, at most."
    )
    server_credit_bytes: Positive = Field(default=2 * GIB, description="Bytes in flight from one server, at most.")
    requests_per_server: Positive = Field(default=64, description="Requests open at one server, at most.")
    lookahead_rows: Positive = Field(
        default=4,
        description="Rows per rank prefetched ahead of the one in training, at most; each has a buffer on the device.",
    )
    request_timeout_s: float = Field(
        default=120.0, gt=0, description="Seconds until an unanswered request counts as failed."
    )
    attempts: Positive = Field(
        default=3,
        description="Failed attempts per sample, on different servers where there are several, before it is "
        "quarantined; the death of a server does not count as one.",
    )
    probe_s: float = Field(default=5.0, gt=0, description="Seconds between health probes of a server that failed.")
    no_server_timeout_s: float = Field(
        default=600.0, gt=0, description="Seconds without a healthy server until the run stops."
    )

    @model_validator(mode="after")
    def _cache_fits_mode(self) -> StreamSection:
        if self.mode in ("online", "fake") and self.cache is not None:
            raise ValueError(
                f'stream.cache: got {self.cache} with stream.mode "{self.mode}", which reads and writes no cache; set '
                'the mode to "hybrid" or "offline", or remove the folder'
            )
        if self.mode in ("offline", "hybrid") and self.cache is None:
            raise ValueError(
                f'stream.cache: got none with stream.mode "{self.mode}", wanted a folder of hidden states; name one or '
                'set the mode to "online"'
            )
        if self.transport == "fp8" and self.mode in ("offline", "hybrid"):
            raise ValueError(
                f'stream.transport: got "fp8" with stream.mode "{self.mode}", wanted "exact" or "bf16" because files '
                "of the cache hold no scales; set one of them"
            )
        return self

    @model_validator(mode="after")
    def _fake_comes_from_nowhere(self) -> StreamSection:
        for name in ("transport", "keys", "endpoints_file"):
            if self.mode == "fake" and (given := getattr(self, name)) != type(self).model_fields[name].default:
                raise ValueError(
                    f'stream.{name}: got {given} with stream.mode "fake", wanted none because no hidden states travel; '
                    "remove it or set another mode"
                )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> StreamSection:
        if not self.servers and self.endpoints_file is None and self.mode in ("online", "hybrid"):
            raise ValueError(
                "stream.servers: got none, wanted at least one {http, zmq}; name a server, or a stream.endpoints_file"
            )
        self.check_servers("stream.servers", self.servers)
        if self.server_credit_bytes > self.credit_bytes:
            raise ValueError(
                f"stream.server_credit_bytes: got {self.server_credit_bytes}, wanted at most stream.credit_bytes = "
                f"{self.credit_bytes}; lower the first or raise the second"
            )
        return self

    def check_servers(self, name: str, servers: Sequence[ServerAddress]) -> None:
        """Raises ValueError, starting with `name`, unless the run may use these servers, all of them together."""
        for i, server in enumerate(servers):
            check_server(f"{name}[{i}].http", server.http, "http", open_to_others=self.insecure)
            keyed = self.insecure or self.keys is not None
            check_server(f"{name}[{i}].zmq", server.zmq, "tcp", open_to_others=keyed)
        for field in ("name", "zmq"):
            given = [getattr(server, field) for server in servers]
            twice = sorted({address for address in given if given.count(address) > 1})
            if twice:
                what = "http" if field == "name" else field
                raise ValueError(f"{name}: got {twice[0]} twice as {what}, wanted each address once; drop one entry")
        whole = {server.http for server in servers if server.data_parallel_rank is None}
        for server in servers:
            if server.data_parallel_rank is not None and server.http in whole:
                raise ValueError(
                    f"{name}: got {server.http} with data_parallel_rank {server.data_parallel_rank} and without one, "
                    "wanted one in every entry of a server with several engines; set it, or drop one entry"
                )
