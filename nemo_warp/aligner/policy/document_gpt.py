"""A `MegatronGPTModel` whose training data are short documents, one per sequence.

Import after `nemo_warp.aligner.compat.activate`.
"""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer
from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
from omegaconf import DictConfig, open_dict

STOCK_CLASS = f"{MegatronGPTModel.__module__}.{MegatronGPTModel.__name__}"


class DocumentDataset(torch.utils.data.Dataset):
    """Documents as sequences: tokens from the first one on, then EOS, cut or padded to one length.

    Args:
        documents: token ids of each document, without EOS.
        seq_length: inputs per sequence; later tokens of a longer document are not used.
        eos_id: ends each document that fits, and pads (padding has no loss).
        num_samples: length of the data set; beyond the last document it starts over.
        seed: each pass over the documents has its own order drawn from it; None keeps the order.
    """

    def __init__(
        self,
        documents: list[list[int]],
        seq_length: int,
        eos_id: int,
        num_samples: int,
        seed: int | None,
    ):
        rows = [[*ids, eos_id][: seq_length + 1] for ids in documents]
        lengths = torch.tensor([len(row) for row in rows])
        padded = [row + [eos_id] * (seq_length + 1 - len(row)) for row in rows]
        self._rows = torch.tensor(padded, dtype=torch.long)
        # The prediction of position t is token t + 1: the last one counted is EOS, padding is not.
        self._loss_mask = (torch.arange(1, seq_length + 1) < lengths[:, None]).float()
        self._positions = torch.arange(seq_length)
        self._order = _order(len(rows), num_samples, seed)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """``tokens``, ``labels``, ``position_ids`` int64 and ``loss_mask`` fp32, [seq_length]."""
        document = int(self._order[index])
        row = self._rows[document]
        return {
            "tokens": row[:-1],
            "labels": row[1:],
            "loss_mask": self._loss_mask[document],
            "position_ids": self._positions,
        }


def _order(num_documents: int, num_samples: int, seed: int | None) -> torch.Tensor:
    """Document index of each sample, int64 [num_samples]: whole passes, then the rest of one."""
    generator = torch.Generator()
    passes = []
    for number in range(-(-num_samples // num_documents)):
        if seed is None:
            passes.append(torch.arange(num_documents))
        else:
            generator.manual_seed(seed + number)
            passes.append(torch.randperm(num_documents, generator=generator))
    return torch.cat(passes)[:num_samples]


class DocumentGPTModel(MegatronGPTModel):
    """`MegatronGPTModel` that trains on given documents instead of NeMo's indexed data sets.

    Saved as the stock class it is apart from its data, so that stock NeMo restores it.
    """

    def __init__(self, cfg: DictConfig, trainer: Trainer, documents: dict[str, list[str]]):
        with open_dict(cfg):
            cfg.target = STOCK_CLASS
        self._documents = documents  # text, under the keys train and validation
        super().__init__(cfg, trainer)

    def build_train_valid_test_datasets(self) -> tuple:
        """NeMo's hook, called by `setup` on every rank."""
        batch = self.cfg.global_batch_size
        self._train_ds = self._dataset("train", self.trainer.max_steps * batch, self.cfg.seed)
        # Whole batches, or the last one would leave some data-parallel ranks without samples.
        whole = max(len(self._documents["validation"]) // batch, 1) * batch
        self._validation_ds = self._dataset("validation", whole, None)
        self._test_ds = None
        return self._train_ds, self._validation_ds, self._test_ds

    def _dataset(self, name: str, num_samples: int, seed: int | None) -> DocumentDataset:
        ids = [self.tokenizer.text_to_ids(text) for text in self._documents[name]]
        length = self.cfg.encoder_seq_length
        return DocumentDataset(ids, length, self.tokenizer.eos_id, num_samples, seed)
