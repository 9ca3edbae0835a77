"""Pruning and self-distillation at once: from the dense network, the smallest weights go while the objective trains it.

What pruning before training is measured against (arXiv 2109.15014), on the same network, objective, recipe and budget.
"""

from epsd.data.prepared import Prepared
from epsd.masks import check_fits
from epsd.pipeline.prune import selection
from epsd.project.params import Params
from epsd.registry import ParamsError, variant
from epsd.studies.procedures.types import Desk, Procedure, Trained, dense, finished
from epsd.training.moving import Gradual, Removing


@variant
class Concurrent(Gradual, Procedure):
    """Gradual magnitude pruning to `prune.sparsity` under the run's objective; `prune.score` does not matter."""

    def check(self, params: Params) -> None:
        """Raises what cannot work, before any of it is done."""
        if params.prune.sparsity == 0:
            raise ParamsError("prune.sparsity: concurrent pruning needs one above 0.")
        if self.start > self.end:
            raise ParamsError(f"start: {self.start} is after end: {self.end}.")

    def __call__(self, params: Params, data: Prepared, desk: Desk) -> Trained:
        """As the pipeline trains, but under a mask that loses weights."""
        how = selection(params)
        sparsity, found = how.pop("sparsity"), dense(params, data)
        check_fits(found.mask.keep, sparsity, **how)
        return finished(params, data, found._replace(report={}), desk, Removing(self, sparsity, how))

    def story(self, params: Params, data: Prepared) -> str:
        """In plain words."""
        return (
            f"A {params.architecture['name']} for {data.num_classes} classes of `{params.dataset['name']}` "
            f"({data.sizes['train']} training images) was trained with `{params.objective['name']}` for "
            f"{params.train.epochs} epochs, and lost {params.prune.sparsity:.1%} of its smallest weights meanwhile: "
            f"every {self.every} steps between {self.start:.0%} and {self.end:.0%} of them. Seed {params.seed}."
        )
