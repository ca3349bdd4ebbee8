"""The plan: which stages a recipe consists of, and which need which.

    iteration i:  member 1..M -> merge -> evaluation
                                  merge -> members of iteration i + 1
    at the end:   merge of iteration I -> front (towards SFT), final, benchmarks -> report
                  with front.final_kl: front -> pick -> final

The evaluation of an iteration and the members of the next one may run at the same time.
"""

from __future__ import annotations

from dataclasses import dataclass

MEMBER, MERGE, EVALUATION, FRONT, PICK, FINAL, BENCHMARKS, REPORT = (
    "member",
    "merge",
    "evaluation",
    "front",
    "pick",
    "final",
    "benchmarks",
    "report",
)


@dataclass(frozen=True)
class Stage:
    """One unit of work with a directory of its own.

    Attributes:
        name: its directory below the run's, e.g. ``iteration_01/member_02``.
        kind: one of the constants above.
        iteration: 1..I; that of the last merge for the stages at the end.
        member: 1..M, 0 for other kinds.
        needs: names of the stages that must be done before.
    """

    name: str
    kind: str
    iteration: int
    member: int = 0
    needs: tuple[str, ...] = ()


def member_name(iteration: int, member: int) -> str:
    """Directory of a member's stage."""
    return f"iteration_{iteration:02d}/member_{member:02d}"


def merge_name(iteration: int) -> str:
    """Directory of an iteration's merge."""
    return f"iteration_{iteration:02d}/merge"


def evaluation_name(iteration: int) -> str:
    """Directory of an iteration's evaluation."""
    return f"iteration_{iteration:02d}/evaluation"


def build_plan(
    iterations: int, members: int, pick: bool = False, benchmarks: bool = False
) -> list[Stage]:
    """All stages, each after the ones it needs.

    Args:
        pick: whether the published policy is searched for at a KL.
        benchmarks: whether there are any.
    """
    stages: list[Stage] = []
    for i in range(1, iterations + 1):
        before = (merge_name(i - 1),) if i > 1 else ()
        names = tuple(member_name(i, m) for m in range(1, members + 1))
        stages += [Stage(n, MEMBER, i, m, before) for m, n in enumerate(names, start=1)]
        # A merge needs the one before as well: it gave the init that the members' task vectors
        # start from.
        stages.append(Stage(merge_name(i), MERGE, i, needs=(*names, *before)))
        stages.append(Stage(evaluation_name(i), EVALUATION, i, needs=(merge_name(i), *before)))
    last = (merge_name(iterations),)
    measured = tuple(evaluation_name(i) for i in range(1, iterations + 1))
    picked = (PICK,) if pick else ()
    ends = [Stage(FRONT, FRONT, iterations, needs=last)]
    ends += [Stage(PICK, PICK, iterations, needs=(*last, FRONT))] if pick else []
    ends += [Stage(FINAL, FINAL, iterations, needs=(*last, *picked))]
    ends += [Stage(BENCHMARKS, BENCHMARKS, iterations, needs=last)] if benchmarks else []
    needs = (*measured, *(stage.name for stage in ends))
    return [*stages, *ends, Stage(REPORT, REPORT, iterations, needs=needs)]
