"""A pruned teacher and its student, on the same data, recipe and sparsity: what EPSD's cost is compared with."""

from torch import nn

from epsd.compute.cost import Meter
from epsd.data.prepared import Prepared
from epsd.masks import Mask
from epsd.pipeline.prune import initial, pruned, selection
from epsd.pipeline.train import batches
from epsd.project.params import Params
from epsd.project.settings import Choice
from epsd.registry import ParamsError, variant
from epsd.studies.procedures.types import Desk, Procedure, Trained
from epsd.studies.prune_then_distill.rewinding import Course, Rewinding
from epsd.studies.prune_then_distill.student import StudentKind, has_width, narrowed, nonzero


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
        if params.prune.densities or params.prune.channel_cap or params.prune.rescale:
            raise ParamsError("prune.densities, channel_cap, rescale: prune_then_distill goes by magnitudes alone.")
        if self.student == "narrow":
            has_width(params)

    def __call__(self, params: Params, data: Prepared, desk: Desk) -> Trained:
        """All phases, each epoch kept under `desk.folder`."""
        return self.with_teacher(params, data, desk)[0]

    def with_teacher(self, params: Params, data: Prepared, desk: Desk) -> tuple[Trained, nn.Module]:
        """The student, and the teacher as pruned. Beside `mask/...` of the student the figures are `Course.figures`."""
        self.check(params)
        teacher, train = initial(params, data), batches(params, data, "train")
        validation = batches(params, data, "validation") if data.sizes["validation"] else None
        course = Course(self, params.train, train, validation, params.seed, desk.folder, desk.mark, desk.log)
        left = course.prune(teacher, exclude=params.prune.exclude, **selection(params))
        student, mask, architecture = self._student(params, data, left, course.meter)
        course.distil(teacher, student, mask)
        figures = {f"mask/{name}": value for name, value in mask.summary().items()} | course.figures()
        figures |= {"teacher/sparsity": left.sparsity, "time/train": course.history[-1]["cost/seconds"]}
        return Trained(student, mask, course.history, figures, architecture), teacher

    def _student(self, params: Params, data: Prepared, left: Mask, meter: Meter) -> tuple[nn.Module, Mask, Choice]:
        """Untrained, the mask to train it under, what builds it. `left`: what the teacher's rounds found."""
        architecture = dict(params.architecture)
        if self.student == "scored":
            found = pruned(params.pruning(compare=False), data)
            meter.add(Meter.of(found.report))
            return found.model, found.mask, architecture
        if self.student == "narrow":
            architecture = narrowed(params, data, nonzero(params, data, left))
        model = initial(params.model_copy(update={"architecture": architecture}), data)
        return model, left if self.student == "rewound" else Mask.dense(model), architecture

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
