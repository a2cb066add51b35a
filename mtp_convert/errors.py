"""What can go wrong, as data: every error has a code, an exit code, and says what, where, got / expected, and a hint.

    ConvertError(code, problems, hint)      one error, any number of problems of the same kind
    ERRORS[code] -> ErrorKind               title, exit code and a paragraph for `mtp-convert explain CODE`

Exit codes: 0 ok, 1 internal, 2 usage, 3 bad input file, 4 input and config disagree, 5 parity check failed,
6 I/O, 7 Hub or network, 73 output exists, 75 locked by another run, 130 / 143 signal.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """One row of the error list."""

    title: str
    exit_code: int
    explanation: str
    hint: str = "`mtp-convert explain CODE` says more about a code"


@dataclass(frozen=True, slots=True)
class Problem:
    """One finding: what is wrong, in which file, what was there and what was expected."""

    what: str
    where: str = ""
    got: str = ""
    expected: str = ""

    def line(self) -> str:
        """The problem as one printable line."""
        text = self.what
        if self.where:
            text += f" in {self.where}"
        if self.got:
            text += f": got {self.got}"
        if self.expected:
            text += f"{', ' if self.got else ': '}expected {self.expected}"
        return text


ERRORS: dict[str, ErrorKind] = {
    "MTP001": ErrorKind("wrong option", 2, "An option or its value makes no sense here."),
    "MTP002": ErrorKind(
        "nothing to read",
        3,
        "The path does not exist or holds no checkpoint we know.",
        "SRC is a Hugging Face folder, or the root or iter_* folder of a Megatron checkpoint (torch_dist or mp_rank_*)",
    ),
    "MTP003": ErrorKind(
        "not this layout",
        2,
        "The command names one source layout and the folder holds another. `mtp-convert convert` detects it.",
    ),
    "MTP010": ErrorKind(
        "damaged safetensors file",
        3,
        "The header is not valid, or its byte ranges do not cover the file exactly once.",
        "download the file again",
    ),
    "MTP011": ErrorKind(
        "damaged index",
        3,
        "model.safetensors.index.json and the shards do not agree, or it points outside the folder.",
        "download the whole folder again",
    ),
    "MTP012": ErrorKind(
        "tensor stored twice",
        3,
        "Two shards hold a tensor of the same name; nobody can say which is meant.",
    ),
    "MTP013": ErrorKind(
        "damaged Megatron checkpoint",
        3,
        "`.metadata`, a `.distcp` or `mp_rank_*` file or their agreement is broken: truncated, overlapping or missing.",
        "the checkpoint is damaged or incomplete; copy it again",
    ),
    "MTP014": ErrorKind(
        "refused pickle",
        3,
        "The file asks for a class or function outside the allow-list. It was not executed. Checkpoints are "
        "read without running code, whoever made them.",
    ),
    "MTP015": ErrorKind(
        "path leaves the folder",
        3,
        "A file name inside the checkpoint points outside of its folder.",
    ),
    "MTP016": ErrorKind(
        "ranks disagree",
        3,
        "The files of a legacy checkpoint (`mp_rank_XX`) do not belong together: a rank is missing or too many, its "
        "sizes are not those of the training arguments, or ranks hold different values of what they must hold alike.",
        "the folders come from different runs or are incomplete; copy them again",
    ),
    "MTP020": ErrorKind(
        "config not usable",
        4,
        "config.json is missing, is not JSON, or lacks fields that fix the tensor shapes.",
    ),
    "MTP021": ErrorKind(
        "unknown family",
        4,
        "No adapter knows this `model_type`. `mtp-convert families` lists them.",
    ),
    "MTP022": ErrorKind(
        "tensors missing",
        4,
        "The config asks for tensors that are not stored. Nothing is ever filled with random numbers.",
    ),
    "MTP023": ErrorKind(
        "tensors unexpected",
        4,
        "Stored tensors that the config does not explain. Nothing is ever dropped silently; `--allow-unmapped` "
        "leaves them behind and lists them.",
    ),
    "MTP024": ErrorKind("wrong shape", 4, "A stored tensor has another shape than the config asks for."),
    "MTP025": ErrorKind(
        "MTP depths disagree",
        4,
        "The config's number of MTP depths is not the stored number. Only one case has a meaning: more than one "
        "depth over exactly one stored depth is a repeated layer.",
    ),
    "MTP026": ErrorKind(
        "copies differ",
        4,
        "Two stored tensors must hold the same numbers (tied or copied weights) and do not.",
    ),
    "MTP027": ErrorKind(
        "depths differ",
        4,
        "Folding needs equal MTP depths. `--force-fold mean` averages them, `--force-fold first` keeps the first.",
    ),
    "MTP028": ErrorKind("not expressible", 4, "The target layout or version has no place for what the source holds."),
    "MTP029": ErrorKind("no such tensor", 4, "No layout of the family has a tensor or param of this name."),
    "MTP031": ErrorKind(
        "encoding not usable",
        4,
        "Weights are stored as codes (FP8, MXFP4, NVFP4), and their scales or the config do not fit: a scale is "
        "missing or has another shape than its blocks, a type is not known, or an ignore list names a quantised one.",
    ),
    "MTP032": ErrorKind(
        "cannot run this model",
        4,
        "No forward pass is possible here: no code runs this family in this layout, or the checkpoint lacks what it "
        "needs (training arguments, a config). `verify --levels names,shapes,bits` compares without running.",
    ),
    "MTP030": ErrorKind("parity check failed", 5, "The two sides were compared and are not equal."),
    "MTP040": ErrorKind("cannot write", 6, "The disk is full or the place is not writable. Nothing was left behind."),
    "MTP041": ErrorKind("source changed", 3, "A source file changed while it was read; the output was discarded."),
    "MTP042": ErrorKind("cannot read", 6, "The operating system refused to open or read a file."),
    "MTP050": ErrorKind("Hub or network", 7, "The Hub could not be reached or refused the request."),
    "MTP051": ErrorKind(
        "no access on the Hub",
        7,
        "No token, one that has expired, one that may only read, or an account that may not do this (401, 403).",
        "log in with `hf auth login`, or set HF_TOKEN to a token that may",
    ),
    "MTP052": ErrorKind(
        "not on the Hub",
        7,
        "The repository, revision or file does not exist, or is private and not open to this account (404).",
    ),
    "MTP053": ErrorKind(
        "the repository has changed",
        7,
        "Somebody else committed, or made the same name, in between (409, 412). Nothing of theirs was overwritten.",
        "run the command again: it compares with what is there now, and what was uploaded is not sent again",
    ),
    "MTP054": ErrorKind(
        "the Hub is busy",
        7,
        "It answered 429 or 5xx to every attempt. What was uploaded stays there; the target is as it was.",
        "run the command again later: what was uploaded is not sent again",
    ),
    "MTP055": ErrorKind(
        "no connection to the Hub",
        7,
        "The connection could not be made, broke or timed out in every attempt. What was uploaded stays there.",
        "check the network, proxy and HF_ENDPOINT, then run the command again",
    ),
    "MTP056": ErrorKind(
        "offline mode",
        7,
        "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids every request.",
        "unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE",
    ),
    "MTP057": ErrorKind(
        "upload differs",
        7,
        "Files on the Hub do not have the digests of the files here. The target branch was left as it was.",
    ),
    "MTP058": ErrorKind(
        "wrong visibility",
        7,
        "The repository is public and --private was asked for, or the other way round. Nothing was uploaded.",
        "change it in the repository's settings, or take another name",
    ),
    "MTP059": ErrorKind(
        "another checkpoint is there",
        73,
        "The repository holds weights that this tool did not put there, and the push would replace or remove them.",
        "`--force` replaces them; --dry-run shows what would happen",
    ),
    "MTP060": ErrorKind(
        "model card not usable",
        7,
        "The metadata at the head of README.md is not YAML, or the Hub refuses it.",
        "correct README.md of the folder, or leave the card as it is with --no-card",
    ),
    "MTP061": ErrorKind(
        "folder not as it was written",
        3,
        "A file is missing, damaged or not from the conversion, going by the digests in mtp_convert.json.",
        "convert again; `mtp-convert check DIR` lists what is damaged",
    ),
    "MTP073": ErrorKind(
        "output exists",
        73,
        "The output is already there. `--force` replaces it once the new one is complete.",
    ),
    "MTP075": ErrorKind("locked", 75, "Another run is writing this output."),
    "MTP090": ErrorKind("internal error", 1, "A mistake in mtp-convert itself; please report it with `--debug`."),
}


class ConvertError(Exception):
    """Any refusal of this package: a code of `ERRORS`, its problems, and a hint."""

    def __init__(self, code: str, problems: Problem | str | Iterable[Problem], *, hint: str = "") -> None:
        if isinstance(problems, str):
            problems = Problem(problems)
        self.code = code
        self.kind = ERRORS[code]
        self.problems: tuple[Problem, ...] = (problems,) if isinstance(problems, Problem) else tuple(problems)
        self.hint = hint or self.kind.hint.replace("CODE", code)
        super().__init__(self.headline())

    @property
    def exit_code(self) -> int:
        """The process exit code that goes with this error."""
        return self.kind.exit_code

    def headline(self) -> str:
        """One line: the first problem, and how many more there are."""
        more = f" (and {len(self.problems) - 1} more)" if len(self.problems) > 1 else ""
        return f"{self.kind.title}: {self.problems[0].line()}{more}"
