"""`dflash-scale evaluate`: acceptance of an exported drafter (evaluation/evaluate.py)."""

from argparse import Namespace

from dflash_scale.commands import edge
from dflash_scale.evaluation.evaluate import EvaluateSpec, evaluate, report_lines
from dflash_scale.files import write_file


def run(args: Namespace) -> int:
    spec = EvaluateSpec(
        args.verifier,
        args.drafter,
        args.prompts,
        args.count,
        args.max_new_tokens,
        args.vllm_python,
        tuple(args.vllm_flags),
        device=args.device,
    )
    result = evaluate(spec)
    print(report_lines(result))
    if args.out is not None:
        write_file(args.out, result.dump())
    return edge.DONE
