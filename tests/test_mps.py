"""Every operation of training and sampling has a kernel for Apple's GPUs (MPS), or a known replacement.

The operations are recorded on a CPU. Which ones have a kernel, torch's own table says (``native_functions.yaml``, which
is part of the package ``torchgen``); nothing here runs on MPS.
"""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torchgen
import yaml
from commands import PROMPT
from models import TRANSFORMER_SIZES, VQGAN_SIZES, make_transformer, make_vqgan
from torch.utils._python_dispatch import TorchDispatchMode

TABLE = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
# Keys whose kernels consist of other operations, or apply to any device.
ANY_DEVICE = ("CompositeImplicitAutograd", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional")
# Operations that torch chooses on a CPU only -> what it chooses on MPS.
REPLACED = {
    "_native_multi_head_attention": "_scaled_dot_product_attention_math_for_mps",  # the fast path of nn's own attention
    "_scaled_dot_product_flash_attention_for_cpu": "_scaled_dot_product_attention_math_for_mps",
    "_scaled_dot_product_flash_attention_for_cpu_backward": "_softmax_backward_data",
}


class RecordOperations(TorchDispatchMode):
    """Record the names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation.namespace == "aten":
            self.names.add(operation._schema.name.removeprefix("aten::") + "." + (operation._overloadname or ""))
        return operation(*args, **(kwargs or {}))


@cache
def table() -> dict[str, dict[str, Any]]:
    """Return the entries of torch's table by the name of the operation and its overload, as in ``add.Tensor``."""
    entries = {}
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for entry in yaml.load(TABLE.read_text("utf-8"), loader):
        name, _, overload = entry["func"].partition("(")[0].partition(".")
        entries[f"{name}.{overload or 'default'}"] = entry
    return entries


def has_kernel(name: str) -> bool:
    """Return True if an operation has a kernel for MPS or for any device, itself or by the one that it delegates to."""
    entry = table().get(name)
    if entry is None:
        return False
    if "structured_delegate" in entry:
        delegate, _, overload = entry["structured_delegate"].partition(".")
        return has_kernel(f"{delegate}.{overload or 'default'}")
    dispatch = entry.get("dispatch")
    if dispatch is None:  # made of other operations, which are recorded themselves
        return True
    keys = {key.strip() for keys in dispatch for key in keys.split(",")}
    return "MPS" in keys or bool(keys & set(ANY_DEVICE))


def missing_kernels(names: set[str]) -> set[str]:
    """Return the operations without a kernel for MPS and without a replacement."""
    missing = {name for name in names if not has_kernel(name)}
    return {name for name in missing if name.partition(".")[0] not in REPLACED}


def test_the_table_knows_what_mps_lacks():
    assert has_kernel("mm.default") and has_kernel("add.Tensor") and has_kernel("view.default")
    assert not has_kernel("linalg_eig.default") and not has_kernel("no_such_operation.default")
    assert all(has_kernel(f"{name}.default") for name in REPLACED.values())


@pytest.mark.parametrize("stage", ["vqgan", "transformer"])
def test_training_uses_operations_that_mps_has(fit, stage, tiny_vqgan, shapes_clip):
    if stage == "vqgan":
        options = dict(gan_weight=0.8, gan_start_step=1, lecam_weight=0.1, ema_decay=0.9, kmeans_iters=2, grad_clip=1.0)
        model: Any = make_vqgan(**VQGAN_SIZES | options | dict(codebook_ema_decay=0.9))
    else:
        options = dict(ema_decay=0.9, cond_noise_cosine=0.9, clip_loss_weight=0.2, dropout=0.1, optimizer_name="muon")
        model = make_transformer(**TRANSFORMER_SIZES | options).attach_encoders(tiny_vqgan, shapes_clip)
    with RecordOperations() as recorded:
        fit(model, 3)
    assert len(recorded.names) > 50
    assert missing_kernels(recorded.names) == set()


@pytest.mark.parametrize("settings", [{}, dict(guidance_scale=2.0, top_p=0.9), dict(temperature=0.0)])
def test_sampling_uses_operations_that_mps_has(pipe, settings):
    pipe = copy.deepcopy(pipe)
    with RecordOperations() as recorded, torch.no_grad():
        pipe.generate(pipe.embed(PROMPT).expand(2, -1), 0, **settings)
    assert len(recorded.names) > 20
    assert missing_kernels(recorded.names) == set()
