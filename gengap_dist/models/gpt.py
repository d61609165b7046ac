"""A decoder-only transformer. Shapes: N sequences of T tokens, D units of the residual stream, V different tokens."""

from collections import OrderedDict
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, scaled_dot_product_attention

from gengap_dist.errors import UsageError

STD = 0.02  # of initial weights


@final
class Attention(nn.Module):
    """Causal self-attention of several heads: [N, T, D] to [N, T, D]."""

    def __init__(self, width: int, heads: int) -> None:
        """Of `width` = D units, divided among `heads`."""
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x_NTD: Tensor) -> Tensor:
        """Each position reads those up to itself."""
        by_head = self.qkv(x_NTD).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [3, N, heads, T, D/heads]
        mixed = scaled_dot_product_attention(*by_head.unbind(0), is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


@final
class Block(nn.Module):
    """Attention and two layers with GELU, each added to the residual stream after a norm of its own."""

    def __init__(self, width: int, heads: int) -> None:
        """Of `width` units."""
        super().__init__()
        # `act` marks what probes measure: the output of attention before it is added
        self.attention_norm = nn.LayerNorm(width)
        self.attention = nn.Sequential(OrderedDict(mix=Attention(width, heads), act=nn.Identity()))
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(affine=nn.Linear(width, 4 * width), act=nn.GELU()))
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, x_NTD: Tensor) -> Tensor:
        """[N, T, D] to [N, T, D]."""
        x_NTD = x_NTD + self.attention(self.attention_norm(x_NTD))
        return x_NTD + self.mlp_out(self.mlp(self.mlp_norm(x_NTD)))


@final
class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019) without dropout: pre-norm, learned positions, the embedding also gives the logits.

    It has V D + T D + depth (12 D^2 + 13 D) + 2 D parameters.
    """

    def __init__(self, vocab_size: int, context: int, depth: int, width: int, heads: int) -> None:
        """Weights are normal with standard deviation 0.02, those before an addition divided by sqrt(2 depth)."""
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(vocab_size, width))  # [V, D], of the network itself: it is used twice
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim > 1:
                added = name.endswith(("mix.out.weight", "mlp_out.weight"))
                nn.init.normal_(parameter, std=STD / (2 * depth) ** 0.5 if added else STD)

    def forward(self, tokens_NT: Tensor) -> Tensor:
        """Logits of the next token at each position: [N, T] int64 to [N, T, V]."""
        places = torch.arange(tokens_NT.shape[1], device=tokens_NT.device)
        x_NTD = self.blocks(embedding(tokens_NT, self.tokens) + self.positions(places))
        return linear(self.norm(x_NTD), self.tokens)


def gpt(
    *, input_shape: tuple[int, ...], output_shape: tuple[int, ...], depth: int = 2, width: int = 64, heads: int = 4
) -> GPT:
    """A GPT for sequences of input_shape = (T,) with logits of output_shape = (T, V).

    Raises:
        UsageError: if the samples have other shapes.

    >>> sum(p.numel() for p in gpt(input_shape=(128,), output_shape=(128, 257)).parameters())
    124736
    """
    if (len(input_shape), len(output_shape)) != (1, 2):
        raise UsageError(
            f"model.name (gpt) reads sequences of tokens, and the samples are inputs of shape {list(input_shape)}: set "
            "data.name=stdlib, or text or tokens with data.root"
        )
    (context,), (_, vocab_size) = input_shape, output_shape
    return GPT(vocab_size, context, depth, width, heads)
