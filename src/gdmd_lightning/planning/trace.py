"""What torch code holds in memory, found by following its tensors on a real device or on the meta device.

On the meta device nothing is computed or allocated, so a step of any size can be followed on any machine. Two things
differ there from a GPU, and a mode corrects each: attention is not fused, and ``torch.autocast`` does nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only


class Watch:
    """Most bytes alive since it began.

    Args:
        peak: Bytes alive at its beginning.
    """

    def __init__(self, peak: int) -> None:
        self.peak = peak


class Trace(TorchDispatchMode):
    """Inside, counts every tensor that an operation returns until its storage is freed.

    Views share a storage and count once. What a kernel allocates and frees internally is not seen.

    Args:
        device: Type of device whose tensors count; ``meta`` stands for the GPU.

    Attributes:
        current: Bytes alive.
        peak: Most bytes alive at any time.
        phases: Most bytes alive within each named phase.

    Source: the technique of ``torch.distributed._tools.mem_tracker``.
    """

    def __init__(self, device: str = "meta") -> None:
        super().__init__()
        self.device, self.current, self.peak = device, 0, 0
        self.phases: dict[str, int] = {}
        self._open: list[str] = []
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._shapes = MetaShapes()
        self._watches: list[Watch] = []
        self._unseen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():  # else every attribute of a tensor that is read here passes all modes
            result = self._shapes(func, args, kwargs or {})
            with self.unseen() if _accumulates(func, args) else nullcontext():
                self.see(tensor for tensor in tree_iter(result) if isinstance(tensor, Tensor))
        return result

    def hold(self, module: nn.Module) -> None:
        """Count the parameters, buffers and gradients that a module already has."""
        self.see(module.parameters())
        self.see(module.buffers())
        self.see(parameter.grad for parameter in module.parameters() if parameter.grad is not None)

    def see(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that were not counted yet."""
        for tensor in tensors:
            if tensor.device.type != self.device:
                continue
            storage = tensor.untyped_storage()
            key = id(storage)  # one storage is one Python object for as long as it lives
            if key in self._alive:
                continue
            self._alive[key] = weakref.ref(storage, self._forgetting(key, storage.nbytes()))
            self.current += storage.nbytes()
        self._look()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Inside, the peak is also recorded under this name; phases may be nested."""
        self._open.append(name)
        self._look()
        try:
            yield
        finally:
            self._open.remove(name)

    @contextmanager
    def watch(self) -> Iterator[Watch]:
        """Inside, the peak is also recorded in the object that this gives; watches need not be nested."""
        watch = Watch(self.current)
        self._watches.append(watch)
        try:
            yield watch
        finally:
            self._watches.remove(watch)

    def add(self, size: int) -> None:
        """Count bytes that no tensor here holds, until the same number is taken away."""
        self.current += size
        self._look()

    def bump(self, size: int) -> None:
        """Record a peak of ``size`` bytes in addition to those alive."""
        self._look(size)

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Inside, bytes are counted and peaks are not recorded; what is alive at the end is."""
        self._unseen += 1
        try:
            yield
        finally:
            self._unseen -= 1

    def _look(self, more: int = 0) -> None:
        if self._unseen:
            return
        size = self.current + more
        self.peak = max(self.peak, size)
        for watch in self._watches:
            watch.peak = max(watch.peak, size)
        for name in self._open:
            self.phases[name] = max(self.phases.get(name, 0), size)

    def _forgetting(self, key: int, size: int) -> Callable[[Any], None]:
        def forget(_: Any) -> None:
            if self._alive.pop(key, None) is not None:
                self.current -= size

        return forget


def _accumulates(func: Any, args: Any) -> bool:
    """Whether a backward pass adds a further gradient of a tensor to the sum of its earlier ones.

    Autograd does so in place, and makes a new tensor only under a dispatch mode such as :class:`Trace`.
    """
    if func is not torch.ops.aten.add.Tensor or torch.is_grad_enabled() or torch._C._current_graph_task_id() == -1:
        return False
    sum_so_far, further = args
    return bool(
        isinstance(further, Tensor)
        and sum_so_far.shape == further.shape
        and sum_so_far.untyped_storage().nbytes() == sum_so_far.numel() * sum_so_far.element_size()
    )


_NOT_KNOWN = object()
_VALUES = frozenset(
    {"add_", "addcdiv_", "addcmul_", "copy_", "div_", "fill_", "lerp_", "mul_", "normal_", "sub_", "uniform_", "zero_"}
)
"""Operations that change the values of their first argument."""


class MetaShapes:
    """Calls operations, and repeats on the meta device what it has seen before without asking torch again.

    The blocks of a network call the same operations on the same shapes, and torch works out each result on the meta
    device in Python, which takes most of the time of a trace. Only operations are repeated whose results have storages
    of their own.
    """

    _known: ClassVar[dict[Any, Any]] = {}  # for all plans of a process, which differ in few operations
    _in_place: ClassVar[set[Any]] = set()
    _other: ClassVar[set[Any]] = set()

    def _changes_values_only(self, func: Any) -> bool:
        """Whether an operation changes its first argument, a tensor or a list of them, and no tensor's shape."""
        if func in self._other:
            return False
        name = func._schema.name.removeprefix("aten::")
        in_place = name in _VALUES or (name.startswith("_foreach_") and name.endswith("_"))
        (self._in_place if in_place else self._other).add(func)
        return bool(in_place)

    def __call__(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """The result of ``func(*args, **kwargs)``."""
        if func in self._in_place or self._changes_values_only(func):
            first = args[0]
            if isinstance(first, list):
                if all(each.device.type == "meta" for each in first):
                    return None
            elif first.device.type == "meta":
                return first
        try:
            key = (func, signature(args), signature(tuple(kwargs.items())))
            known = self._known.get(key, _NOT_KNOWN)
        except NotRepeatable:
            return func(*args, **kwargs)
        if known is _NOT_KNOWN:
            result = func(*args, **kwargs)
            self._known[key] = _recipe(result, (args, kwargs))
            return result
        if known is None:
            return func(*args, **kwargs)
        made = [torch.empty_strided(size, stride, dtype=dtype, device="meta") for size, stride, dtype in known]
        return made[0] if isinstance(known, list) else tuple(made)


class NotRepeatable(Exception):
    """An argument does not say what the result will be like."""


def signature(value: Any) -> Any:
    """What the shape of a result can depend on."""
    if isinstance(value, Tensor):
        if value.device.type != "meta":
            raise NotRepeatable
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(signature(each) for each in value)
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | torch.device | torch.layout):
        return type(value), value  # 1, 1.0 and True are equal, but not as arguments
    if isinstance(value, torch.memory_format):
        return value
    raise NotRepeatable


def _recipe(result: Any, inputs: Any) -> list[Any] | tuple[Any, ...] | None:
    """Sizes, strides and types of results, a list for a single one; ``None`` if the call cannot be repeated."""
    results = [result] if isinstance(result, Tensor) else result
    if not isinstance(results, list | tuple) or not all(isinstance(each, Tensor) for each in results):
        return None
    # Not from the schema: some operations return a view although theirs does not say so.
    shared = {_storage(each) for each in tree_iter(inputs) if isinstance(each, Tensor)}
    own = {_storage(each) for each in results}
    if shared & own or len(own) < len(results):
        return None
    found = [(each.size(), each.stride(), each.dtype) for each in results]
    for each, (size, stride, dtype) in zip(results, found, strict=True):
        like = torch.empty_strided(size, stride, dtype=dtype, device="meta").untyped_storage()
        if each.device.type != "meta" or like.nbytes() != each.untyped_storage().nbytes():
            return None
    return found if isinstance(result, Tensor) else tuple(found)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class FusedAttention(TorchFunctionMode):
    """Inside, attention on the meta device keeps what a fused kernel keeps: its output and one number per row.

    torch chooses the unfused form there, with a matrix of all pairs of tokens that a GPU would not hold.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention:
            query = args[0] if args else kwargs["query"]  # diffusers' FLUX.2 passes all of them by name
            if query.device.type == "meta":
                return _fused(*args, **kwargs)
        return func(*args, **kwargs)


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    needs = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    out: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, None, needs, dropout_p, is_causal, scale=scale
    )[0]
    return out


# CUDA's lists, by the names of the functions and methods that diffusers' and transformers' networks and our losses
# call. Source: torch's documentation of torch.amp, "CUDA Ops that can autocast".
_LOWER = frozenset(
    {
        "__matmul__", "__rmatmul__", "addbmm", "addmm", "addmv", "addr", "baddbmm", "bmm", "conv1d", "conv2d",
        "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "einsum", "linear", "matmul",
        "mm", "mv", "scaled_dot_product_attention",
    }
)  # fmt: skip
_FULL = frozenset(
    {
        "__pow__", "__rpow__", "cosine_similarity", "cross_entropy", "cumprod", "cumsum", "exp", "group_norm",
        "kl_div", "l1_loss", "layer_norm", "log", "log_softmax", "mse_loss", "norm", "pow", "prod",
        "reciprocal", "rms_norm", "rsqrt", "smooth_l1_loss", "softmax", "softplus", "square", "sum",
    }
)  # fmt: skip


class Autocast(TorchFunctionMode):
    """Inside, operations on the meta device cast their inputs as ``torch.autocast`` does on CUDA.

    Casts are not cached: Lightning's mixed precision sets ``cache_enabled=False``, so each forward casts the weights
    again and, with gradient, keeps the copies for its backward.

    Args:
        dtype: The lower precision.
    """

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _LOWER:
            args, kwargs = self._cast((args, kwargs), self.dtype)
        elif name in _FULL:
            args, kwargs = self._cast((args, kwargs), torch.float32)
        return func(*args, **kwargs)

    def _cast(self, arguments: Any, dtype: torch.dtype) -> Any:
        def cast(tensor: Tensor) -> Tensor:
            castable = tensor.is_floating_point() and tensor.dtype != torch.float64 and tensor.device.type == "meta"
            return tensor.to(dtype) if castable else tensor

        return tree_map_only(Tensor, cast, arguments)
