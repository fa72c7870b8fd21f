"""The Hugging Face interface: results equal the reference, or the call is refused in one line."""

import copy
import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, build
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from fusiontree.inference.loading import exported_name, trained_name
from fusiontree.model.hf import FusionTreeConfig, FusionTreeForCausalLM, FusionTreeForSequenceClassification
from fusiontree.model.layers import Linear
from fusiontree.model.lm import HybridLM

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
KINDS: list[dict[str, Any]] = [
    *({}, {"srte": "learned"}, {"window_schedule": "pyramid"}, {"global_heads": 4}),
    *({"layer_kinds": ("attention", "mamba", "hybrid")}, {"layer_global_heads": (2, 0, 0)}),
]


def wrapped(seed: int = 0, **changes: Any) -> FusionTreeForCausalLM:
    """Return `conftest.build`'s model with transformers' interface."""
    trained = build(seed, **changes)
    config = FusionTreeConfig(**trained.config.to_dict(), eos_token_id=0, bos_token_id=0, pad_token_id=1)
    model = FusionTreeForCausalLM(config).eval()
    model.load_state_dict({exported_name(name): value for name, value in trained.state_dict().items()}, strict=False)
    return model


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    """Return random tokens that are neither the end nor padding."""
    return torch.randint(2, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


# --- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shares=st.lists(st.sampled_from([0.0, 0.2, 0.6, 1.0]), min_size=1, max_size=4),
    cuts=st.sets(st.integers(1, 49), max_size=5),
    kind=st.sampled_from(KINDS),
)
@torch.no_grad()
def test_masked_tokens_are_skipped_in_every_piece(seed: int, shares: list[float], cuts: set[int], kind: dict) -> None:
    torch.set_num_threads(1)
    model, B = wrapped(seed % 5, **kind), len(shares)
    ids = tokens(B, 50, seed)
    mask = torch.rand(B, 50, generator=torch.Generator().manual_seed(seed)) >= torch.tensor(shares)[:, None]
    cache, pieces = None, []
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), 50], strict=True):
        output = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        cache = output.to_tuple()[1]
        pieces.append(output.logits)
    logits = torch.cat(pieces, 1)
    assert cache.get_seq_length() == 50
    assert logits.isfinite().all()
    for row in range(B):
        if not mask[row].any():
            continue
        alone = model(ids[row, mask[row]][None]).logits[0]
        last_real = mask[row].cumsum(0) - 1  # a masked token's output is that of the last real token
        known = last_real >= 0
        torch.testing.assert_close(logits[row, known], alone[last_real[known]], **CLOSE)


@pytest.mark.slow
@torch.no_grad()
def test_prompts_padded_on_either_side_are_continued_as_alone() -> None:
    model, prompts = wrapped(), [tokens(1, n, n)[0] for n in (3, 40, 17)]
    alone = [model.generate(p[None], max_new_tokens=10, do_sample=False)[0, -10:] for p in prompts]
    for side in ("left", "right"):
        ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=1, padding_side=side)
        for options in ({}, {"use_cache": False}, {"num_beams": 2}):
            expected = alone
            if "num_beams" in options:
                expected = [
                    model.generate(p[None], max_new_tokens=10, do_sample=False, **options)[0, -10:] for p in prompts
                ]
            batch = model.generate(ids, attention_mask=(ids != 1).long(), max_new_tokens=10, do_sample=False, **options)
            assert torch.equal(batch[:, -10:], torch.stack(expected)), (side, options)


@torch.no_grad()
def test_a_mask_that_the_cache_cannot_follow_is_refused() -> None:
    model, ids = wrapped(), tokens(2, 20)
    mask = torch.ones_like(ids)
    cache = model(ids[:, :12], attention_mask=mask[:, :12], use_cache=True).to_tuple()[1]
    later = mask.clone()
    later[1, 3] = 0  # a cached token
    for wrong, message in {
        mask[:, 12:]: r"attention_mask has shape \[2, 8\]; for 12 cached and 8 new tokens it must be \[2, 20\]",
        mask[:, None]: r"it must be \[2, 20\]",
        later: "attention_mask masks other cached tokens than the calls that cached them",
    }.items():
        with pytest.raises(ValueError, match=message):
            model(ids[:, 12:], attention_mask=wrong, past_key_values=cache)
    with pytest.raises(ValueError, match="the input has 6 rows, the cache 2; repeat the cache's rows"):
        model(ids[:, 12:].repeat(3, 1), past_key_values=cache)
    torch.testing.assert_close(model(ids[:, 12:], past_key_values=cache).logits, model(ids).logits[:, 12:], **CLOSE)


# --- documents -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_real_token_at_position_0_starts_a_document_with_and_without_cache() -> None:
    model, ids = wrapped(), tokens(1, 40)
    positions = torch.cat([torch.arange(9), torch.arange(6), torch.arange(25)])[None]
    parts = [model(part).logits for part in ids.split([9, 6, 25], 1)]
    mask = torch.ones_like(ids)
    mask[0, 20:23] = 0
    torch.testing.assert_close(model(ids, position_ids=positions).logits, torch.cat(parts, 1), **CLOSE)
    masked = model(ids, position_ids=positions, attention_mask=mask).logits
    alone = model(torch.cat([ids[:, 15:20], ids[:, 23:]], 1)).logits
    torch.testing.assert_close(masked[:, [*range(15, 20), *range(23, 40)]], alone, **CLOSE)
    cache, pieces = None, []
    for start, end in ((0, 9), (9, 12), (12, 30), (30, 31), (31, 40)):
        output = model(ids[:, start:end], position_ids=positions[:, start:end], past_key_values=cache, use_cache=True)
        cache = output.to_tuple()[1]
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), torch.cat(parts, 1), **CLOSE)


def test_positions_that_do_not_count_tokens_are_refused() -> None:
    model, ids = wrapped(), tokens(1, 6)
    for positions in ([0, 1, 2, 5, 6, 7], [3, 4, 5, 3, 4, 5], [1, 1, 1, 1, 1, 1]):
        with pytest.raises(ValueError, match="position_ids must increase by one within a document"):
            model(ids, position_ids=torch.tensor([positions]))
    with pytest.raises(ValueError, match=r"position_ids has shape \[6\]; it must be \[1, 6\]"):
        model(ids, position_ids=torch.arange(6))


def test_the_loss_predicts_real_tokens_of_the_same_document_only() -> None:
    model, ids = wrapped(), tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[1, 5] = mask[1, 10:] = 0
    positions = torch.arange(12).repeat(2, 1)
    positions[1, 7:] = torch.arange(5)
    output = model(ids, attention_mask=mask, position_ids=positions, labels=ids)
    log_p = output.logits.log_softmax(-1)
    predicted = [(0, t) for t in range(4, 12)] + [(1, t) for t in (1, 2, 3, 4, 6, 8, 9)]
    losses = torch.stack([-log_p[row, t - 1, ids[row, t]] for row, t in predicted])
    torch.testing.assert_close(output.loss, losses.mean())
    summed = model(ids, attention_mask=mask, position_ids=positions, labels=ids, num_items_in_batch=3).loss
    torch.testing.assert_close(summed, losses.sum() / 3)
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    assert torch.equal(model(ids, shift_labels=shifted).loss, model(ids, labels=ids).loss)


# --- arguments and outputs -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_embeddings_replace_tokens() -> None:
    model, ids = wrapped(), tokens(2, 20)
    embeds = model.get_input_embeddings()(ids)
    mask = torch.ones_like(ids)
    mask[0, 4:9] = mask[1, 15:] = 0
    for options in ({}, {"attention_mask": mask}):
        assert torch.equal(model(inputs_embeds=embeds, **options).logits, model(ids, **options).logits)
    greedy = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(inputs_embeds=embeds, **greedy), model.generate(ids, **greedy)[:, 20:])
    for both in ({}, {"input_ids": ids, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="give either input_ids or inputs_embeds"):
            model(**both)


@torch.no_grad()
def test_hidden_states_are_the_inputs_of_the_blocks_and_of_the_head() -> None:
    model, ids = wrapped(), tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :5] = mask[1, 8:11] = 0
    seen: list[Tensor] = []
    hooks = [b.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) for b in model.model.blocks]
    model(ids)
    for hook in hooks:
        hook.remove()
    states = model(ids, output_hidden_states=True).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(states, seen, strict=False))
    assert len(states) == len(seen) + 1
    assert torch.equal(model.lm_head(states[-1]), model(ids).logits)
    assert torch.equal(model.base_model(ids).last_hidden_state, states[-1])
    alone = model(ids[1, mask[1] == 1][None], output_hidden_states=True).hidden_states
    whole = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    cache = model(ids[:, :9], attention_mask=mask[:, :9], use_cache=True).to_tuple()[1]
    rest = model(ids[:, 9:], attention_mask=mask, past_key_values=cache, output_hidden_states=True).hidden_states
    for one, some, later in zip(alone, whole, rest, strict=True):
        torch.testing.assert_close(some[1, mask[1] == 1], one[0], **CLOSE)
        torch.testing.assert_close(later[1, 2:], one[0, 8:], **CLOSE)


def test_an_argument_without_effect_is_refused_and_a_redundant_one_ignored() -> None:
    from transformers import DynamicCache

    model, ids = wrapped(), tokens(1, 8)
    expected, packing = model(ids).logits, {"cu_seq_lens_q": torch.tensor([0, 8]), "max_length_q": 8}
    redundant = {"token_type_ids": torch.zeros_like(ids), "output_attentions": False, "is_causal": True, "tokenizer": 0}
    assert torch.equal(model(ids, **redundant, position_ids=torch.arange(8)[None], **packing).logits, expected)
    for name, value in {"output_attentions": True, "is_causal": False, "num_logits_to_keep": 1, **packing}.items():
        with pytest.raises(TypeError, match=f"this model does not support the argument {name}"):
            model(ids, **{name: value})
    model.config.output_attentions = True
    with pytest.raises(TypeError, match="does not support the argument output_attentions"):
        model(ids)
    for call, options in ((wrapped().generate, {"max_new_tokens": 2}), (wrapped(), {"labels": ids})):
        with pytest.raises(TypeError, match="does not support a DynamicCache; pass none"):
            call(ids, past_key_values=DynamicCache(), **options)


def test_a_cache_is_returned_by_default_except_in_training_and_with_recomputation() -> None:
    model, ids = wrapped(), tokens(1, 8)
    for equal in (model, copy.deepcopy(model)):
        assert equal(ids).to_tuple()[1].get_seq_length() == 8
    assert len(model(ids, use_cache=False).to_tuple()) == len(model.train()(ids).to_tuple()) == 1
    model.eval().gradient_checkpointing_enable()
    assert len(model(ids).to_tuple()) == 1
    model.gradient_checkpointing_disable()
    model.config.use_cache = False
    assert len(model(ids).to_tuple()) == 1


def test_a_kernel_of_the_gpu_is_chosen_by_the_environment_at_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSIONTREE_SCAN", "mamba_ssm")
    model = wrapped()
    with pytest.raises(ValueError, match="kernels.scan 'mamba_ssm' cannot run here: needs a CUDA device"):
        model(tokens(1, 8))


# --- generation ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_cache_is_continued_over_turns_by_copies_and_by_rows() -> None:
    model, ids = wrapped(), tokens(2, 12)
    greedy = {"max_new_tokens": 6, "do_sample": False}
    mask = torch.ones(2, 40, dtype=torch.int64)
    mask[0, :5] = 0
    cache = model.new_cache(2)
    text = ids
    for turn in range(3):
        given = {"attention_mask": mask[:, : text.shape[1]], **greedy}
        answer = model.generate(text, past_key_values=cache, **given)
        assert torch.equal(answer, model.generate(text, **given)), turn
        text = torch.cat([answer, tokens(2, 3, turn)], 1)
    start = model(ids, use_cache=True).to_tuple()[1]
    for seed in range(2):  # two continuations of one prompt
        text = torch.cat([ids, tokens(2, 4, seed)], 1)
        answer = model.generate(text, past_key_values=copy.deepcopy(start), **greedy)
        assert torch.equal(answer, model.generate(text, **greedy))
    start.batch_repeat_interleave(2)
    start.batch_select_indices(torch.tensor([3, 0, 1]))
    text = torch.cat([ids[[1, 0, 0]], tokens(3, 4)], 1)
    assert torch.equal(model.generate(text, past_key_values=start, **greedy), model.generate(text, **greedy))


def test_decoding_that_takes_tokens_back_is_refused() -> None:
    model, ids = wrapped(), tokens(1, 12)
    for options in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": wrapped(1)}, {"assistant_early_exit": 1}):
        with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
            model.generate(ids, max_new_tokens=4, **options)
    with pytest.raises(NotImplementedError, match="the cache does not support crop"):
        model(ids, use_cache=True).to_tuple()[1].crop(4)


def test_guidance_and_sampled_sequences_equal_those_without_cache() -> None:
    model, ids = wrapped(), tokens(2, 12)
    for options in ({"guidance_scale": 1.5}, {"do_sample": True, "num_return_sequences": 3}, {"num_beams": 3}):
        runs = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            runs.append(model.generate(ids, max_new_tokens=6, use_cache=use_cache, **options))
        assert torch.equal(*runs), options


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    wrapped().save_pretrained(folder)
    return folder


def test_weights_that_the_files_lack_are_initialized_as_in_training(saved: Path) -> None:
    junk = [torch.full((2**16,), float("nan")) for _ in range(40)]
    del junk
    model = FusionTreeForCausalLM.from_pretrained(saved, num_layers=5, tie_word_embeddings=False)
    lm = HybridLM(dataclasses.replace(SMALL, num_layers=5, tie_embeddings=False))
    kept = wrapped().state_dict()
    for name, value in model.state_dict().items():
        fresh = lm.state_dict()[trained_name(name)]
        if name in kept and name != "lm_head.weight":
            assert torch.equal(value, kept[name]), name
        elif fresh.std() == 0:
            assert torch.equal(value, fresh), name
        else:
            assert 0.5 < value.std() / fresh.std() < 2, name
            assert value.isfinite().all(), name
    assert model.lm_head.weight is not model.model.embedding.weight


def test_one_missing_weight_of_a_module_leaves_its_others_as_loaded(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "model")
    weights = load_file(saved / "model.safetensors")
    del weights["model.blocks.1.mamba.dt_bias"]
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    found = FusionTreeForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    assert all(torch.equal(found[name], value) for name, value in weights.items())
    dt = torch.nn.functional.softplus(found["model.blocks.1.mamba.dt_bias"])
    assert ((dt > 0.0009) & (dt < 0.11)).all()


def test_a_new_model_and_new_heads_are_initialized_as_in_training(saved: Path) -> None:
    config = FusionTreeConfig(**SMALL.to_dict(), pad_token_id=1)
    torch.manual_seed(0)
    model = FusionTreeForCausalLM(config)
    reference = HybridLM(SMALL).state_dict()
    for name, value in model.state_dict().items():
        if name != "lm_head.weight" and reference[trained_name(name)].std() > 0:
            assert 0.5 < value.std() / reference[trained_name(name)].std() < 2, name
    assert model.lm_head.weight is model.model.embedding.weight
    classifier = FusionTreeForSequenceClassification.from_pretrained(saved, num_labels=3).eval()
    assert 0.01 < classifier.score.weight.std() < 0.03
    model, ids = wrapped(), tokens(2, 14)
    assert torch.equal(classifier.model(ids).last_hidden_state, model.model(ids).last_hidden_state)
    ids[0, 9:] = 1  # padding
    scores = classifier(ids, labels=torch.tensor([0, 2]))
    alone = torch.cat([classifier(ids[:1, :9]).logits, classifier(ids[1:]).logits])
    torch.testing.assert_close(scores.logits, alone, **CLOSE)
    torch.testing.assert_close(scores.loss, torch.nn.functional.cross_entropy(alone, torch.tensor([0, 2])))


def test_resized_embeddings_stay_tied_and_survive_saving(tmp_path: Path) -> None:
    model, ids = wrapped(), tokens(1, 10)
    expected = model(ids).logits
    model.resize_token_embeddings(112)
    assert model.lm_head.weight is model.model.embedding.weight
    torch.testing.assert_close(model(ids).logits[..., :96], expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(ids).logits[..., :96], expected, rtol=0, atol=0.1)
    model.save_pretrained(tmp_path)
    again = FusionTreeForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.vocab_size == 112
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_trainer_finds_the_labels_and_the_cache_among_the_outputs() -> None:
    from transformers.utils.generic import find_labels

    for kind in (FusionTreeForCausalLM, FusionTreeForSequenceClassification):
        assert find_labels(kind) == ["labels"]
    outputs = wrapped()(tokens(1, 8), labels=tokens(1, 8))
    assert {*outputs} - {*FusionTreeConfig.keys_to_ignore_at_inference} == {"loss", "logits"}


# --- training --------------------------------------------------------------------------------------------------------


def test_linear_layers_are_those_that_quantizers_and_adapters_replace() -> None:
    model = wrapped()
    linear = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    parts = ("mamba.in_proj", "mamba.out_proj", "attention.qkv_proj", "attention.out_proj", "mlp.gate_up", "mlp.down")
    assert linear == {"lm_head", *(f"model.blocks.{i}.{part}" for i in range(3) for part in parts)}
    assert not [name for name, module in model.named_modules() if isinstance(module, Linear)]


def test_mixed_precision_equals_that_of_training() -> None:
    model, ids = wrapped(), tokens(2, 40)
    reference = build(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(ids, labels=ids)
    torch.testing.assert_close(output.logits, reference(ids).logits, rtol=0, atol=0.02)
    output.loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    (reference(ids, labels=labels).loss_sum / 78).backward()
    for name, parameter in reference.named_parameters():
        found = model.get_parameter(exported_name(name)).grad
        assert (found - parameter.grad).norm() <= 0.05 * parameter.grad.norm() + 1e-4, name


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_repeats_the_random_draws_of_adapters(reentrant: bool) -> None:
    def gradients(recomputed: bool) -> list[Tensor]:
        model = wrapped().train()
        for block in model.model.blocks:  # as LoRA's dropout
            block.mlp.down.register_forward_pre_hook(lambda _, x: torch.nn.functional.dropout(x[0], 0.5))
        if recomputed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(0)
        model(tokens(2, 20), labels=tokens(2, 20)).loss.backward()
        return [p.grad for p in model.parameters()]

    for kept, again in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(kept, again)
