"""Comparing configurations: the tests and corrections against numbers worked out by hand, and which runs make a row."""

import math
from typing import Any

import pytest

from epsd.comparison import command, tables
from epsd.comparison.metrics import better
from epsd.comparison.rows import table
from epsd.comparison.significance import against, mark_best
from epsd.comparison.statistics import difference, holm, summarise
from epsd.comparison.types import ComparisonError, Entry, Table

BASE = {
    "seed": "0", "prune.sparsity": "0.9", "prune.score.name": "epsd", "prune.control": "none", "objective.name": "cskd",
    "train.lr": "0.1", "train.schedule": "cosine", "train.gamma": "0.1", "detect.lr": "0.05", "threads": "2",
    "evaluate.ece_bins": "15",
}  # fmt: skip


def entry(value: float, *, began: float = 0, digest: str = "d", variant: str = "", **params: Any) -> Entry:
    """A run; `prune__score__name="random"` changes a parameter."""
    changed = {key.replace("__", "."): str(new) for key, new in params.items()}
    return Entry({**BASE, **changed}, {"test/top1": value, "test/ece": value}, began, digest, variant)


def runs(values: list[float], **params: Any) -> list[Entry]:
    return [entry(value, seed=seed, **params) for seed, value in enumerate(values)]


def test_parameters_that_are_new_since_a_run_do_not_part_it_from_those_that_did_the_same() -> None:
    known: dict[str, Any] = {"prune__channel_cap": "null", "prune__batches": 1, "prune__average": "absolute"}
    known["prune__rescale"] = "false"
    found = table([entry(0.9), entry(0.8, seed=1, **known), entry(0.7, **{**known, "prune__batches": 2})], "test/top1")
    assert sorted(len(row.cells[0.9].values) for row in found.rows) == [1, 2]


# --- numbers --------------------------------------------------------------------------------------------------------


def test_mean_and_sample_deviation() -> None:
    mean, deviation, seeds = summarise([1.0, 2.0, 4.0])
    assert (mean, seeds) == (pytest.approx(7 / 3), 3)
    assert deviation == pytest.approx(math.sqrt(7 / 3))  # ((4/3)² + (1/3)² + (5/3)²) / 2
    assert math.isnan(summarise([1.0]).deviation)


def test_paired_over_the_seeds_that_match() -> None:
    """Differences 0.02, 0.01, 0.04: t = √7 with 2 degrees of freedom, for which p = 1 - t / √(t² + 2) = 1 - √7 / 3."""
    found = difference({0: 0.90, 1: 0.92, 2: 0.94, 7: 0.5}, {2: 0.90, 1: 0.91, 0: 0.88, 9: 0.1})
    assert (found.test, found.seeds) == ("paired", 3)
    assert found.by == pytest.approx(0.07 / 3)
    assert found.p == pytest.approx(1 - math.sqrt(7) / 3)


def test_welch_where_seeds_do_not_match() -> None:
    """Variances 2 and 2 of two values each: t = -3 / √2 with 2 degrees of freedom, p = 1 - |t| / √(t² + 2)."""
    found = difference({0: 1.0, 1: 3.0}, {5: 4.0, 6: 6.0})
    assert (found.test, found.seeds) == ("welch", 2)
    assert found.by == pytest.approx(-3)
    assert found.p == pytest.approx(1 - (3 / math.sqrt(2)) / math.sqrt(4.5 + 2))


@pytest.mark.parametrize(
    "mine, other, reason",
    [
        ({0: 1.0}, {0: 2.0}, "fewer than two seeds"),
        ({0: 1.0, 1: 2.0}, {3: 2.0}, "fewer than two seeds"),
        ({0: 0.1, 1: 0.2, 2: 0.3}, {0: 0.2, 1: 0.3, 2: 0.4}, "the same difference at every seed"),
        ({0: 1.0, 1: 1.0}, {5: 2.0, 6: 2.0}, "no spread over seeds"),
    ],
)
def test_no_p_without_spread_or_seeds(mine: dict[int, float], other: dict[int, float], reason: str) -> None:
    found = difference(mine, other)
    assert (found.test, found.reason) == ("none", reason)
    assert math.isnan(found.p) and not found.significant


def test_equal_values_are_not_different() -> None:
    assert difference({0: 1.0, 1: 2.0}, {0: 1.0, 1: 2.0}).p == 1.0


def test_holm_by_hand() -> None:
    """Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1, never falling: 0.02, 0.03, 0.06, 0.06."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(
    "metric, way",
    [
        ("test/top1", "higher"), ("test/nll", "lower"), ("test/ece", "lower"), ("detect/map50", "higher"),
        ("time/train", "lower"), ("mask/seconds", "lower"), ("model/bytes_sparse", "lower"),
        ("model/compression", "higher"), ("val/top1", "higher"), ("train/loss", "lower"),
        ("latency/torch_batch1_one_thread_ms", "lower"), ("deploy/int8_validation_drop", "lower"),
        ("latency/onnx_batch1_one_thread_times_dense_torch", "higher"), ("deploy/int8_agreement", "higher"),
        ("train/cross_entropy", "lower"), ("detect/map50_11point", "higher"),
        ("detect/train_loss", "lower"), ("mask/peak_memory_mib", "lower"), ("cost/image_passes", "lower"),
        ("model/prunable_nonzero", "lower"), ("mask/dead_layers", "lower"), ("cost/images_forward", "lower"),
        ("train/lr", None), ("mask/jaccard_cross_entropy", None), ("model/sparsity", None), ("mask/precedence", None),
    ],
)  # fmt: skip
def test_which_way_is_better(metric: str, way: str | None) -> None:
    assert better(metric) == way


def test_of_a_metric_nobody_knows_no_best_is_marked() -> None:
    made = table([Entry(one.params, {"train/lr": 0.1}) for one in runs([0.7, 0.8])], "train/lr")
    mark_best(made)
    assert not made.rows[0].cells[0.9].best
    assert made.notes == ["No best is marked: it is not known whether a lower or a higher train/lr is better."]
    assert tables.written(made, "markdown").startswith("train/lr, mean")


# --- rows -----------------------------------------------------------------------------------------------------------


def test_rows_are_methods_columns_sparsities_cells_seeds() -> None:
    made = table(
        [*runs([0.7, 0.8]), *runs([0.5, 0.6], prune__sparsity="0.95"), *runs([0.1], prune__score__name="random")],
        "test/top1",
    )
    assert [(row.label, row.objective) for row in made.rows] == [("epsd", "cskd"), ("random", "cskd")]
    assert made.columns == [0.9, 0.95]
    assert made.rows[0].cells[0.95].values == {0: 0.5, 1: 0.6}


def test_what_has_no_effect_is_no_difference() -> None:
    made = table([entry(0.7), entry(0.8, seed=1, threads=1, detect__lr=0.5, train__gamma=0.5)], "test/top1")
    assert [row.cells[0.9].values for row in made.rows] == [{0: 0.7, 1: 0.8}]


def test_the_bins_matter_to_calibration_alone() -> None:
    two = [entry(0.7), entry(0.8, seed=1, evaluate__ece_bins=5)]
    assert len(table(two, "test/top1").rows) == 1
    assert len(table(two, "test/ece").rows) == 2


def test_configurations_that_differ_are_rows_that_say_in_what() -> None:
    made = table([*runs([0.7, 0.8]), *runs([0.2, 0.3], train__lr="0.01")], "test/top1")
    assert [row.label for row in made.rows] == ["epsd (train.lr=0.1)", "epsd (train.lr=0.01)"]
    assert [row.cells[0.9].summary.mean for row in made.rows] == pytest.approx([0.75, 0.25])


def test_a_difference_that_no_name_tells_is_told_of_every_row() -> None:
    made = table([*runs([0.7]), *runs([0.2], prune__score__name="random", train__lr="0.01")], "test/top1")
    assert [row.label for row in made.rows] == ["epsd (train.lr=0.1)", "random (train.lr=0.01)"]


def test_settings_of_a_score_tell_its_rows_apart_only() -> None:
    erk = {"prune__score__name": "random", "prune__score__distribution": "erk"}
    uniform = {**erk, "prune__score__distribution": "uniform"}
    made = table([*runs([0.7]), *runs([0.2], **erk), *runs([0.3], **uniform)], "test/top1")
    assert [row.label for row in made.rows] == [
        "epsd", "random (prune.score.distribution=erk)", "random (prune.score.distribution=uniform)",
    ]  # fmt: skip


def test_numbers_written_differently_are_one_value() -> None:
    made = table([entry(0.7), entry(0.8, seed=1, prune__sparsity="0.90", train__lr="1e-1")], "test/top1")
    assert [row.cells.keys() for row in made.rows] == [{0.9}]


def test_a_variants_name_is_its_method() -> None:
    made = table([entry(0.7, variant="mine", prune__control="shuffled"), entry(0.1, prune__control="shuffled", seed=1)],
                 "test/top1")  # fmt: skip
    assert [row.method for row in made.rows] == ["mine"]


def test_what_the_names_of_variants_say_is_not_told_again() -> None:
    wide, thin = runs([0.9, 0.8]), [entry(0.7, variant="thin", **{"architecture.width": "0.5"})]
    assert [row.context for row in table([*wide, *thin], "test/top1").rows] == [{}, {}]
    other = [entry(0.6, variant="thin", **{"architecture.width": "0.25"})]
    assert [row.context for row in table([*thin, *other], "test/top1").rows] == [
        {"architecture.width": "0.5"}, {"architecture.width": "0.25"},
    ]  # fmt: skip
    unnamed = runs([0.5], **{"architecture.width": "0.75"})
    assert all("architecture.width" in row.context for row in table([*wide, *thin, *unnamed], "test/top1").rows)


def test_each_data_set_has_its_table_and_what_they_share_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    """The best of one data set is no best of another; a data set without the baseline is told."""
    score = "prune.score.name"
    ours = {"dataset.name": "digits"}
    digits = [*runs([0.91, 0.92, 0.93], **ours, **{score: "random"}), *runs([0.95, 0.96, 0.98], **ours)]
    photos = runs([0.41, 0.42, 0.44], **{"dataset.name": "image_folder", "dataset.root": "photos"})
    request = command.Request(baseline="random", best=True)
    parts = command.every(request, [*digits, *photos])
    assert list(parts) == ["dataset.name=digits"]
    assert (
        "dataset.name=image_folder, dataset.root=photos: --baseline: there is no row 'random'"
        in capsys.readouterr().err
    )
    request = request._replace(baseline=None)
    parts = command.every(request, [*digits, *photos])
    assert [[row.label for row in part.rows] for part in parts.values()] == [["random", "epsd"], ["epsd"]]
    assert all(any(cell.best for row in part.rows for cell in row.cells.values()) for part in parts.values())
    text = command.text(request, [*digits, *photos], "markdown")
    assert text.count("## dataset.name=") == 2 and text.count("Bold: the highest mean") == 1
    assert "## " not in command.text(request, digits, "markdown")
    titled = runs([0.96], **ours, **{"dataset.title": "Digits", score: "snip"})
    assert len(command.every(request, [*digits, *titled])) == 1, "another name is no other data"
    assert command.text(request, [*digits, *photos], "csv").count("method,objective") == 1
    with pytest.raises(ComparisonError, match="--baseline: there is no row 'nothing'"):
        command.every(request._replace(baseline="nothing"), [*digits, *photos])


def test_the_dense_network_is_one_row_whatever_would_have_pruned_it() -> None:
    made = table([entry(0.7, prune__sparsity=0), entry(0.8, prune__sparsity=0.0, seed=1, prune__score__name="snip")],
                 "test/top1")  # fmt: skip
    assert [(row.method, row.cells[0.0].values) for row in made.rows] == [("dense", {0: 0.7, 1: 0.8})]


def test_the_newest_of_two_runs_counts_and_the_other_is_mentioned() -> None:
    made = table([entry(0.9, began=5), entry(0.1, began=2), entry(0.2, began=1)], "test/top1")
    assert made.rows[0].cells[0.9].values == {0: 0.9}
    assert made.notes == ["2 earlier runs of the same configuration and seed are left out."]


def test_one_seed_on_two_data_sets_is_two_rows() -> None:
    made = table([entry(0.9, digest="a"), entry(0.1, digest="b"), entry(0.8, digest="a", seed=1)], "test/top1")
    assert [row.label for row in made.rows] == ["epsd (data.digest=a)", "epsd (data.digest=b)"]
    split_by_seed = table([entry(0.9, digest="a"), entry(0.1, digest="b", seed=1)], "test/top1")
    assert len(split_by_seed.rows) == 1


def test_runs_without_the_metric_are_named() -> None:
    lost = Entry({**BASE, "prune.score.name": "snip"}, {"val/top1": 0.5})
    made = table([*runs([0.5]), lost, Entry({**lost.params, "seed": "1"}, {"test/top1": math.inf})], "test/top1")
    assert made.notes == ["2 runs have no test/top1: snip+cskd."]


def test_runs_of_somebody_else_are_left_out() -> None:
    others = [Entry({**BASE, "seed": "random"}, {"test/top1": 0.1}), Entry({"seed": "1"}, {"test/top1": 0.1})]
    assert [row.cells[0.9].values for row in table([*runs([0.5]), *others], "test/top1").rows] == [{0: 0.5}]


def test_seeds_make_pairs_where_they_saw_the_same_data() -> None:
    """A split by seed, as `dvc repro` makes it, against one split for all, as a study has it."""
    values = [0.90, 0.92, 0.94]
    mine = [entry(value, seed=seed, digest=f"split {seed}") for seed, value in enumerate(values)]
    for digests, test in ((["split 0", "split 1", "split 2"], "paired"), (["split 0"] * 3, "welch")):
        base = [
            entry(value - 0.1 * value**2, seed=seed, digest=digest, prune__score__name="random")
            for seed, (value, digest) in enumerate(zip(values, digests, strict=True))
        ]
        made = table([*mine, *base], "test/top1")
        against(made, "random")
        assert made.rows[0].cells[0.9].against.test == test


def test_an_unknown_metric_lists_those_there_are() -> None:
    with pytest.raises(ComparisonError, match=r"'test/top5'. There are: test/ece, test/top1\."):
        table(runs([0.5]), "test/top5")
    with pytest.raises(ComparisonError, match="no finished run of a trained model"):
        table([Entry({}, {"test/top1": 1.0})], "test/top1")


# --- against a baseline ---------------------------------------------------------------------------------------------


def three() -> Table:
    return table(
        [
            *runs([0.90, 0.92, 0.94]), *runs([0.88, 0.91, 0.90], prune__score__name="random"),
            *runs([0.50, 0.55, 0.54], prune__score__name="snip"),
            *runs([0.10, 0.20, 0.30], prune__score__name="snip", objective__name="pskd"),
        ],
        "test/top1",
    )  # fmt: skip


def test_each_row_against_the_baseline_of_its_objective_corrected() -> None:
    made = three()
    against(made, "random")
    epsd, random, snip, other = (row.cells[0.9].against for row in made.rows)
    assert random is None and other is None  # itself; no baseline under pskd
    assert epsd is not None and snip is not None
    assert epsd.p == pytest.approx(1 - math.sqrt(7) / 3)
    # Differences -0.38, -0.36, -0.36: mean -1.1 / 3, variance 0.0004 / 3, and p = 1 - |t| / √(t² + 2).
    t2 = 3 * (1.1 / 3) ** 2 / (0.0004 / 3)
    assert snip.p == pytest.approx(1 - math.sqrt(t2 / (t2 + 2)))
    assert snip.corrected == pytest.approx(2 * snip.p) and snip.significant
    assert epsd.corrected == pytest.approx(epsd.p) and not epsd.significant
    assert any("paired over seeds, Holm-corrected over 2 comparisons" in note for note in made.notes)


def test_score_and_objective_is_one_baseline_for_all() -> None:
    made = three()
    against(made, "random+cskd")
    assert [row.cells[0.9].against is not None for row in made.rows] == [True, False, True, True]


def test_the_dense_network_is_a_baseline_at_every_sparsity() -> None:
    made = table([*runs([0.9, 0.8], prune__sparsity=0), *runs([0.7, 0.5])], "test/top1")
    against(made, "dense")
    assert made.rows[1].cells[0.9].against is not None


def test_an_unknown_or_unclear_baseline_lists_the_rows() -> None:
    with pytest.raises(
        ComparisonError, match=r"no row 'prospr'. Rows: epsd\+cskd, random\+cskd, snip\+cskd, snip\+pskd"
    ):
        against(three(), "prospr")
    erk = {"prune__score__name": "random", "prune__score__distribution": "erk"}
    made = table(
        [*runs([0.7]), *runs([0.2], **erk), *runs([0.2], **{**erk, "prune__score__distribution": "u"})], "test/top1"
    )
    with pytest.raises(ComparisonError, match="is several rows"):
        against(made, "random")


def test_rows_with_another_learning_rate_meet_the_baseline_with_theirs() -> None:
    made = table(
        [entry(v, seed=s, train__lr=lr, prune__score__name=score)
         for lr in (0.1, 0.2) for score in ("epsd", "random") for s, v in enumerate([0.1 * (lr + 1), 0.3 * (lr + 1)])],
        "test/top1",
    )  # fmt: skip
    against(made, "random")
    assert all(row.cells[0.9].against.p == 1.0 for row in made.rows if row.method == "epsd")


def test_best_and_what_is_not_told_apart_from_it() -> None:
    made = three()
    mark_best(made)
    assert [row.cells[0.9].best for row in made.rows] == [True, True, False, False]
    single = table([*runs([0.9]), *runs([0.5], prune__score__name="snip")], "test/ece")
    mark_best(single)
    assert [row.cells[0.9].best for row in single.rows] == [False, False]
    assert "lowest mean" in single.notes[-1] and "2 cells have fewer than 3 seeds" in single.notes[-1]


# --- timings --------------------------------------------------------------------------------------------------------


LATENCY = "latency/torch_batch1_one_thread_ms"


def timed(value: float, machine: dict[str, str] | None = None, **params: Any) -> Entry:
    whole = entry(value, **{"device": "cpu", "train__precision": "fp32", **params})
    metrics = {"time/train": value, LATENCY: value, "test/top1": value}
    return Entry(whole.params, metrics, machine=machine or {"versions.cpu": "A x2"})


def test_a_table_of_timings_says_what_they_were_taken_with() -> None:
    made = table([timed(1.0), timed(2.0, prune__score__name="random")], "time/train")
    assert made.notes == ["Timed with device cpu, threads 2, train.precision fp32, versions.cpu A x2."]
    assert [row.label for row in made.rows] == ["epsd", "random"]
    assert table([timed(1.0)], "test/top1").notes == []


@pytest.mark.parametrize(
    "other, label",
    [
        ({"threads": 1}, "threads=1"),
        ({"train__precision": "bf16"}, "train.precision=bf16"),
        ({"device": "cuda"}, "device=cuda"),
        ({"machine": {"versions.cpu": "B x8"}}, "versions.cpu=B x8"),
        ({"machine": {"threads": "7", "versions.cpu": "A x2"}}, "threads=7"),
    ],
)
def test_timings_taken_otherwise_are_other_rows_and_not_compared(other: dict[str, Any], label: str) -> None:
    same = [timed(t + 1.0, seed=s) for s, t in enumerate((0.0, 0.1, 0.3))]
    slow = [timed(t + 5.0, seed=s, prune__score__name="random", **other) for s, t in enumerate((0.0, 0.2, 0.1))]
    both = [timed(t + 2.0, seed=s, prune__score__name="snip") for s, t in enumerate((0.0, 0.2, 0.3))]
    made = table([*same, *slow, *both], "time/train")
    assert made.rows[1].label == f"random ({label})"
    against(made, f"{made.rows[0].label}+cskd")
    assert [row.cells[0.9].against is not None for row in made.rows] == [False, False, True]
    assert any(note.startswith("1 rows were timed otherwise than") for note in made.notes)
    mark_best(made)
    assert [row.cells[0.9].best for row in made.rows] == [True, True, False]


def test_one_seed_timed_twice_in_different_ways_is_two_rows() -> None:
    assert len(table([timed(1.0), timed(2.0, threads=1)], LATENCY).rows) == 2
    assert len(table([timed(1.0), timed(2.0, threads=1)], "test/top1").rows) == 1
    assert len(table([timed(1.0), timed(2.0, evaluate__latency_batch_sizes="[8]")], LATENCY).rows) == 2
    assert len(table([timed(1.0), timed(2.0, evaluate__latency_batch_sizes="[8]")], "time/train").rows) == 1


@pytest.mark.parametrize("key", ["launch.processes", "data.workers", "train.compile", "device"])
def test_how_it_was_computed_tells_timings_apart_and_no_results(key: str) -> None:
    both = [timed(1.0), timed(2.0, **{key.replace(".", "__"): "2"})]
    assert len(table(both, "time/train").rows) == 2
    assert len(table(both, "test/top1").rows) == 1


# --- written down ---------------------------------------------------------------------------------------------------


@pytest.fixture
def whole() -> Table:
    made = three()
    against(made, "random")
    mark_best(made)
    return made


def test_markdown(whole: Table) -> None:
    lines = tables.written(whole, "markdown").splitlines()
    assert lines[2] == "| method | objective | sparsity 0.9 |"
    assert lines[4] == "| epsd | cskd | **0.9200 ± 0.0200** (n 3, p 0.118) |"
    assert lines[5] == "| random | cskd | **0.8967 ± 0.0153** (n 3) |"
    assert lines[-1].startswith("* Bold: the highest mean")


def test_csv_reads_back_in_full(whole: Table) -> None:
    import io

    import pandas as pd

    frame = pd.read_csv(io.StringIO(tables.written(whole, "csv")))
    assert list(frame.columns) == list(tables.CSV_COLUMNS)
    assert frame["mean"].tolist() == [row.cells[0.9].summary.mean for row in whole.rows]
    assert frame["test"].tolist()[0] == "paired" and frame["best"].tolist() == [True, True, False, False]
    assert frame["p_holm"][2] == whole.rows[2].cells[0.9].against.corrected


def test_latex_escapes(whole: Table) -> None:
    whole.rows[0].method = "a_b & 5%"
    text = tables.written(whole, "latex")
    assert r"a\_b \& 5\% & cskd & \textbf{0.9200 $\pm$ 0.0200} (n 3, p 0.118) \\" in text
    assert text.count(r"\begin{tabular}{llr}") == text.count(r"\end{tabular}") == 1


def test_terminal_shows_every_row(whole: Table) -> None:
    text = tables.written(whole, "terminal")
    assert all(word in text for word in ("epsd", "random", "snip", "pskd", "0.9200 ± 0.0200", "p 0.118"))


def test_narrow_networks_are_not_dense_ones() -> None:
    """Sparsity 0 with channels: a method of its own, apart by budget. Else settings of channels part nothing."""
    narrow: dict[str, Any] = {"prune__structure": "channels", "prune__sparsity": 0, "prune__allocation": "uniform"}
    found = table(
        [
            entry(0.9, prune__sparsity=0, prune__structure="weights", prune__macs=0.25),
            entry(0.9, prune__sparsity=0, prune__structure="weights", prune__macs=0.5, seed=1),
            entry(0.8, **narrow, prune__macs=0.25),
            entry(0.7, **narrow, prune__macs=0.5),
            entry(0.6, **narrow, prune__macs=0.5, prune__control="shuffled"),
        ],
        "test/top1",
    )
    assert [row.method for row in found.rows] == [
        "dense", "epsd channels uniform", "epsd channels uniform", "epsd channels uniform shuffled",
    ]  # fmt: skip
    assert len(found.rows[0].cells[0.0].values) == 2
    assert [row.context["prune.macs"] for row in found.rows[1:3]] == ["0.25", "0.5"]
