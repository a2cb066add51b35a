"""Greedy decoding with MTP drafts, exact: the model itself confirms every token.

Symbols: B rows, H hidden size, V vocabulary, D MTP depths, n drafts of a round (at most D), a accepted ones.

Tokens x[0..T] are known, the model has read all but x[T]. Depth k at position i reads what depth k - 1 (depth 0: the
model) computed there and token x[i + k + 1], and predicts x[i + k + 2]. So up to position T - k - 1 it reads known
tokens; from there to T - 1 it reads drafts of the depths before, and its own draft at T - 1 is token T + k + 1.
A round lets each depth catch up to position T - 1, runs the model on x[T] and all drafts at once, keeps the drafts up
to the first one that the model would not have chosen, and undoes whatever was computed from others. Per round the
model reads n + 1 tokens and depth k at most max(k, a) + 1, however long the sequence is.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from mtp_convert.models.nemotron_v3.batch import make_batch
from mtp_convert.models.nemotron_v3.cache import NemotronHybridCache
from mtp_convert.models.nemotron_v3.layers import NemotronV3Block

if TYPE_CHECKING:
    from mtp_convert.models.nemotron_v3.model import NemotronHForCausalLM


@dataclass(frozen=True)
class SpeculativeOutput:
    """Generated tokens and how well the drafts did.

    Attributes:
        sequences: prompt and new tokens [B, S]; rows that ended early are padded as `generate` does.
        rounds: passes of the model after the one over the prompt; plain decoding needs one per token.
        drafted: entry k: drafts of depth k that were checked, over unfinished rows.
        accepted: entry k: those of them that the model would have chosen, like all drafts before them.
    """

    sequences: Tensor
    rounds: int
    drafted: tuple[int, ...]
    accepted: tuple[int, ...]

    @property
    def acceptance(self) -> tuple[float, ...]:
        """Share of accepted drafts, per depth; nan for a depth that drafted nothing."""
        return tuple(a / d if d else float("nan") for a, d in zip(self.accepted, self.drafted, strict=True))


class _Trail:
    """What one depth (or the model) computed, [B, positions, H], for the positions that others may still read."""

    def __init__(self, values: Tensor) -> None:
        self.start, self.values = 0, values

    @property
    def end(self) -> int:
        return self.start + self.values.shape[1]

    def between(self, start: int, end: int) -> Tensor:
        return self.values[:, start - self.start : end - self.start]

    def extend(self, values: Tensor, *, at: int) -> None:
        """Positions from `at` on become `values`."""
        self.values = torch.cat([self.between(self.start, at), values], dim=1)

    def forget_before(self, position: int) -> None:
        self.values, self.start = self.between(position, self.end).clone(), position


class _Drafter:
    """The D depths, each with a cache of its own, also where they share weights."""

    def __init__(self, model: "NemotronHForCausalLM", padding: Tensor | None) -> None:
        assert model.mtp is not None
        self.model, self.mtp, self.padding = model, model.mtp, padding
        self.depths = model.mtp.num_depths
        kinds = [block.block_type for block in model.mtp.layers if isinstance(block, NemotronV3Block)]
        self.caches = [NemotronHybridCache(model.config, mtp_block_types=kinds) for _ in range(self.depths)]
        self.trails: list[_Trail] = []  # entry k is what depth k reads

    def prefill(self, ids: Tensor, hidden: Tensor) -> None:
        """Run every depth where it reads known tokens, but for the last such position, which the first round needs.

        `ids` [B, T + 1], `hidden` [B, T, H] of the model. Nothing of this is recorded: it stays right.
        """
        known = ids.shape[1]
        self.trails = [_Trail(hidden), *(_Trail(hidden[:, :0]) for _ in range(self.depths - 1))]
        for k, cache in enumerate(self.caches):
            self._run(k, ids, until=max(known - k - 2, 0))
            cache.activate_past_recording()
        self._forget()

    def draft(self, ids: Tensor, count: int) -> Tensor:
        """The next `count` tokens [B, count] behind `ids` [B, T + 1], as the depths see them."""
        known = ids.shape[1]
        for k in range(count):
            hidden = self._run(k, ids, until=known - 1)
            ids = torch.cat([ids, self.model.logits(hidden[:, -1:]).argmax(-1)], dim=1)
        return ids[:, known:]

    def settle(self, hidden: Tensor, *, known: int) -> None:
        """Go on from the `known` - 1 tokens that the model has read, its last outputs being `hidden` [B, a + 1, H]."""
        self.trails[0].extend(hidden, at=known - 1 - hidden.shape[1])
        for k, cache in enumerate(self.caches):
            right = max(known - 2 - k, 0)  # positions at which depth k read tokens that have turned out right
            cache.crop(min(right - cache.length, 0))
        self._forget()

    def _run(self, k: int, ids: Tensor, *, until: int) -> Tensor:
        """Depth k from where it stands to position `until` - 1; its outputs there."""
        cache, start = self.caches[k], self.caches[k].length
        hidden: Tensor = self.trails[k].between(start, until)
        if start == until:
            return hidden
        embedded = self.model.model.embed(ids[:, start + k + 1 : until + k + 1])
        padding = None if self.padding is None else self.padding[:, :until]
        batch = make_batch(self.model.config, embedded, attention_mask=padding, cache=cache)
        first, *others = self.mtp.depth_layers(k)
        hidden = first(hidden, embed_input=embedded, batch=batch)
        for layer in others:
            hidden = layer(hidden, batch=batch)
        cache.advance(until - start)
        if k + 1 < self.depths:
            self.trails[k + 1].extend(hidden, at=start)
        return hidden

    def _forget(self) -> None:
        for trail, cache in zip(self.trails, self.caches, strict=True):
            trail.forget_before(cache.length)


class _Tokens:
    """Prompt and generated tokens [B, length], extended by the rules of transformers' own loop."""

    def __init__(
        self, prompt: Tensor, criteria: StoppingCriteriaList, pad: Tensor | None, streamer: BaseStreamer | None
    ) -> None:
        self.ids, self._criteria, self._pad, self._streamer = prompt, criteria, pad, streamer
        self.finished = torch.zeros(len(prompt), dtype=torch.bool, device=prompt.device)

    def append(self, new: Tensor) -> bool:
        """Add [B, m] tokens until every row is finished; whether they all are."""
        for column in torch.split(new, 1, dim=1):
            if self._pad is not None:
                column = column.masked_fill(self.finished[:, None], int(self._pad))
            if self._streamer is not None:
                self._streamer.put(column.squeeze(1).cpu())  # type: ignore[no-untyped-call]
            self.ids = torch.cat([self.ids, column], dim=1)
            self.finished = self.finished | self._criteria(self.ids, None)
            if bool(self.finished.all()):
                if self._streamer is not None:
                    self._streamer.end()  # type: ignore[no-untyped-call]
                return True
        return False


def decode_with_drafts(
    model: "NemotronHForCausalLM",
    input_ids: Tensor,
    *,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None = None,
    **model_kwargs: Any,  # noqa: ANN401 - named here, `generate` would hand them over twice
) -> SpeculativeOutput:
    """A decoding method for transformers' `generate(custom_generate=...)`; see the module's text.

    `model_kwargs` are read for `attention_mask` [B, S] and an empty `past_key_values`.

    Raises ValueError for whatever is not plain greedy decoding from the beginning.
    """
    attention_mask: Tensor | None = model_kwargs.get("attention_mask")
    cache: NemotronHybridCache | None = model_kwargs.get("past_key_values")
    cache = model.new_cache() if cache is None else cache
    _refuse(generation_config, cache)
    tokens = _Tokens(input_ids, stopping_criteria, generation_config._pad_token_tensor, streamer)
    longest, depths = generation_config.max_length, model.num_mtp_depths
    padding = None
    if attention_mask is not None:
        room = longest + depths - input_ids.shape[1]
        padding = F.pad(attention_mask, (0, room), value=1)
    hidden = _read(model, input_ids, cache, padding)
    ended = tokens.append(_choose(model.logits(hidden[:, -1:]), input_ids, logits_processor))
    drafted, accepted, rounds = [0] * depths, [0] * depths, 0
    drafter = _Drafter(model, padding)
    if not ended:
        drafter.prefill(tokens.ids, hidden)
    cache.activate_past_recording()
    with model._optimize_model_for_decode():  # type: ignore[misc]  # it needs nothing but this class
        while not ended:
            known = tokens.ids
            drafts = drafter.draft(known, min(depths, longest - known.shape[1] - 1))
            hidden = _read(model, torch.cat([known[:, -1:], drafts], dim=1), cache, padding)
            chosen = _choose(model.logits(hidden), torch.cat([known, drafts], dim=1), logits_processor)
            right = (chosen[:, :-1] == drafts).cumprod(dim=1)[~tokens.finished]  # [unfinished rows, n]
            for k, count in enumerate(right.sum(0).tolist()):
                drafted[k] += len(right)
                accepted[k] += count
            common = int(right.sum(1).min())
            cache.crop(common - drafts.shape[1])
            ended = tokens.append(chosen[:, : common + 1])
            rounds += 1
            if not ended:
                drafter.settle(hidden[:, : common + 1], known=tokens.ids.shape[1])
    return SpeculativeOutput(tokens.ids, rounds, tuple(drafted), tuple(accepted))


def _read(model: "NemotronHForCausalLM", ids: Tensor, cache: NemotronHybridCache, padding: Tensor | None) -> Tensor:
    """Hidden states [B, new, H] of `ids` [B, new] behind what is cached."""
    mask = None if padding is None else padding[:, : cache.length + ids.shape[1]]
    hidden: Tensor = model.model(ids, attention_mask=mask, past_key_values=cache)
    return hidden


def _choose(logits: Tensor, ids: Tensor, processor: LogitsProcessorList) -> Tensor:
    """The model's choices [B, m] by logits [B, m, V]; `ids` [B, length] end with the token before the last choice."""
    choices = []
    for j in range(logits.shape[1]):
        behind = ids[:, : ids.shape[1] - logits.shape[1] + 1 + j]
        scores = processor(behind.long(), logits[:, j].to(torch.float32, copy=True).contiguous())  # type: ignore[arg-type]
        choices.append(scores.argmax(-1))
    return torch.stack(choices, dim=1)


def _refuse(generation_config: GenerationConfig, cache: NemotronHybridCache) -> None:
    problems = []
    if generation_config.do_sample:
        problems.append("do_sample is true")
    if generation_config.num_beams != 1:
        problems.append(f"num_beams is {generation_config.num_beams}")
    if cache.length:
        problems.append(f"the cache holds {cache.length} tokens already")
    if problems:
        raise ValueError(f"MTP drafts are for greedy decoding of one prompt per row: {', '.join(problems)}")
