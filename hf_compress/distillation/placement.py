"""Where the teachers live: whole in every process, or each process with a share of their weights."""

from accelerate import Accelerator
from torch import nn

from hf_compress.distillation.arguments import Placement
from hf_compress.modeling.blocks import find_blocks


def place_teacher(
    teacher: nn.Module, placement: Placement, accelerator: Accelerator, keeps_head: bool = False
) -> nn.Module:
    """Brings a teacher to where it is asked.

    accelerate's `prepare` is not used: it would list the teacher among the models to be saved, and patch the forward
    of the user's model for mixed precision.

    Args:
        teacher (`nn.Module`): The teacher. It is changed in place; one that is quantized or dispatched over devices
            stays where its loader put it.
        placement (`str`): `"replicated"`, or `"sharded"`: the weights of a block are gathered while it runs, so that
            every process has to ask the teacher equally often.
        accelerator (`Accelerator`): Tells the device and the processes.
        keeps_head (`bool`, *optional*): Whether what lies outside the blocks stays gathered between forward passes,
            because the output layer is applied by itself.

    Returns:
        `nn.Module`: The teacher itself.

    Raises:
        ValueError: if its weights are not all in this process, or it cannot be sharded.
    """
    check_whole(teacher, "The teacher")
    is_placed = getattr(teacher, "hf_device_map", None) or getattr(teacher, "is_quantized", False)
    if placement == "sharded":
        _check_sharding(accelerator, bool(is_placed))
        return _shard_(teacher, accelerator, keeps_head)
    return teacher if is_placed else teacher.to(accelerator.device)


def check_whole(model: nn.Module, name: str) -> None:
    """Raises if a model was loaded in pieces, or as an empty shell that another process is to fill.

    Args:
        model (`nn.Module`): A model whose weights are about to be read.
        name (`str`): What to call it.

    Raises:
        ValueError: if it has weights that are not in this process.
    """
    missing = [path for path, value in model.named_parameters() if _is_missing(model, path, value)]
    if missing:
        raise ValueError(
            f"{name} has no values for {len(missing)} of its weights in this process ({missing[0]} is the first): it "
            "was loaded to be filled or gathered by a training of its own. Load whole models: set "
            "zero3_init_flag: false (DeepSpeed) or fsdp_cpu_ram_efficient_loading: false (FSDP) in the configuration "
            "of accelerate, as the files in scripts/accelerate_configs do."
        )


def _is_missing(model: nn.Module, path: str, value: nn.Parameter) -> bool:
    # Projections of a part that was removed have no inputs or no outputs.
    owner = model.get_submodule(path.rpartition(".")[0])
    is_removed = 0 in [getattr(owner, width, None) for width in ("in_features", "out_features", "nx", "nf")]
    return value.is_meta or (value.numel() == 0 and not is_removed)


def _check_sharding(accelerator: Accelerator, is_placed: bool) -> None:
    if getattr(accelerator.state, "deepspeed_plugin", None) is not None:
        raise ValueError(
            "teacher_placement='sharded' cannot be combined with DeepSpeed, whose hooks would gather the teacher's "
            "weights a second time: use teacher_placement='replicated', or train with FSDP or data-parallel."
        )
    if accelerator.num_processes == 1:
        raise ValueError(
            "teacher_placement='sharded' was given to a single process, which has no other to share the weights "
            "with: start several with `accelerate launch --num_processes N`, or use teacher_placement='replicated'."
        )
    if is_placed:
        raise ValueError(
            "teacher_placement='sharded' was given with a teacher that is quantized or spread over devices, whose "
            "weights cannot be cut: load it plainly, or use teacher_placement='replicated'."
        )


def _shard_(teacher: nn.Module, accelerator: Accelerator, keeps_head: bool) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for module in dict.fromkeys(block.module for block in find_blocks(teacher)):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    # All that is shared, such as tied embeddings, lies outside the blocks: one group must hold every use of a weight.
    fully_shard(teacher, mesh=mesh, reshard_after_forward=not keeps_head)
    return teacher
