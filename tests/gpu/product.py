"""The product itself on one GPU, or on a CPU.

    python tests/gpu/product.py VERIFIER ANSWERS OUT [--set section.key=value ...]

A server beside the training, `deepspeed launch/train.py` with one rank, stopped by a signal in the middle and continued
with --resume, exported, and evaluated. Ends with 0 if every sample was trained once, nothing was left over, and the
drafter is accepted more often than an untrained one. The verifier and its answers are the demo's (launch/demo), made
where there is a network; --set names what is to be tried, such as drafter.attention_backend=sm90.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # started as a script
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from dflash_scale.config.run import load_config  # noqa: E402
from dflash_scale.data.dataset import load_prepared  # noqa: E402
from dflash_scale.data.prepare import prepare  # noqa: E402
from dflash_scale.evaluation.evaluate import EvaluateSpec, evaluate, report_lines  # noqa: E402
from dflash_scale.server.process import end_with_parent, free_port  # noqa: E402
from dflash_scale.training.export import export_checkpoint, named_checkpoint  # noqa: E402
from launch.demo.main import Demo, Server, servers  # noqa: E402

CONFIG = ROOT / "configs" / "demo.json"
STOP_AT, EPOCHS, PROMPTS, NEW_TOKENS = 12, 2, 4, 64


@dataclass(frozen=True)
class Product:
    """One run: where it goes, and what differs from the demo's configuration."""

    out: Path
    overrides: list[str]

    @property
    def ledger(self) -> Path:
        return self.out / "train" / "ledger" / "rank-0.jsonl"

    def trained(self) -> list[dict[str, object]]:
        """What the ledger says of each step."""
        return [json.loads(line) for line in self.ledger.read_text().splitlines()] if self.ledger.exists() else []

    def start(self, fleet: list[Server], *flags: str) -> subprocess.Popen[bytes]:
        addresses = json.dumps([{"http": server.http, "zmq": server.zmq} for server in fleet])
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--num_accelerators=1"]
        command += [f"--master_port={free_port()}", str(ROOT / "launch" / "train.py"), "--config", str(CONFIG), *flags]
        for override in [*self.overrides, f"stream.servers={addresses}"]:
            command += ["--set", override]
        return subprocess.Popen(command, cwd=ROOT, preexec_fn=end_with_parent)

    def stop(self, run: subprocess.Popen[bytes]) -> None:
        """Signals the launcher once the run is in its middle."""
        while len(self.trained()) < STOP_AT and run.poll() is None:
            time.sleep(0.05)
        run.send_signal(signal.SIGTERM)
        run.wait()
        done = len(self.trained())
        print(f"product: stopped with status {run.returncode} after step {done}", flush=True)
        assert done >= STOP_AT, "training ended before it was stopped; its messages stand above"

    def check_ledger(self) -> None:
        """Every sample once an epoch, over the stop and the resumption."""
        samples = len(load_prepared(self.out / "data").train)
        seen: dict[object, Counter[int]] = {}
        for entry in self.trained():
            seen.setdefault(entry["epoch"], Counter()).update(entry["samples"])  # type: ignore[call-overload]
        assert seen == {epoch: Counter(range(samples)) for epoch in range(EPOCHS)}, "a sample was lost or repeated"
        print(f"product: {samples} samples, each once in each of {EPOCHS} epochs", flush=True)


def run(verifier: Path, answers: Path, product: Product) -> None:
    prepare([answers / "held-in.jsonl"], str(verifier), product.out / "data", validation_fraction=0.05)
    config = load_config(CONFIG, product.overrides)
    with servers(Demo(product.out, product.out, CONFIG, None, 0, 0), config) as fleet:
        product.stop(product.start(fleet))
        resumed = product.start(fleet, "--resume")
        assert resumed.wait() == 0, f"the resumed run ended with status {resumed.returncode}"
    product.check_ledger()
    print((product.out / "train" / "metrics.jsonl").read_text().splitlines()[-1][:600], flush=True)
    drafter = export_checkpoint(named_checkpoint(product.out / "train"), product.out / "drafter")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    began = time.perf_counter()
    spec = EvaluateSpec(str(verifier), drafter, answers / "held-out.jsonl", PROMPTS, NEW_TOKENS, device=device)
    result = evaluate(spec)
    print(f"{report_lines(result)}\nproduct: evaluated on {device} in {time.perf_counter() - began:.1f} s", flush=True)
    assert result.equal == 1.0 and result.replay_gap < 1.0
    assert result.speculative.length > result.untrained.length + 0.2, "the drafter has not learnt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verifier", type=Path, help="folder that launch/demo/verifier.py made")
    parser.add_argument("answers", type=Path, help="folder with its held-in.jsonl and held-out.jsonl")
    parser.add_argument("out", type=Path, help="new folder for the run")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one value")
    args = parser.parse_args()
    overrides = [f"verifier.model={args.verifier}", f"data.path={args.out / 'data'}"]
    overrides += [f"train.output_dir={args.out / 'train'}", f"train.epochs={EPOCHS}", "train.checkpoint_every=10"]
    overrides += ["train.validate_every=20", "train.log_every=2", "train.tensorboard=false", *args.set]
    args.out.mkdir(parents=True)
    run(args.verifier, args.answers, Product(args.out, overrides))


if __name__ == "__main__":
    main()
