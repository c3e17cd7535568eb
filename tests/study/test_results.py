"""Tables and page of a study whose runs are numbers that a test wrote."""

import csv
import json
import math
import re
from dataclasses import replace

import pytest
import yaml

from clip_pgs.evaluation.report.command import run as report
from clip_pgs.study.__main__ import main
from clip_pgs.study.plan import read_options, read_study
from clip_pgs.study.record import Record, read_record, write_record
from clip_pgs.training.run_folder import save_options
from support.commands import refusal
from support.studies import fill, write_study

RANDOM = [0.30, 0.32, 0.28, 0.35, 0.31, 0.29]
PGS = [0.35, 0.36, 0.34, 0.36, 0.33, 0.36]
RECALL = "zeroshot-classification/four/mean_per_class_recall"
TEXT = "zeroshot-retrieval/pairs/text_retrieval_recall@1"
SCORE = {"score": ["zeroshot-classification/four/acc1"]}


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A study of six seeds; do not change it."""
    study = write_study(tmp_path_factory.mktemp("filled"))
    study.change(seeds=list(range(6)))
    fill(study, {"random": RANDOM, "pgs": PGS})
    assert main(study.argv("--report-only")) == 0
    return study


@pytest.mark.parametrize("change", [{"flops_per_image": 10**400}, {"metrics": {"acc1": 10**400}}])
def test_a_result_of_a_number_that_cannot_be_is_left_out(study, change):
    fill(study, {"random": RANDOM[:2], "pgs": PGS[:2]})
    path = study.study / "pgs/seed_1/eval-unmasked/zeroshot-classification.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert main(study.argv("--report-only")) == 0
    rows = json.loads((study.study / "results.json").read_text())["rows"]
    assert [list(row["seeds"]) for row in rows if row["arm"] == "pgs"] == [["0"], []]


def test_what_the_tables_lack_is_named_on_the_terminal(study, capsys):
    study.change(seeds=list(range(6)))
    arms = yaml.safe_load(study.path.read_text())["arms"]
    del arms["pgs"]["evaluate"]
    study.change(arms=arms)
    fill(study, {"random": RANDOM[:5], "pgs": PGS})
    assert main(study.argv("--report-only")) == 0
    said = capsys.readouterr().err
    assert said == (
        "WARNING: Not in the tables: random | unmasked, seed 5 (not trained to the end).\n"
    )
    record = read_record(study.study / "pgs/seed_2")
    write_record(replace(record, evaluations={}), study.study / "pgs/seed_2")
    write_record(Record("0", ["one"], "", failed="out of luck"), study.study / "pgs/seed_3")
    (study.study / "pgs/seed_4/eval-unmasked/zeroshot-retrieval.json").unlink()
    for number in (0, 1):
        damaged = study.study / f"pgs/seed_{number}/eval-unmasked/zeroshot-classification.json"
        damaged.write_text(damaged.read_text()[:100])
    assert main(study.argv("--report-only")) == 0
    said = capsys.readouterr().err
    for part in (
        "seeds 0, 1 (no value of score, recall, as zeroshot-classification.json in eval-unmasked "
        "is no result)",
        "pgs | unmasked, seed 2 (not evaluated)",
        "pgs | unmasked, seed 3 (failed)",
        "pgs | unmasked, seed 4 (no value of score)",
    ):
        assert part in said
    assert said.removeprefix("WARNING: ").strip() in json.dumps(
        json.loads((study.study / "results.json").read_text())["notes"]
    )


def test_a_metric_that_is_not_defined_leaves_its_cells_blank_alone(study):
    study.change(metrics={"recall": RECALL, **SCORE, "both": [RECALL, *SCORE["score"]]})
    study.change(seeds=list(range(6)))
    fill(study, {"random": RANDOM, "pgs": PGS})
    for path in study.study.glob("*/*/eval-unmasked/zeroshot-classification.json"):
        content = json.loads(path.read_text())
        content["metrics"]["mean_per_class_recall"] = None
        path.write_text(json.dumps(content))
    assert main(study.argv("--report-only")) == 0
    content = json.loads((study.study / "results.json").read_text())
    assert [said["metric"] for said in content["comparisons"]] == ["score"]
    assert content["comparisons"][0]["p"] == pytest.approx(2 / 64)
    (note,) = [note for note in content["notes"] if "Blank" in note]
    assert note.startswith("Blank: recall, both,")
    lines = list(csv.DictReader((study.study / "results.csv").open()))
    assert [float(line["score"]) for line in lines] == pytest.approx(RANDOM + PGS)
    assert {line["recall"] for line in lines} == {line["both"] for line in lines} == {""}
    # The primary metric is needed, and so is every result.
    study.change(primary="recall")
    assert main(study.argv("--report-only")) == 0
    assert "no value of recall)" in (study.study / "results.md").read_text()


def test_a_seed_that_lacks_the_result_of_a_secondary_metric_is_left_out(study):
    study.change(metrics={"recall": RECALL, "text": TEXT}, primary="recall")
    fill(study, {"random": RANDOM[:2], "pgs": PGS[:2]})
    (study.study / "pgs/seed_1/eval-unmasked/zeroshot-retrieval.json").unlink()
    assert main(study.argv("--report-only")) == 0
    text = (study.study / "results.md").read_text()
    assert r"pgs \| unmasked, seed 1 (no value of text)" in text
    assert "Blank" not in text


def test_differences_are_paired_by_seed(filled):
    content = json.loads((filled.study / "results.json").read_text())
    (primary,) = [said for said in content["comparisons"] if said["metric"] == "score"]
    expected = [pgs - random for pgs, random in zip(PGS, RANDOM, strict=True)]
    assert list(primary["differences"].values()) == pytest.approx(expected)
    assert primary["mean"]["mean"] == pytest.approx(sum(expected) / 6)
    assert 0 < primary["mean"]["low"] < primary["mean"]["mean"] < primary["mean"]["high"]
    # All six are above 0: two patterns of 64 are as extreme, and one row needs no correction.
    assert (primary["p"], primary["p_holm"]) == (pytest.approx(2 / 64), pytest.approx(2 / 64))
    rows = {(row["arm"], row["evaluation"]): row for row in content["rows"]}
    row = rows["pgs", "unmasked"]
    assert (row["training_flops"], row["flops_per_image"]) == (2e12, 1e6)
    assert row["means"]["score"]["mean"] == pytest.approx(sum(PGS) / 6)
    assert rows["pgs", "masked"]["seeds"] == {}


def test_tables_say_the_same_everywhere(filled):
    text = (filled.study / "results.md").read_text()
    row = r"\| pgs \\\| unmasked \| 6 \| 2\.00 \| 1\.00 \| \+4\.2 \\\[\d\.\d, \d\.\d\\\] \| 0\.031 "
    assert re.search(row, text)
    assert "no p below" not in text
    with (filled.study / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [float(line["score"]) for line in lines] == pytest.approx(RANDOM + PGS)
    differences = [line["score - random | unmasked"] for line in lines if line["arm"] == "pgs"]
    assert float(differences[3]) == pytest.approx(0.01)


def test_the_page_needs_nothing_else(filled):
    page = (filled.study / "index.html").read_text()
    assert "+4.2" in page
    assert page.count("data:image/svg+xml;base64,") == 2
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    for name in ("score_by_training_flops", "score_by_inference_flops"):
        assert (filled.study / "figures" / f"{name}.png").is_file()


def test_the_dearest_arm_is_drawn_inside_the_plot(filled):
    drawing = (filled.study / "figures/score_by_training_flops.svg").read_text()
    frame = re.search(r'<clipPath id="[^"]*">\s*<rect x="([\d.]+)" [^>]*width="([\d.]+)"', drawing)
    right = float(frame[1]) + float(frame[2])
    marks = [float(x) for x in re.findall(r'<g clip-path.*?<use [^>]*x="([\d.]+)"', drawing, re.S)]
    assert len(marks) >= 2
    assert max(marks) < right - 10


@pytest.mark.parametrize("primary", ["r\u00e9call & <b>", "recall"])
def test_no_figure_of_an_earlier_primary_metric_stays(study, primary):
    study.change(metrics={**SCORE, primary: RECALL}, primary=primary)
    fill(study, {"random": RANDOM[:2], "pgs": PGS[:2]})
    assert main(study.argv("--report-only")) == 0
    figures = study.study / "figures"
    (figures / "mine.png").write_bytes((figures / f"{primary}_by_training_flops.png").read_bytes())
    (figures / "notes_by_training_flops.svg").write_text("mine")
    study.change(primary="score")
    assert main(study.argv("--report-only")) == 0
    drawn = {
        f"score_by_{cost}_flops.{form}"
        for cost in ("training", "inference")
        for form in ("png", "svg")
    }
    assert {path.name for path in figures.iterdir()} == {
        *drawn,
        "mine.png",
        "notes_by_training_flops.svg",
    }


def test_five_seeds_are_said_to_give_no_p_below_0_05(study):
    study.change(seeds=list(range(6)))
    fill(study, {"random": RANDOM, "pgs": PGS[:5]})
    assert main(study.argv("--report-only")) == 0
    text = (study.study / "results.md").read_text()
    assert "5 paired seeds: with fewer than 6 no p below 0.05 is possible" in text
    assert r"pgs \| unmasked, seed 5; pgs \| masked, seed 5 (not trained to the end)" in text


def test_why_a_row_has_no_interval_is_said_once_however_many_metrics_it_has(study):
    study.change(seeds=list(range(6)))
    fill(study, {"random": RANDOM[:1], "pgs": PGS[:1]})
    assert main(study.argv("--report-only")) == 0
    text = (study.study / "results.md").read_text()
    assert text.count("one seed has no interval") == 1


def test_a_report_of_a_study_says_that_its_runs_are_to_be_named(study, capsys):
    fill(study, {"random": RANDOM[:2], "pgs": PGS[:2]})
    for arm in ("random", "pgs"):
        (study.study / arm / "seed_0/options.json").write_text("{}")
    out = ["-o", str(study.folder / "report")]
    for source in (study.study, study.study / "pgs"):
        sentence = refusal(report, [str(source), *out], capsys)
        assert f"{source} holds no results itself; name its runs, such as " in sentence
    assert main(study.argv("--report-only")) == 0
    for source in (study.study, study.study / "results.csv"):
        sentence = refusal(report, [str(source), *out], capsys)
        assert "it is that of a study, whose own report is" in sentence
        assert f"name them, {study.study}/ARM/seed_N" in sentence
    assert not (study.folder / "report").exists()


def test_the_record_of_an_earlier_version_is_read(study):
    fill(study, {"random": RANDOM[:2], "pgs": PGS[:2]})
    path = study.study / "pgs/seed_1/study.json"
    record = json.loads(path.read_text())
    del record["spent"]
    path.write_text(json.dumps({**record, "seconds": 12.0}))
    assert main(study.argv("--report-only")) == 0
    assert len((study.study / "results.csv").read_text().splitlines()) == 5


def test_runs_of_other_code_and_failures_are_told(study):
    fill(study, {"random": RANDOM[:2], "pgs": PGS[:1]})
    fill(study, {"pgs": PGS[:1]}, code="two")
    record = Record("0", ["one"], "", failed="out of luck", accepted=["lr 0.1 -> 0.2"])
    write_record(record, study.study / "pgs/seed_1")
    assert main(study.argv("--report-only")) == 0
    text = (study.study / "results.md").read_text()
    assert "two: pgs, seed 0" in text
    assert "| pgs, seed 1 | out of luck |" in text
    assert r"Kept although the study means otherwise (lr 0.1 -\> 0.2): pgs, seed 1." in text


def test_what_several_runs_differ_in_is_told_once(study):
    study.change(seeds=list(range(3)))
    fill(study, {"random": RANDOM[:3], "pgs": PGS[:3]})
    fill(study, {"pgs": PGS[:3]}, code="two")
    for seed in (0, 2):
        path = study.study / f"random/seed_{seed}"
        write_record(replace(read_record(path), accepted=["lr 0.1 -> 0.2"]), path)
    assert main(study.argv("--report-only")) == 0
    text = (study.study / "results.md").read_text()
    assert "two: pgs, seeds 0, 1, 2." in text
    assert r"two: pgs \| unmasked, seeds 0, 1, 2." in text
    assert text.count("Kept although") == 1
    assert r"(lr 0.1 -\> 0.2): random, seeds 0, 2." in text


CHANGES = {
    "another primary metric": ({"primary": "recall"}, "primary 'score' -> 'recall'"),
    "another formula of it": (
        {"metrics": {"score": "zeroshot-classification/four/acc1"}, "primary": "score"},
        "metrics",
    ),
    "another reference": ({"reference": "pgs"}, "reference"),
    "more seeds": ({"seeds": [0, 1, 2]}, "seeds"),
    "fewer rows": ({"arms": {"random": {}, "pgs": {"train": {"masking": "pgs"}}}}, "rows"),
}


@pytest.mark.parametrize("is_fresh", [True, False], ids=["run", "run by an earlier version"])
@pytest.mark.parametrize(("parts", "told"), CHANGES.values(), ids=CHANGES)
def test_what_the_file_named_after_the_first_run_is_not_called_named_before(
    study, monkeypatch, parts, told, is_fresh
):
    def notes(*flags):
        assert main(study.argv(*flags)) == 0
        return json.loads((study.study / "results.json").read_text())["notes"]

    if is_fresh:
        monkeypatch.setattr("clip_pgs.study.runner.Runner.run", lambda _: 0)
        assert "The primary metric, named before the first run, is score;" in notes()[0]
    fill(study, {"random": RANDOM[:2], "pgs": PGS[:2]})
    before = notes("--report-only")
    assert ("named before the first run" in before[0]) == is_fresh
    assert not any("file was changed" in note for note in before)
    study.change(**parts)
    is_other = "primary" in parts
    for _ in range(2):
        first, change, *_ = notes("--report-only")
        assert ("named before the first run" in first) == (is_fresh and not is_other)
        since = "run" if is_fresh else "results"
        assert change.startswith(f"The study's file was changed after its first {since}: ")
        assert told in change


def test_results_of_an_earlier_version_tell_the_first_primary_metric(study):
    fill(study, {"random": RANDOM[:2], "pgs": PGS[:2]})
    assert main(study.argv("--report-only")) == 0
    (study.study / "protocol.json").unlink()
    study.change(primary="recall")
    assert main(study.argv("--report-only")) == 0
    notes = json.loads((study.study / "results.json").read_text())["notes"]
    assert "after its first results: primary 'score' -> 'recall'." in notes[1]


@pytest.mark.parametrize("content", ["{", "[]", '{"metrics": 5, "seeds": {}, "rows": null}'])
def test_a_protocol_that_is_none_vouches_for_nothing(study, capsys, content):
    fill(study, {"random": RANDOM[:2], "pgs": PGS[:2]})
    (study.study / "protocol.json").write_text(content)
    is_one = "metrics" in content
    assert main(study.argv("--report-only")) == (0 if is_one else 2)
    if is_one:
        assert "named before" not in (study.study / "results.md").read_text()
    else:
        assert f"{study.study}/protocol.json" in capsys.readouterr().err


def test_runs_that_are_not_what_the_file_says_by_now_are_told(study):
    fill(study, {"random": RANDOM[:2], "pgs": PGS[:2]})
    plan = read_study(study.path, root=study.root)
    for arm, options in read_options(plan).items():
        for seed in (0, 1):
            save_options(replace(options, seed=seed), plan.run(arm, seed))
    for path, data in ((plan.run("random", 0), "a" * 64), (plan.run("pgs", 1), "b" * 64)):
        record = read_record(path)
        record.evaluations["unmasked"].data = data
        write_record(record, path)
    assert main(study.argv("--report-only")) == 0
    text = (study.study / "results.md").read_text()
    assert "means otherwise" not in text
    assert "other flags" not in text
    assert f"evaluated on the same data ({12 * 'a'}). {12 * 'b'}: pgs | unmasked, seed 1." in (
        text.replace("\\", "")
    )

    content = yaml.safe_load(study.path.read_text())
    arms = content["arms"] | {"pgs": {"train": {"masking": "pgs", "lr": 0.5}}}
    evaluations = [content["evaluations"][0] | {"batch-size": 3}]
    study.change(arms=arms, evaluations=evaluations)
    assert main(study.argv("--report-only")) == 0
    text = (study.study / "results.md").read_text().replace("\\", "")
    assert "otherwise (lr 0.001 -> 0.5): pgs, seeds 0, 1." in text
    assert (
        "Evaluated with other flags than the study's: random | unmasked, seeds 0, 1; "
        "pgs | unmasked, seeds 0, 1." in text
    )


def test_a_run_that_is_done_and_has_lost_its_options_is_told(study):
    fill(study, {"random": RANDOM[:1], "pgs": PGS[:1]})
    run = study.study / "pgs/seed_0"
    (run / "options.json").write_text("{")
    assert main(study.argv("--report-only")) == 0
    text = (study.study / "results.md").read_text().replace("\\", "")
    assert re.search(r"means otherwise \(\S*options.json[^\n]*\): pgs, seed 0\.", text)


@pytest.mark.parametrize(
    "change",
    [
        {"spent": {"flops": "a", "seconds": None, "hardware": "a test"}},
        {"spent": {"flops": None, "seconds": None, "hardware": 5}},
        {"code": 5},
        {"code": "one"},
        {"accepted": {}},
        {"failed": None},
        {"evaluations": {"unmasked": {"flags": [], "code": 1, "seconds": 1.0}}},
        {"evaluations": {"unmasked": {"flags": "", "code": "", "seconds": 1.0}}},
        {"evaluations": {"unmasked": {"flags": [], "code": "", "seconds": "1"}}},
        {"evaluations": {"unmasked": 3}},
        {"evaluations": {"unmasked": {}}},
        {"evaluations": []},
        {"accepted": 5},
        {"trained_under": "one"},
        {"trained_under": [1]},
        {"spent": {"flops": -5, "seconds": 1.0, "hardware": "a test"}},
        {"spent": {"flops": 5, "seconds": math.nan, "hardware": "a test"}},
    ],
)
def test_a_record_of_other_types_is_damaged(study, capsys, change):
    fill(study, {"random": RANDOM[:1], "pgs": PGS[:1]})
    path = study.study / "pgs/seed_0/study.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert main(study.argv("--report-only")) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {path} is damaged: it")
    assert "remove that file and go on with --accept-changes" in said
    assert all(word not in said for word in ("iterable", "attribute", "__init__"))


def test_what_a_study_is_about_is_no_markup(study):
    about = "# one\n| two | $3$ <script>alert(1)</script>\n\n## &lt; *four* `five` \x1b[31m"
    study.change(about=about, metrics={"a_*b*": ["zeroshot-classification/four/acc1"]})
    study.change(primary="a_*b*")
    fill(study, {"random": RANDOM[:2], "pgs": PGS[:2]})
    assert main(study.argv("--report-only")) == 0
    lines = (study.study / "results.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("#")] == ["# Study tiny"]
    (said,) = [line for line in lines if "script" in line]
    assert said.startswith(
        r"\# one \| two \| \$3\$ \<script\>alert(1)\</script\> \#\# \&lt; \*four\*"
    )
    assert any(line.startswith(r"The primary metric") and r"a\_\*b\*" in line for line in lines)
    assert any(line.startswith(r"![a\_\*b\* against") and "a_%2Ab%2A_by" in line for line in lines)
    page = (study.study / "index.html").read_text()
    assert "# one | two | $3$ &lt;script&gt;alert(1)&lt;/script&gt; ## &amp;lt; *four*" in page
    assert "\x1b" not in page
