"""The options of the command line, each defined once: spelling, help text, panel, environment variable."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer


def option(*names: str, help: str, panel: str, env: str, least: int | None = None) -> Any:  # noqa: ANN401 - typer's own names
    """An option with its MTP_CONVERT_* variable."""
    return typer.Option(
        *names, help=help, rich_help_panel=panel, min=least, envvar=f"MTP_CONVERT_{env}", show_envvar=False
    )


Src = Annotated[
    Path,
    typer.Argument(
        metavar="SRC",
        help="Checkpoint folder (Hugging Face or native safetensors; Megatron torch_dist: root or iter_*).",
    ),
]
Dst = Annotated[Path, typer.Argument(metavar="DST", help="Output folder; must not exist.")]
HfConfig = Annotated[
    Path | None,
    option(
        "--hf-config",
        help="config.json (or its folder) for a source without one.",
        panel="Input",
        env="HF_CONFIG",
    ),
]
AllowUnmapped = Annotated[
    bool,
    option(
        "--allow-unmapped",
        help="Leave tensors behind that the family does not know; they are listed.",
        panel="Input",
        env="ALLOW_UNMAPPED",
    ),
]
DtypeOption = Annotated[
    Literal["auto", "bf16", "fp16", "fp32"],
    option("--dtype", help="Element type; auto: as stored.", panel="Output", env="DTYPE"),
]
Shard = Annotated[
    str,
    option("--max-shard-size", help="Largest output file.", panel="Output", env="MAX_SHARD_SIZE"),
]
Force = Annotated[
    bool,
    option("--force", help="Replace DST once the new one is complete.", panel="Output", env="FORCE"),
]
Threads = Annotated[int | None, option("--threads", help="Copy threads.", panel="Output", env="THREADS", least=1)]
Version = Annotated[
    str,
    option(
        "--megatron-version",
        help="Megatron-Core release that will read it.",
        panel="Megatron",
        env="MEGATRON_VERSION",
    ),
]
Steps = Annotated[
    int | None,
    option(
        "--mtp-num-layers",
        help="MTP depths to run; more than one over one stored depth is a repeated layer.",
        panel="Megatron",
        env="MTP_NUM_LAYERS",
        least=1,
    ),
]
Tp = Annotated[
    int,
    option(
        "--tp",
        "--tensor-model-parallel-size",
        help="Checked, and written to args; torch_dist loads at any size.",
        panel="Megatron",
        env="TP",
        least=1,
    ),
]
Pp = Annotated[
    int,
    option("--pp", "--pipeline-model-parallel-size", help="As --tp.", panel="Megatron", env="PP", least=1),
]
Ep = Annotated[
    int, option("--ep", "--expert-model-parallel-size", help="As --tp.", panel="Megatron", env="EP", least=1)
]
Etp = Annotated[
    int,
    option("--etp", "--expert-tensor-parallel-size", help="As --tp.", panel="Megatron", env="ETP", least=1),
]
Padding = Annotated[
    int,
    option(
        "--make-vocab-size-divisible-by",
        help="Pad vocabulary rows to a multiple of this times --tp.",
        panel="Megatron",
        env="MAKE_VOCAB_SIZE_DIVISIBLE_BY",
        least=1,
    ),
]
Format = Annotated[
    Literal["human", "json", "quiet"], option("--format", help="How to print.", panel="Display", env="FORMAT")
]


Variant = Annotated[
    str,
    option("--variant", help="A named form of the target layout, e.g. automodel.", panel="Output", env="VARIANT"),
]
To = Annotated[Literal["hf", "megatron", "native"], option("--to", help="Target layout.", panel="Output", env="TO")]
Via = Annotated[
    Literal["hf", "megatron", "native", ""],
    option("--via", help="Layout in between; by default the other one.", panel="Check", env="VIA"),
]
ForceFold = Annotated[
    Literal["mean", "first", ""],
    option("--force-fold", help="What the one depth becomes when depths differ.", panel="Output", env="FORCE_FOLD"),
]
Depths = Annotated[int, option("--depths", help="Equal depths to write.", panel="Output", env="DEPTHS", least=1)]
DryRun = Annotated[bool, option("--dry-run", help="Only show the plan.", panel="Output", env="DRY_RUN")]
Scratch = Annotated[
    Path | None, option("--scratch", help="Folder for the temporary files.", panel="Check", env="SCRATCH")
]
