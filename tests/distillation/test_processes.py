"""Two processes train as one: data-parallel, with shards of the student, with shards of the teacher."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch import nn

from hf_compress import DistillationArguments
from hf_compress.distillation.placement import check_whole, place_teacher
from hf_compress.distillation.processes import ProcessesMixin, name_blocks_, unreached
from hf_compress.modeling.blocks import find_blocks
from hf_compress.modeling.removal import remove_attention_, remove_ffn_
from tests.distillation.tiny import make_trainer, tiny_model
from tests.distillation.two_processes import CASES

TOLERANCE = 1e-5
ROOT = Path(__file__).parent.parent.parent
CONFIGS = sorted((ROOT / "scripts" / "accelerate_configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """All cases and facts, from one start of two processes."""
    folder = tmp_path_factory.mktemp("processes")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "two_processes.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads((folder / "differences.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_two_processes_have_the_gradients_and_weights_of_one(name, found):
    differences = found["differences"][name]
    assert differences["gradients"] <= TOLERANCE
    assert differences["weights"] <= TOLERANCE
    assert differences["logs"] <= 1e-4


def test_resuming_two_processes_is_bit_exact(found):
    assert found["facts"]["resuming"] == 0.0


def test_projections_start_alike_in_all_processes(found):
    assert found["facts"]["projections_of_other_seeds"] == 0.0


def test_a_sharded_teacher_says_the_same_and_is_in_no_checkpoint(found):
    facts = found["facts"]["sharded_teacher"]
    assert facts["are_equal"]
    assert 0.45 < facts["share"] < 0.55
    assert facts["keys"] == []
    assert facts["difference"] == 0.0


def test_checkpoints_of_shards_are_whole_and_resumed_bit_exactly(found):
    facts = found["facts"]["resuming_shards"]
    assert facts == {"difference": 0.0, "saved": 0.0, "keys": []}
    assert found["facts"]["saved_shards"] == 0.0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short batches", "have [3, 2] batches an epoch and 1 make a step"),
        ("short batches, sharded", "have [2, 1] batches an epoch and 2 make a step"),
        ("placed teacher", "quantized or spread over devices"),
        ("projections", "need projections of widths (teacher0_encoder1_encoder2)"),
        ("shares", "log_gradient_shares=True needs the student's whole weights"),
    ],
)
def test_what_would_hang_or_be_wrong_raises(name, message, found):
    assert message in found["facts"]["refusals"][name]


def test_a_single_process_cannot_share_a_teacher(tmp_path):
    with pytest.raises(ValueError, match="was given to a single process.*accelerate launch --num_processes"):
        make_trainer("single-label", tmp_path, teacher_placement="sharded")
    with pytest.raises(ValueError, match="teacher_placement='everywhere' is unknown: give replicated or sharded"):
        DistillationArguments(str(tmp_path), teacher_placement="everywhere")


def test_deepspeed_and_a_sharded_teacher_exclude_each_other():
    state = SimpleNamespace(deepspeed_plugin=object())
    accelerator = SimpleNamespace(state=state, num_processes=2, device=torch.device("cpu"))
    with pytest.raises(ValueError, match="cannot be combined with DeepSpeed"):
        place_teacher(tiny_model("single-label"), "sharded", accelerator)


def test_deepspeed_and_chunks_exclude_each_other():
    args = SimpleNamespace(n_gpu=1, logits_chunk=64)
    trainer = SimpleNamespace(args=args, stages=[], projections={}, _is_reentrant=False, is_deepspeed_enabled=True)
    with pytest.raises(ValueError, match="logits_chunk=64 applies the output layer once per chunk"):
        ProcessesMixin._check_processes(trainer)


def test_models_without_their_weights_raise():
    model = tiny_model("single-label")
    # What was removed has no values, and lacks none.
    remove_attention_(find_blocks(model)[0].attention)
    remove_ffn_(find_blocks(model)[0].ffn)
    check_whole(model, "The teacher")
    model.classifier.weight = nn.Parameter(torch.empty(0))
    with pytest.raises(ValueError, match="The teacher has no values for 1 of its weights.*classifier.weight"):
        check_whole(model, "The teacher")
    with torch.device("meta"):
        empty = tiny_model("single-label")
    with pytest.raises(ValueError, match="fsdp_cpu_ram_efficient_loading: false"):
        check_whole(empty, "The teacher")


def test_parameters_that_a_loss_does_not_reach():
    first, second = (nn.Linear(2, 2) for _ in range(2))
    hidden = first(torch.ones(1, 2))
    parameters = [*first.parameters(), *second.parameters()]
    assert unreached(second(hidden).sum(), parameters) == []
    missed = unreached(hidden.sum() + second.bias.sum(), parameters)
    assert len(missed) == 1
    assert missed[0] is second.weight


def set_all(monkeypatch, environment: dict[str, str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configurations_are_read_by_accelerate(path, monkeypatch):
    config = load_config_from_file(str(path))  # raises on unknown keys
    first, second = path.read_text().splitlines()[:2]
    assert first.startswith("# ")
    assert second.startswith(f"# accelerate launch --config_file scripts/accelerate_configs/{path.name} scripts/")
    args = launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    assert {*config.fsdp_config, *config.deepspeed_config} <= set(vars(args))
    args = _validate_launch_command(args)[0]
    assert args.num_processes == 2
    assert path.name in (path.parent / "README.md").read_text()
    if config.distributed_type == DistributedType.FSDP:
        set_all(monkeypatch, prepare_multi_gpu_env(args))
        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2
        assert not plugin.cpu_ram_efficient_loading
        assert plugin.state_dict_type.name == "FULL_STATE_DICT"
        name_blocks_(plugin, tiny_model("single-label"))
        assert plugin.transformer_cls_names_to_wrap == ["BertLayer"]
    elif config.distributed_type == DistributedType.DEEPSPEED:
        args.deepspeed_fields_from_accelerate_config = ""
        set_all(monkeypatch, prepare_deepspeed_cmd_env(args)[1])
        plugin = DeepSpeedPlugin()
        assert plugin.zero_stage == 3
        assert not plugin.zero3_init_flag
        assert plugin.zero3_save_16bit_model
        assert {plugin.gradient_accumulation_steps, plugin.gradient_clipping} == {"auto"}
    else:
        assert args.multi_gpu
