"""Evaluation in five suites, as functions and as `clip-pgs test`.

from clip_pgs.evaluation import evaluate, format_table, load_model, load_suite

results = evaluate(load_model("logs/demo"), load_suite("zeroshot-retrieval"))
print(format_table(results))
"""

from typing import TYPE_CHECKING

from clip_pgs.registry import late_names

if TYPE_CHECKING:
    from clip_pgs.evaluation.datasets import EvalSet
    from clip_pgs.evaluation.models import LoadedModel, check_finite, load_model, weights_digest
    from clip_pgs.evaluation.report.results_table import format_table
    from clip_pgs.evaluation.report.scores import Average, averages
    from clip_pgs.evaluation.results import Result, read_results
    from clip_pgs.evaluation.runner import evaluate
    from clip_pgs.evaluation.suites import SUITES, Scores, Suite, load_suite, register_suite

__all__ = [
    "SUITES",
    "Average",
    "EvalSet",
    "LoadedModel",
    "Result",
    "Scores",
    "Suite",
    "averages",
    "check_finite",
    "evaluate",
    "format_table",
    "load_model",
    "load_suite",
    "read_results",
    "register_suite",
    "weights_digest",
]

__getattr__ = late_names(
    __name__,
    __all__,
    "datasets",
    "results",
    "suites",
    "report.scores",
    "report.results_table",
    "models",
    "runner",
)
