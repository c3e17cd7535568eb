from clip_pgs.evaluation import Result, format_table


def result(dataset, suite="zeroshot-classification", status="done", metrics=None, error=None):
    return Result(
        suite=suite,
        dataset=dataset,
        status=status,
        metrics=metrics or {},
        samples=100 if status == "done" else 0,
        error=error,
        seconds=1.0,
        task="",
        location="",
        model="m",
        pretrained="",
        weights_digest="",
    )


def test_table_shows_percent_average_and_reasons():
    results = [
        result("shape", metrics={"acc1": 0.5, "acc5": None, "mean_per_class_recall": 0.4}),
        result("gone", status="missing", error="no folder gone"),
        result("color", metrics={"acc1": 0.25, "acc5": 0.75, "mean_per_class_recall": 0.2}),
    ]
    assert format_table(results) == (
        "zeroshot-classification  acc1  acc5  recall  samples\n"
        "shape                    50.0     -    40.0      100\n"
        "gone                     missing: no folder gone\n"
        "color                    25.0  75.0    20.0      100\n"
        "average (2 of 3)         37.5  75.0    30.0\n"
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
