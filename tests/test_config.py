"""Configuration: loading, merging, validation, and error messages of one line."""

import json
import subprocess
import sys

import pytest
from conftest import write_manifest

from fusiontree.config import KEYS, RunConfig, config_differences, deepspeed_json, load_config, preset_names, to_yaml
from fusiontree.errors import UserError
from fusiontree.run.datasets import check_data


def error_of(source, *overrides) -> str:
    with pytest.raises(UserError) as caught:
        load_config(str(source), overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "config.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_a_file_extends_a_preset_and_overrides_win(write):
    path = write("base: tiny\nname: mine\nmodel: {num_layers: 2}\noptimizer:\n  lr: 1e-4\n")
    config = load_config(str(path), ["model.mlp_size=128", "data.path=some/where", "model.mlp_size=256"])
    assert (config.name, config.model.num_layers, config.model.hidden_size) == ("mine", 2, 256)
    assert config.model.mlp_size == 256
    assert config.optimizer.lr == 0.0001
    assert str(config.data.path) == "some/where"
    assert str(config.run_dir) == "runs/mine"


def test_a_base_path_is_relative_to_the_file(write, tmp_path):
    (tmp_path / "deep").mkdir()
    write("base: tiny\nseed: 5\nname: parent\n", "deep/parent.yaml")
    child = write("base: deep/parent.yaml\nname: child\n")
    assert (load_config(str(child)).seed, load_config(str(child)).name) == (5, "child")


def test_a_circular_base_is_rejected(write):
    write("base: a.yaml\n", "b.yaml")
    assert "`base` is circular" in error_of(write("base: b.yaml\n", "a.yaml"))


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("1E3", 1000.0), ("2.5e+1", 25.0), (".5", 0.5), ("3", 3.0), ("5.", 5.0)]
)
def test_numbers_follow_yaml_1_2(text, value):
    assert load_config("tiny", [f"optimizer.lr={text}"]).optimizer.lr == value


def test_yaml_1_1_booleans_and_dates_stay_strings():
    assert load_config("tiny", ["name=no"]).name == "no"
    assert load_config("tiny", ["name=2026-01-02"]).name == "2026-01-02"
    assert load_config("tiny", ["logging.wandb=true"]).logging.wandb is True


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("modle.hiden_size=3", "model.hidden_size"),
        ("lr=3", "optimizer.lr"),
        ("hidden_size=3", "model.hidden_size"),
        ("seeed=3", "seed"),
        ("seed.a=3", "seed"),
        ("optimizer.learning_rate.x=3", None),
    ],
)
def test_an_unknown_key_is_rejected_with_a_suggestion(override, suggestion):
    key = override.partition("=")[0]
    message = error_of("tiny", override)
    assert message.startswith(f"override '{override}': unknown key '{key}'; ")
    if suggestion:
        assert message.endswith(f"did you mean '{suggestion}'?")


def test_an_unknown_key_in_a_file_names_the_file(write):
    path = write("base: tiny\nmodle:\n  hiden_size: 3\n")
    assert error_of(path) == f"{path}: unknown key 'modle.hiden_size'; did you mean 'model.hidden_size'?"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch.tokens=many", "override 'batch.tokens=many': batch.tokens is 'many'; it must be a valid integer"),
        ("seed=1.5", "override 'seed=1.5': seed is 1.5; it must be a valid integer"),
        ("name=12", "override 'name=12': name is 12; it must be a valid string"),
        ("optimizer.lr=.inf", "override 'optimizer.lr=.inf': optimizer.lr is inf; it must be finite"),
        ("optimizer.lr=0", "override 'optimizer.lr=0': optimizer.lr is 0; it must be greater than 0"),
        ("precision=fp16", "override 'precision=fp16': precision is 'fp16'; it must be 'bf16', 'fp32' or 'fp8'"),
        ("data.path=[1]", "override 'data.path=[1]': data.path is [1]; it must be a single value"),
        ("seed={}", "override 'seed={}': seed is {}; it must be a single value"),
        ("name=../x", "override 'name=../x': name is '../x'; use letters, digits, '_', '-' and, after the first, '.'"),
        ("name", "override 'name' is not of the form key=value, e.g. optimizer.lr=3e-4"),
        ("batch=3", "override 'batch=3': 'batch' is a section, not a value; its keys are tokens, micro_rows"),
        ("model.num_heads=3", "num_heads 3 is not a multiple of num_kv_heads 2; change one of them"),
    ],
)
def test_an_invalid_value_names_its_key_origin_and_remedy(override, message):
    assert error_of("tiny", override).endswith(message)


def test_several_errors_are_counted_in_one_line():
    assert error_of("tiny", "seed=x", "precision=fp16").endswith("(1 more error)")


def test_yaml_errors_name_file_and_line(write):
    path = write("base: tiny\nmodel: [1\n")
    assert error_of(path).startswith(f"{path}, line 3: not valid YAML: ")
    path = write("base: tiny\nseed: 1\nseed: 2\n")
    assert error_of(path) == f"{path}, line 3: not valid YAML: key 'seed' is given twice"
    assert error_of(write("just words\n")).endswith("it must consist of `key: value` lines")


def test_unreadable_files_are_named(tmp_path, write):
    assert error_of("tinny").endswith("did you mean the preset 'tiny'?")
    assert error_of(tmp_path) == f"configuration {tmp_path} is a folder; name a YAML file or a preset"
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    assert "is not UTF-8 text" in error_of(tmp_path / "latin.yaml")
    path = write("base: nowhere.yaml\n")
    assert error_of(path).startswith(f"{path}: base {tmp_path / 'nowhere.yaml'} is neither a file nor a preset")


def test_missing_keys_are_named(write):
    path = write("base: tiny\nmodel:\n  vocab_size: null\n")
    assert "model.vocab_size is None" in error_of(path)
    assert error_of(write("name: x\n")).startswith(f"{path}: model is missing; set it, or extend a preset")


@pytest.mark.parametrize(
    ("overrides", "both"),
    [
        (["schedule.warmup_steps=100"], ["schedule: warmup_steps 100", "steps 100", "lower warmup_steps"]),
        (["batch.tokens=5000"], ["batch.tokens 5000", "data.seq_len 1024 x batch.micro_rows 1 = 1024", "4096 or 5120"]),
        (
            ["model.srte=learned", "model.max_positions=512"],
            ["model.max_positions 512", "data.seq_len 1024", "raise max_positions or lower seq_len"],
        ),
    ],
)
def test_conflicting_values_are_both_named(overrides, both):
    message = error_of("tiny", *overrides)
    assert all(part in message for part in both), message


MIXED = [
    *("data.sources.web.path=data/web", "data.sources.web.weight=0.7", "data.sources.code.path=s3://bucket/code"),
    *("data.sources.code.max_epochs=4", "data.weights={50: {code: 0.5}}", "data.curriculum={0: 256, 50: 512}"),
    "data.seq_len=512",
]


def test_tables_merge_by_entry_and_null_removes_one(write):
    base = write(
        "base: tiny\ndata:\n  sources: {web: {path: a}, code: {path: b, weight: 2}}\n"
        "  weights: {20: {web: 0}, 60: {web: 3}}\n  curriculum: {0: 256, 40: 1024}\n",
        "base.yaml",
    )
    config = load_config(str(base))
    assert config.data.locations == {"web": "a", "code": "b"}
    both = ({"web": 1.0, "code": 2.0}, {"web": 0.0, "code": 2.0}, {"web": 3.0, "code": 2.0})
    assert config.data.weight_table == tuple(zip((0, 20, 60), both, strict=True))
    assert config.data.lengths == ((0, 256), (40, 1024))
    path = write("base: base.yaml\ndata: {sources: {code: {path: c}}, curriculum: {40: 512, 50: 1024}}\n")
    child = load_config(str(path), ["data.weights.20=null", "data.sources.code.max_epochs=2"])
    assert child.data.sources["code"].model_dump() == {"path": "c", "weight": 2.0, "max_epochs": 2.0}
    assert [step for step, _ in child.data.weight_table] == [0, 60]
    assert child.data.lengths == ((0, 256), (40, 512), (50, 1024))
    alone = load_config(str(path), ["data.sources=null", "data.weights=null", "data.curriculum=null", "data.path=d"])
    assert alone.data == load_config("tiny", ["data.path=d"]).data


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.sources.web=a"], ["data.sources.web is 'a'", "give data.sources.NAME.path"]),
        (["data.sources.web.path=a", "data.sources.web.pth=a"], ["unknown key 'data.sources.web.pth'"]),
        (["data.sources.web.weight=1"], ["data.sources.web.path is missing"]),
        (["data.sources.web.path=a", "data.path=b"], ["path b", "sources web", "both given"]),
        (["data.sources.web.path=a", "data.sources.web.weight=0"], ["every weight is 0"]),
        (["data.sources.web.path=a", "data.weights.5.web=0"], ["weights.5: every weight is 0"]),
        (["data.sources.web.path=a", "data.weights.5.wbe=1"], ["weights.5: wbe is not one of sources (web)"]),
        (["data.weights.5.web=1"], ["weights.5: web is not one of sources (none given)"]),
        (["data.sources.web.path=a", "data.weights.0.web=1"], ["weights.0", "sources.NAME.weight"]),
        (["data.sources.web.path=a", "data.weights.100.web=1"], ["data.weights.100", "schedule.steps 100"]),
        (["data.curriculum.10=512"], ["curriculum starts at step 10"]),
        (["data.curriculum.0=512"], ["curriculum ends at length 512, but seq_len is 1024"]),
        (["data.curriculum={0: 512, 9: 256, 10: 1024}"], ["curriculum.9: length 256 is not above", "512"]),
        (["data.curriculum={0: 300, 10: 1024}"], ["curriculum.0: length 300 does not divide seq_len 1024"]),
        (["data.curriculum={0: 512, 100: 1024}"], ["data.curriculum.100 is not below schedule.steps 100"]),
        (["data.curriculum={0: 512, x: 1024}"], ["data.curriculum.x", "valid integer"]),
        (["data.curriculum=512"], ["data.curriculum is 512", "give data.curriculum.STEP"]),
        (["data.curriculum={0: {a: 4}}"], ["data.curriculum.0.a is 4", "give data.curriculum.STEP"]),
    ],
)
def test_invalid_tables_are_rejected(overrides, words):
    message = error_of("tiny", *overrides)
    assert all(word in message for word in words), message


def test_cross_checks_accept_their_limits():
    assert load_config("tiny", ["schedule.warmup_steps=99"]).schedule.warmup_steps == 99
    assert load_config("tiny", ["model.srte=learned", "model.max_positions=1024"]).model.max_positions == 1024


def test_a_configuration_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load_config("tiny").seed = 3


BATCH = ["batch.tokens=8192", "batch.micro_rows=2"]


@pytest.mark.parametrize(("ranks", "steps"), [(1, 4), (2, 2), (4, 1)])
def test_accumulation_steps(ranks, steps):
    assert load_config("tiny", BATCH).accumulation_steps(ranks) == steps


@pytest.mark.parametrize(
    ("ranks", "batches", "counts"), [(3, "6144 or 12288", "2 or 4"), (8, "16384", "4"), (5, "10240", "4")]
)
def test_an_indivisible_batch_suggests_batches_and_rank_counts(ranks, batches, counts):
    with pytest.raises(UserError) as caught:
        load_config("tiny", BATCH).accumulation_steps(ranks)
    assert f"nearest batch.tokens for {ranks} ranks: {batches};" in str(caught.value)
    assert str(caught.value).endswith(f"nearest rank counts for this batch: {counts}")


@pytest.mark.parametrize(
    "overrides", [[], ["name='1e4'"], ["name=no", "data.path=a b/ü", "optimizer.eps=1e-20"], MIXED]
)
@pytest.mark.parametrize("preset", preset_names())
def test_yaml_round_trip(preset, overrides, write):
    config = load_config(preset, overrides)
    assert load_config(str(write(to_yaml(config)))) == config


def test_yaml_contains_every_key():
    text = to_yaml(load_config("tiny"))
    assert all(f"{key.rpartition('.')[2]}:" in text for key in KEYS)
    assert len(KEYS) == len(set(KEYS))


def test_differences_name_keys_that_block_a_resume():
    old = load_config("tiny")
    new = load_config("tiny", ["optimizer.lr=1e-4", "schedule.steps=300", "model.window=64", "seed=1"])
    assert config_differences(old, new) == ["seed", "model.window", "optimizer.lr", "schedule.steps"]


def test_differences_name_entries_of_tables():
    old, new = load_config("tiny", MIXED), load_config("tiny", [*MIXED, "data.sources.web.path=moved"])
    assert config_differences(old, new) == []
    changes = [
        "data.weights.50.code=1",
        "data.sources.web.weight=2",
        "data.curriculum.40=512",
        "data.curriculum.50=null",
    ]
    assert config_differences(old, load_config("tiny", [*MIXED, *changes])) == [
        *("data.sources.web.weight", "data.weights.50.code", "data.curriculum.50", "data.curriculum.40")
    ]


def test_differences_ignore_keys_free_on_resume():
    free = [
        *(
            "name=other",
            "output=elsewhere",
            "data.path=moved",
            "activation_checkpointing=none",
            "deepspeed=zero1",
            "batch.micro_rows=1",
        ),
        *("data.workers=5", "data.max_bad_rows=1"),
        *("logging.every=1", "validation.rows=3", "checkpoint.every=7", "kernels.scan=reference"),
    ]
    new = load_config("tiny", free)
    assert new != load_config("tiny")
    assert config_differences(load_config("tiny"), new) == []


@pytest.mark.parametrize(
    ("name", "stage"), [("zero0", 0), ("zero1", 1), ("zero2", 2), ("zero3", 3), ("zero3_offload", 3)]
)
def test_shipped_deepspeed_settings_contain_only_zero_optimization(name, stage):
    settings = deepspeed_json(load_config("tiny", [f"deepspeed={name}"]))
    assert settings["zero_optimization"]["stage"] == stage
    assert set(settings) == {"zero_optimization"}


@pytest.mark.parametrize(
    ("settings", "owner"),
    [
        ({"train_batch_size": 8}, "batch.tokens"),
        ({"train_micro_batch_size_per_gpu": 1}, "batch.micro_rows"),
        ({"gradient_clipping": 1.0}, "optimizer.grad_clip"),
        ({"bf16": {"enabled": True}}, "precision"),
        ({"scheduler": {}}, "schedule.*"),
        ({"tensorboard": {"enabled": True}}, "logging.tensorboard"),
        ({"csv_monitor": {"enabled": True}}, "logging.*"),
        ({"comet": {"enabled": True}}, "logging.*"),
        ({"optimizer": {"type": "AdamW"}}, "optimizer.*"),  # DeepSpeed would compile its own
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, "activation_checkpointing"),  # no effect there
    ],
)
def test_deepspeed_settings_owned_by_the_configuration_are_rejected(settings, owner, write):
    path = write(json.dumps(settings), "ds.json")
    with pytest.raises(UserError, match=f"sets '{next(iter(settings))}'; remove it and set {owner}"):
        deepspeed_json(load_config("tiny", [f"deepspeed={path}"]))


@pytest.mark.parametrize("key", ["sequence_parallel_size", "tensor_parallel", "checkpoint"])
def test_unsupported_deepspeed_settings_are_rejected(key, write):
    path = write(json.dumps({key: 2}), "ds.json")
    with pytest.raises(UserError, match=f"sets '{key}'; remove it: "):
        deepspeed_json(load_config("tiny", [f"deepspeed={path}"]))


@pytest.mark.parametrize(
    ("zero", "words"),
    [
        (True, 'zero_optimization is True; it must be an object, e.g. {"stage": 2}'),
        (None, "zero_optimization is None; it must be an object"),
        ({"stage": "2"}, "zero_optimization.stage is '2'; it must be 0, 1, 2 or 3"),
        ({"stage": 4}, "zero_optimization.stage is 4;"),
        ({"stage": True}, "zero_optimization.stage is True;"),
        ({"stage": 3, "offload_param": True}, "zero_optimization.offload_param is True; it must be an object"),
        ({"stage": 2, "offload_optimizer": None}, "zero_optimization.offload_optimizer is None; it must be an object"),
        (
            {"stage": 2, "cpu_offload": True},
            'zero_optimization.cpu_offload is deprecated in DeepSpeed; use offload_optimizer: {"device"',
        ),
    ],
)
def test_malformed_zero_optimization_is_rejected_in_one_line(zero, words, write):
    path = write(json.dumps({"zero_optimization": zero}), "ds.json")
    with pytest.raises(UserError) as caught:
        deepspeed_json(load_config("tiny", [f"deepspeed={path}", "optimizer.kind=muon", "optimizer.grad_clip=0"]))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nvme_offload_needs_the_configurations_nvme_path(write):
    with pytest.raises(UserError, match=r"deepspeed zero3_nvme offloads to NVMe; set nvme_path=DIR"):
        deepspeed_json(load_config("tiny", ["deepspeed=zero3_nvme"]))
    zero = deepspeed_json(load_config("tiny", ["deepspeed=zero3_nvme", "nvme_path=/fast"]))["zero_optimization"]
    assert [zero[part]["nvme_path"] for part in ("offload_param", "offload_optimizer")] == ["/fast", "/fast"]
    own = {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/mine"}}}
    path = write(json.dumps(own), "ds.json")
    with pytest.raises(UserError, match=r"sets 'nvme_path'; remove it and set the run's nvme_path"):
        deepspeed_json(load_config("tiny", [f"deepspeed={path}"]))


def test_muon_is_limited_to_supported_deepspeed_settings(write):
    muon = ["optimizer.kind=muon", "optimizer.grad_clip=0", "nvme_path=/fast"]
    for name in ("zero1", "zero2", "zero3", "zero3_offload"):
        deepspeed_json(load_config("tiny", [*muon, f"deepspeed={name}"]))
    path = write(json.dumps({"zero_optimization": {"stage": 2, "reduce_scatter": True}}), "ds.json")
    for name, words in (
        ("zero0", "muon needs ZeRO stage 1 to 3"),
        ("zero3_nvme", "muon cannot offload to NVMe"),
        (path, "sets 'reduce_scatter', but Muon needs complete gradients"),
    ):
        with pytest.raises(UserError, match=words):
            deepspeed_json(load_config("tiny", [*muon, f"deepspeed={name}"]))


def test_missing_or_malformed_deepspeed_json(write):
    with pytest.raises(UserError, match="neither one of zero0, .*, zero3_nvme, zero3_offload nor a JSON"):
        deepspeed_json(load_config("tiny", ["deepspeed=zero9"]))
    for text in ("{", "[" * 100_000):
        with pytest.raises(UserError, match="is not valid JSON"):
            deepspeed_json(load_config("tiny", [f"deepspeed={write(text, 'ds.json')}"]))


def test_a_deeply_nested_manifest_is_rejected(tmp_path):
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="not a dataset's manifest"):
        check_folder(tmp_path)


def check_folder(folder) -> None:
    check_data(load_config("tiny", [] if folder is None else [f"data.path={folder}"]))


def test_the_dataset_must_exist_and_fit_the_model(tmp_path, write):
    with pytest.raises(UserError, match=r"data.path is missing; add data.path=DIR"):
        check_folder(None)
    with pytest.raises(UserError, match=r"no manifest.json there"):
        check_folder(tmp_path)
    write("[]", "manifest.json")
    with pytest.raises(UserError, match="not a dataset's manifest"):
        check_folder(tmp_path)
    write_manifest(tmp_path, 8193)
    with pytest.raises(UserError, match=r"8193 tokens, more than model.vocab_size 8192"):
        check_folder(tmp_path)
    write_manifest(tmp_path, 8192)
    check_folder(tmp_path)


def test_config_does_not_import_torch():
    code = "import sys; from fusiontree.config import load_config; load_config('tiny'); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_section_names():
    assert list(RunConfig.model_fields) == [
        *("name", "output", "seed", "init_from", "model", "data", "batch", "optimizer", "schedule", "losses"),
        *("distill", "precision", "activation_checkpointing", "deepspeed", "nvme_path", "checkpoint", "validation"),
        *("logging", "health", "kernels"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("text", ["[" * 20_000, f"seed: {'9' * 5000}", "{[1]: 2}", "? {a: b}\n: 1", "\0"])
def test_hostile_yaml_is_one_line(text, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    message = error_of(path)
    assert f"{path}: not valid YAML: " in message
    assert "\n" not in message
