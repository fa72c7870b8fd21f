"""The objective's terms follow the configuration, and impossible settings are refused."""

import json
from pathlib import Path

import pytest
import torch
from conftest import write_manifest

from fusiontree.config import LossConfig, config_differences, load_config, to_yaml
from fusiontree.errors import UserError
from fusiontree.run.datasets import check_data
from fusiontree.training.objective import gate_penalty


def penalty(layer_means: list[float], **settings: object) -> tuple[float, torch.Tensor]:
    mean = torch.tensor(layer_means)[:, None].expand(-1, 4).clone()
    value, slope = gate_penalty(mean, LossConfig(**settings), step=0)
    return value.item(), slope


def test_balance_penalises_only_layers_outside_the_band() -> None:
    settings = {"gate_balance": {0: 2.0}, "gate_target": 0.5, "gate_band": 0.25}
    value, slope = penalty([0.3, 0.74, 0.9, 0.05], **settings)
    assert value == pytest.approx(2.0 * (0.15 + 0.2) / 4)
    torch.testing.assert_close(slope, torch.tensor([0, 0, 2.0, -2.0])[:, None].expand(4, 4) / 16)


def test_positive_entropy_weights_push_gates_apart_and_negative_ones_together() -> None:
    value, slope = penalty([0.25, 0.75], gate_entropy={0: 1.0})
    assert value == pytest.approx(torch.distributions.Bernoulli(torch.tensor(0.25)).entropy().item())
    assert (slope[0] > 0).all()
    assert (slope[1] < 0).all()
    torch.testing.assert_close(penalty([0.25, 0.75], gate_entropy={0: -1.0})[1], -slope)


@pytest.mark.parametrize("settings", [{"gate_balance": {0: 0.7}, "gate_band": 0.1}, {"gate_entropy": {0: 0.4}}])
def test_the_slope_is_the_penaltys_gradient(settings: dict) -> None:
    mean = torch.rand(3, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    value, slope = gate_penalty(mean, LossConfig(**settings), step=0)
    torch.testing.assert_close(slope, torch.autograd.grad(value, mean)[0])


def test_saturated_gates_have_a_finite_slope() -> None:
    assert torch.isfinite(penalty([0.0, 1.0], gate_entropy={0: 1.0})[1]).all()


def test_weights_are_one_value_or_a_table_by_step(tmp_path: Path) -> None:
    config = load_config("tiny", ["losses.gate_balance=0.5", "losses.gate_entropy={0: 0, 50: -0.1}"])
    assert config.losses.gate_balance == {0: 0.5}
    assert config.losses.gate_entropy == {0: 0.0, 50: -0.1}
    assert config.losses.shapes_gates
    assert not load_config("tiny").losses.shapes_gates
    path = tmp_path / "c.yaml"
    path.write_text(to_yaml(config))
    assert load_config(str(path)) == config
    assert load_config(str(path), ["losses.gate_entropy=2", "losses.gate_entropy.9=3"]).losses.gate_entropy == {
        0: 2,
        9: 3,
    }
    assert config_differences(config, load_config("tiny")) == [
        *("losses.gate_balance.0", "losses.gate_entropy.50"),
    ]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["losses.gate_balance=-1"], "losses.gate_balance.0 is -1"),
        (
            ["losses.gate_entropy={5: {a: 1}}"],
            "losses.gate_entropy.5.a is 1; give one value, or losses.gate_entropy.STEP",
        ),
        (["losses.z_loss=much"], "losses.z_loss is 'much'"),
        (["losses.gate_balance=1", "model.fusion=sum"], "model.fusion sum has none; set both to 0"),
        (["distill.temperature=0"], "distill.temperature is 0"),
    ],
)
def test_invalid_losses_are_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config("tiny", overrides)
    assert words in str(caught.value)


@pytest.fixture
def student(tmp_path: Path) -> list[str]:
    """Return settings of a run with an empty teacher folder, on a dataset of tokenizer "abc"."""
    (tmp_path / "data").mkdir()
    write_manifest(tmp_path / "data", 8192, "abc")
    (tmp_path / "teacher").mkdir()
    return [f"data.path={tmp_path / 'data'}", f"distill.teacher={tmp_path / 'teacher'}"]


@pytest.mark.parametrize(
    ("vocab_size", "fingerprint", "words"),
    [
        (8192, "abc", None),
        (8000, "abc", "has model.vocab_size 8000, but this run has 8192"),
        (8192, "xyz", "has another tokenizer (xyz) than the data (abc)"),
        (None, "abc", "is not an exported folder; name one made by `fusiontree export`"),
    ],
)
def test_a_teacher_with_another_vocabulary_is_refused_in_one_line(
    vocab_size: int | None, fingerprint: str, words: str | None, student: list[str], tmp_path: Path
) -> None:
    if vocab_size is not None:
        (tmp_path / "teacher" / "config.json").write_text(json.dumps({"vocab_size": vocab_size}))
    (tmp_path / "teacher" / "fusiontree.json").write_text(json.dumps({"tokenizer_fingerprint": fingerprint}))
    config = load_config("tiny", student)
    if words is None:
        check_data(config)
        return
    with pytest.raises(UserError) as caught:
        check_data(config)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
