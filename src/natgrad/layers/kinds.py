"""The kinds of ``torch.nn`` layers that have rules."""

from torch import nn

from natgrad.layers.attention import rules_of_attention
from natgrad.layers.convolution import ConvolutionRule, TransposedConvolutionRule
from natgrad.layers.embedding import EmbeddingRule
from natgrad.layers.linear import LinearRule
from natgrad.layers.normalization import ChannelsRule, LastDimensionsRule
from natgrad.layers.recurrent import GatesRule
from natgrad.layers.registry import register_layer
from natgrad.layers.unrolled import rules_of

# Kinds whose parameters are used in ways that nothing can see, and what to do instead.
REFUSED = {
    nn.EmbeddingBag: "EmbeddingBag, which sums embeddings out of sight; use Embedding and sum them yourself",
}


def register_kinds() -> None:
    """Enter the rules of ``torch.nn``."""
    register_layer(nn.Linear, LinearRule())
    for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        register_layer(kind, ConvolutionRule())
    for kind in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
        register_layer(kind, TransposedConvolutionRule())
    register_layer(nn.Embedding, EmbeddingRule())
    for kind in (nn.LayerNorm, nn.RMSNorm):
        register_layer(kind, LastDimensionsRule())
    for kind in (nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
        register_layer(kind, ChannelsRule())
    for kind in (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d):
        register_layer(kind, ChannelsRule())
    register_layer(nn.MultiheadAttention, rules_of_attention)
    for kind in (nn.RNNCell, nn.LSTMCell, nn.GRUCell):
        register_layer(kind, {"ih": GatesRule("ih"), "hh": GatesRule("hh")})
    for kind in (nn.RNN, nn.LSTM, nn.GRU):
        register_layer(kind, rules_of)


register_kinds()


def refused(layer: nn.Module) -> str | None:
    """Why a layer's parameters can have no factor, where that is known."""
    for kind, reason in REFUSED.items():
        if isinstance(layer, kind):
            return reason
    return None
