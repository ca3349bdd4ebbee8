import subprocess
import sys

from nemo_warp.core.seeds import derive_seed, epoch_order, order_hash, prompt_indices


def test_every_prompt_once_per_epoch_whatever_the_batch():
    """Trap 7: upstream counts responses where its sampler counts prompts."""
    whole = prompt_indices(seed=3, start=0, count=30, num_prompts=10)
    for epoch in range(3):
        assert sorted(whole[10 * epoch :][:10]) == list(range(10))
    assert whole[:10] != whole[10:20]
    for start in range(0, 28, 4):
        assert prompt_indices(3, start, 4, 10) == whole[start : start + 4]


def test_one_permutation_per_epoch():
    """Not one per step: 100 steps of 4 prompts of an epoch of 200, and over its end."""
    epoch_order.cache_clear()
    for step in range(100):
        prompt_indices(5, 4 * step, 4, 200)
    assert epoch_order.cache_info().misses == 2


def test_order_depends_on_the_seed():
    orders = {tuple(prompt_indices(seed, 0, 20, 20)) for seed in range(10)}
    assert len(orders) == 10
    assert order_hash(["a", "b", "c", "d"] * 8, 1) != order_hash(["a", "b", "c", "d"] * 8, 2)


def test_seeds_are_the_same_in_every_process():
    code = "from nemo_warp.core.seeds import *; print(derive_seed(1, 'rollout', 7, 0))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(other.stdout) == derive_seed(1, "rollout", 7, 0)
    parts = [(1, "rollout", 7, 0), (1, "rollout", 7, 1), (1, "rollout", 8, 0), (2, "rollout", 7, 0)]
    assert len({derive_seed(*p) for p in parts}) == 4
    assert all(0 <= derive_seed(*p) < 2**63 for p in parts)
