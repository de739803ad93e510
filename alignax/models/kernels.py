"""Attention kernels of other libraries: splash attention on TPUs, cuDNN on NVIDIA GPUs.

`attention.attention` is the definition and the default. The kernels compute the same
values. Where a kernel does not apply, one log line gives the reason and the definition is
used instead.

A kernel gets the mask in one of two forms. If positions are columns and a token sees its
own segment, the mask is causal or local with segment ids, and no array of size T^2 exists.
Every other mask, such as that of packed siblings, is an array of T^2 per row that all heads
share; splash attention skips the blocks of it that are wholly masked.

The compiler cannot partition either kernel as it partitions XLA's operations. Splash
attention runs in a `shard_map` over the mesh of its operands; cuDNN's attention has its own
partitioning.

Shape suffixes as in transformer.py.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash_kernel,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as splash_mask,
)
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from alignax.models import fallback
from alignax.models.attention import same_segment, visible
from alignax.models.contract import KEPT

NAMES = ("xla", "splash", "cudnn")  # what config.model.attn_kernel may be
BLOCKS = (512, 256, 128)  # queries and keys of a block, the largest that divides T
ROWS, HEADS = ("data", "fsdp"), "model"  # axes of a mesh that split rows and heads
FAR = np.iinfo(np.int32).max


class Call(NamedTuple):
    """The static settings of a call."""

    scale: float
    cap: float | None
    window: int | None  # tokens a local layer sees; None where T is not longer
    masked: bool  # the mask is an array
    allowed: Callable[[tuple, tuple], Any] | None  # of an Attend
    interpret: bool = False


def attend(q, k, v, positions, attend, local, config, in_order: bool, cached: bool):
    """The same as `attention.attention`, or None where the kernel does not apply.

    Args:
      q: queries [N, T, H, E].
      k, v: keys and values, [N, T, K, E].
      positions: [N, T], of queries and keys.
      attend: an `Attend`, or None.
      local: whether the layer is local; it may be traced.
      config: a ModelConfig, whose attn_kernel is not 'xla'.
      in_order: positions are columns.
      cached: keys and values come from a cache.

    Returns:
      [N, T, H, E] in v's dtype, or None.
    """
    c, t = config, q.shape[1]
    plain = attend is None or attend.allowed is same_segment
    if c.attn_kernel == "cudnn":
        plain = attend is None
    call = Call(
        scale=(c.query_scale or q.shape[-1]) ** -0.5,
        cap=c.attn_softcap,
        window=c.window if c.window and c.window < t else None,
        masked=not (plain and in_order),
        allowed=attend and attend.allowed,
        interpret=fallback.platform() == "cpu",
    )
    refuses = _splash_refuses if c.attn_kernel == "splash" else _cudnn_refuses
    why = "keys come from a cache" if cached else refuses(call, q, k)
    if why:
        fallback.say_once(
            f"attn_kernel={c.attn_kernel!r}: XLA's attention instead, {why}"
        )
        return None
    run = _sharded_splash if c.attn_kernel == "splash" else cudnn
    ids = () if attend is None else attend.ids
    if call.masked:
        window = FAR if call.window is None else jnp.where(local, call.window, FAR)
        rows = jnp.broadcast_to(positions, q.shape[:2]), ids
        return run(call._replace(window=None), q, k, v, (rows, window))
    if call.window is None or (isinstance(local, bool) and not local):
        return run(call._replace(window=None), q, k, v, (ids, None))
    if isinstance(local, bool):
        return run(call, q, k, v, (ids, None))

    def either(call):
        return lambda q, k, v, ids: run(call, q, k, v, (ids, None))

    far = either(call._replace(window=None))
    return jax.lax.cond(local, either(call), far, q, k, v, ids)


def _splash_refuses(call, q, k) -> str:
    """Why splash attention does not apply; '' if it does."""
    if (where := fallback.platform()) not in ("tpu", "cpu"):
        return f"platform {where}"
    mesh = _mesh(q)
    if mesh is None:
        return ""
    if not {*ROWS, HEADS} <= {*mesh.axis_names}:
        return f"a mesh of axes {mesh.axis_names}"
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        return "inside a shard_map"
    rows, heads = math.prod(mesh.shape[a] for a in ROWS), mesh.shape[HEADS]
    if q.shape[0] % rows:
        return f"{q.shape[0]} rows do not divide over data*fsdp={rows}"
    if k.shape[2] % heads:
        return f"{k.shape[2]} heads of keys do not divide over model={heads}"
    return ""


def _mesh(x):
    """The mesh of an operand, traced or not; None for a single device."""
    mesh = jax.typeof(x).sharding.mesh
    return None if mesh.empty or mesh.size == 1 else mesh


def _sharded_splash(call, q, k, v, mask):
    mesh = _mesh(q)
    if mesh is None:
        return splash(call, q, k, v, mask)
    heads, (rows, window) = P(ROWS, None, HEADS), mask

    def shard(q, k, v, rows, window):
        return splash(call, q, k, v, (rows, window))

    return jax.shard_map(
        shard, mesh=mesh, in_specs=(*[heads] * 3, P(ROWS), P()), out_specs=heads,
        check_vma=False,
    )(q, k, v, rows, window)  # fmt: skip


def splash(call: Call, q, k, v, mask) -> Array:
    """Splash attention on one device, over all rows and heads of its operands.

    Args:
      call: the static settings.
      q, k, v: as in `attend`.
      mask: ((positions, ids), window) if the mask is an array, else (ids, None).
    """
    t, h = q.shape[1], q.shape[2]
    pad = -t % BLOCKS[-1]  # columns after all others: no token of the text sees them
    size = t + pad
    block = next(b for b in BLOCKS if size % b == 0)
    settings: Any = dict(
        block_sizes=_blocks(block), head_shards=1, q_seq_shards=1,
        attn_logits_soft_cap=call.cap, interpret=call.interpret,
        residual_checkpoint_name=KEPT,
    )  # fmt: skip

    def heads(x):
        return jnp.moveaxis(jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))), 2, 1)

    rows, window = mask
    rows = jax.tree.map(
        lambda x: jnp.pad(x, ((0, 0), (0, pad)), constant_values=FAR), rows
    )
    q = (q.astype(jnp.float32) * call.scale).astype(q.dtype)  # the kernel has no scale
    given = (heads(q), heads(k), heads(v), rows)
    if call.masked:

        def one(x):
            q, k, v, row = x
            token = jax.tree.map(lambda x: x[None], row)
            kernel = splash_kernel.make_splash_mha(
                visible(call.allowed, token, token, window), **settings
            )
            return _static(kernel)(q, k, v)

        y = jax.lax.map(one, given)
    else:
        kernel = splash_kernel.make_splash_mha(
            splash_mask.MultiHeadMask([_causal(size, call.window)] * h), **settings
        )

        def own(q, k, v, ids):
            segments = splash_kernel.SegmentIds(ids[0], ids[0]) if ids else None
            return kernel(q, k, v, segments)

        y = jax.vmap(own)(*given)
    return jnp.moveaxis(y, 1, 2)[:, :t]


def _causal(size, window):
    if window is None:
        return splash_mask.CausalMask((size, size))
    return splash_mask.LocalMask((size, size), (window - 1, 0), 0)


def _blocks(b):
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq")
    blocks = {f"block_{name}": b for name in (*names, "kv_dq")}
    return splash_kernel.BlockSizes(**blocks)


def _static(kernel):
    """The kernel of a traced mask without its `is_dynamic_mask`.

    The kernel tests that flag with `if`, which fails on the traced array that it is here.
    """
    kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info = (
        info._replace(is_dynamic_mask=None)
        for info in (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info)
    )
    return kernel


def _cudnn_refuses(call, q, k) -> str:
    """Why cuDNN's attention does not apply; '' if it does."""
    if (where := fallback.platform()) not in ("gpu", "cuda"):
        return f"platform {where}"
    if call.cap is not None:
        return "scores have a soft-cap"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in 16 bits, not in {q.dtype}"
    if q.shape[-1] > 128 or q.shape[-1] % 8:
        return f"heads of size {q.shape[-1]}"
    if call.masked and q.shape[1] % 2:
        return f"an odd number of tokens, {q.shape[1]}, under a mask"
    return ""


def cudnn(call: Call, q, k, v, mask, implementation="cudnn") -> Array:
    """cuDNN's attention of q, k, v and a mask as in `splash`, without segments.

    Args:
      call, q, k, v, mask: as in `splash`.
      implementation: of jax.nn.dot_product_attention; tests pass another.
    """
    rows, window = mask
    seen = None
    if call.masked:
        seen = visible(call.allowed, rows, rows, window)[:, None]
    return jax.nn.dot_product_attention(
        q, k, v, mask=seen, is_causal=not call.masked, scale=call.scale,
        local_window_size=call.window and (call.window - 1, 0),
        implementation=implementation,
    )  # fmt: skip
