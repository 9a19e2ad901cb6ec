"""RefAlign's diffusion transformer: Wan with a reference branch (RefAlign, arXiv 2603.25743, section 3).

The branch adds no weight. It is a way of running Wan's own: reference latents become extra latent frames behind the
video's, take part in self-attention and feed-forward, skip the cross-attention to the text, and are dropped before
the head. Bernini-R (arXiv 2605.22344) differs in two switches of the configuration: each reference has a grid of its
own, and reads the text. This file stands alone: a Hub repo carries it beside the transformer's weights.
"""

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from diffusers import WanTransformer3DModel
from diffusers.hooks import (
    FasterCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed, WanTransformerBlock
from diffusers.utils import apply_lora_scale
from diffusers.utils.torch_utils import maybe_allow_in_graph
from torch import nn


WAN_CHANNELS = 16  # channels of Wan 2.1's latents
WAN_CLASSES = ("WanTransformer3DModel", "RefAlignWanTransformer3DModel")
REFERENCE_ROPES = ("frames", "sources")  # where references stand: RefAlign's way, and Bernini-R's
TRAINED_SOURCES = 5  # the most references that Bernini-R was trained with
SOURCE_THETA = 10000.0  # base of the rotation that tells sources apart

# The modules whose outputs TaylorSeer extrapolates. Its own defaults match no module of Wan.
TAYLORSEER_IDENTIFIERS = [r"blocks\.\d+\.(attn1|attn2|ffn)"]


@dataclass
class RefAlignWanTransformerOutput(Transformer2DModelOutput):
    """
    Output of [`RefAlignWanTransformer3DModel`].

    Args:
        sample (`torch.Tensor` of shape `(batch, channels, frames, height, width)`):
            The velocity of the video's latents; the references are not in it.
        reference_hidden_states (`tuple`, *optional*):
            The reference tokens after each block of `output_reference_layers`, in that order, each of shape
            `(batch, references * tokens, dim)`. For a list of references each is a tuple with the tokens of each
            reference, `(batch, tokens, dim)`.
    """

    reference_hidden_states: tuple[torch.Tensor, ...] | tuple[tuple[torch.Tensor, ...], ...] | None = None


@dataclass
class RefAlignMagCacheConfig(MagCacheConfig):
    """
    diffusers' [`MagCacheConfig`] with ratios for each guidance pass, whose residuals change at a pace of their own.

    Args:
        pass_ratios (`dict[str, Sequence[float]]`):
            The `mag_ratios` of each pass: `"null"`, `"reference"` and `"full"`. Any number of steps will do.
    """

    pass_ratios: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if missing := {"null", "reference", "full"} - self.pass_ratios.keys():
            raise ValueError(f"`pass_ratios` must have the ratios of each pass, but lacks {sorted(missing)}.")
        self._by_pass = {}
        for name, ratios in self.pass_ratios.items():
            # diffusers' own stretches them to the number of steps
            stretched = MagCacheConfig(num_inference_steps=self.num_inference_steps, mag_ratios=list(ratios))
            self._by_pass[name] = stretched.mag_ratios
        self.begin()

    def begin(self) -> None:
        """To be called when the cache is emptied: its own count of the steps begins anew."""
        self._starts: dict[str, int] = {}
        self.mag_ratios = self._by_pass["full"]

    def choose(self, context: str, step: int | None) -> None:
        """Takes the ratios, from the step of the cache's beginning on, of the pass that a context of the cache is of:
        `full`, or `full_1` of a second group."""
        start = self._starts.setdefault(context, step or 0)
        self.mag_ratios = self._by_pass[context.partition("_")[0]][start:]


@maybe_allow_in_graph
class RefAlignWanTransformerBlock(WanTransformerBlock):
    """Wan's block, in which the tokens behind the video's skip the cross-attention to the text."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        rotary_emb: tuple[torch.Tensor, torch.Tensor],
        num_video_tokens: int | None = None,
        token_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, tokens, dim)`): video tokens, then reference tokens.
            encoder_hidden_states (`torch.Tensor` of shape `(batch, text_tokens, dim)`): the embedded prompt.
            temb (`torch.Tensor` of shape `(batch, 6, dim)`): one modulation for all tokens of a sample.
            rotary_emb (`tuple` of two `(1, tokens, 1, head_dim)`): cosines and sines.
            num_video_tokens (`int`, *optional*): how many tokens are the video's; all of them if `None`.
            token_mask (`torch.Tensor` of shape `(1, tokens, 1)`, *optional*): 1 for video tokens, 0 for reference
                tokens. Takes the place of `num_video_tokens` where the tokens are split over ranks.
        """
        if num_video_tokens is None and token_mask is None:
            return super().forward(
                hidden_states,
                encoder_hidden_states,
                temb,
                rotary_emb,  # pyright: ignore[reportArgumentType] (diffusers types the pair as one tensor)
            )
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (self.scale_shift_table + temb.float()).chunk(6, dim=1)

        # 1. Self-attention over video and references
        norm_hidden_states = (self.norm1(hidden_states.float()) * (1 + scale) + shift).type_as(hidden_states)
        attn_output = self.attn1(norm_hidden_states, None, None, rotary_emb)
        hidden_states = (hidden_states.float() + attn_output * gate).type_as(hidden_states)

        # 2. Cross-attention to the text, for the video only
        if token_mask is None:
            # The parts have no names, so that none lives on through the feed-forward and adds to the peak of memory
            hidden_states = torch.cat(
                [
                    hidden_states[:, :num_video_tokens]
                    + self._cross_attention(hidden_states[:, :num_video_tokens], encoder_hidden_states),
                    hidden_states[:, num_video_tokens:],
                ],
                dim=1,
            )
        else:
            hidden_states = hidden_states + self._cross_attention(hidden_states, encoder_hidden_states) * token_mask

        # 3. Feed-forward over video and references
        norm_hidden_states = (self.norm3(hidden_states.float()) * (1 + ffn_scale) + ffn_shift).type_as(hidden_states)
        ffn_output = self.ffn(norm_hidden_states)
        return (hidden_states.float() + ffn_output.float() * ffn_gate).type_as(hidden_states)

    def _cross_attention(self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        norm_hidden_states = self.norm2(hidden_states.float()).type_as(hidden_states)
        return self.attn2(norm_hidden_states, encoder_hidden_states, None, None)


def _with_reference_options(signature: inspect.Signature) -> inspect.Signature:
    """The signature of Wan's `__init__`, with the options of the reference branch."""
    options = [
        inspect.Parameter("reference_rope", inspect.Parameter.KEYWORD_ONLY, default="frames", annotation=str),
        inspect.Parameter("text_to_references", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=bool),
    ]
    return signature.replace(parameters=[*signature.parameters.values(), *options])


class TokenMask(nn.Module):
    """1 for video tokens and 0 for reference tokens, `(1, tokens, 1)`: a module, so that context parallelism can split
    what it returns over the ranks as it splits the tokens."""

    def forward(self, hidden_states: torch.Tensor, num_video_tokens: int) -> torch.Tensor:
        positions = torch.arange(hidden_states.shape[1], device=hidden_states.device)
        return (positions < num_video_tokens).to(hidden_states.dtype)[None, :, None]


class SourceRotaryPosEmbed(WanRotaryPosEmbed):
    """
    Wan's rotary positions, in which each reference is a source of its own (SA-3D of Bernini-R, arXiv 2605.22344).

    Every source has a grid that starts at (0, 0, 0). To the angles of source i those of a position i are added, over
    all channels of a head: pair j turns by `i * theta^(-2j / head_dim)` more. The video is source 0. One module makes
    the positions of all sources, so that context parallelism can split them as it splits the tokens.
    """

    def forward(
        self, hidden_states: torch.Tensor, references: Sequence[torch.Tensor] = ()
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch, channels, frames, height, width)`): the video's latents.
            references (`Sequence[torch.Tensor]`): each `(batch, channels, 1, height, width)`, of any height and width.

        Returns:
            `tuple`: cosines and sines, each `(1, tokens, 1, head_dim)`, the video's first.
        """
        positions: list[Any] = [super().forward(hidden_states)]  # diffusers types each pair as one tensor
        for source, latents in zip(source_ids(len(references)), references, strict=True):
            grid: Any = super().forward(latents)
            positions.append(self._turned(grid, source))
        cosines, sines = zip(*positions, strict=True)
        return torch.cat(cosines, dim=1), torch.cat(sines, dim=1)

    def _turned(self, position: tuple[torch.Tensor, torch.Tensor], source: float) -> tuple[torch.Tensor, torch.Tensor]:
        cosine, sine = position
        pairs = torch.arange(0, self.attention_head_dim, 2, dtype=torch.float64)
        angles = (source * SOURCE_THETA ** (-pairs / self.attention_head_dim)).repeat_interleave(2)
        cosine_i, sine_i = angles.cos().to(cosine), angles.sin().to(sine)
        return cosine * cosine_i - sine * sine_i, sine * cosine_i + cosine * sine_i


def source_ids(num_references: int) -> list[float]:
    """The source of each reference: 1, 2, ...; more than were trained share the trained range evenly."""
    if num_references <= TRAINED_SOURCES:
        return [float(source) for source in range(1, num_references + 1)]
    return torch.linspace(1, TRAINED_SOURCES, num_references, dtype=torch.float64).tolist()


class RefAlignWanTransformer3DModel(WanTransformer3DModel):
    r"""
    [`WanTransformer3DModel`] with a reference branch: same parameters, same state dict, and two entries more in the
    configuration.

    Without `reference_hidden_states` it is exactly [`WanTransformer3DModel`].

    Args:
        reference_rope (`str`, defaults to `"frames"`): where references stand. `"frames"`: they are latent frames
            behind the video's, of its size (RefAlign). `"sources"`: each has a grid of its own, in any size, told
            apart by a rotation ([`SourceRotaryPosEmbed`]; Bernini-R).
        text_to_references (`bool`, defaults to `False`): whether references read the text too (Bernini-R).
        args, kwargs: [`WanTransformer3DModel`]'s.
    """

    _no_split_modules = ["RefAlignWanTransformerBlock"]
    _repeated_blocks = ["RefAlignWanTransformerBlock"]
    _cp_plan = {
        # "" splits Wan 2.2's timestep per token, which a Wan 2.1 model never gets, and forbids all outputs but tensors
        **{name: plan for name, plan in WanTransformer3DModel._cp_plan.items() if name != ""},
        "token_mask": {0: ContextParallelInput(split_dim=1, expected_dims=3, split_output=True)},
        "all_tokens": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }

    @functools.wraps(WanTransformer3DModel.__init__)
    def __init__(
        self, *args: Any, reference_rope: str = "frames", text_to_references: bool = False, **kwargs: Any
    ) -> None:
        if reference_rope not in REFERENCE_ROPES:
            raise ValueError(f"`reference_rope` must be one of {REFERENCE_ROPES}, but is {reference_rope!r}.")
        super().__init__(*args, **kwargs)
        self.register_to_config(reference_rope=reference_rope, text_to_references=text_to_references)
        self._take_reference_blocks()
        if reference_rope == "sources":
            self.rope.__class__ = SourceRotaryPosEmbed  # same buffers, another forward
        # Both without parameters: places where context parallelism splits the mask and gathers the tokens
        self.token_mask = TokenMask()
        self.all_tokens = nn.Identity()

    # diffusers reads the names of the configuration from the signature
    __init__.__signature__ = _with_reference_options(  # pyright: ignore[reportAttributeAccessIssue]
        inspect.signature(WanTransformer3DModel.__init__)
    )

    @classmethod
    def from_wan(cls, transformer: WanTransformer3DModel) -> "RefAlignWanTransformer3DModel":
        """
        A model that shares the weights of `transformer`: no copy is made, and `transformer` stays as it is.

        Raises:
            ValueError: if `transformer` is quantised or has LoRAs, whose layers cannot be shared.
        """
        if getattr(transformer, "hf_quantizer", None) is not None or getattr(transformer, "peft_config", None):
            raise ValueError(
                "A Wan transformer that is quantised or has LoRAs cannot be given the reference branch. Load it as "
                f"{cls.__name__} in the first place (its from_pretrained and from_single_file), and LoRAs after that."
            )
        with torch.device("meta"):
            # diffusers types it as a tuple, which it is only on demand
            model = cast("RefAlignWanTransformer3DModel", cls.from_config(transformer.config))
        model.load_state_dict(transformer.state_dict(), assign=True)
        model.rope = transformer.rope  # its buffers are in no state dict
        for ours, theirs in zip(model.parameters(), transformer.parameters(), strict=True):
            ours.requires_grad_(theirs.requires_grad)
        return model.train(transformer.training)

    def enable_cache(self, config: Any) -> None:
        """
        Enables a cache of diffusers: FirstBlockCache, MagCache, SeaCache or TaylorSeer.

        TaylorSeer without identifiers gets those of this model ([`TAYLORSEER_IDENTIFIERS`]).

        Raises:
            ValueError: for PyramidAttentionBroadcast and FasterCache.
        """
        if isinstance(config, (PyramidAttentionBroadcastConfig, FasterCacheConfig)):
            # Both keep one state, or one pair of states, for all guidance passes; RefAlign has up to three.
            raise ValueError(
                f"{type(config).__name__} mixes RefAlign's guidance passes with each other. Use "
                "FirstBlockCacheConfig, MagCacheConfig, SeaCacheConfig or TaylorSeerCacheConfig instead."
            )
        if isinstance(config, TaylorSeerCacheConfig) and not (
            config.use_lite_mode or config.cache_identifiers or config.skip_predict_identifiers
        ):
            config = dataclasses.replace(config, cache_identifiers=TAYLORSEER_IDENTIFIERS)
        super().enable_cache(config)

    @contextmanager
    def cache_context(self, name: str, **kwargs: Any) -> Iterator[None]:
        """As diffusers' own, which keeps what a cache knows of one pass apart from the others."""
        if isinstance(self._cache_config, RefAlignMagCacheConfig):
            self._cache_config.choose(name, kwargs.get("step_index"))
        with super().cache_context(name, **kwargs):
            yield

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        super()._reset_stateful_cache(recurse)
        if isinstance(self._cache_config, RefAlignMagCacheConfig):
            self._cache_config.begin()

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.LongTensor,
        encoder_hidden_states: torch.Tensor,
        encoder_hidden_states_image: torch.Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        *,
        reference_hidden_states: torch.Tensor | Sequence[torch.Tensor] | None = None,
        output_reference_layers: Sequence[int] | None = None,
    ) -> RefAlignWanTransformerOutput | Transformer2DModelOutput | tuple:
        """
        The velocity of the video's latents (RefAlign, arXiv 2603.25743, section 3).

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, channels, frames, height, width)`):
                Noisy video latents.
            timestep (`torch.Tensor` of shape `(batch,)`):
                In [0, 1000]. One timestep modulates video and references alike.
            encoder_hidden_states (`torch.Tensor` of shape `(batch, text_tokens, text_dim)`):
                The prompt's embeddings.
            encoder_hidden_states_image (`torch.Tensor`, *optional*):
                As in [`WanTransformer3DModel`].
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return an output class instead of a tuple.
            attention_kwargs (`dict`, *optional*):
                `{"scale": s}` scales the LoRA layers by `s` for this call.
            reference_hidden_states (`torch.Tensor` or `list[torch.Tensor]`, *optional*):
                Clean latents of shape `(batch, channels, references, height, width)`: one latent frame per
                reference, normalised as the video's are. Zeros are the null reference. With `reference_rope`
                `"sources"` also a list of `(batch, channels, 1, height, width)`, each of its own size. `None`:
                exactly [`WanTransformer3DModel`].
            output_reference_layers (`Sequence[int]`, *optional*):
                Blocks, counted from 0, after which the reference tokens are returned too.

        Returns:
            [`RefAlignWanTransformerOutput`], or a tuple of its fields. The second field is there only with
            `output_reference_layers`.

        Raises:
            ValueError: if the shapes of video and references do not fit each other, or a layer does not exist.
        """
        layers = None if output_reference_layers is None else tuple(output_reference_layers)
        if reference_hidden_states is None:
            if layers is not None:
                raise ValueError(
                    f"`output_reference_layers` is {layers}, but there are no reference "
                    "tokens to return. Pass `reference_hidden_states`, or leave `output_reference_layers` out."
                )
            # The decorator has taken the LoRA scale out of `attention_kwargs`, so it is not applied twice
            return super().forward(  # pyright: ignore[reportReturnType] (diffusers types it as a tensor)
                hidden_states=hidden_states,
                timestep=timestep,
                encoder_hidden_states=encoder_hidden_states,
                encoder_hidden_states_image=encoder_hidden_states_image,
                return_dict=return_dict,
                attention_kwargs=attention_kwargs,
            )
        self._check_references(hidden_states, timestep, reference_hidden_states, layers)

        # 1. Tokens: the references' stand behind the video's
        batch_size, _, num_frames, height, width = hidden_states.shape
        _, patch_height, patch_width = self.config["patch_size"]
        grid = (num_frames, height // patch_height, width // patch_width)
        num_video_tokens = grid[0] * grid[1] * grid[2]
        hidden_states, rotary_emb, reference_lengths = self._tokens(hidden_states, reference_hidden_states)
        num_tokens = hidden_states.shape[1]

        # 2. Conditions
        temb, timestep_proj, encoder_hidden_states, encoder_hidden_states_image = self.condition_embedder(
            timestep, encoder_hidden_states, encoder_hidden_states_image
        )
        timestep_proj = timestep_proj.unflatten(1, (6, -1))
        if encoder_hidden_states_image is not None:
            encoder_hidden_states = torch.concat([encoder_hidden_states_image, encoder_hidden_states], dim=1)

        # 3. Which tokens are the video's. Only where a rank holds a part of the tokens is the mask shorter than they
        # are, and only there it is needed: a slice costs less.
        token_mask = self.token_mask(hidden_states, num_video_tokens)
        is_split = token_mask.shape[1] != num_tokens
        branch = (num_video_tokens, token_mask if is_split else None)
        if self.config["text_to_references"]:
            branch = (None, None)  # all tokens are alike: Wan's own block

        # 4. Transformer blocks
        reference_tokens = {}
        arguments = (encoder_hidden_states, timestep_proj, rotary_emb, *branch)
        for index, block in enumerate(self.blocks):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                checkpointed = self._gradient_checkpointing_func
                hidden_states = checkpointed(block, hidden_states, *arguments)  # pyright: ignore[reportOptionalCall]
            else:
                hidden_states = block(hidden_states, *arguments)
            if index in (layers or ()):
                tokens = self.all_tokens(hidden_states)[:, num_video_tokens:]
                reference_tokens[index] = tokens if reference_lengths is None else tokens.split(reference_lengths, 1)

        # 5. Head, for the video alone. Where a rank holds a part of the tokens, `proj_out` gathers them first.
        if not is_split:
            hidden_states = hidden_states[:, :num_video_tokens]
        shift, scale = (self.scale_shift_table.to(temb.device) + temb.unsqueeze(1)).chunk(2, dim=1)
        shift, scale = shift.to(hidden_states.device), scale.to(hidden_states.device)
        hidden_states = (self.norm_out(hidden_states.float()) * (1 + scale) + shift).type_as(hidden_states)
        hidden_states = self.proj_out(hidden_states)[:, :num_video_tokens]

        # 6. Unpatchify: (batch, frames * rows * columns, patch_height * patch_width * channels) to latents
        hidden_states = hidden_states.reshape(batch_size, *grid, patch_height, patch_width, -1)
        sample = hidden_states.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)

        references = None if layers is None else tuple(reference_tokens[layer] for layer in layers)
        if not return_dict:
            return (sample,) if references is None else (sample, references)
        return RefAlignWanTransformerOutput(sample=sample, reference_hidden_states=references)

    def _tokens(
        self, hidden_states: torch.Tensor, references: torch.Tensor | Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor], list[int] | None]:
        """The tokens of video and references, `(batch, tokens, dim)`, their rotary positions, and, for a list of
        references, how many tokens each has."""
        dtype = hidden_states.dtype
        if self.config["reference_rope"] == "frames":
            # References are latent frames behind the video's, in the patches and in the rotary positions
            latents = torch.cat([hidden_states, cast("torch.Tensor", references).to(dtype)], dim=2)
            return self._patches(latents).contiguous(), self.rope(latents), None
        is_list = not isinstance(references, torch.Tensor)
        sources = references if is_list else references.split(1, dim=2)
        sources = [latents.to(dtype) for latents in sources]
        tokens = [self._patches(latents) for latents in (hidden_states, *sources)]
        lengths = [part.shape[1] for part in tokens[1:]] if is_list else None
        return torch.cat(tokens, dim=1), self.rope(hidden_states, sources), lengths

    def _patches(self, latents: torch.Tensor) -> torch.Tensor:
        return self.patch_embedding(latents).flatten(2).transpose(1, 2)

    def _check_references(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        reference_hidden_states: torch.Tensor | Sequence[torch.Tensor],
        layers: Sequence[int] | None,
    ) -> None:
        video, references = tuple(hidden_states.shape), reference_hidden_states
        if isinstance(references, torch.Tensor):
            if self.config["reference_rope"] == "frames" or references.ndim != 5:
                self._check_frames(video, tuple(references.shape))
            else:
                self._check_sources(video, references.split(1, dim=2))
        else:
            self._check_sources(video, references)
        if timestep.ndim != 1:
            raise ValueError(
                f"`timestep` has shape {tuple(timestep.shape)}; with references it must be (batch,): one timestep "
                "modulates all tokens of a sample."
            )
        if self.config["patch_size"][0] != 1:
            raise ValueError(
                f"`patch_size` is {tuple(self.config['patch_size'])}; with references its first number must be 1, "
                "because each reference is one latent frame."
            )
        for layer in layers or ():
            if not 0 <= layer < len(self.blocks):
                raise ValueError(
                    f"`output_reference_layers` names block {layer}, but the blocks are 0 to {len(self.blocks) - 1}."
                )

    @staticmethod
    def _check_frames(video: tuple[int, ...], references: tuple[int, ...]) -> None:
        if len(references) != 5 or references[:2] != video[:2] or references[3:] != video[3:] or references[2] == 0:
            raise ValueError(
                f"`reference_hidden_states` has shape {references}; beside `hidden_states` of shape {video} it must "
                f"be (batch, channels, references, height, width) = ({video[0]}, {video[1]}, 1 or more, {video[3]}, "
                f"{video[4]}). Pass `None` where there are no references."
            )

    def _check_sources(self, video: tuple[int, ...], references: Sequence[torch.Tensor]) -> None:
        if self.config["reference_rope"] != "sources":
            raise ValueError(
                "`reference_hidden_states` is a list, which only a model with `reference_rope` 'sources' (Bernini-R) "
                "takes. Pass one tensor (batch, channels, references, height, width)."
            )
        if not references:
            raise ValueError("`reference_hidden_states` is an empty list. Pass `None` where there are no references.")
        _, patch_height, patch_width = self.config["patch_size"]
        for number, latents in enumerate(references, 1):
            shape = tuple(latents.shape)
            fits = len(shape) == 5 and shape[:2] == video[:2] and shape[2] == 1 and min(shape[3:]) > 0
            if not fits or shape[3] % patch_height or shape[4] % patch_width:
                raise ValueError(
                    f"Reference {number} of `reference_hidden_states` has shape {shape}; beside `hidden_states` of "
                    f"shape {video} it must be (batch, channels, 1, height, width) = ({video[0]}, {video[1]}, 1, a "
                    f"multiple of {patch_height}, a multiple of {patch_width})."
                )

    # -- What diffusers 0.42 does not offer; tests/pipelines/test_diffusers.py tells which of it can go ---------------

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> "RefAlignWanTransformer3DModel":
        """Loads as diffusers' own does, but from safetensors files alone: others run code when they are opened."""
        return super().from_pretrained(*args, **{**kwargs, "use_safetensors": True})

    def _take_reference_blocks(self) -> None:
        # diffusers/models/transformers/transformer_wan.py: the class of its blocks is fixed
        for block in self.blocks:
            block.__class__ = RefAlignWanTransformerBlock  # same parameters, another forward

    @classmethod
    def extract_init_dict(
        cls, config_dict: dict[str, Any], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        # diffusers/configuration_utils.py: warns at every load of `auto_map`, which its own AutoModel reads
        config_dict = dict(config_dict)
        config_dict.pop("auto_map", None)
        return super().extract_init_dict(config_dict, **kwargs)

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path_or_dict: str | dict | None = None,
        *,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> "RefAlignWanTransformer3DModel":
        """
        Loads a native or diffusers checkpoint, as diffusers' own does. With `dtype` it keeps in float32 what
        [`~RefAlignWanTransformer3DModel.from_pretrained`] keeps: norms, modulation, timestep embedding.

        Raises:
            ValueError: for a file that runs code when it is opened, or a quantisation that would not be done.
        """
        name = pretrained_model_link_or_path_or_dict
        if isinstance(name, (str, os.PathLike)) and os.fspath(name).endswith((".bin", ".ckpt", ".pt", ".pth")):
            raise ValueError(f"{name} is of a format that runs code when it is opened. Pass a .safetensors file.")
        dtype = torch_dtype if dtype is None else dtype
        quantization = kwargs.pop("quantization_config", None)
        method = getattr(quantization, "quant_method", None)
        if method not in (None, "gguf", "torchao"):
            raise ValueError(
                f"`from_single_file` quantises by GGUFQuantizationConfig and TorchAoConfig, but not by "
                f"{type(quantization).__name__}. Save the model as a folder, and pass that to `from_pretrained`."
            )
        if method == "gguf":
            return super().from_single_file(
                name,  # pyright: ignore[reportArgumentType] (it takes state dicts too)
                dtype=dtype,
                quantization_config=quantization,
                **kwargs,
            )
        # diffusers/loaders/single_file_model.py: casts norms and modulation too, and passes over torchao's ways
        model = super().from_single_file(name, **kwargs)  # pyright: ignore[reportArgumentType]
        if dtype is not None or quantization is not None:
            model.cast_weights(dtype or torch.bfloat16)
        return model if quantization is None else model._quantize(quantization)

    def _quantize(self, config: Any) -> "RefAlignWanTransformer3DModel":
        """Quantises its weights as `from_pretrained` does, one by one."""
        from diffusers.quantizers import DiffusersAutoQuantizer

        quantizer: Any = DiffusersAutoQuantizer.from_config(config, pre_quantized=False)
        quantizer.validate_environment()
        quantizer.preprocess_model(model=self, device_map=None, keep_in_fp32_modules=self._keep_in_fp32_modules)
        for name, parameter in list(self.named_parameters()):
            if quantizer.check_if_quantized_param(self, parameter, name, {}):
                quantizer.create_quantized_param(self, parameter, name, parameter.device, {}, [])
        quantizer.postprocess_model(self)
        self.hf_quantizer = quantizer
        return self

    def cast_weights(self, dtype: torch.dtype) -> "RefAlignWanTransformer3DModel":
        """Casts its weights but those that [`~RefAlignWanTransformer3DModel.from_pretrained`] keeps in float32."""
        for name, parameter in self.named_parameters():
            is_kept = any(module in name.split(".") for module in self._keep_in_fp32_modules)
            parameter.data = parameter.data.to(torch.float32 if is_kept else dtype)
        return self


# -- What is kept over the steps of a small model ---------------------------------------------------------------------


class KeptOverSteps:
    """
    While it is on, what a transformer computes of the texts alone (their embedding, and each block's keys and values)
    or of the latents' sizes alone (rotary positions) is computed once for each: bit for bit the same. For models so
    small that this is a large part of a step.
    """

    def __init__(self, transformer: RefAlignWanTransformer3DModel, is_small: bool) -> None:
        embedder: Any = transformer.condition_embedder
        blocks: Any = transformer.blocks
        modules: dict[nn.Module, Callable] = {transformer.rope: _key_of_sizes, embedder.text_embedder: _key_of_text}
        for block in blocks:
            modules |= dict.fromkeys((block.attn2.to_k, block.attn2.to_v, block.attn2.norm_k), _key_of_text)
        # What is offloaded, cached or compiled has a forward of its own, which must see every call
        is_plain = all(map(_is_plain, (transformer, *blocks, *modules)))
        self.modules = modules if is_small and is_plain else {}
        self.kept: dict[tuple[Any, ...], tuple[Any, Any]] = {}

    def __enter__(self) -> "KeptOverSteps":
        for module, key_of in self.modules.items():
            module.forward = functools.partial(self._forward, key_of, module.forward)
        return self

    def __exit__(self, *_: Any) -> None:
        for module in self.modules:
            del module.forward  # the class's own is seen again
        self.forget()

    def forget(self) -> None:
        """To be called when texts were changed in place, or weights, such as a LoRA's scale."""
        self.kept.clear()

    def _forward(self, key_of: Callable, forward: Callable, *inputs: Any) -> Any:
        key = (forward, key_of(*inputs))
        if key not in self.kept:
            self.kept[key] = (inputs, forward(*inputs))  # inputs too, so that a text's place in memory remains its own
        return self.kept[key][1]


def _key_of_text(text: torch.Tensor) -> tuple[Any, ...]:
    return text.data_ptr(), text.shape, text.stride(), text.dtype


def _key_of_sizes(latents: torch.Tensor, references: Sequence[torch.Tensor] = ()) -> tuple[Any, ...]:
    return tuple((each.shape, each.device) for each in (latents, *references))


def _is_plain(module: nn.Module) -> bool:
    return "forward" not in vars(module) and getattr(module, "_compiled_call_impl", None) is None


# -- Checks of models ---------------------------------------------------------------------------------------------


def check_is_wan21(config: Mapping[str, Any], source: str) -> None:
    """
    Raises ValueError, naming what it is instead, unless a transformer is Wan 2.1's text-to-video one, or RefAlign's.

    Args:
        config (`Mapping`): its configuration, as `transformer/config.json` holds it or the model itself.
        source (`str`): what the error names.
    """
    kind, channels = config.get("_class_name", WAN_CLASSES[0]), config.get("in_channels", WAN_CHANNELS)
    kind = kind[-1] if isinstance(kind, list) else kind
    takes_images = config.get("image_dim") is not None or config.get("added_kv_proj_dim") is not None
    if kind not in WAN_CLASSES:
        raise other_model(source, f"a {kind}")
    if takes_images or channels == 36:
        raise other_model(source, f"an image-to-video {kind}")
    if channels != WAN_CHANNELS:
        known = {48: "Wan 2.2's TI2V-5B"}
        raise other_model(source, known.get(channels, f"a {kind} that takes {channels} channels, not {WAN_CHANNELS}"))


def other_model(source: str, kind: str) -> ValueError:
    """The error for a model that RefAlign cannot run on."""
    return ValueError(
        f"{source} is of another kind: {kind}. RefAlign needs Wan 2.1's text-to-video model, 1.3B or 14B: pass one, "
        "such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers, or a RefAlign model made of one."
    )


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]], source: str) -> None:
    """Raises ValueError for the first of these named tensors that holds NaN or infinite numbers. Quantised ones, and
    those without data, are passed over."""
    for name, tensor in tensors:
        is_plain = type(tensor) in (torch.Tensor, nn.Parameter) and not tensor.is_meta
        if not is_plain or not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        # In 1.6 s for 14B, where `isfinite` takes a minute; a float of 8 bits has no minimum
        low, high = torch.aminmax(tensor.detach() if tensor.element_size() > 1 else tensor.detach().half())
        if not (low.isfinite() and high.isfinite()):
            raise ValueError(
                f"{source} holds numbers that are not finite (NaN or infinite), first in {name}: the file is damaged, "
                "or its training diverged. Download it again, or take an earlier checkpoint."
            )


def _register_for_caches() -> None:
    # diffusers/hooks/_helpers.py: caches look a block's exact class up, not its parents. The registry is private, so a
    # later diffusers may move it; then only the caches are lost, and they say so themselves.
    try:
        from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
    except ImportError:
        return
    TransformerBlockRegistry.register(
        RefAlignWanTransformerBlock, TransformerBlockMetadata(return_hidden_states_index=0)
    )


_register_for_caches()
