"""The runs below a folder, and the newest finished one."""

from __future__ import annotations

import logging
import os
from functools import partial

import pytest
from commands import TRANSFORMER, VQGAN


@pytest.fixture
def call(call):
    return partial(call, "clipgen-train")


def test_newest_finished_tokenizer_is_used_and_logged(call, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    data = ["data.train_size=64", "data.val_size=8"]
    assert call(*VQGAN, *data, "output=outputs/vqgan/first").code == 0
    unfinished = tmp_path / "outputs" / "vqgan" / "second" / "checkpoints" / "last.ckpt"
    unfinished.parent.mkdir(parents=True)
    unfinished.touch()
    os.utime(unfinished, (2e9, 2e9))
    assert call(*TRANSFORMER, *data, "output=run2").code == 0
    assert "Tokenizer: outputs/vqgan/first, the newest finished one" in caplog.text
    assert (
        "Passed over outputs/vqgan/second, which is not finished: clipgen-train resume=outputs/vqgan/second"
        in caplog.text
    )
    (tmp_path / "outputs").rename(tmp_path / "elsewhere")
    resumed = call("resume=run2", "trainer.max_steps=5")  # its own copy
    assert resumed.code == 0, resumed.stderr
