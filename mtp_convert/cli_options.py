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
    str,
    typer.Argument(
        metavar="SRC",
        help="Checkpoint folder (Hugging Face or native safetensors; Megatron torch_dist or legacy: root or iter_*), "
        "or a Hub repository: org/name, org/name@revision, hf://org/name.",
    ),
]
Dst = Annotated[Path, typer.Argument(metavar="DST", help="Output folder; must not exist.")]
HfConfig = Annotated[
    str | None,
    option(
        "--hf-config",
        help="config.json, its folder or a Hub repository, for a source without one.",
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
Encoding = Annotated[
    Literal["auto", "source", "bf16", "fp8-block", "mxfp4"],
    option(
        "--encoding",
        help="How weights are stored. auto: as they are; source: as in the folder that they came from; bf16: no codes.",
        panel="Output",
        env="ENCODING",
    ),
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
        help="Ranks that every layer is cut over. torch_dist loads at any size: there it is checked and noted in args.",
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
    int | None,
    option(
        "--etp",
        "--expert-tensor-parallel-size",
        help="The same for experts; by default --tp.",
        panel="Megatron",
        env="ETP",
        least=1,
    ),
]
Vpp = Annotated[
    int,
    option(
        "--vpp",
        "--virtual-pipeline-model-parallel-size",
        help="Pieces of the model per pipeline stage.",
        panel="Megatron",
        env="VPP",
        least=1,
    ),
]
First = Annotated[
    int | None,
    option(
        "--decoder-first-pipeline-num-layers",
        help="Decoder layers of the first pipeline stage, where not all have as many.",
        panel="Megatron",
        env="DECODER_FIRST_PIPELINE_NUM_LAYERS",
        least=1,
    ),
]
Last = Annotated[
    int | None,
    option(
        "--decoder-last-pipeline-num-layers",
        help="Decoder layers of the last pipeline stage.",
        panel="Megatron",
        env="DECODER_LAST_PIPELINE_NUM_LAYERS",
        least=1,
    ),
]
PipelineLayout = Annotated[
    str,
    option(
        "--pipeline-model-parallel-layout",
        help="Any other division of the layers, in Megatron-LM's letters.",
        panel="Megatron",
        env="PIPELINE_MODEL_PARALLEL_LAYOUT",
    ),
]
Container = Annotated[
    Literal["torch_dist", "legacy"],
    option(
        "--container",
        help="One file format for all sizes, or one mp_rank_* folder per rank.",
        panel="Megatron",
        env="CONTAINER",
    ),
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
Copies = Annotated[
    Literal["compare", "use-main", "keep"],
    option(
        "--copies",
        help="Stored copies (tied weights, embeddings of MTP layers) that differ: refuse, go by the main tensor, or "
        "keep both.",
        panel="Input",
        env="COPIES",
    ),
]
FamilyOption = Annotated[str, option("--family", help="Look in this family only.", panel="Input", env="FAMILY")]
NewDepths = Annotated[int, option("--depths", help="MTP depths to make.", panel="Output", env="DEPTHS", least=1)]
Ends = Annotated[
    bool,
    option(
        "--with-ends/--without-ends",
        help="Embedding and output head, which the heads share with their model.",
        panel="Output",
        env="WITH_ENDS",
    ),
]
HeadsTo = Annotated[Literal["hf", "native"], option("--to", help="Layout of the heads.", panel="Output", env="TO")]
