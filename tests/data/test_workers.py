"""The default number of worker processes follows the processors, and changes nothing but the time."""

import os

import pytest
import torch

from shunted_lit.data import ShapesDataModule
from shunted_lit.data.base import choose_num_workers


@pytest.mark.parametrize(
    ("processors", "samples", "devices", "workers"),
    [(2, 64, 1, 2), (2, 63, 1, 0), (16, 1000, 1, 8), (16, 1000, 4, 4), (1, 1000, 1, 1), (4, 1000, 8, 0)],
)
def test_default_number_of_workers(processors, samples, devices, workers, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(processors)), raising=False)
    assert choose_num_workers(samples, devices) == workers


def load(**options):
    data = ShapesDataModule(size=16, train_size=64, val_size=2, batch_size=32, **options)
    data.setup("fit")
    return data.train_dataloader(), data.val_dataloader()


def test_default_follows_the_data_and_a_given_number_is_kept(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2}, raising=False)
    assert [loader.num_workers for loader in load()] == [3, 0]
    assert [loader.num_workers for loader in load(num_workers=1)] == [1, 1]


def test_batches_do_not_depend_on_the_number_of_workers(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    torch.manual_seed(0)  # without a Trainer, the seed of the run is PyTorch's
    train, _ = load()
    expected, _ = load(num_workers=0)
    assert train.num_workers == 2
    for batch, other in zip(train, expected, strict=True):
        torch.testing.assert_close(batch, other, rtol=0, atol=0)
