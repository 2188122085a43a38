"""Layer 0: operators in plain PyTorch, and the one place where a native kernel may replace them."""

from mask2former.ops.ms_deform_attn import ms_deform_attn, ms_deform_attn_fused

__all__ = ["ms_deform_attn", "ms_deform_attn_fused"]
