"""Generation for the hybrid model: transformers' loops over its own cache, and drafting with MTP."""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin
from transformers.generation.streamers import BaseStreamer

from mtp_convert.models.nemotron_v3.cache import NemotronHybridCache
from mtp_convert.models.nemotron_v3.speculation import SpeculativeOutput, decode_with_drafts

if TYPE_CHECKING:
    from mtp_convert.models.mtp import MTPModule


class HybridGeneration(GenerationMixin):
    """`generate` and `generate_speculative`; a decoding step reads one token, whatever has been read before."""

    config: Any
    lm_head: nn.Module | None
    mtp: "MTPModule | None"

    def new_cache(self) -> NemotronHybridCache:
        """An empty cache for the backbone."""
        return NemotronHybridCache(self.config)

    @torch.no_grad()
    def generate_speculative(
        self, inputs: Tensor, *, streamer: BaseStreamer | None = None, **kwargs: object
    ) -> SpeculativeOutput:
        """Greedy generation in fewer passes: MTP drafts up to D tokens, one pass of the model checks them all.

        The tokens are those of `generate(..., do_sample=False)`, for every row of the batch. A round keeps as many
        drafts as the row with the fewest right ones has. Arguments are those of `generate`: prompt ids [B, S],
        `attention_mask`, `max_new_tokens`, `eos_token_id`, logits processors, stopping criteria.

        Raises ValueError if the model has no MTP, or for sampling, beams, or a cache that is not empty.
        """
        if self.mtp is None:
            raise ValueError("generate_speculative needs MTP, but the model has no MTP depth")
        generate: Any = self.generate  # type: ignore[misc]  # transformers says it needs its own model class
        # `generate` shows a streamer the prompt, but hands it to no decoding method other than its own.
        method = partial(decode_with_drafts, streamer=streamer)
        out: SpeculativeOutput = generate(inputs, custom_generate=method, streamer=streamer, **kwargs)
        return out

    def prepare_inputs_for_generation(  # type: ignore[override]  # the arguments of NeMo AutoModel
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: NemotronHybridCache | None = None,
        cache_position: Tensor | None = None,
        use_cache: bool | None = True,
        **kwargs: Any,  # noqa: ANN401 - whatever the loop carries along
    ) -> dict[str, Any]:
        """Arguments of the next forward pass: the prompt with an empty cache, then what is not cached yet.

        `input_ids` are all tokens so far [B, length]. `inputs_embeds` [B, S, H] stand for the prompt; `input_ids` then
        are only those behind it. transformers' loop says itself how many tokens are new (`next_sequence_length`, none:
        all of `input_ids`); for other callers they are those that the cache does not hold.
        """
        if use_cache and past_key_values is None:
            past_key_values = self.new_cache()
        done = past_key_values.length if past_key_values is not None else 0
        inputs: dict[str, Any] = {
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": bool(use_cache),
            "logits_to_keep": kwargs.get("logits_to_keep", 0),
            "output_hidden_states": kwargs.get("output_hidden_states"),
        }
        prompt = inputs_embeds.shape[1] if inputs_embeds is not None else 0
        if inputs_embeds is not None and done < prompt:
            return {**inputs, "inputs_embeds": inputs_embeds[:, done:]}
        by_loop = not kwargs.keys().isdisjoint(("next_sequence_length", "is_first_iteration"))
        new: int | None = kwargs.get("next_sequence_length") if by_loop else input_ids.shape[1] + prompt - done
        if new is not None and new > 0:  # not so for a chunk of the prompt, which some loops hand over alone
            input_ids = input_ids[:, input_ids.shape[1] - new :]
        return {**inputs, "input_ids": input_ids}

    def _prepare_cache_for_generation(  # type: ignore[override]  # nothing depends on the others
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *_: object
    ) -> None:
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation is {generation_config.cache_implementation!r}, but this model has its own cache"
            )
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = self.new_cache()

    def get_experts_implementation(self) -> dict[str, str]:
        """Which code multiplies the experts, in the form that transformers' generation loop reads."""
        return {"": self.config._experts_implementation}

    def set_experts_implementation(self, implementation: dict[str, str]) -> None:
        """Change it; transformers' loop does while decoding on a GPU."""
        self.config._experts_implementation = implementation[""]
