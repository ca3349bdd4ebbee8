"""The policy in memory as a model of EleutherAI's lm-evaluation-harness, at any TP, PP and DP.

lm-eval has a model ``nemo_lm`` of its own. It loads a ``.nemo`` for each run, knows one node and
greedy decoding, has no BOS, decodes and re-encodes contexts, and (0.4.12) fails in
``loglikelihood_rolling`` on texts longer than the context. Here the weights are those that an
evaluation holds, so that one loading serves every kappa, and tokens stay tokens.

Every rank calls lm-eval with the same requests and gets the same answers. Requests are shared out
over the data-parallel ranks; the ranks of one model-parallel group work on the same ones together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from megatron.core import parallel_state
from nemo.collections.nlp.modules.common.text_generation_strategy import (
    GPTModelTextGenerationStrategy,
)
from nemo_aligner.utils.distributed import broadcast_tensor_within_pp

from nemo_warp.aligner.policy.actor import WarpActorModel
from nemo_warp.progress import progress

DEFAULT_MAX_NEW_TOKENS = 256
"""lm-eval's own default where a task does not say how long an answer may be."""

_Row = TypeVar("_Row")
_Answer = TypeVar("_Answer")


class PolicyLM(TemplateLM):
    """Scores and continues texts with the weights that are in ``model`` at the time.

    Use inside ``model.inference()``. Probabilities are at temperature 1, without the rows that only
    pad the vocabulary.

    Args:
        model: a policy.
        micro_batch_size: sequences in one forward pass.
        add_bos: put BOS before every text (Gemma needs it); by default only an empty context gets
            a first token, BOS where the tokenizer has one and EOS otherwise.
    """

    def __init__(self, model: WarpActorModel, micro_batch_size: int, add_bos: bool = False) -> None:
        super().__init__()
        self.policy = model
        self.micro_batch_size = micro_batch_size
        self.add_bos = add_bos
        self.context = int(model.cfg.encoder_seq_length)
        # lm-eval's own sharing out of requests stays off: rank 0 of 1, on every rank.
        self._rank, self._world_size = 0, 1
        if add_bos and self._bos is None:
            raise ValueError("add_bos is set, but the model's tokenizer has no BOS token")

    @property
    def eot_token_id(self) -> int:
        """End of sequence."""
        return int(self.policy.tokenizer.eos_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        return self.eot_token_id if self._bos is None else self._bos

    @property
    def _bos(self) -> int | None:
        try:
            found = self.policy.tokenizer.bos_id
        except (AttributeError, TypeError):  # NeMo's tokenizers differ in how they say "none"
            return None
        return int(found) if found is not None and found >= 0 else None

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Tokens of a text, after BOS if `add_bos` and it is a whole text."""
        tokens = list(self.policy.tokenizer.text_to_ids(string))
        bos = self.add_bos and add_special_tokens is not False
        return [self.prefix_token_id, *tokens] if bos else tokens

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of whole texts; one longer than the context is scored in windows.

        Each token is predicted once, the first from `prefix_token_id`.
        """
        windows: list[tuple[int, list[int], list[int]]] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            pieces = get_rolling_token_windows(tokens, self.prefix_token_id, self.context, 1)
            windows += [(number, *make_disjoint_window(piece)) for piece in pieces]
        scores = self._score([(given, wanted) for _, given, wanted in windows], disable_tqdm)
        totals = [0.0] * len(requests)
        for (number, _, _), (log_prob, _) in zip(windows, scores, strict=True):
            totals[number] += log_prob
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, cut before the first of the task's end strings.

        Raises:
            ValueError: a task asks for sampling, or its context leaves no room for an answer.
        """
        rows = [self._generation(request) for request in requests]
        # NeMo pads the prompts of a batch to the longest, and what is generated must not depend on
        # a neighbour: one length at a time.
        by_length: dict[tuple[int, int, tuple[str, ...]], list[int]] = {}
        for index, (tokens, limit, until) in enumerate(rows):
            by_length.setdefault((len(tokens), limit, until), []).append(index)
        batches = [
            group[start : start + self.micro_batch_size]
            for group in by_length.values()
            for start in range(0, len(group), self.micro_batch_size)
        ]
        answers: list[str] = [""] * len(rows)
        found = self._share(batches, lambda batch: self._continue([rows[i] for i in batch]),
                            "generate", disable_tqdm)  # fmt: skip
        for batch, texts in zip(batches, found, strict=True):
            for index, text in zip(batch, texts, strict=True):
                answers[index] = text
        return answers

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        return self._score([(given, wanted) for _, given, wanted in requests], disable_tqdm)

    def _score(
        self, rows: Sequence[tuple[list[int], list[int]]], quiet: bool
    ) -> list[tuple[float, bool]]:
        """(log-probability, is it the greedy choice) of each ``wanted`` after its ``given``."""
        # Long ones first: a batch of one length pads little, and memory peaks at the beginning.
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]) - len(rows[i][1]))
        size = self.micro_batch_size
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        found = self._share(batches, lambda batch: self._score_batch([rows[i] for i in batch]),
                            "score", quiet)  # fmt: skip
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(rows)
        for batch, scores in zip(batches, found, strict=True):
            for index, score in zip(batch, scores, strict=True):
                answers[index] = score
        return answers

    def _score_batch(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """As `_score`, of one batch; what does not fit the context is cut off on the left."""
        whole = [(given + wanted)[-self.context - 1 :] for given, wanted in rows]
        width = max(len(tokens) for tokens in whole)
        padded = torch.full((len(rows), width), self.eot_token_id)
        mask = torch.zeros(len(rows), width - 1)
        for i, (tokens, (_, wanted)) in enumerate(zip(whole, rows, strict=True)):
            padded[i, : len(tokens)] = torch.tensor(tokens)
            stop = len(tokens) - 1
            mask[i, max(0, stop - len(wanted)) : stop] = 1
        # Temperature 1, whatever temperature members sample at: benchmarks compare models.
        log_probs, best = self.policy.score(padded.cuda(), mask.cuda(), 1.0, len(rows))
        totals = log_probs.double().sum(-1).tolist()
        greedy = (log_probs >= best).all(-1).tolist()  # both are 0 off the mask
        return list(zip(totals, greedy, strict=True))

    def _generation(self, request: Instance) -> tuple[list[int], int, tuple[str, ...]]:
        """Context tokens, length limit and end strings of a request."""
        text, arguments = request.args
        if arguments.get("do_sample") and arguments.get("temperature", 1.0) > 0:
            raise ValueError(
                f"task {request.task_name} samples its answers; only greedy decoding is supported"
            )
        until = arguments.get("until") or []
        until = (until,) if isinstance(until, str) else tuple(until)
        limit = int(arguments.get("max_gen_toks", DEFAULT_MAX_NEW_TOKENS))
        if limit >= self.context:
            raise ValueError(
                f"task {request.task_name} wants {limit} new tokens of a model whose context is "
                f"{self.context}; lower max_gen_toks"
            )
        return self.tok_encode(text)[-(self.context - limit) :], limit, until

    def _continue(self, rows: Sequence[tuple[list[int], int, tuple[str, ...]]]) -> list[str]:
        """Answers to contexts of one length."""
        length, limit, until = len(rows[0][0]), rows[0][1], rows[0][2]
        contexts = torch.full((len(rows), length + limit), self.eot_token_id)
        contexts[:, :length] = torch.tensor([tokens for tokens, _, _ in rows])
        output = self.policy.generate(
            inputs=(contexts.cuda(), torch.full((len(rows),), length).cuda()),
            length_params={"min_length": 0, "max_length": limit},
            strategy=GPTModelTextGenerationStrategy(self.policy),  # NeMo looks for its own classes
            sampling_params={
                "use_greedy": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0,
                "repetition_penalty": 1.0, "add_BOS": False, "all_probs": False,
                "compute_logprob": False, "end_strings": ["<|endoftext|>", *until],
            },
        )  # fmt: skip
        # Only the last pipeline stage's ranks and the first one's get an answer from NeMo.
        ids = torch.tensor(output["token_ids"]).cuda() if output else None
        ids = broadcast_tensor_within_pp(ids)
        return [self._answer(tokens, row) for tokens, row in zip(ids.tolist(), rows, strict=True)]

    def _answer(self, tokens: list[int], row: tuple[list[int], int, tuple[str, ...]]) -> str:
        """The text after the context, up to EOS and before the first end string."""
        context, limit, until = row
        new = tokens[len(context) : len(context) + limit]
        if self.eot_token_id in new:
            new = new[: new.index(self.eot_token_id)]
        # Decoded with the context: a first token may begin a word or go on with one.
        decode = self.policy.tokenizer.ids_to_text
        text = decode([*context, *new])[len(decode(context)) :]
        ends = [place for end in until if end and (place := text.find(end)) >= 0]
        return text[: min(ends)] if ends else text

    def _share(
        self, batches: Sequence[_Row], work: Callable[[_Row], _Answer], name: str, quiet: bool
    ) -> list[_Answer]:
        """``work`` on every batch, each on one data-parallel rank; all answers on all ranks."""
        group = parallel_state.get_data_parallel_group()
        mine = range(parallel_state.get_data_parallel_rank(), len(batches), group.size())
        silent = quiet or torch.distributed.get_rank() != 0
        answers = {i: work(batches[i]) for i in progress(mine, desc=name, disable=silent)}
        parts: list[Any] = [None] * group.size()
        torch.distributed.all_gather_object(parts, answers, group=group)
        together = {index: answer for part in parts for index, answer in part.items()}
        return [together[index] for index in range(len(batches))]
