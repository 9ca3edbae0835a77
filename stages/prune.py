"""Early pruning: find the mask that keeps the weights worth self-distilling. Writes artifacts/prune/."""

import epsd.project.own_code  # noqa: F401, I001 (first, before torch: whose code runs, how threads wait)

from epsd.architectures import narrowed
from epsd.compute import distributed
from epsd.compute.devices import Machine
from epsd.data.prepared import Prepared
from epsd.figures import style as figures
from epsd.pipeline import changes
from epsd.pipeline.prune import pruned
from epsd.pipeline.stage import check_training, run_stage, start_read, warn_of_detection
from epsd.pipeline.weights import content_of
from epsd.project import artifacts
from epsd.project.params import Params


def main(params: Params, machine: Machine) -> str:
    """Build and score the network on augmented training images; save mask, initial weights and report."""
    data = Prepared.load(artifacts.DATA, machine)
    check_training(params, data)
    mask, model, report, examined, channels, scores = pruned(params, data)
    if not distributed.is_main():
        return ""
    warn_of_detection(params, model)
    may_be = bool(channels) or params.start.weights is not None
    shapes = narrowed(model, params.architecture, data.num_classes, data.image_shape) if may_be else None
    artifacts.save_pruned(mask, model, report, examined.rows() if examined else [], channels, shapes)
    figures.save(figures.glance(mask, scores), artifacts.MASK_FIGURE)
    changes.remember(start_read(params), content_of)
    dead = f", no weight left in {', '.join(mask.dead_layers())}" if mask.dead_layers() else ""
    narrow = f"cut to {report['macs']:.1%} of the multiply-adds, " if channels else ""
    rounds = f", {params.prune.rounds} rounds of {report.get('image_passes', 0):,.0f} image passes in all"
    spent = rounds if params.prune.rounds > 1 else ""
    return f"{narrow}kept {mask.kept:,} of {mask.total:,} weights, sparsity {mask.sparsity:.4f}{dead}{spent}"


if __name__ == "__main__":
    run_stage("prune", main)
