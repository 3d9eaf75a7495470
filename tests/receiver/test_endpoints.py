"""The watched list of servers: what is taken from it, when, and what is refused."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from dflash_scale.config.stream import ServerAddress, StreamSection
from dflash_scale.receiver.endpoints import POLL_EVERY_S, Endpoints


def server(number: int) -> dict[str, str]:
    return {"http": f"http://127.0.0.1:{8000 + number}", "zmq": f"tcp://127.0.0.1:{5600 + number}"}


def named(number: int) -> ServerAddress:
    return ServerAddress(**server(number))


class Watch:
    """A file and the watch on it, with a clock of its own."""

    def __init__(self, path: Path, **stream: Any) -> None:
        self.path, self.now = path, 0.0
        section = StreamSection(servers=(named(0),), endpoints_file=str(path), **stream)
        self.endpoints = Endpoints(section)

    def write(self, content: object) -> None:
        aside = self.path.with_suffix(".partial")
        aside.write_text(content if isinstance(content, str) else json.dumps(content))
        os.replace(aside, self.path)

    def poll(self) -> bool:
        self.now += POLL_EVERY_S
        return self.endpoints.poll(self.now)


def test_servers_come_and_go_with_the_file(tmp_path: Path) -> None:
    watch = Watch(tmp_path / "servers.json")
    assert not watch.poll()
    assert watch.endpoints.servers == [named(0)]
    watch.write([server(1), server(2)])
    assert not watch.endpoints.poll(watch.now + POLL_EVERY_S / 2), "at most once a second"
    assert watch.poll()
    assert watch.endpoints.servers == [named(0), named(1), named(2)]
    assert not watch.poll(), "unchanged"
    watch.write([server(2)])
    assert watch.poll()
    assert watch.endpoints.servers == [named(0), named(2)]
    watch.write([])
    assert watch.poll()
    assert watch.endpoints.servers == [named(0)], "those of the configuration stay"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[{", "Invalid JSON"),
        ({"http": "x"}, "entry list: Input should be a valid array"),
        ([{**server(1), "port": 1}], r"entry \[0\]\['port'\]: Extra inputs are not permitted"),
        ([server(1) | {"http": "http://10.0.0.1:8001"}], "wanted a loopback address"),
        ([server(1), server(1)], "got http://127.0.0.1:8001 twice"),
        ([server(0)], "got http://127.0.0.1:8000 twice"),
        ([server(1) | {"http": server(0)["http"], "data_parallel_rank": 1}], "without one, wanted one in every entry"),
    ],
)
def test_a_bad_file_is_logged_once_and_the_last_list_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: object, says: str
) -> None:
    watch = Watch(tmp_path / "servers.json")
    watch.write([server(3)])
    assert watch.poll()
    watch.write(content)
    for _ in range(3):
        assert not watch.poll()
    (record,) = caplog.records
    assert record.levelname == "ERROR"
    assert re.search(says, record.getMessage())
    assert "the fleet stays at 2 servers" in record.getMessage()
    assert watch.endpoints.servers == [named(0), named(3)]
    watch.write([server(4)])
    assert watch.poll()


def test_engines_of_one_server_join(tmp_path: Path) -> None:
    watch = Watch(tmp_path / "servers.json")
    engines = [server(rank) | {"http": server(9)["http"], "data_parallel_rank": rank} for rank in (1, 2)]
    watch.write(engines)
    assert watch.poll()
    assert watch.endpoints.servers == [named(0), *(ServerAddress.model_validate(engine) for engine in engines)]


def test_a_file_that_vanishes_is_logged_once_and_may_come_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watch = Watch(tmp_path / "servers.json")
    watch.write([server(1)])
    assert watch.poll()
    watch.path.unlink()
    for _ in range(3):
        assert not watch.poll()
    assert len(caplog.records) == 1
    assert watch.endpoints.servers == [named(0), named(1)]
    watch.write([server(2)])
    assert watch.poll()
    assert watch.endpoints.servers == [named(0), named(2)]


def test_the_configuration_may_name_no_server_only_with_a_file() -> None:
    assert StreamSection(servers=(), endpoints_file="servers.json").servers == ()
    with pytest.raises(ValueError, match="wanted at least one"):
        StreamSection(servers=())
