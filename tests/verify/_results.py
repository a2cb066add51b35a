"""Verifications made by hand: what `judge` could have found, without a model."""

from __future__ import annotations

import math
from dataclasses import replace
from random import Random

from mtp_convert.errors import Problem
from mtp_convert.verify.result import (
    LEVELS,
    Culprit,
    LogitScores,
    Mapped,
    PlaceError,
    Section,
    SideFacts,
    Verification,
)

HOSTILE = "<script>alert(1)</script>::error::%0A\n::warning::x|`\"'&\x1b[31m\u202e"
A = SideFacts("runs/iter_0000100", "glm4_moe", "megatron", "torch_dist", {"BF16": 412, "F32": 46}, "megatron tree")
B = SideFacts("out/hf", "glm4_moe", "hf", "safetensors", {"BF16": 1250}, "transformers 5.23")
MAPPING = (
    Mapped("embedding.word_embeddings.weight", "model.embed_tokens.weight", "copy", 1),
    Mapped(
        "decoder.layers.{0..47}.self_attention.linear_qkv.weight",
        "model.layers.{0..47}.self_attn.{q,k,v}_proj.weight",
        "split 3",
        48,
    ),
    Mapped(
        "decoder.layers.{1..47}.mlp.experts.linear_fc1.weight{0..127}",
        "model.layers.{1..47}.mlp.experts.{0..127}.{gate,up}_proj.weight",
        "split 2",
        6016,
    ),
    Mapped("mtp.layers.0.eh_proj.weight", "model.layers.48.eh_proj.weight", "copy", 1),
)
ENVIRONMENT = {
    "command": "mtp-convert verify runs/iter_0000100 out/hf --report parity.html",
    "python": "3.11.9",
    "torch": "2.9.1",
    "transformers": "5.23.0",
    "platform": "Linux x86_64",
}


def place_names(layers: int, depths: int) -> list[str]:
    """In the order they run."""
    main = ["embedding", *(f"layers.{i}" for i in range(layers)), "final_norm", "logits"]
    return main + [f"mtp.{k}.{part}" for k in range(depths) for part in ("fused", "block", "logits")]


def passing(layers: int = 48, depths: int = 2, seed: int = 0) -> Verification:
    """Everything within its threshold; figures like those of a real run."""
    random = Random(seed)
    places, chained = [], 2e-7
    for name in place_names(layers, depths):
        floor = 2e-7 * math.exp(random.gauss(0, 0.35))
        relative = 0.0 if name == "embedding" else floor * random.uniform(0.6, 2.4)
        chained *= 1.06 if name.startswith("layers") else 1
        cosine = 1 - relative / 50
        limit = 10 * floor
        places.append(PlaceError(name, relative * 8, relative, relative, cosine, floor, limit, chained))
    steps = ["logits", *(f"mtp.{k}.logits" for k in range(depths))]
    scores = tuple(
        LogitScores(name, 3e-10 * (k + 1), 1.0, 0.99996, (2.1034 + k / 3, 2.1034 + k / 3), (0.84 - k / 8,) * 2)
        for k, name in enumerate(steps)
    )
    main, *drafts = scores
    counts = {"names": 458, "shapes": 458, "bits": 458, "forward": len(places)}
    return Verification(
        A,
        B,
        tuple(Section(level, counts[level]) for level in LEVELS),
        tuple(places),
        (replace(main, acceptance=None), *drafts),
        tokens=(2, 64),
        seconds=12.34,
        mapping=MAPPING,
        environment=dict(ENVIRONMENT),
    )


def failing(at: str = "layers.3", error: float = 0.213, layers: int = 48) -> Verification:
    """One layer computes something else; what follows is fed A's values and agrees again."""
    v = passing(layers)
    index = [p.place for p in v.places].index(at)
    places = tuple(
        replace(
            p,
            relative=error if i == index else p.relative,
            cosine=0.9713 if i == index else p.cosine,
            chained=p.chained if i < index else error * (1 + (i - index) / 40),
        )
        for i, p in enumerate(v.places)
    )
    bad = places[index]
    scores = tuple(
        replace(s, kl=0.083 * (i + 1), top1=0.8125 - i / 8, top5=0.94, acceptance=s.acceptance and (0.71, 0.515))
        for i, s in enumerate(v.scores)
    )
    layer = f"{at}.self_attention.linear_qkv.weight"
    sections = {
        "bits": Section("bits", 458, (Problem("values differ", layer, "sha 1f3a90", "sha 77c2e4"),)),
        "forward": Section(
            "forward",
            len(places),
            (Problem("beyond the threshold", at, f"{bad.relative:.2g}", f"at most {bad.threshold:.2g}"),),
            notes=("routing ties broken by A",),
        ),
    }
    culprit = Culprit(
        at,
        (f"decoder.{layer}", f"decoder.{at}.self_attention.linear_proj.weight", f"decoder.{at}.mlp.router.weight"),
        tuple(f"model.{at}.self_attn.{p}_proj.weight" for p in "qkvo"),
        (f"{at}.q", f"{at}.k"),
        "The rows of q and k look interchanged: swapping them brings the error back to the floor.",
    )
    return replace(
        v,
        sections=tuple(sections.get(s.level, s) for s in v.sections),
        places=places,
        scores=scores,
        culprit=culprit,
    )


def broken() -> Verification:
    """NaN, infinite and zero in every field that can be."""
    v = failing(error=math.nan)
    places = list(v.places)
    places[20] = replace(places[20], relative=math.inf, max_abs=math.inf, chained=math.inf)
    places[21] = replace(places[21], floor=math.nan, threshold=math.nan, cosine=math.nan, mean_abs=math.nan)
    places[22] = replace(places[22], floor=0.0, threshold=0.0, relative=0.0, chained=0.0)
    scores = tuple(
        replace(s, kl=math.nan if i else math.inf, top1=math.nan, top5=0.0, loss=(2.1, math.nan))
        for i, s in enumerate(v.scores)
    )
    scores = (*scores[:-1], replace(scores[-1], acceptance=(0.5, math.nan)))
    return replace(v, places=tuple(places), scores=scores)


def skipped() -> Verification:
    """No level had anything to compare."""
    sections = tuple(Section(level, 0, skipped="the families differ") for level in LEVELS)
    return Verification(A, B, sections)


def no_forward() -> Verification:
    """Everything but the forward passes."""
    v = passing()
    sections = (*v.sections[:3], Section("forward", 0, skipped="no tree runs this family"))
    return replace(v, sections=sections, places=(), scores=(), tokens=(0, 0))


def streamed() -> Verification:
    """Layer by layer from disk."""
    return replace(passing(61, 1), mode="streamed", dtype="bfloat16", device="cuda:0")


def quick() -> Verification:
    """A few places only."""
    v = passing()
    places = tuple(
        p for p in v.places if p.place in ("embedding", "layers.0", "layers.24", "mtp.0.fused", "mtp.0.block")
    )
    sections = (*v.sections[:3], Section("forward", len(places), notes=("quick: 5 of 57 places",)))
    return replace(v, places=places, scores=(), sections=sections, quick=True)


def hostile() -> Verification:
    """Every text is an attack."""
    v = failing()
    places = tuple(replace(p, place=f"layers.{HOSTILE}") if p.place == "layers.3" else p for p in v.places)
    section = Section("names", 458, (Problem(HOSTILE, HOSTILE, HOSTILE, HOSTILE),), HOSTILE, (HOSTILE,))
    side = SideFacts(HOSTILE, HOSTILE, HOSTILE, HOSTILE, {HOSTILE: 1}, HOSTILE)
    return replace(
        v,
        a=side,
        b=side,
        sections=(section, *v.sections[1:]),
        places=places,
        scores=tuple(replace(s, place=f"mtp.{HOSTILE}.logits") for s in v.scores),
        culprit=Culprit(
            f"layers.{HOSTILE}", tuple(f"{HOSTILE}{i}" for i in range(20)), (HOSTILE,), (HOSTILE,), HOSTILE
        ),
        mapping=(Mapped(HOSTILE, HOSTILE, HOSTILE, 3),),
        environment={HOSTILE: HOSTILE, "command": HOSTILE},
        dtype=HOSTILE,
        device=HOSTILE,
    )


ALL = {
    "passing": passing,
    "failing": failing,
    "broken": broken,
    "skipped": skipped,
    "no_forward": no_forward,
    "streamed": streamed,
    "quick": quick,
    "hostile": hostile,
    "large": lambda: failing("layers.123", layers=240),
    "one_layer": lambda: passing(1, 1),
}
