from clip_pgs.evaluation import format_table
from support.reports import make_result


def result(dataset, suite="zeroshot-classification", status="done", **fields):
    samples = 100 if status == "done" else 0
    return make_result(dataset, suite, status=status, samples=samples, **fields)


def test_table_shows_percent_average_and_reasons():
    results = [
        result("shape", metrics={"acc1": 0.5, "acc5": None, "mean_per_class_recall": 0.4}),
        result("gone", status="missing", error="no folder gone"),
        result("color", metrics={"acc1": 0.25, "acc5": 0.75, "mean_per_class_recall": 0.2}),
    ]
    assert format_table(results) == (
        "zeroshot-classification  acc1           acc5  recall  samples\n"
        "shape                    50.0              -    40.0      100\n"
        "gone                     missing: no folder gone\n"
        "color                    25.0           75.0    20.0      100\n"
        "average (2 of 3)         37.5  75.0 (1 of 3)    30.0\n"
    )


def test_table_has_one_block_per_suite():
    metrics = {f"{kind}_retrieval_recall@{k}": 0.1 for kind in ("image", "text") for k in (10, 5)}
    text = format_table(
        [
            result("shape", metrics={"acc1": 1.0}),
            result("pairs", suite="zeroshot-retrieval", metrics=metrics),
        ]
    )
    _, retrieval = text.split("\n\n")
    assert retrieval.splitlines()[0].split("  ") == [
        "zeroshot-retrieval",
        "text R@5",
        "text R@10",
        "image R@5",
        "image R@10",
        "samples",
    ]


def test_table_of_missing_sets_alone_has_their_reasons():
    text = format_table([result("gone", status="missing", error="no folder gone")])
    assert text == "zeroshot-classification\ngone" + " " * 21 + "missing: no folder gone\n"


def test_robustness_has_the_averages_with_and_without_the_plain_set():
    values = {"photos": 0.6, "sketches": 0.3, "drawings": 0.1}
    text = format_table(
        [
            result(
                name,
                suite="robustness",
                metrics={"acc1": value},
                details={"is_reference": True} if name == "photos" else {},
            )
            for name, value in values.items()
        ]
    )
    assert text == (
        "robustness       acc1  samples\n"
        "photos           60.0      100\n"
        "sketches         30.0      100\n"
        "drawings         10.0      100\n"
        "ID average (3)   33.3\n"
        "OOD average (2)  20.0\n"
        "ID average: over all of these sets\n"
        "OOD average: without the one that the others vary\n"
    )


def test_compositionality_shows_ties_and_the_averages_of_its_parts():
    accuracies = {"add_att": 0.5, "swap_att": 0.7, "replace_rel": 0.4}
    text = format_table(
        [
            result(
                f"sugar_crepe/{split}",
                suite="compositionality",
                metrics={"acc": value},
                details={"ties": 3},
            )
            for split, value in accuracies.items()
        ]
    )
    assert text == (
        "compositionality             acc  ties  samples\n"
        "sugar_crepe/add_att         50.0     3      100\n"
        "sugar_crepe/swap_att        70.0     3      100\n"
        "sugar_crepe/replace_rel     40.0     3      100\n"
        "average (3)                 53.3\n"
        "attribute average (2 of 3)  60.0\n"
        "relation average (1)        40.0\n"
        "ties: pairs whose two captions score alike, which count as wrong\n"
    )


def test_linear_probe_shows_the_regularisation_it_chose():
    metrics = {"lp_acc1": 0.5, "lp_acc5": 0.9, "lp_mean_per_class_recall": 0.4, "knn_acc1": 0.45}
    details = {"regularization": 0.31622}
    text = format_table([result("six", suite="linear-probe", metrics=metrics, details=details)])
    assert text == (
        "linear-probe  20-NN  acc1  acc5  recall  regularization  samples\n"
        "six            45.0  50.0  90.0    40.0           0.316      100\n"
        "regularization: C, the penalty's inverse, best on a held-back fifth of train\n"
        "20-NN: a vote of the 20 nearest images of train\n"
    )


def test_names_and_reasons_reach_the_terminal_without_control_characters():
    text = format_table(
        [
            result("a\x1b[2Jb\n", metrics={"acc1": 0.5, "x\x07": 0.1}),
            result("c", status="failed", error="\x1b]0;title\x07\r\u202e"),
            result("d", status="failed", error=None),
        ]
    )
    assert all(character.isprintable() or character == "\n" for character in text)
    assert text.count("\n") == 5
    assert not text.rstrip().endswith("None")
