"""Files that are there twice, across splits and inside one."""

from epsd.files.duplicates import duplicates, marks


def told(**splits: str) -> list[str]:
    """Of splits whose files have a letter each as content, and are named by their place."""
    found = {split: marks(letter.encode() for letter in letters) for split, letters in splits.items()}
    return duplicates(found, {split: [f"{split[:2]}{at}" for at in range(len(text))] for split, text in splits.items()})


def test_none_and_empty_splits() -> None:
    assert told(train="abc", validation="", test="de") == []


def test_across_and_inside() -> None:
    assert told(train="abca", validation="dd", test="ec") == [
        "1 of test also in train, byte for byte (te1 as tr2)",
        "1 of train there twice, byte for byte (tr3 as tr0)",
        "1 of validation there twice, byte for byte (va1 as va0)",
    ]
    assert told(train="aaabb") == ["3 of train there twice, byte for byte (tr1 as tr0)"]
