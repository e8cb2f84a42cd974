"""What a run needs from outside, checked before its first step: launcher and compiler."""

import os
import shutil
from collections.abc import Sequence

from inl_core.run.errors import UserError


def check_launcher(
    mixed_precision: str,
    gradient_accumulation_steps: int,
    accepted: Sequence[str] = ("bf16", "fp16"),
) -> None:
    """Refuse what `accelerate launch`, or its config file, asks for against the run's settings.

    The settings of the run are recorded and decide. accelerate would follow the environment in
    some of these and ignore it in others: autocast, division of the gradients, compilation.

    Args:
        mixed_precision: Of the run; `auto` leaves it to the launcher. The launcher's "no" is also
            what it says if nobody asked.
        gradient_accumulation_steps: Of the run.
        accepted: What `auto` may be told to be.

    Raises:
        UserError: They differ; the message has the options to give.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if mixed_precision == "auto" and asked not in ("no", *accepted):
        raise UserError(
            f"accelerate's launcher asks for mixed_precision {asked}; this run can have no or "
            f"{' or '.join(accepted)}: give the launcher one of them"
        )
    if mixed_precision != "auto" and asked not in ("no", mixed_precision):
        raise UserError(
            f"accelerate's launcher asks for mixed_precision {asked} and this run for "
            f"{mixed_precision}: give the run --mixed_precision {asked} (or mixed_precision in its "
            f"config), or the launcher --mixed_precision {mixed_precision}"
        )
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "")
    if steps not in ("", "auto", str(gradient_accumulation_steps)):
        raise UserError(
            f"accelerate's launcher asks for gradient_accumulation_steps {steps} and this run for "
            f"{gradient_accumulation_steps}: give the run --gradient_accumulation_steps {steps}, "
            "or unset ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
        )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend != "no":
        raise UserError(
            f"accelerate's launcher asks for dynamo_backend {backend}: set it to no, and use "
            "--compile of this command"
        )


def check_whole_checkpoints() -> None:
    """Refuse FSDP with checkpoints in parts, for a trainer that leaves their form to accelerate.

    torch reads them with the whole pickle, which `check_torch_files` refuses: such a run could not
    be resumed.

    Raises:
        UserError: `fsdp_state_dict_type` is another one than FULL_STATE_DICT.
    """
    kind = os.environ.get("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT")
    if kind != "FULL_STATE_DICT" and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise UserError(
            f"accelerate's launcher asks for fsdp_state_dict_type {kind}, whose checkpoints are "
            "pickles and are not resumed: set it to FULL_STATE_DICT, as in "
            "configs/accelerate/fsdp2.yaml"
        )


def check_compiler() -> None:
    """Refuse `--compile` where nothing can compile.

    Inductor needs a C++ compiler for a CPU, and Triton a C compiler for a GPU; without them,
    PyTorch fails within the first step.

    Raises:
        UserError: There is none.
    """
    import torch
    from torch._inductor import config, cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    if torch.accelerator.is_available():
        tried = [os.environ["CC"]] if os.environ.get("CC") else ["clang", "gcc"]
        found = any(shutil.which(name) for name in tried)
        what, variable = "C", "CC"
    else:
        tried = [name for name in config.cpp.cxx if name]
        what, variable, found = "C++", "CXX", True
        try:
            cpp_builder.get_cpp_compiler()
        except InvalidCxxCompiler:
            found = False
    if not found:
        raise UserError(
            f"--compile needs a {what} compiler, and there is none ({' or '.join(tried)}): install "
            f"one (apt install g++), name it in {variable}, or train without --compile"
        )
