"""What a conversion to Megatron decides beyond the layout: spelling, padding, copies, arguments, and the container."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mtp_convert import provenance, sidecar
from mtp_convert.checkpoint import Checkpoint
from mtp_convert.engine.ranks import legacy_output
from mtp_convert.engine.sinks import Output, OutTensor, torch_dist_output
from mtp_convert.errors import ConvertError, Problem
from mtp_convert.mapping.family import ConfigError, Form
from mtp_convert.mapping.layout import Layout
from mtp_convert.options import Options
from mtp_convert.parallel import Placement, place
from mtp_convert.sharding import deal

# Arguments without which Megatron-Core builds another model, and its first release (major, minor) that has them.
SINCE = {
    "experimental_attention_variant": (0, 16),  # sparse attention with an indexer, gated delta nets
    "attention_output_gate": (0, 16),
    "moe_latent_size": (0, 16),
    "mtp_use_repeated_layer": (0, 17),
}
PACKED = "packed"  # a spelling of experts that is read and not written: releases since 0.17 do not know it
TRANSFORMERS_BEST = 2  # experts of a group whose scores are its score, in all of its models with router groups
FORMATS = {"torch_dist": "torch_dist", "legacy": "torch"}  # container -> Megatron-LM's --ckpt-format


@dataclass(frozen=True)
class MegatronTarget:
    """A Megatron checkpoint to be: family arguments (without sizes), and where the model will lie."""

    source: Checkpoint
    options: Options
    args: Mapping[str, Any]
    placement: Placement

    @property
    def legacy(self) -> bool:
        """Whether every rank gets a file of its own."""
        return self.options.container == "legacy"

    def padded(self, target: Layout) -> dict[str, int]:
        """Rows of vocabulary tensors: what is asked for, or what the weights had there before.

        Ranks of a legacy checkpoint have equal shares.
        """
        asked, tensor = self.options.padding, self.placement.sizes.tensor
        noted = provenance.padded(self.source, target) if asked == 1 else {}
        if asked == 1 and not self.legacy:
            return noted
        vocab = {n: noted.get(n, b.shape[0]) for n, b in target.bindings.items() if b.vocab}
        multiple = asked * tensor
        return {n: -(-rows // multiple) * multiple for n, rows in vocab.items()}

    def copies(self, target: Layout) -> frozenset[str]:
        """A tied output layer: where a later stage needs one; in torch_dist where it was stored before."""
        if self.legacy:
            return deal.copies(target, self.placement.chunks)
        if self.source.stored.container == "legacy":
            return frozenset()
        return provenance.copies(self.source, target)

    @property
    def notes(self) -> tuple[str, ...]:
        """What Megatron-Core will compute in another way than the source's own stack, with the same weights."""
        groups, chosen = self.args.get("moe_router_num_groups") or 1, self.args.get("moe_router_group_topk") or 0
        best = self.args["moe_router_topk"] // chosen if groups > 1 and chosen else TRANSFORMERS_BEST
        if best == TRANSFORMERS_BEST:
            return ()
        return (
            f"Megatron-Core scores a group of experts by its best {best}, transformers by its best "
            f"{TRANSFORMERS_BEST}: with the same weights they route, and so compute, differently",
        )

    def arguments(self, rows: int) -> dict[str, Any]:
        """The training arguments, with the parallel sizes and the vocabulary `rows` that are written."""
        found = {**self.args, **self.placement.arguments(self.args)}
        found["ckpt_format"] = FORMATS[self.options.container]
        found["padded_vocab_size"] = rows or found["vocab_size"]
        if self.options.padding > 1:
            found["make_vocab_size_divisible_by"] = self.options.padding
        return found

    def content(self, target: Layout) -> dict[str, bool]:
        """`content_metadata`: what a reader must be told where the keys are not those of the model's own config."""
        single = target.words.get("shards") == "single"
        own = self.source.family.default_words("megatron", self.source.dims).get("decoder")
        apart = target.words.get("decoder") == "per_layer" and own == "stacked"
        return {
            **({"singleton_local_shards": True} if single else {}),
            **({"non_homogeneous_layers": True} if apart else {}),
        }

    def output(self, tensors: Sequence[OutTensor], target: Layout, args: Mapping[str, Any]) -> Output:
        """The files with tensors."""
        source, folder = self.source.stored.tensors, sidecar.RELEASE
        if not self.legacy:
            limit = self.options.max_shard_size
            return torch_dist_output(tensors, source, folder=folder, objects=target.objects, max_file_size=limit)
        shapes = {t.name: t.shape for t in tensors}
        contents = deal.deal(target, shapes, self.placement.chunks, self.placement.sizes)
        common = {"args": Namespace(**args), "checkpoint_version": 3.0, "iteration": 0}
        return legacy_output(contents, tensors, source, folder=folder, common=common)


def megatron_target(source: Checkpoint, options: Options, *, steps: int, repeated: bool) -> MegatronTarget:
    """Check the sizes against the model.

    Raises:
        ConvertError: MTP001 for sizes or a container that make no sense here, MTP020 when the config lacks what
            Megatron has to be told, MTP028 when the family has no such form.
    """
    if options.container not in FORMATS:
        raise ConvertError("MTP001", Problem("--container", got=options.container, expected=", ".join(FORMATS)))
    if options.container == "legacy" and "legacy" not in source.family.forms:
        raise ConvertError("MTP028", Problem(f"{source.family.name} has no legacy names"))
    config = {**source.model_config, "tie_word_embeddings": source.dims.tied}
    try:
        args = source.family.megatron_args(config, steps, repeated)
    except ConfigError as error:
        hint = "correct config.json, or give the right one with --hf-config"
        raise ConvertError("MTP020", Problem(str(error), "config.json"), hint=hint) from error
    _since(args, options)
    return MegatronTarget(source, options, args, place(args, options))


def _since(args: Mapping[str, Any], options: Options) -> None:
    """Refuse a Megatron release that does not know an argument by which the model is built.

    Raises:
        ConvertError: MTP028.
    """
    release = f"Megatron-Core {options.megatron_version}"
    later = {name: since for name, since in SINCE.items() if args.get(name) and options.version < since}
    problems = [
        Problem(f"{release} has no {n}", got=repr(args[n]), expected=f"{x}.{y} or later") for n, (x, y) in later.items()
    ]
    if problems:
        raise ConvertError("MTP028", problems, hint="choose a later --megatron-version")


def megatron_words(source: Checkpoint, options: Options) -> dict[str, str]:
    """The spelling: what the weights had in Megatron before, except where the container or its releases decide."""
    forms, choices = source.family.forms, source.family.choices["megatron"]
    form = forms.get(options.container, Form())
    released = {w: s for w, s in form.words(options.version).items() if w in choices}
    carried = dict(provenance.words(source, "megatron"))
    if carried.get("experts") == PACKED:
        del carried["experts"]
    if carried.get("keys") != released.get("keys"):
        decided = {w for f in forms.values() for w in f.words(options.version)}
        carried = {w: s for w, s in carried.items() if w not in decided}
    return {**released, **carried, **source.family.fixed("megatron", options.container), **options.words}
