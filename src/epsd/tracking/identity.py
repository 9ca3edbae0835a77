"""Who works on a run and from which code: the tags that say so."""

import contextlib
import hashlib
import json
import os
import platform
from collections.abc import Mapping

from epsd.project import processes
from epsd.project.runtime import PACKAGES, brief, say_once, versions


def _process_tags() -> dict[str, str]:
    me = processes.identity()
    return {"host": platform.node(), "pid": str(me["pid"]), "pid.started": str(int(me["pid.started"]))}


def is_gone(tags: Mapping[str, str]) -> bool:
    """True when the process that wrote these tags on this machine has ended (another one may have its number now)."""
    with contextlib.suppress(KeyError, ValueError):
        return processes.gone(int(tags["pid"]), float(tags["pid.started"]) if "pid.started" in tags else None)
    return False


def identity_tags(stage: str, params: Mapping[str, str]) -> dict[str, str]:
    """Who made the run, from which code, which experiment of DVC and which configuration."""
    found = versions()
    digest = hashlib.sha256(json.dumps(sorted(params.items())).encode()).hexdigest()[:12]
    source = f"epsd {stage}" if stage in ("tune", "study", "analyse") else f"stages/{stage}.py"
    tags = {"config_hash": digest, "mlflow.source.name": source, "mlflow.source.type": "LOCAL"}
    with contextlib.suppress(Exception):  # no user name in some containers
        import getpass

        tags["mlflow.user"] = getpass.getuser()
    for tag, variable in {"dvc.exp_name": "DVC_EXP_NAME", "dvc.baseline_rev": "DVC_EXP_BASELINE_REV"}.items():
        if value := os.environ.get(variable):
            tags[tag] = value
    if commit := found.get("git.commit"):
        tags |= {"git.commit": commit, "git.dirty": found["git.dirty"], "mlflow.source.git.commit": commit}
    shown = ("python", *PACKAGES, "cpu", "gpu")
    return tags | {f"versions.{name}": found[name] for name in shown if name in found}


def identity(stage: str, params: Mapping[str, str]) -> dict[str, str]:
    """`identity_tags` and those of this process; none, said once, where the machine cannot be described."""
    try:
        return {**identity_tags(stage, params), **_process_tags()}
    except Exception as error:  # an odd machine is no reason to stop a training
        say_once(f"tracking: this machine cannot be described ({brief(error)}).")
        return {}
