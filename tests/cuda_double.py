"""A stand-in for CUDA devices: real numbers in host memory behind tensors that say they are on cuda:<n>.

`Cuda()` is a context manager. Within it `torch.cuda` is PyTorch's own Python code over doubles of the C
functions that it calls, which raise before initialization as the real ones do. Every operator is run on the
CPU, by the kernels that a CPU's tensors take, so that results are a CPU run's to the bit. A mix of devices
raises as on a GPU, a tensor that is used on another stream than it was made on raises unless that one has
waited, and what makes the host wait for the device is counted with the function of teq that asked for it.

Different from a GPU: kernels are a CPU's, the backward pass runs in the calling thread, Adam loops over its
tensors, memory is not counted, and `torch.compile` raises.

How it is done: a tensor's device in C++ is `lazy`, because autograd in a PyTorch for CPUs has neither a guard
nor streams for `cuda`; what Python sees of it says `cuda`. A TorchFunctionMode translates the devices in
calls, a TorchDispatchMode runs the operators.
"""

import functools
import sys
from collections import Counter
from types import SimpleNamespace
from unittest import mock

import torch
import torch._dynamo  # before there seems to be a GPU, which it would then initialize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
NAME, MEMORY = "Stand-in GPU", 80 * 10**9
# what cannot return before the device has answered: its result, or the size of that, is for the host
WAITS = {
    aten._local_scalar_dense: "item",
    aten.equal: "equal",
    aten.allclose: "equal",
    aten.is_nonzero: "item",
    aten.nonzero: "nonzero",
    aten.masked_select: "nonzero",
    aten.unique_dim: "unique",
    aten._unique2: "unique",
    aten.unique_consecutive: "unique",
    aten.bincount: "bincount",
    aten._linalg_check_errors: "linalg",
    aten.repeat_interleave: "repeat_interleave",  # of a tensor of counts
}
INDEXED = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
ABSENT = (aten.histogram, aten._histogramdd_bin_edges)  # there is no kernel of these for CUDA


class Race(RuntimeError):
    """A tensor is used on a stream that has not waited for the one that makes it."""


class OnCuda(torch.Tensor):
    """A tensor that says it is on a CUDA device; `host` holds its numbers, `made` the stream and its time."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host, index, made=None):
        """host: a CPU tensor, whose memory the new one has."""
        return torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=torch.device("lazy", index),
        )

    def __init__(self, host, index, made=None):
        self.host, self.index, self.made = host, index, made if made is not None else {}

    @property
    def device(self):
        return torch.device("cuda", self.index)

    @property
    def is_cuda(self):
        return True

    def get_device(self):
        return self.index

    def __repr__(self):
        return f"OnCuda({self.host!r}, device='{self.device}')"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return Cuda.current.run(func, args, kwargs or {})


class Generator(torch._C.Generator):
    """A CPU's generator that says where it is."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")

    def __init__(self, device="cpu"):
        self.place = torch.device(device)

    @property
    def device(self):
        return self.place


class Stream:
    """An order of work on a device. `seen`: up to which time of every stream it has waited."""

    def __init__(self, device=None, priority=0, stream_id=None, device_index=None, device_type=None):
        if stream_id is None:
            with torch.cuda.device(device):
                device_index = torch.cuda.current_device()
            stream_id = Cuda.current.new_stream()
        self.stream_id, self.device_index, self.device_type = stream_id, device_index, 1
        self.device = torch.device("cuda", device_index)

    def wait_stream(self, other):
        Cuda.current.waits.append((self.stream_id, other.stream_id))
        Cuda.current.seen[self.stream_id].update(
            {
                stream: max(time, Cuda.current.seen[self.stream_id][stream])
                for stream, time in Cuda.current.seen[other.stream_id].items()
            }
        )

    def synchronize(self):
        Cuda.current.note("synchronize")

    def __eq__(self, other):
        return isinstance(other, Stream) and self.stream_id == other.stream_id

    def __hash__(self):
        return hash(self.stream_id)


class Cuda:
    """Context manager: so many CUDA devices, not initialized yet.

    calls: how often each C function was called. reads: (what, function of teq, device index) of everything
    that made the host wait for the device. synchronized: device indices. waits: (stream, the one waited for).
    pinned: (function of teq, tensor) of every allocation of pinned memory.
    """

    current = None

    def __init__(self, devices=1):
        self.devices = devices
        self.calls, self.reads, self.synchronized, self.waits = Counter(), [], [], []
        self.pinned = []
        self.initialized, self.device = False, 0
        self.streams = dict.fromkeys(range(devices), 0)  # the current stream of each device
        self.seen = {0: Counter()}

    def __enter__(self):
        assert not torch.cuda.is_available(), "there is a real one"
        Cuda.current = self
        functions = {
            "_cuda_getDeviceCount": lambda: self.devices,
            "_cuda_init": self._init,
            "_cuda_setDevice": self._set_device,
            "_cuda_getDevice": lambda: self.device,
            "_cuda_synchronize": self._synchronize,
            "_cuda_getCurrentStream": lambda index: (self.streams[index], index, 1),
            "_cuda_getDefaultStream": lambda index: (0, index, 1),
            "_cuda_setStream": self._set_stream,
            "_cuda_emptyCache": lambda: self._needs_init(),
            "_cuda_memoryStats": self._memory,
            "_cuda_resetPeakMemoryStats": self._allocator,
            "_cuda_isCurrentStreamCapturing": lambda: False,
        }
        generators = tuple(Generator(f"cuda:{i}") for i in range(self.devices))
        changed = {
            "_initialized": False,
            "_queued_calls": [],
            "_cudart": SimpleNamespace(cudaMemGetInfo=lambda index: (MEMORY, MEMORY)),
            "_exchange_device": self._counted("_cuda_exchangeDevice", self._exchange),
            "_maybe_exchange_device": self._counted("_cuda_maybeExchangeDevice", self._exchange),
            "_get_device_properties": self._properties,
            "default_generators": generators,
            "Stream": Stream,
            "_lazy_seed_tracker": type(torch.cuda._lazy_seed_tracker)(),
        }
        self.patches = [
            *(
                mock.patch.object(torch._C, name, self._counted(name, function), create=True)
                for name, function in functions.items()
            ),
            *(mock.patch.object(torch.cuda, name, value, create=True) for name, value in changed.items()),
            mock.patch.object(torch.cuda, "_cached_device_count", None, create=True),
            mock.patch.object(torch.autograd, "_engine_run_backward", _backward),
            mock.patch.object(torch, "Generator", Generator),
            mock.patch.object(torch, "compile", self._no_compiler),
            _Calls(),
            _Operators(),
        ]
        # on devices that have no kernel for it, C++ makes it of other operators, as on no GPU and no CPU
        self.kernels = torch.library.Library("aten", "IMPL")
        self.kernels.impl("silu_backward", lambda *_: None, "Lazy")  # never called: `run` comes before
        self.swapped = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        for patch in self.patches:
            patch.__enter__()
        return self

    def __exit__(self, *error):
        for patch in reversed(self.patches):
            patch.__exit__(*error)
        torch.__future__.set_swap_module_params_on_conversion(self.swapped)
        self.kernels._destroy()
        Cuda.current = None

    def numbers(self):
        """How often each module of teq read a result back to go on by it."""
        return Counter(place.rpartition(".")[0] for what, place, _ in self.reads if what != "copy")

    def copies(self):
        """How often each module of teq copied a tensor to the host."""
        return Counter(place.rpartition(".")[0] for what, place, _ in self.reads if what == "copy")

    # the C functions

    def _counted(self, name, function):
        def call(*args, **kwargs):
            self.calls[name] += 1
            return function(*args, **kwargs)

        return call

    def _init(self):
        self.initialized = True

    def _needs_init(self):
        if not self.initialized:
            raise RuntimeError("CUDA error: initialization error")

    def _allocator(self, index):
        """What the allocator says of a device that it does not know (yet)."""
        if not self.initialized or not 0 <= index < self.devices:
            raise RuntimeError(f"Invalid device argument {index}: did you call init?")

    def _set_device(self, index):
        torch.cuda._lazy_init()
        if not 0 <= index < self.devices:
            raise torch.AcceleratorError("CUDA error: invalid device ordinal")
        self.device = index

    def _exchange(self, index):
        if index < 0:
            return -1
        before = self.device
        self._set_device(index)
        return before

    def _synchronize(self):
        self._needs_init()
        self.synchronized.append(self.device)

    def _set_stream(self, stream_id, device_index, device_type):
        self._needs_init()
        self.device = device_index
        self.streams[device_index] = stream_id

    def _memory(self, index):
        self._allocator(index)
        bytes_ = {"all": {"current": 10**6, "peak": 10**6}}
        return {"allocated_bytes": bytes_, "reserved_bytes": bytes_}

    def _properties(self, index):
        return SimpleNamespace(
            name=NAME,
            major=9,
            minor=0,
            total_memory=MEMORY,
            multi_processor_count=132,
            uuid=f"{NAME}-{index}",
        )

    def _no_compiler(self, *_, **__):
        raise RuntimeError("the stand-in for a GPU has no compiler")

    def new_stream(self):
        """The number of a new stream."""
        self.seen[len(self.seen)] = Counter()
        return len(self.seen) - 1

    # operators

    def note(self, what, index=0):
        """The host waits for the device: remember for whom."""
        self.reads.append((what, _asked(), index))

    def run(self, func, args, kwargs):
        """The operator on the CPU, after the checks of a GPU."""
        tensors = _tensors(args, kwargs)
        ours = [tensor for tensor in tensors if isinstance(tensor, OnCuda)]
        wanted = next((i for i in map(_index, (*args, *kwargs.values())) if i is not None), None)
        if not ours and wanted in (None, -1):
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled():  # where operators that are made of others come whole
            with _Operators():
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        torch.cuda._lazy_init()
        packet = func.overloadpacket
        here = ours[0].index if ours else None
        index = here if wanted is None else wanted  # where the result will be, -1 on the CPU
        if packet in ABSENT:
            raise NotImplementedError(f"Could not run '{func.name()}' with arguments from the 'CUDA' backend")
        if packet is aten.copy_:
            if isinstance(args[1], OnCuda) and not isinstance(args[0], OnCuda):
                self.note("copy", args[1].index)
        elif packet is aten._to_copy:
            if here is not None and index == -1:
                self.note("copy", here)
        elif len(ours) < len(tensors) or self.devices > 1:
            _check_devices(func, args, tensors, ours)
        known = kwargs.get("output_size") is not None
        if (packet in WAITS and not known) or (packet in INDEXED and _counts(*args[1:3])):
            self.note(WAITS.get(packet, "nonzero"), here)
        made = self._step(here if index == -1 else index, ours, func)
        inner = {k: _host(v) for k, v in kwargs.items() if k not in ("device", "non_blocking")}
        if kwargs.get("device") is not None:
            inner["device"] = torch.device("cpu")
        out = func(*map(_host, args), **inner)
        given, views = _returned(func)
        if len(given) != 1:
            return type(out)(
                self._result(value, args, kwargs, place, views, index, made)
                for value, place in zip(out, given, strict=True)
            )
        return self._result(out, args, kwargs, given[0], views, index, made)

    def _step(self, index, ours, func):
        """A step of the current stream: {stream: time}. What it takes must be made by then."""
        if index not in self.streams:
            raise torch.AcceleratorError("CUDA error: invalid device ordinal")
        stream = self.streams[index]
        seen = self.seen[stream]
        for tensor in ours:
            for other, time in tensor.made.items():
                if other != stream and seen[other] < time:
                    raise Race(f"{func}: made on stream {other}, used on stream {stream} without waiting")
        seen[stream] += 1
        return {stream: seen[stream]}

    def _result(self, value, args, kwargs, place, views, index, made):
        """The argument that was written to, or `value` on the device `index`."""
        if place is not None:
            position, name = place
            argument = kwargs[name] if name in kwargs else args[position]
            if isinstance(argument, OnCuda):
                argument.made.update(made)
            return argument
        if index == -1:
            return value
        if isinstance(value, torch.Tensor):  # a view is as old as what it shows
            return OnCuda(value, index, args[0].made if views and isinstance(args[0], OnCuda) else dict(made))
        if isinstance(value, list | tuple):
            return type(value)(self._result(v, args, kwargs, None, views, index, made) for v in value)
        return value


def _asked():
    """The innermost function of teq that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("teq.") and not frame.f_code.co_name.startswith("<"):
            return f"{module.removeprefix('teq.')}.{frame.f_code.co_name}"
        frame = frame.f_back
    return "elsewhere"


def _tensors(args, kwargs):
    found = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [v for v in value if isinstance(v, torch.Tensor)]
    return found


def _check_devices(func, args, tensors, ours):
    if len({tensor.index for tensor in ours}) > 1:
        raise _mixed("cuda:0 and cuda:1", func)
    others = [tensor for tensor in tensors if not isinstance(tensor, OnCuda)]
    if func.overloadpacket in INDEXED and isinstance(args[0], OnCuda):  # indices are copied to the device
        others = [other for other in others if not any(other is i for i in args[1])]
    names = [argument.name for argument in func._schema.arguments if _written(argument)]
    written = [a for a, argument in zip(args, func._schema.arguments, strict=False) if argument.name in names]
    if ours and any(other.ndim > 0 or any(other is w for w in written) for other in others):
        raise _mixed(f"{ours[0].device} and cpu", func)


def _written(argument):
    return argument.alias_info is not None and argument.alias_info.is_write


@functools.cache
def _returned(func):
    """For each result the argument (position, name) that it is, or None; and whether results are views."""
    written = {
        frozenset(argument.alias_info.before_set): (position, argument.name)
        for position, argument in enumerate(func._schema.arguments)
        if _written(argument)
    }
    results = func._schema.returns
    places = [written.get(frozenset(r.alias_info.before_set)) if _written(r) else None for r in results]
    return places or [None], any(result.alias_info is not None for result in results)


class _Operators(TorchDispatchMode):
    """Operators that make something on a device, and all others."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return Cuda.current.run(func, args, kwargs or {})


class _Calls(TorchFunctionMode):
    """Calls of PyTorch from Python: devices by the name that C++ knows, and what no operator stands for."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if (instead := INSTEAD.get(func)) is not None:
            return instead(func, *args, **kwargs)
        if func is torch.device:
            return func(*args, **kwargs)
        given = [_index(value) for value in (*args, *kwargs.values())]
        if kwargs.get("pin_memory"):
            return _pin(func, self.__torch_function__(func, types, args, {**kwargs, "pin_memory": False}))
        if any(index not in (None, -1) for index in given):
            torch.cuda._lazy_init()
            args, kwargs = tuple(map(_renamed, args)), {k: _renamed(v) for k, v in kwargs.items()}
        if (generator := kwargs.get("generator")) is not None:
            placed = [index for index in given if index is not None] or [
                value.index if isinstance(value, OnCuda) else -1
                for value in args
                if isinstance(value, torch.Tensor)
            ]
            if (placed or [-1])[0] != _index(generator.device):
                raise RuntimeError(
                    f"Expected another device type for generator but found '{generator.device}'"
                )
        return func(*args, **kwargs)


_run_backward = torch.autograd._engine_run_backward


def _backward(*args, **kwargs):
    with _Calls():  # which a call suspends: under checkpointing the backward pass runs blocks again
        return _run_backward(*args, **kwargs)


def _index(device):
    """The index that a name of a device means: a CUDA device's, -1 for the CPU, None for no device."""
    if isinstance(device, str):
        if not device.startswith(("cuda", "cpu")) or len(device) > 7:
            return None
        device = torch.device(device)
    if not isinstance(device, torch.device):
        return None
    if device.type in ("cuda", "lazy"):
        return Cuda.current.device if device.index is None else device.index
    return -1 if device.type == "cpu" else None


def _renamed(value):
    index = _index(value)
    return value if index in (None, -1) else torch.device("lazy", index)


def _host(value):
    if isinstance(value, list | tuple):
        return type(value)(map(_host, value))
    return value.host if isinstance(value, OnCuda) else value


def _counts(indices, values=None):
    """Whether indexing must know how many elements a mask has; to fill them with one number it need not."""
    masked = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
    return masked and (values is None or isinstance(values, OnCuda) or values.numel() != 1)


def _mixed(found, func):
    return RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, {found}! ({func})"
    )


def _tensor(func, data, *, device=None, **kwargs):
    """Made on the host and moved, as C++ does where no mode can see it."""
    made = data if isinstance(data, OnCuda) and func is torch.as_tensor else func(data, **kwargs)
    with _Calls():
        return made if device is None else made.to(device)


def _tolist(func, tensor):
    if not isinstance(tensor, OnCuda):
        return func(tensor)
    Cuda.current.note("tolist", tensor.index)
    return tensor.host.tolist()


def _numpy(func, tensor, *args, **kwargs):
    if isinstance(tensor, OnCuda):
        raise TypeError(f"can't convert {tensor.device} device type tensor to numpy. Use Tensor.cpu() first")
    return func(tensor, *args, **kwargs)


def _pin(func, tensor, *_):
    torch.cuda._lazy_init()
    pinned = tensor.clone()
    Cuda.current.pinned.append((_asked(), pinned))
    return pinned


def _is_pinned(func, tensor, *_):
    place = tensor.untyped_storage().data_ptr()
    return any(place == pinned.untyped_storage().data_ptr() for _, pinned in Cuda.current.pinned)


def _set_data(func, tensor, value):
    if isinstance(tensor, OnCuda) is isinstance(value, OnCuda):
        return func(tensor, value)
    asked = tensor.requires_grad
    if isinstance(tensor, torch.nn.Parameter):
        value = torch.nn.Parameter(value, requires_grad=asked)
    elif isinstance(value, OnCuda):
        value = value.detach()
    torch.utils.swap_tensors(tensor, value)
    return None


def _attention(func, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **more):
    """The kernel that a CPU takes: C++ chooses by the device."""
    if isinstance(query, OnCuda):
        host = [
            None if t is None else _host(t).detach().requires_grad_(t.requires_grad)
            for t in (query, key, value, attn_mask)
        ]
        choice = torch._fused_sdp_choice(*host, dropout_p, is_causal, scale=scale, **more)
        if choice == torch.nn.attention.SDPBackend.FLASH_ATTENTION.value:
            if attn_mask is not None and attn_mask.dtype == torch.bool:
                seen = attn_mask
                attn_mask = torch.zeros_like(seen, dtype=query.dtype).masked_fill_(~seen, float("-inf"))
            kernel = aten._scaled_dot_product_flash_attention_for_cpu
            return kernel(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return func(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **more)


INSTEAD = {
    torch.tensor: _tensor,
    torch.as_tensor: _tensor,
    torch.Tensor.tolist: _tolist,
    torch.Tensor.numpy: _numpy,
    torch.Tensor.__array__: _numpy,
    torch.Tensor.pin_memory: _pin,
    torch.Tensor.is_pinned: _is_pinned,
    torch.Tensor.data.__set__: _set_data,
    torch.nn.functional.scaled_dot_product_attention: _attention,
}
