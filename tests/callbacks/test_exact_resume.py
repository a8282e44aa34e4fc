import random

import numpy as np
import torch

from pem_lightning.training.resume import _moved, seed_step


def draw():
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_a_step_draws_by_seed_step_and_process_alone():
    seed_step(3, 7, 0)
    first = draw()
    draw()
    seed_step(3, 7, 0)
    assert draw() == first
    for other in ((4, 7, 0), (3, 8, 0), (3, 7, 1)):
        seed_step(*other)
        assert not set(draw()) & set(first)


def test_the_best_checkpoint_is_known_where_its_folder_was_moved_to(tmp_path):
    state = {
        "dirpath": "/before",
        "best_model_path": "/before/best.ckpt",
        "kth_best_model_path": "/before/best.ckpt",
        "last_model_path": "",
        "best_k_models": {"/before/best.ckpt": 7.0},
        "best_model_score": 7.0,
    }
    assert _moved(state, str(tmp_path)) == state  # another folder, without the file
    (tmp_path / "best.ckpt").write_text("")
    best = f"{tmp_path}/best.ckpt"
    assert _moved(state, str(tmp_path)) == {
        "dirpath": str(tmp_path),
        "best_model_path": best,
        "kth_best_model_path": best,
        "last_model_path": "",
        "best_k_models": {best: 7.0},
        "best_model_score": 7.0,
    }
