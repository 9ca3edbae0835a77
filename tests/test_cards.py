"""The model card says what the files say."""

import re

from epsd import cards

REPORT = {
    "test": {"top1": 0.9861, "top5": 1.0, "nll": 0.12, "ece": 0.0916},
    "model": {
        "sparsity": 0.95,
        "parameters": 77754,
        "parameters_nonzero": 4520,
        "compression": 17.2,
        "gflops_dense": 1,
    },
}
SUBJECT = cards.Subject(
    params={
        "seed": 3,
        "architecture": {"name": "resnet", "depth": 8},
        "objective": {"name": "cskd"},
        "prune": {"score": {"name": "snip"}, "sparsity": 0.95, "scope": "global"},
        "train": {"epochs": 60, "batch_size": 64, "lr": 0.1, "clip_norm": None},
        "detect": {"epochs": 4},
    },
    data={
        "source": "some digits",
        "digest": "0123456789abcdef0123",
        "sizes": {"train": 12, "test": 5},
        "class_names": [f"class{i}" for i in range(30)],
        "image_shape": [3, 20, 30],
    },
    story="A small network.",
    run={"run_id": "abc", "name": "digits-snip"},
    report=REPORT,
    classes=[("class0", 3, 0.5), ("class1", 2, 1.0), ("class2", 0, "")],
)


def test_every_part_is_there() -> None:
    text = cards.model_card(SUBJECT)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    assert titles == ["digits-snip", "Data", "Method", "Metrics", "Limits", "How to use it", "Parameters"]
    for words in (
        "A small network.",
        "some digits, digest `0123456789abcdef`",
        "12 train, 5 test, of 3x20x30 pixels",
        "class19, ...",
        "snip; sparsity 0.95, scope global",
        "| top-1 accuracy | 0.9861 |",
        "| of these not zero | 4,520 |",
        "Weakest classes: class0 50.0% of 3, class1 100.0% of 2.",
        "One training, seed 3",
        "epsd promote abc",
        "Images of 20x30 are taken as they are",
        "train.clip_norm: null",
    ):
        assert words in text, words
    assert "class20" not in text and "detect.epochs" not in text and "EPSD (Chen" not in text


def test_the_method_is_named_where_it_is_epsd() -> None:
    params = {**SUBJECT.params, "prune": {**SUBJECT.params["prune"], "score": {"name": "epsd", "steps": 3}}}
    assert "EPSD (Chen et al., AAAI 2024)" in cards.model_card(SUBJECT._replace(params=params))


def test_results_in_a_sentence() -> None:
    assert cards.results(REPORT, 359).startswith("Top-1 accuracy 0.9861 on 359 test images, ECE 0.0916; 95.00% of")
