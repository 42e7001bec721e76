// A device that is none: torch's dispatch key PrivateUse1 on the host's memory.
//
// Every op runs on the CPU, on tensors that alias the device's memory, and is refused where its operands are on different
// devices, as a GPU refuses it. Fresh memory is NaN. Op calls, synchronizations, bytes and memory are counted.
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/set_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <unordered_set>

namespace {

using at::Tensor;
using c10::DispatchKey;
using c10::IValue;

constexpr auto DEVICE_TYPE = c10::DeviceType::PrivateUse1;
const c10::Device DEVICE(DEVICE_TYPE, 0), HOST(c10::DeviceType::CPU);
constexpr int ALL_ONES = 0xFF;  // NaN in every floating-point type, -1 in every integer

// ---- what is counted ----

struct Counts {
  std::atomic<int64_t> calls{0}, syncs{0}, uploads{0}, bytes{0}, held{0}, peak{0};
};
Counts counts;
std::mutex names_lock;
std::map<std::string, int64_t> calls_by_name, syncs_by_name;

void count_call(const std::string& name, bool sync) {
  ++counts.calls;
  counts.syncs += sync;
  std::lock_guard<std::mutex> lock(names_lock);
  ++calls_by_name[name];
  if (sync) ++syncs_by_name[name];
}

void take_memory(int64_t size) {
  int64_t now = counts.held += size, peak = counts.peak;
  while (now > peak && !counts.peak.compare_exchange_weak(peak, now)) {
  }
}

// ---- memory: every block belongs to a CPU storage, or to the allocator, and is counted until it is freed ----

struct Block {  // of the CPU's memory, on the device
  c10::DataPtr data;
  int64_t size;
};

void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  counts.held -= block->size;
  delete block;
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    auto data = c10::GetCPUAllocator()->allocate(size);
    void* place = data.get();
    if (place != nullptr) std::memset(place, ALL_ONES, size);
    take_memory(size);
    return {place, new Block{std::move(data), static_cast<int64_t>(size)}, &free_block, DEVICE};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return nullptr;
  }
  void copy_data(void* to, const void* from, size_t size) const override {
    default_copy_data(to, from, size);
  }
};
Allocator allocator;
REGISTER_ALLOCATOR(DEVICE_TYPE, &allocator);

struct Owner {  // of memory that is seen from the other side
  c10::Storage storage;
  int64_t counted;
};

void free_owner(void* context) {
  auto* owner = static_cast<Owner*>(context);
  counts.held -= owner->counted;
  delete owner;
}

// The same memory as a storage of the other device. fresh: what the CPU allocated for the device, to be counted.
c10::Storage seen_from(const c10::Storage& storage, c10::Device device, bool fresh) {
  const int64_t size = storage.nbytes();
  if (fresh) take_memory(size);
  c10::DataPtr data(
      const_cast<void*>(storage.data()), new Owner{storage, fresh ? size : 0}, &free_owner, device);
  return c10::Storage(
      c10::Storage::use_byte_size_t(), size, std::move(data), c10::GetAllocator(device.type()), /*resizable=*/true);
}

Tensor over(c10::Storage storage, const Tensor& like, c10::Device device) {
  const auto key = device == HOST ? DispatchKey::CPU : DispatchKey::PrivateUse1;
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  if (like.is_conj()) made._set_conj(true);
  if (like.is_neg()) made._set_neg(true);
  return made;
}

Tensor on_host(const Tensor& tensor) {
  return over(seen_from(tensor.storage(), HOST, false), tensor, HOST);
}

// ---- the fallback: any op, on aliases ----

// An op whose result's shape depends on data, or that looks at values, waits on a GPU until all before it is done.
const std::unordered_set<std::string> WAITING = {
    "aten::nonzero", "aten::masked_select", "aten::_unique", "aten::_unique2", "aten::unique_dim",
    "aten::unique_consecutive", "aten::unique_dim_consecutive", "aten::repeat_interleave", "aten::equal",
    "aten::bincount", "aten::_assert_async"};

struct Call {
  std::vector<std::pair<Tensor, Tensor>> aliases;  // (the device's tensor, the CPU's)
  const Tensor* strange = nullptr;                 // an operand of the CPU
  bool on_device = false;

  Tensor aliased(const Tensor& tensor, bool may_be_elsewhere) {
    if (!tensor.defined()) return tensor;
    if (tensor.device().type() == DEVICE_TYPE) {
      on_device = true;
      for (const auto& [own, host] : aliases) {
        if (own.is_same(tensor)) return host;
      }
      counts.bytes += tensor.numel() * tensor.element_size();
      aliases.emplace_back(tensor, on_host(tensor));
      return aliases.back().second;
    }
    if (tensor.dim() > 0 && !may_be_elsewhere) strange = &tensor;
    return tensor;
  }

  IValue to_host(const IValue& value, bool may_be_elsewhere) {
    if (value.isTensor()) return aliased(value.toTensor(), may_be_elsewhere);
    if (value.isTensorList()) {
      c10::List<Tensor> all;
      for (const Tensor& tensor : value.toTensorVector()) all.push_back(aliased(tensor, may_be_elsewhere));
      return all;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> all;
      for (const std::optional<Tensor>& tensor : value.toOptionalTensorVector()) {
        all.push_back(tensor ? std::optional<Tensor>(aliased(*tensor, may_be_elsewhere)) : tensor);
      }
      return all;
    }
    if (value.isDevice() && value.toDevice().type() == DEVICE_TYPE) {
      on_device = true;
      return HOST;
    }
    if (value.isGenerator() && value.toGenerator().defined()) {
      TORCH_CHECK(!on_device, "Expected a '", DEVICE_TYPE, "' device type for generator but found 'cpu'");
    }
    return value;
  }

  // The tensor that was given, a view of one that was given, or new memory.
  Tensor to_device(const Tensor& result) {
    if (!result.defined() || result.device() != HOST || !on_device) return result;
    for (const auto& [own, host] : aliases) {
      if (host.is_same(result)) return own;
    }
    for (const auto& [own, host] : aliases) {
      if (host.storage().is_alias_of(result.storage())) return over(own.storage(), result, DEVICE);
    }
    counts.bytes += result.numel() * result.element_size();
    return over(seen_from(result.storage(), DEVICE, true), result, DEVICE);
  }

  IValue to_device(const IValue& value) {
    if (value.isTensor()) return to_device(value.toTensor());
    if (value.isTensorList()) {
      c10::List<Tensor> all;
      for (const Tensor& tensor : value.toTensorVector()) all.push_back(to_device(tensor));
      return all;
    }
    return value;
  }

  // An op that writes to an argument may have given it another shape, and more memory for it.
  void take_over_shapes() {
    for (const auto& [own, host] : aliases) {
      auto* impl = own.unsafeGetTensorImpl();
      if (host.storage().data() != own.storage().data() || host.storage().nbytes() > own.storage().nbytes()) {
        impl->set_storage_keep_dtype(seen_from(host.storage(), DEVICE, true));
      }
      if (host.sizes() != own.sizes() || host.strides() != own.strides()) {
        impl->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
      }
    }
  }
};

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto arguments = schema.arguments().size();
  const auto first = stack->size() - arguments;
  Call call;
  for (size_t i = 0; i < arguments; ++i) {
    const bool index = schema.arguments()[i].name() == "indices" && schema.name().find("index") != std::string::npos;
    (*stack)[first + i] = call.to_host((*stack)[first + i], index);
  }
  TORCH_CHECK(
      call.strange == nullptr || !call.on_device, "Expected all tensors to be on the same device, but ", schema.name(),
      " got one of ", call.strange->sizes(), " on ", call.strange->device(), " beside others on ", DEVICE);
  bool sync = WAITING.count(schema.name()) != 0;
  op.redispatchBoxed(c10::DispatchKeySet(DispatchKey::CPU), stack);
  call.take_over_shapes();
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i) {
    auto& result = (*stack)[i];
    sync |= result.isBool() || result.isDouble() || result.isInt();
    result = call.to_device(result);
  }
  count_call(schema.name(), sync);
}

// ---- ops that a boxed fallback cannot be: those that make, copy and read tensors ----

Tensor empty(
    c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
    std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  count_call("aten::empty", false);
  return at::detail::empty_generic(
      C10_AS_INTARRAYREF_SLOW(size), &allocator, c10::DispatchKeySet(DispatchKey::PrivateUse1),
      dtype.value_or(c10::get_default_dtype_as_scalartype()), format);
}

Tensor empty_strided(
    c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  count_call("aten::empty_strided", false);
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &allocator,
      c10::DispatchKeySet(DispatchKey::PrivateUse1), dtype.value_or(c10::get_default_dtype_as_scalartype()));
}

Tensor host_side(const Tensor& tensor) {
  return tensor.device() == HOST ? tensor : on_host(tensor);
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool /*non_blocking*/) {
  const bool down = to.device() == HOST;
  counts.uploads += from.device() == HOST;
  counts.bytes += from.numel() * from.element_size();
  count_call(down ? "copy to the host" : "aten::copy_", down);
  host_side(to).copy_(host_side(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  at::native::resize_output(to, from.sizes());
  return copy_from(from, to, false);
}

at::Scalar item(const Tensor& tensor) {
  count_call("aten::_local_scalar_dense", true);
  return on_host(tensor).item();
}

// Convolutions of an unknown device end in these two.
Tensor convolution(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, c10::SymIntArrayRef stride,
    c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef output_padding,
    c10::SymInt groups) {
  static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::convolution", "");
  torch::jit::Stack stack;
  torch::jit::push(
      stack, input, weight, bias, stride.vec(), padding.vec(), dilation.vec(), transposed, output_padding.vec(), groups);
  run_on_host(op, &stack);
  return stack.back().toTensor();
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& gradient, const Tensor& input, const Tensor& weight, c10::SymIntArrayRef stride,
    c10::SymIntArrayRef padding, c10::SymIntArrayRef dilation, bool transposed, c10::SymIntArrayRef output_padding,
    c10::SymInt groups, std::array<bool, 3> wanted) {
  static auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::convolution_backward", "");
  std::vector<c10::SymInt> bias_size{transposed ? weight.sym_size(1) * groups : weight.sym_size(0)};
  torch::jit::Stack stack;
  torch::jit::push(
      stack, gradient, input, weight, bias_size, stride.vec(), padding.vec(), dilation.vec(), transposed,
      output_padding.vec(), groups, wanted);
  run_on_host(op, &stack);
  return {stack[0].toTensor(), stack[1].toTensor(), stack[2].toTensor()};
}

void record_stream(Tensor& /*tensor*/, c10::Stream /*stream*/) {
  count_call("aten::record_stream", false);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &item);
  m.impl("set_", &at::native::set_cpu_);
  m.impl("set_.source_Storage", &at::native::set_);
  m.impl("set_.source_Storage_storage_offset", &at::native::set_storage_cpu_);
  m.impl("set_.source_Tensor", &at::native::set_tensor_);
  m.impl("record_stream", &record_stream);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
  // composed of others for an unknown device: that of groups fails on channels_last, and a GPU has its own, too
  m.impl("native_group_norm", torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
  m.impl("native_layer_norm", torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {  // of a GPU's lists, those that denoisers use
  KERNEL_PRIVATEUSEONE(linear, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(conv2d, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(matmul, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(bmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(baddbmm, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(scaled_dot_product_attention, lower_precision_fp)
  KERNEL_PRIVATEUSEONE(layer_norm, fp32)
  KERNEL_PRIVATEUSEONE(group_norm, fp32)
}

// ---- what torch asks of a device ----

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override {
    return DEVICE_TYPE;
  }
  c10::Device exchangeDevice(c10::Device) const override {
    return DEVICE;
  }
  c10::Device getDevice() const override {
    return DEVICE;
  }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override {
    return c10::Stream(c10::Stream::DEFAULT, DEVICE);
  }
  c10::Stream getDefaultStream(c10::Device) const override {
    return getStream(DEVICE);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return stream;
  }
  c10::DeviceIndex deviceCount() const noexcept override {
    return 1;
  }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override {
    return true;
  }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override {
    return true;
  }
  void synchronizeStream(const c10::Stream&) const override {
    count_call("synchronize", true);
  }
  void synchronizeDevice(const c10::DeviceIndex) const override {
    count_call("synchronize", true);
  }
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return true;
  }
  bool hasPrimaryContext(c10::DeviceIndex) const override {
    return true;
  }
  c10::DeviceIndex deviceCount() const override {
    return 1;
  }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex getCurrentDevice() const override {
    return 0;
  }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override {
    return 0;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override {
    return 0;
  }
  at::Device getDeviceFromPtr(void*) const override {
    return DEVICE;
  }
};
Hooks hooks;
const bool registered = (at::RegisterPrivateUse1HooksInterface(&hooks), true);

// ---- what tests ask of it ----

using Named = c10::Dict<std::string, int64_t>;

Named named(const std::map<std::string, int64_t>& from) {
  Named to;
  for (const auto& [name, count] : from) to.insert(name, count);
  return to;
}

TORCH_LIBRARY(fakedev, m) {
  m.def("reset", []() {
    std::lock_guard<std::mutex> lock(names_lock);
    calls_by_name.clear(), syncs_by_name.clear();
    counts.calls = counts.syncs = counts.uploads = counts.bytes = 0;
    counts.peak = counts.held.load();
  });
  m.def("counts", []() {
    return named({{"calls", counts.calls}, {"syncs", counts.syncs}, {"uploads", counts.uploads},
                  {"bytes", counts.bytes}, {"held", counts.held}, {"peak", counts.peak}});
  });
  m.def("calls", []() { return named(calls_by_name); });
  m.def("syncs", []() { return named(syncs_by_name); });
}

}  // namespace
