"""Prepare: read and verify the images, split them, write compact arrays. Writes artifacts/data/ and artifacts/voc/."""

from epsd import artifacts
from epsd.datasets import DATASETS
from epsd.params import Params
from epsd.preparing import prepare, summary
from epsd.registry import choose
from epsd.stage import run_stage


def main(params: Params) -> str:
    """Read the chosen data set; carve the splits it does not bring."""
    dataset = choose(DATASETS, params.dataset, "dataset")
    shares = {"validation": params.data.validation, "test": params.data.test}
    index = prepare(dataset(), artifacts.DATA, seed=params.seed, limit=params.data.limit, **shares)
    return summary(index)


if __name__ == "__main__":
    run_stage("prepare", main)
