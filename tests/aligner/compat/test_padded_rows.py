"""A vocabulary that was padded for another TP."""

import member_lab as lab
import numpy as np
import pytest
import tiny_models
from ranks import run_ranks

pytestmark = pytest.mark.nemo


def saved(path, tokenizer):
    """128 entries at TP 1 are 128 rows."""
    tiny_models.save_tiny_nemo(path, tokenizer, make_vocab_size_divisible_by=128)
    return loaded(path, 1)


def loaded(path, tensor):
    return lab.local_tensors(tiny_models.load_tiny_nemo(path, tensor=tensor))


def test_rows_that_a_checkpoint_does_not_have_are_zero(nemo, tmp_path):
    """At TP 2 they are 256 rows: Llama 3's 128256 are 128512 at TP 4."""
    tokenizer = tiny_models.write_tokenizer(tmp_path)
    path = tmp_path / "model.nemo"
    one = lab.assemble(run_ranks(saved, 1, path, tokenizer))
    two = lab.assemble(run_ranks(loaded, 2, path, 2))
    grown = [key for key in one if one[key].shape != two[key].shape]
    assert len(grown) == 2, "embedding and output layer"
    for key, values in one.items():
        rows = len(values)
        assert np.array_equal(two[key][:rows], values), key
        assert not two[key][rows:].any(), key
    assert two[grown[0]].shape[0] == 256
