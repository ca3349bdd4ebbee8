"""A model card: what was merged, how, and at which angles, beside the weights that came of it."""

from __future__ import annotations

from typing import Any

from nemo_warp.checkpoints.iterations import RUN_CONFIG
from nemo_warp.merge.publish.provenance import provenance
from nemo_warp.merge.publish.tracker import BRIDGE_OPTION, FLAGS
from nemo_warp.merge.report.report import describe_merge, unit_table
from nemo_warp.merge.report.statistics import merge_statistics
from nemo_warp.merge.results import MergeResult

_FRONT = "---\ntags:\n- merge\n- warp\n---\n\n"
_FORMULAS = {
    "slerp": "theta_init + slerp(theta_m - theta_init)",
    "karcher": "theta_init + the Karcher mean of the directions of theta_m - theta_init",
    "lerp": "the average of theta_m",
    "slerp-full": "slerp(theta_m)",
}
_LOADING = {
    "safetensors": "`AutoModelForCausalLM.from_pretrained(FOLDER)` reads it, as does any server.",
    "torch_dist": f"Megatron-LM reads a folder of iterations that holds it: `--load PARENT {FLAGS}`"
    " (`--finetune`, too, to count iterations from 0).",
}


def card(result: MergeResult, index: int) -> bytes:
    """The card of one output; equal merges, equal bytes.

    Args:
        result: of a merge, not published yet.
        index: of the output's eta.
    """
    statistics, plan = merge_statistics(result), result.plan
    report = {**provenance(plan, result.groups), **statistics}
    eta, towards = plan.options.etas[index], "theta_init"
    if plan.options.liti_towards is not None:
        towards = "theta_towards"
    lines = [
        "# A merge of policies (WARP)",
        "",
        f"theta = (1 - eta) * {towards} + eta * theta_merged, with eta = {eta:g} and, "
        f"{_shared(report['options'])}, theta_merged = {_FORMULAS[plan.options.method]}.",
        "",
        *describe_merge(report),
        "",
        *unit_table(_of_one_output(report, index)),
    ]
    if statistics["warnings"]:
        lines += ["", "## Warnings", "", *(f"- {warning}" for warning in statistics["warnings"])]
    lines += ["", *_loading(plan), "", _made_with(report["versions"])]
    return (_FRONT + "\n".join(lines) + "\n").encode()


def _shared(options: dict[str, Any]) -> str:
    if options["granularity"] == "model":
        return "with one angle for the whole model"
    return f"{options['granularity']} by {options['granularity']}"


def _of_one_output(report: dict[str, Any], index: int) -> dict[str, Any]:
    def row(found: dict[str, Any]) -> dict[str, Any]:
        return {**found, "outputs": [found["outputs"][index]]}

    units = {name: row(found) for name, found in report["units"].items()}
    return {**report, "units": units, "model": row(report["model"])}


def _loading(plan: Any) -> list[str]:
    if plan.image.files and any(file.name == "model_config.yaml" for file in plan.image.files):
        return ["NeMo's `restore_from` reads it."]
    if RUN_CONFIG in plan.inputs[0].archive.members:
        return [
            f"Megatron-Bridge starts training from it with `{BRIDGE_OPTION}=PARENT`, the folder of "
            "iterations that holds it."
        ]
    known = _LOADING.get(plan.inputs[0].format)
    return [known] if known else []


def _made_with(versions: dict[str, str]) -> str:
    return (
        "Made with "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ("; digests, options and etas are in `warp_merge.json`.")
    )
