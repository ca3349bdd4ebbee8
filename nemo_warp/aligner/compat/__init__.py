"""NeMo outside NVIDIA's container: two modules of replacements behind one explicit call.

`activate` is called by every entry point of `nemo_warp.aligner`, before anything imports NeMo::

    from nemo_warp.aligner.compat import activate

    activate()
    from nemo_warp.aligner.member import trainer

* `stand_ins` takes the place of apex, Transformer Engine and TensorRT-LLM where they are absent;
* `cuda_on_cpu` answers CUDA calls on machines without a GPU.

Importing `nemo_warp` activates nothing. In the container, with a GPU, neither does anything.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from importlib.util import find_spec

logger = logging.getLogger(__name__)

_report: CompatReport | None = None


@dataclass(frozen=True)
class CompatReport:
    """What was replaced, each as ``what: by what or why``. Both are empty in the container."""

    missing: tuple[str, ...] = ()
    stand_ins: tuple[str, ...] = ()
    cuda_on_cpu: tuple[str, ...] = ()

    def summary(self) -> list[str]:
        """One line per module that replaced something, for the start-up log."""
        lines = []
        if self.stand_ins:
            absent = f"absent: {', '.join(self.missing)}" if self.missing else "newer torch"
            lines.append(f"stand-ins ({absent}) replaced {_names(self.stand_ins)}")
        if self.cuda_on_cpu:
            lines.append(f"no GPU: CUDA on the CPU replaced {_names(self.cuda_on_cpu)}")
        return lines


def activate() -> CompatReport:
    """Make NeMo importable and usable on this machine; imports it if anything is replaced.

    The first call does the work, later ones return its report. Rank 0 logs what was replaced.

    Raises:
        ModuleNotFoundError: NeMo, NeMo-Aligner or Megatron-core is not installed.
        RuntimeError: NeMo was imported before, without the replacements it needs.
    """
    global _report
    if _report is None:
        _report = _replace_what_is_needed()
        # From the environment: torch.distributed is not initialised yet when this runs.
        if int(os.environ.get("RANK", "0")) == 0:
            for line in _report.summary():
                logger.warning(line)
    return _report


def _replace_what_is_needed() -> CompatReport:
    _require_installed()
    # Not at the top: `--help` and `plan` import the package and must not pay for torch (1 to 2 s).
    import torch

    from nemo_warp.aligner.compat import cuda_on_cpu, stand_ins
    from nemo_warp.aligner.compat.replacements import Replacements

    missing, without_gpu = stand_ins.absent(), not torch.cuda.is_available()
    stood_in, on_cpu = Replacements(), Replacements()
    if missing or without_gpu:
        _require_nemo_not_imported()
    # Order matters: what NeMo reads while it is imported comes first; replacing in NeMo imports it,
    # and with it torch functions that cuda_on_cpu must have wrapped by then ("from torch import
    # empty" keeps the old one).
    stand_ins.replace_before_nemo(stood_in, missing)
    if without_gpu:
        cuda_on_cpu.replace_before_nemo(on_cpu)
        cuda_on_cpu.replace_in_nemo(on_cpu)
    stand_ins.replace_in_nemo(stood_in, missing)
    return CompatReport(tuple(missing), tuple(stood_in.made), tuple(on_cpu.made))


def _require_installed() -> None:
    packages = {"nemo": "nemo-toolkit", "nemo_aligner": "nemo-aligner", "megatron": "megatron-core"}
    # find_spec finds a package without importing it, which for NeMo takes 12 s.
    absent = [package for name, package in packages.items() if find_spec(name) is None]
    if absent:
        raise ModuleNotFoundError(
            f"{', '.join(absent)} not installed: training needs NeMo; run `make setup`, or use "
            "the NeMo container (`nemo-warp doctor` shows what is there)"
        )


def _require_nemo_not_imported() -> None:
    # Submodules, because the bare packages are imported by their own namespace and plugins.
    early = [
        name for name in ("megatron.core", "nemo.core", "nemo_aligner.utils") if name in sys.modules
    ]
    if early:
        raise RuntimeError(
            f"{', '.join(early)} imported before nemo_warp.aligner.compat.activate(): call it "
            "first thing in the entry point"
        )


def _names(replaced: tuple[str, ...]) -> str:
    names = [entry.partition(":")[0].rpartition(".")[2] for entry in replaced]
    return ", ".join(dict.fromkeys(names))
