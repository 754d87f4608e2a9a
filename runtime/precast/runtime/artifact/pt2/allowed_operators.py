"""The operators that the graph of a `.pt2` may call: those whose result depends on their arguments alone.

Absent, for a reason each: what reads or writes files (`from_file`), takes storages and addresses apart (`set_`,
`resize_`, `_from_blob`), leaves memory as it finds it (`empty_strided`), draws random numbers, changes an argument in
place, or relies on a caller that checked its arguments (most names that begin with an underscore). `as_strided` and
the indexing operators check their bounds themselves.
"""

from __future__ import annotations

__all__ = ["ATEN", "PYTHON"]

_NAMES = """
__and__ __lshift__ __or__ __rshift__ __xor__
_adaptive_avg_pool2d _adaptive_avg_pool3d _assert_scalar _assert_tensor_metadata _int_mm _log_softmax
_native_batch_norm_legit_no_training _safe_softmax _softmax _to_copy _unsafe_view _upsample_bicubic2d_aa _weight_norm
_upsample_bilinear2d_aa _weight_int4pack_mm_for_cpu _weight_int8pack_mm
abs absolute acos acosh adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
adaptive_max_pool2d add addbmm addcdiv addcmul addmm addmv addr adjoint affine_grid_generator alias all amax amin
aminmax angle any arange arccos arccosh arcsin arcsinh arctan arctan2 arctanh argmax argmin argsort as_strided asin
asinh atan atan2 atanh atleast_1d atleast_2d atleast_3d avg_pool1d avg_pool2d avg_pool3d
baddbmm batch_norm bilinear bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor
block_diag bmm broadcast_tensors broadcast_to bucketize
cartesian_prod cat cdist ceil celu channel_shuffle chunk clamp clamp_max clamp_min clip clone col2im column_stack
complex concat concatenate conj conj_physical constant_pad_nd contiguous conv1d conv2d conv3d conv_transpose1d
conv_transpose2d conv_transpose3d convolution copy copysign cos cosh cosine_similarity count_nonzero cross cummax
cummin cumprod cumsum
deg2rad detach detach_copy diag diag_embed diagflat diagonal diff dist div divide dot dropout dstack
einsum elu embedding empty empty_like eq erf erfc erfinv exp exp2 expand expand_as expand_copy expm1 eye
fft_fft fft_fft2 fft_fftn fft_fftshift fft_ifft fft_ifft2 fft_ifftn fft_ifftshift fft_irfft fft_irfft2 fft_irfftn
fft_rfft fft_rfft2 fft_rfftn fill fix flatten flip fliplr flipud float_power floor floor_divide fmax fmin fmod frac
frobenius_norm full full_like
gather ge gelu glu greater greater_equal grid_sampler grid_sampler_2d group_norm gt
hann_window hardshrink hardsigmoid hardswish hardtanh heaviside hstack hypot
im2col imag index index_add index_copy index_fill index_put index_select inner instance_norm isclose isfinite isin isinf
isnan isneginf isposinf istft item
kron kthvalue
layer_norm ldexp le leaky_relu lerp less less_equal lift_fresh_copy linalg_cross linalg_matmul linalg_norm
linalg_vecdot linalg_vector_norm linear linspace log log10 log1p log2 log_sigmoid log_softmax logaddexp logaddexp2
logcumsumexp logical_and logical_not logical_or logical_xor logit logsumexp lt
masked_fill masked_scatter masked_select matmul max max_pool1d max_pool2d max_pool2d_with_indices max_pool3d maximum
mean median meshgrid min minimum mish mm mode moveaxis movedim mul multiply mv
nan_to_num nanmean nansum narrow narrow_copy native_group_norm native_layer_norm ne neg negative new_empty new_full
new_ones new_zeros nonzero nonzero_static norm not_equal numpy_T
one_hot ones ones_like outer
pad pairwise_distance permute permute_copy pixel_shuffle pixel_unshuffle polar positive pow prelu prod
quantile
rad2deg ravel real reciprocal reflection_pad1d reflection_pad2d relu relu6 remainder renorm repeat repeat_interleave
replication_pad1d replication_pad2d replication_pad3d reshape reshape_as resolve_conj resolve_neg rms_norm roll rot90
round row_stack rsqrt rsub
scalar_tensor scaled_dot_product_attention scatter scatter_add scatter_reduce searchsorted select select_copy
select_scatter selu sgn sigmoid sign signbit silu sin sinc sinh slice slice_copy slice_scatter softmax softplus
softshrink sort special_erf special_expit special_log_softmax special_logsumexp special_softmax split split_with_sizes
sqrt square squeeze squeeze_copy stack std std_mean stft sub subtract sum swapaxes swapdims sym_numel sym_size
sym_stride
t t_copy take take_along_dim tan tanh tensor_split tensordot threshold tile to topk trace transpose transpose_copy tril
tril_indices triu triu_indices true_divide trunc type_as
unbind unflatten unfold unsafe_chunk unsafe_split unsafe_split_with_sizes unsqueeze unsqueeze_copy upsample_bicubic2d
upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_trilinear3d
var var_mean vdot view view_as view_as_complex view_as_real view_copy vstack
where xlogy zeros zeros_like
"""

ATEN = frozenset(_NAMES.split())
"""By name; every overload but those that write into an argument."""

PYTHON = {
    **{
        f"_operator.{name}": f"operator:{name}"
        for name in (
            *("add", "sub", "mul", "floordiv", "truediv", "mod", "pow", "neg", "pos"),
            *("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "lshift", "rshift"),
        )
    },
    **{f"math.{name}": f"math:{name}" for name in ("ceil", "floor", "trunc")},
    **{f"torch.sym_{name}": f"torch:sym_{name}" for name in ("float", "int", "ite", "max", "min", "not", "sum")},
}
"""Arithmetic on sizes: the name in the file -> module and name of the function."""
