"""A pruned teacher and its student, on the same data, recipe and sparsity: what EPSD's cost is compared with."""

from epsd.data.prepared import Prepared
from epsd.project.params import Params
from epsd.registry import ParamsError, variant
from epsd.studies.procedures.types import Desk, Procedure, Trained
from epsd.studies.prune_then_distill.rewinding import Rewinding
from epsd.studies.prune_then_distill.student import StudentKind, distilled, has_width


@variant
class PruneThenDistill(Rewinding, Procedure):
    """Train a dense teacher with cross entropy, prune it in rounds to `prune.sparsity`, distil it into a student.

    One run: epochs are counted through all phases (`train/phase` 0 teacher, 1 ... n rounds, n + 1 student) under the
    same metric names; `cost/...` includes all of them. The run's `objective` matters to the student `scored` alone.

    student : "narrow" (default, the paper's), "rewound" or "scored": see `StudentKind`.
    """

    student: StudentKind = "narrow"

    def check(self, params: Params) -> None:
        """Raises what cannot work, before any of it is done."""
        self.epochs(params.train)
        if params.start.weights is not None:
            raise ParamsError("start.weights: prune_then_distill trains its teacher from random weights: use null.")
        if params.prune.densities or params.prune.channel_cap:
            raise ParamsError("prune.densities, prune.channel_cap: prune_then_distill goes by magnitudes alone.")
        if self.student == "narrow":
            has_width(params)

    def __call__(self, params: Params, data: Prepared, desk: Desk) -> Trained:
        """All phases, each epoch kept under `desk.folder`."""
        found = distilled(params, data, self, self.student, on_epoch=desk.log, folder=desk.folder, mark=desk.mark)
        seconds = {"time/train": found.history[-1]["cost/seconds"]}
        return Trained(found.student, found.mask, found.history, found.figures | seconds, found.architecture)

    def story(self, params: Params, data: Prepared) -> str:
        """In plain words."""
        teacher, rounds, student = self.epochs(params.train)
        kinds = {
            "narrow": "a narrower dense student with as many parameters",
            "rewound": "a student under the same mask, from initial weights",
            "scored": f"a student under the mask of `{params.prune.score['name']}`, from initial weights",
        }
        times = len(self.densities(params.prune.sparsity))
        return (
            f"A dense {params.architecture['name']} teacher for {data.num_classes} classes of "
            f"`{params.dataset['name']}` ({data.sizes['train']} training images) was trained for {teacher} epochs, "
            f"lost {params.prune.sparsity:.1%} of its weights in {times} rounds of {rounds} "
            f"epochs, and was distilled for {student} epochs into {kinds[self.student]}. Seed {params.seed}."
        )
