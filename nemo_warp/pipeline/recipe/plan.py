"""The plan: which stages a recipe consists of, and which need which.

    iteration i:  member 1..M -> merge -> evaluation
                                  merge -> members of iteration i + 1
    at the end:   merge of iteration I -> front (towards SFT), final -> report

The evaluation of an iteration and the members of the next one may run at the same time.
"""

from __future__ import annotations

from dataclasses import dataclass

MEMBER, MERGE, EVALUATION, FRONT, FINAL, REPORT = (
    "member",
    "merge",
    "evaluation",
    "front",
    "final",
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


def build_plan(iterations: int, members: int) -> list[Stage]:
    """All stages, each after the ones it needs."""
    stages: list[Stage] = []
    for i in range(1, iterations + 1):
        before = (merge_name(i - 1),) if i > 1 else ()
        names = tuple(member_name(i, m) for m in range(1, members + 1))
        stages += [Stage(n, MEMBER, i, m, before) for m, n in enumerate(names, start=1)]
        stages.append(Stage(merge_name(i), MERGE, i, needs=(*names, *before)))
        stages.append(Stage(evaluation_name(i), EVALUATION, i, needs=(merge_name(i), *before)))
    last = (merge_name(iterations),)
    measured = tuple(evaluation_name(i) for i in range(1, iterations + 1))
    stages.append(Stage("front", FRONT, iterations, needs=last))
    stages.append(Stage("final", FINAL, iterations, needs=last))
    stages.append(Stage("report", REPORT, iterations, needs=(*measured, "front", "final")))
    return stages
