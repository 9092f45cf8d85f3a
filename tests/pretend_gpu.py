"""A GPU in name only: numbers are computed on the CPU, and every call that makes a host wait for its GPU is counted."""

from __future__ import annotations

import traceback
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
_INSIDE = torch.device("lazy", 0)  # what C++ sees: its gradients need no driver, and a copy to the CPU is no empty call
_READS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "unique_consecutive", "_unique2"}
_ROOT = Path(__file__).resolve().parents[1]
_CODE = [str(_ROOT / name) for name in ("tokenizer", "autoregressive")]


class OnGPU(Tensor):
    """A tensor that says it is on a GPU, around one of the CPU."""

    inner: Tensor
    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnGPU:
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=_INSIDE, **layout)
        made.inner = inner
        return made

    def new_tensor(self, data: Any, **options: Any) -> Tensor:  # type: ignore[override]
        return torch.tensor(data, **{"dtype": self.dtype, **options}).to(GPU)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert PretendGPU.current is not None
        return PretendGPU.current.run(func, args, kwargs or {})


class PretendGPU(TorchDispatchMode):
    """Inside the `with`: `waits`, by line of code, and `reads`, copies to the CPU that are read later."""

    current: PretendGPU | None = None

    def __enter__(self) -> PretendGPU:
        self.waits: Counter[str] = Counter()
        self.reads = 0
        self._around = ExitStack()
        make = torch.tensor

        def tensor(data: Any, **options: Any) -> Tensor:
            device = options.pop("device", "cpu")
            return make(data, **options).to(device)

        def pinned(x: Tensor) -> Tensor:
            x = x.clone()
            x.is_in_pinned_memory = True  # type: ignore[attr-defined]
            return x

        for name, stand_in in (
            ("torch.cuda._lazy_init", lambda: None), ("torch.tensor", tensor), ("torch.Tensor.pin_memory", pinned),
            ("torch.cuda.Event", mock.Mock()), ("torch.cuda.current_stream", mock.Mock()),
        ):  # fmt: skip
            self._around.enter_context(mock.patch(name, stand_in))
        PretendGPU.current = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        PretendGPU.current = None
        self._around.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """An operation of torch; its result is on the GPU if it says so or an argument is."""
        name, target = func._overloadpacket.__name__, kwargs.get("device")
        is_inside = [isinstance(x, OnGPU) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        stays = any(is_inside) if target is None else torch.device(target).type in ("cuda", "lazy")
        if name in _READS and any(is_inside):
            self._wait(name)
        elif name in ("index", "index_put_", "_index_put_impl_", "index_put") and is_inside[0]:
            for index in args[1]:
                if index is not None and (index.dtype == torch.bool or not isinstance(index, OnGPU)):
                    self._wait(f"{name} by {'a mask' if index.dtype == torch.bool else 'an index of the CPU'}")
        elif name == "_to_copy" and stays != is_inside[0]:
            later = kwargs.get("non_blocking") and (is_inside[0] or hasattr(args[0], "is_in_pinned_memory"))
            self.reads += bool(later and is_inside[0])
            if not later:
                self._wait("copy to the GPU" if stays else "copy to the CPU")
        elif name == "copy_" and is_inside[0] != is_inside[1]:
            self._wait(name)
        if target is not None and stays:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        plain_args, plain_kwargs = tree_map(lambda x: x.inner if isinstance(x, OnGPU) else x, (args, kwargs))
        out = func(*plain_args, **plain_kwargs)
        if func._schema.name.endswith("_") and args and isinstance(args[0], Tensor):
            return args[0]  # changed in place
        return tree_map(lambda x: OnGPU(x) if isinstance(x, Tensor) else x, out) if stays else out

    def _wait(self, what: str) -> None:
        frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(tuple(_CODE))]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "elsewhere"
        self.waits[f"{place} {what}"] += 1
