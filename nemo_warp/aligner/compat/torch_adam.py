"""Megatron's distributed optimizer over torch's Adam, where apex and Transformer Engine are absent.

Their fused Adam counts steps per group; torch's keeps a counter of no dimensions in the state of
each parameter. Megatron-core 0.11 knows of it in ``state_dict`` and ``load_state_dict``
(optimizer/distrib_optimizer.py l.611 and l.709, "non-Apex/TE support"), but not where it saves and
loads the states as sharded tensors, nor where a fresh optimizer has no states yet. This module
imports no NeMo.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def without_step(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that looks at a parameter's state, which then has no step counter in it."""

    @functools.wraps(method)
    def hidden(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _hidden_steps(self.optimizer):
            return method(self, *args, **kwargs)

    return hidden


def with_states(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that wants states: a fresh optimizer gets those of step 0 first."""

    @functools.wraps(method)
    def filled(self: Any, *args: Any, **kwargs: Any) -> Any:
        # torch's Adam makes its states in its first step, and state_dict asserts that all states
        # name one and the same step (distrib_optimizer.py l.610): of no states it finds none.
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if not self.optimizer.state[parameter]:
                    self.optimizer.state[parameter] = {
                        "step": torch.tensor(0.0),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }
        return method(self, *args, **kwargs)

    return filled


def with_own_steps(method: Callable[..., Any]) -> Callable[..., Any]:
    """A ``load_state_dict`` after which every parameter has a step counter of its own.

    Megatron-core gives all of them one and the same tensor (l.714-718), to which torch's Adam then
    adds 1 once for each parameter: after a resume its bias correction is that of a later step.
    """

    @functools.wraps(method)
    def separated(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()
        return result

    return separated


@contextmanager
def _hidden_steps(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    states = [state for state in optimizer.state.values() if "step" in state]
    # Megatron-core takes everything in a state for a tensor of the parameter's shape.
    steps = [state.pop("step") for state in states]
    try:
        yield
    finally:
        for state, step in zip(states, steps, strict=True):
            state["step"] = step
