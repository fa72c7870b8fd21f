"""An exported model spread over devices or offloaded to disk gives the same results as on one device."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from conftest import SMALL, build, python, write_run
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorDeviceMismatchError, FakeTensorMode
from torch.utils import backend_registration
from transformers import AutoModelForCausalLM

from fusiontree.export.exporter import export
from fusiontree.model.cache import Cache
from fusiontree.model.documents import Documents
from fusiontree.model.lm import HybridLM

# --- CPU and disk, by accelerate -------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def exported(request: Any, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run, changes = tmp_path_factory.mktemp("runs") / "run", {"vocab_size": 512, "tie_embeddings": request.param}
    write_run(run, dataclasses.replace(SMALL, **changes), build(**changes).state_dict(), tokenizer_folder, 0, 1)
    export(run, run / "out")
    return run / "out"


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


ON_DISK = [
    {"model.blocks.1"},
    {"model.embedding", "lm_head", "model.norm"},
    {"model.blocks.0", "model.blocks.2", "model.norm"},
]


@pytest.mark.parametrize("on_disk", ON_DISK)
def test_layers_on_disk_change_no_token(exported: Path, on_disk: set[str], tmp_path: Path) -> None:
    reference = load(exported)
    parts = ["model.embedding", "model.norm", *(f"model.blocks.{i}" for i in range(3)), "lm_head"]
    device_map = {part: "disk" if part in on_disk else "cpu" for part in parts}
    model = load(exported, device_map=device_map, offload_folder=tmp_path)
    on_disk_names = {name for name, value in model.named_parameters() if value.is_meta}
    assert on_disk_names == {
        name for name, _ in reference.named_parameters() if any(name.startswith(f"{part}.") for part in on_disk)
    }
    ids = torch.arange(2, 62).view(2, 30)
    mask = torch.ones_like(ids)
    mask[1, :12] = 0
    for options in ({}, {"num_beams": 2}):
        outputs = [m.generate(ids, attention_mask=mask, max_new_tokens=8, **options) for m in (reference, model)]
        assert torch.equal(*outputs)
    assert model(ids, labels=ids).loss == reference(ids, labels=ids).loss


def test_device_maps_of_accelerate(exported: Path) -> None:
    ids = torch.arange(2, 42)[None]
    for device_map in ("auto", {"": "cpu"}):
        assert torch.equal(load(exported, device_map=device_map)(ids).logits, load(exported)(ids).logits)


# --- several devices, simulated by fake tensors ----------------------------------------------------------------------


def placed(changes: dict) -> HybridLM:
    """Return a model with embedding and first layer on one device and the rest on another, by accelerate's hooks."""
    with torch.device("meta"):
        model = HybridLM(dataclasses.replace(SMALL, **changes)).eval()
    first = [model.embedding, model.blocks[0]]
    for module in (model.embedding, model.norm, model.head, *model.blocks):
        if module is not None:
            move(module, torch.device("pretend", int(not any(module is one for one in first))))
    return model


def move(module: nn.Module, device: torch.device) -> None:
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                empty = torch.empty(value.shape, dtype=value.dtype, device=device)
                part._parameters[name] = nn.Parameter(empty, requires_grad=False)
    add_hook_to_module(module, AlignDevicesHook(execution_device=device))


def tokens(count: int) -> tuple[Tensor, Documents]:
    """Return two rows of one document each."""
    device = torch.device("pretend", 0)
    ids, numbers = (torch.zeros(2, count, dtype=kind, device=device) for kind in (torch.int64, torch.int32))
    return ids, Documents(ids, numbers, torch.zeros(3, dtype=torch.int32, device=device), count)


def run_on_two_devices() -> None:
    """Run a forward pass, two prefill chunks and two decoding steps over two devices; mixing devices raises."""
    backend_registration._setup_privateuseone_for_python_backend("pretend")
    Documents.bounds = [0, 40, 80]  # the host reads them, and fake tensors have no values
    with FakeTensorMode(), torch.no_grad():
        for changes in ({}, {"tie_embeddings": False, "srte": "learned", "srte_shared": False}):
            model = placed(changes)
            model(*tokens(40))
            cache = model.new_cache(2)
            for count in (40, 40, 1, 1):
                model(*tokens(count), cache=cache)
            assert cache.length == 82
            assert [layer.state.device.index for layer in cache.layers] == [0, 1, 1]
            cache.select(torch.zeros(3, dtype=torch.int64, device=cache.position.device))
            assert {len(layer.state) for layer in cache.layers} == {3}
        Cache.to = lambda self, device: self
        with pytest.raises(FakeTensorDeviceMismatchError):  # proof that mixed devices raise
            model(*tokens(1), cache=model.new_cache(2))


def test_layers_on_several_devices_never_mix_tensors() -> None:
    # in its own process: torch cannot unregister a device
    python("-c", "import test_placement; test_placement.run_on_two_devices()", cwd=Path(__file__).parent)
