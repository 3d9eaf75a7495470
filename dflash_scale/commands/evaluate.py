"""`dflash-scale evaluate`: acceptance of an exported drafter (evaluation/evaluate.py)."""

from argparse import Namespace

from dflash_scale.commands import edge
from dflash_scale.evaluation.evaluate import EvaluateSpec, evaluate, report_lines
from dflash_scale.files import write_file


def run(args: Namespace) -> int:
    out = vars(args).pop("out")
    result = evaluate(EvaluateSpec(**vars(args)))
    print(report_lines(result))
    if out is not None:
        write_file(out, result.dump())
    return edge.DONE
