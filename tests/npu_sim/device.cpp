// A simulated NPU: torch's PrivateUse1 device with memory of the host, for tests without Ascend hardware.
//
//   torch operator on npu tensors --> kernels below (memory, views, copies)
//                                 \-> boxed: counted by name, computed by the CPU's kernel
//
// Device memory is host memory, so nothing here says how fast an NPU is or what its kernels round to. What it does say:
// which operators a program asks an NPU for, how much device memory it holds, where the host waits for the device, and
// whether streams wait for each other where they have to.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_local_scalar_dense_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/_to_copy_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/is_set_to_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>

#include "counters.h"

namespace npu_sim {

constexpr auto NPU = c10::DeviceType::PrivateUse1;

std::mutex counting;
std::map<std::string, int64_t> operators, transfers;
std::function<void(const std::string&)> on_read;
thread_local int inside = 0;

void count(std::map<std::string, int64_t>& where, const std::string& name) {
  const std::lock_guard<std::mutex> lock(counting);
  ++where[name];
}

// The host waits for the device: `name` says by what.
void read(const std::string& name) {
  if (inside)
    return;
  count(transfers, "read " + name);
  if (on_read)
    on_read(name);
}

namespace {

int64_t from_environment(const char* name, int64_t otherwise) {
  const char* value = std::getenv(name);
  return value && *value ? std::atoll(value) : otherwise;
}

c10::DeviceIndex device_count() {
  static const auto count = static_cast<c10::DeviceIndex>(from_environment("NPU_SIM_DEVICES", 1));
  return count;
}

thread_local c10::DeviceIndex current = 0;

c10::DeviceIndex checked(c10::DeviceIndex index) {
  TORCH_CHECK(index >= 0 && index < device_count(), "npu:", int(index), " was asked for; the simulation has ",
              int(device_count()), " (NPU_SIM_DEVICES)");
  return index;
}

// --- memory -------------------------------------------------------------------------------------------------------

using c10::CachingAllocator::StatType;
using c10::CachingDeviceAllocator::DeviceStats;

struct Block {
  c10::DeviceIndex device;
  size_t bytes;
  c10::StreamId home, writer;
  uint64_t written;
  std::map<c10::StreamId, uint64_t> uses;
  std::set<c10::StreamId> recorded;
};

// Streams are in no order but that of events: what one of them uses, another has to have written before an event that
// the first waits for. The simulation does all of it at once, and counts where a device need not have.
struct Order {
  using Clock = std::map<c10::StreamId, uint64_t>;
  std::mutex mutex;
  uint64_t now = 0;
  std::map<c10::StreamId, Clock> seen;
  Clock host;
  std::map<std::string, int64_t> hazards;

  static Order& get() {
    static auto* order = new Order();
    return *order;
  }
  static void merge(Clock& into, const Clock& from) {
    for (const auto& [stream, tick] : from)
      into[stream] = std::max(into[stream], tick);
  }
  void use(Block& block, c10::StreamId stream, bool writes) {
    const std::lock_guard<std::mutex> lock(mutex);
    auto& clock = seen[stream];
    merge(clock, host);
    const auto tick = ++now;
    if (block.writer != stream && clock[block.writer] < block.written)
      ++hazards["used before it was written"];
    for (const auto& [other, used] : block.uses)
      if (writes && other != stream && clock[other] < used)
        ++hazards["written while it was used"];
    clock[stream] = block.uses[stream] = tick;
    if (writes) {
      block.writer = stream;
      block.written = tick;
    }
  }
  void free(const Block& block) {
    const std::lock_guard<std::mutex> lock(mutex);
    auto clock = seen[block.home];
    merge(clock, host);
    for (const auto& [other, used] : block.uses)
      if (other != block.home && clock[other] < used && !block.recorded.count(other))
        ++hazards["given back while it was used"];
  }
  void host_waits(c10::StreamId stream) {
    const std::lock_guard<std::mutex> lock(mutex);
    merge(host, seen[stream]);
  }
};

// What the device found when it was first used: variables, and whether torch had been asked for the same bits.
std::map<std::string, std::string> found_at_first;

void look_around() {
  static std::once_flag once;
  std::call_once(once, [] {
    for (const auto* name : {"PYTORCH_NPU_ALLOC_CONF", "HCCL_DETERMINISTIC", "CLOSE_MATMUL_K_SHIFT"})
      if (const char* value = std::getenv(name))
        found_at_first[name] = value;
    found_at_first["deterministic"] = at::globalContext().deterministicAlgorithms() ? "yes" : "no";
  });
}

thread_local std::map<c10::DeviceIndex, c10::StreamId> streams;

struct NpuAllocator final : c10::DeviceAllocator {
  std::mutex mutex;
  std::unordered_map<void*, Block> blocks;
  std::vector<DeviceStats> stats = std::vector<DeviceStats>(device_count());
  size_t limit = from_environment("NPU_SIM_MEMORY", int64_t(64) << 30);

  static NpuAllocator& get() {
    static auto* allocator = new NpuAllocator();
    return *allocator;
  }

  static void release(void* data) {
    auto& self = get();
    {
      const std::lock_guard<std::mutex> lock(self.mutex);
      const auto found = self.blocks.find(data);
      if (found == self.blocks.end())
        return;
      auto& stats = self.stats[found->second.device];
      for (auto* each : {&stats.allocated_bytes, &stats.active_bytes, &stats.reserved_bytes, &stats.requested_bytes})
        (*each)[size_t(StatType::AGGREGATE)].decrease(found->second.bytes);
      stats.allocation[size_t(StatType::AGGREGATE)].decrease(1);
      Order::get().free(found->second);
      self.blocks.erase(found);
    }
    std::free(data);
  }

  c10::DataPtr allocate(size_t bytes) override {
    const auto device = current;
    const auto stream = streams[device];
    void* data = nullptr;
    look_around();
    if (bytes) {
      const std::lock_guard<std::mutex> lock(mutex);
      auto& each = stats[device];
      const auto live = size_t(each.allocated_bytes[size_t(StatType::AGGREGATE)].current);
      if (live + bytes > limit) {
        ++each.num_ooms;
        TORCH_CHECK_WITH(OutOfMemoryError, false, "NPU out of memory. Tried to allocate ", bytes, " bytes (NPU ",
                         int(device), "; ", limit, " bytes total capacity; ", live, " bytes already allocated)");
      }
      TORCH_CHECK(posix_memalign(&data, 512, bytes) == 0, "the host has no memory for the simulated NPU");
      blocks[data] = {device, bytes, stream, stream, 0, {}, {}};
      Order::get().use(blocks[data], stream, true);
      for (auto* stat : {&each.allocated_bytes, &each.active_bytes, &each.reserved_bytes, &each.requested_bytes})
        (*stat)[size_t(StatType::AGGREGATE)].increase(bytes);
      each.allocation[size_t(StatType::AGGREGATE)].increase(1);
    }
    return {data, data, &release, c10::Device(NPU, device)};
  }

  c10::DeleterFnPtr raw_deleter() const override {
    return &release;
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
  bool initialized() override {
    return true;
  }
  void emptyCache(c10::MempoolId_t) override {}
  void use(void* data, bool writes) {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = blocks.find(data);
    if (found != blocks.end())
      Order::get().use(found->second, streams[found->second.device], writes);
  }
  void recordStream(const c10::DataPtr& data, c10::Stream stream) override {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = blocks.find(data.get());
    if (found != blocks.end())
      found->second.recorded.insert(stream.id());
  }
  DeviceStats getDeviceStats(c10::DeviceIndex device) override {
    const std::lock_guard<std::mutex> lock(mutex);
    return stats.at(checked(device));
  }
  void resetAccumulatedStats(c10::DeviceIndex device) override {
    const std::lock_guard<std::mutex> lock(mutex);
    auto& each = stats.at(checked(device));
    each.allocated_bytes[size_t(StatType::AGGREGATE)].reset_accumulated();
    each.num_ooms = 0;
  }
  void resetPeakStats(c10::DeviceIndex device) override {
    const std::lock_guard<std::mutex> lock(mutex);
    auto& each = stats.at(checked(device));
    for (auto* stat : {&each.allocated_bytes, &each.active_bytes, &each.reserved_bytes, &each.requested_bytes})
      (*stat)[size_t(StatType::AGGREGATE)].reset_peak();
  }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex device) override {
    const auto live = getDeviceStats(device).allocated_bytes[size_t(StatType::AGGREGATE)].current;
    return {limit - size_t(live), limit};
  }
};

const auto registered_allocator = [] {
  c10::SetAllocator(NPU, &NpuAllocator::get());
  return true;
}();

// Host memory that is known to be pinned: a set of addresses.
struct PinnedAllocator final : at::HostAllocator {
  std::mutex mutex;
  std::map<const char*, size_t> blocks;

  static PinnedAllocator& get() {
    static auto* allocator = new PinnedAllocator();
    return *allocator;
  }
  static void release(void* data) {
    {
      const std::lock_guard<std::mutex> lock(get().mutex);
      get().blocks.erase(static_cast<const char*>(data));
    }
    std::free(data);
  }
  c10::DataPtr allocate(size_t bytes) override {
    void* data = nullptr;
    if (bytes) {
      TORCH_CHECK(posix_memalign(&data, 512, bytes) == 0, "the host has no memory to pin");
      const std::lock_guard<std::mutex> lock(mutex);
      blocks[static_cast<const char*>(data)] = bytes;
    }
    return {data, data, &release, c10::Device(c10::kCPU)};
  }
  bool has(const void* data) {
    const std::lock_guard<std::mutex> lock(mutex);
    auto behind = blocks.upper_bound(static_cast<const char*>(data));
    if (behind == blocks.begin())
      return false;
    --behind;
    return static_cast<const char*>(data) < behind->first + behind->second;
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return &release;
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
  bool record_event(void*, void*, c10::Stream) override {
    return true;
  }
  void empty_cache() override {}
  at::HostStats get_stats() override {
    return {};
  }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
};

REGISTER_HOST_ALLOCATOR(NPU, &PinnedAllocator::get())

// --- device, streams, events --------------------------------------------------------------------------------------
// Everything is done when the call returns; streams and events are numbers and times.

struct Event {
  std::chrono::steady_clock::time_point at;
  Order::Clock seen;
};

std::atomic<c10::StreamId> next_stream{1};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override {
    return NPU;
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    const auto before = getDevice();
    setDevice(device);
    return before;
  }
  c10::Device getDevice() const override {
    return {NPU, current};
  }
  void setDevice(c10::Device device) const override {
    if (device.has_index())
      current = checked(device.index());
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.has_index())
      current = device.index();
  }
  c10::Stream getStream(c10::Device device) const override {
    const auto index = device.has_index() ? device.index() : current;
    return c10::Stream(c10::Stream::UNSAFE, {NPU, index}, streams[index]);
  }
  c10::Stream getDefaultStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::UNSAFE, {NPU, device.has_index() ? device.index() : current}, 0);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return getNewStream(device, 0);
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    return c10::Stream(c10::Stream::UNSAFE, {NPU, device.has_index() ? device.index() : current}, next_stream++);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const auto before = getStream(stream.device());
    streams[stream.device_index()] = stream.id();
    return before;
  }
  void* getStreamNativeHandle(const c10::Stream) const override {
    return nullptr;
  }
  bool queryStream(const c10::Stream&) const override {
    return true;
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    read("synchronize");
    Order::get().host_waits(stream.id());
  }
  void synchronizeDevice(const c10::DeviceIndex) const override {
    read("synchronize");
    for (c10::StreamId stream = 0; stream < next_stream; ++stream)
      Order::get().host_waits(stream);
  }
  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (!*event)
      *event = new Event();
    auto& own = *static_cast<Event*>(*event);
    own.at = std::chrono::steady_clock::now();
    const std::lock_guard<std::mutex> lock(Order::get().mutex);
    own.seen = Order::get().seen[stream.id()];
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (!event)
      return;
    const std::lock_guard<std::mutex> lock(Order::get().mutex);
    Order::merge(Order::get().seen[stream.id()], static_cast<Event*>(event)->seen);
  }
  bool queryEvent(void*) const override {
    return true;
  }
  void synchronizeEvent(void* event) const override {
    read("synchronize");
    const std::lock_guard<std::mutex> lock(Order::get().mutex);
    Order::merge(Order::get().host, static_cast<Event*>(event)->seen);
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    delete static_cast<Event*>(event);
  }
  double elapsedTime(void* first, void* second, const c10::DeviceIndex) const override {
    const auto taken = static_cast<Event*>(second)->at - static_cast<Event*>(first)->at;
    return std::chrono::duration<double, std::milli>(taken).count();
  }
  void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const override {
    NpuAllocator::get().recordStream(data, stream);
  }
  c10::DeviceIndex deviceCount() const noexcept override {
    return device_count();
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

// --- random numbers -----------------------------------------------------------------------------------------------

// The CPU's generator under another device's name, one a device; kernels of the CPU are given `inner`.
struct NpuGenerator final : c10::GeneratorImpl {
  at::Generator inner;

  explicit NpuGenerator(c10::DeviceIndex device, uint64_t seed = c10::detail::getNonDeterministicRandom())
      : NpuGenerator(device, at::make_generator<at::CPUGeneratorImpl>(seed)) {}
  NpuGenerator(c10::DeviceIndex device, at::Generator inner)
      : c10::GeneratorImpl({NPU, device}, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)), inner(std::move(inner)) {}

  void set_current_seed(uint64_t seed) override {
    inner.set_current_seed(seed);
  }
  void set_offset(uint64_t offset) override {
    inner.set_offset(offset);
  }
  uint64_t get_offset() const override {
    return inner.get_offset();
  }
  uint64_t current_seed() const override {
    return inner.current_seed();
  }
  uint64_t seed() override {
    return inner.seed();
  }
  void set_state(const c10::TensorImpl& state) override {
    inner.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return inner.unsafeGetGeneratorImpl()->get_state();
  }
  NpuGenerator* clone_impl() const override {
    return new NpuGenerator(device_.index(), inner.clone());
  }
};

const at::Generator& default_generator(c10::DeviceIndex device) {
  static auto* generators = [] {
    auto* made = new std::vector<at::Generator>();
    for (c10::DeviceIndex index = 0; index < device_count(); ++index)
      made->push_back(at::make_generator<NpuGenerator>(index, c10::default_rng_seed_val));
    return made;
  }();
  return generators->at(device < 0 ? current : checked(device));
}

at::Generator inner_of(const at::Generator& generator) {
  return static_cast<NpuGenerator*>(generator.unsafeGetGeneratorImpl())->inner;
}

// --- what torch asks of a device in general -----------------------------------------------------------------------

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return device_count() > 0;
  }
  void init() const override {}
  bool hasPrimaryContext(c10::DeviceIndex) const override {
    return true;
  }
  c10::DeviceIndex deviceCount() const override {
    return device_count();
  }
  void setCurrentDevice(c10::DeviceIndex device) const override {
    current = checked(device);
  }
  c10::DeviceIndex getCurrentDevice() const override {
    return current;
  }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
    const auto before = current;
    current = checked(device);
    return before;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override {
    return device < 0 ? current : exchangeDevice(device);
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex device) const override {
    return default_generator(device);
  }
  at::Generator getNewGenerator(c10::DeviceIndex device) const override {
    return at::make_generator<NpuGenerator>(device < 0 ? current : checked(device));
  }
  at::Device getDeviceFromPtr(void* data) const override {
    auto& allocator = NpuAllocator::get();
    const std::lock_guard<std::mutex> lock(allocator.mutex);
    const auto found = allocator.blocks.find(data);
    TORCH_CHECK(found != allocator.blocks.end(), "no memory of the simulated NPU");
    return {NPU, found->second.device};
  }
  bool isPinnedPtr(const void* data) const override {
    return PinnedAllocator::get().has(data);
  }
  at::Allocator* getPinnedMemoryAllocator() const override {
    return &PinnedAllocator::get();
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    at::native::resize_bytes_cpu(storage.unsafeGetStorageImpl(), bytes);
  }
};

const auto registered_hooks = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  return true;
}();

// --- kernels ------------------------------------------------------------------------------------------------------

at::Tensor empty(c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const c10::DeviceGuard guard(device.value_or(at::Device(NPU)));
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &NpuAllocator::get(),
                                   c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>) {
  const c10::DeviceGuard guard(device.value_or(at::Device(NPU)));
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride),
                                           &NpuAllocator::get(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           c10::dtype_or_default(dtype));
}

at::Tensor copy_from(const at::Tensor& source, const at::Tensor& target, bool non_blocking) {
  const bool from_npu = source.device().type() == NPU, to_npu = target.device().type() == NPU;
  if (from_npu && !to_npu)
    read("copy");
  else if (!inside) {
    const auto* kind = from_npu ? "on the device" : non_blocking && source.is_pinned() ? "write pinned" : "write";
    count(transfers, std::string(kind) + (streams[target.device().index()] ? " on a stream of its own" : ""));
  }
  if (source.numel())
    on_host(target, true).copy_(on_host(source));
  if (from_npu && !to_npu && !inside)
    Order::get().host_waits(streams[source.device().index()]);
  return target;
}

at::Tensor copy_from_and_resize(const at::Tensor& source, const at::Tensor& target) {
  at::native::resize_output(target, source.sizes());
  return copy_from(source, target, false);
}

at::Scalar local_scalar_dense(const at::Tensor& self) {
  read("item");
  Order::get().host_waits(streams[self.device().index()]);
  return at::native::_local_scalar_dense_cpu(on_host(self));
}

at::Tensor& set_source(at::Tensor& self, at::Storage source) {
  const auto count = static_cast<int64_t>(source.nbytes() / self.dtype().itemsize());
  return at::native::set_storage_cpu_(self, std::move(source), 0, {count}, {});
}

at::Tensor& set_empty(at::Tensor& self) {
  at::Storage storage(at::Storage::use_byte_size_t(), 0, &NpuAllocator::get(), true);
  return at::native::set_storage_cpu_(self, std::move(storage), 0, {0}, {});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return at::native::set_storage_cpu_(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

// As torch-npu, whose device has no float64: casts to it give float32.
at::Tensor to_copy(const at::Tensor& self, std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout,
                   std::optional<at::Device> device, std::optional<bool> pin_memory, bool non_blocking,
                   std::optional<at::MemoryFormat> format) {
  if (!inside && dtype == at::kDouble && device.value_or(self.device()).type() == NPU)
    dtype = at::kFloat;
  return at::native::_to_copy(self, dtype, layout, device, pin_memory, non_blocking, format);
}

// As torch-npu: `weight.data = ` takes a tensor of the host where one of the device was, and the other way round.
bool compatible(const at::Tensor& self, const at::Tensor& from) {
  const auto dense = [](const at::Tensor& each) {
    return each.key_set().has(c10::DispatchKey::CPU) || each.key_set().has(c10::DispatchKey::PrivateUse1);
  };
  return self.key_set() == from.key_set() || (dense(self) && dense(from));
}

void record_stream(at::Tensor& self, at::Stream stream) {
  NpuAllocator::get().recordStream(self.storage().data_ptr(), stream);
}

// Operators whose result's shape, or whose result, the host has to wait for.
bool reads(const std::string& name) {
  static const std::set<std::string> names = {
      "aten::nonzero",       "aten::masked_select",      "aten::equal",      "aten::_unique2",
      "aten::unique_dim",    "aten::unique_consecutive", "aten::bincount",   "aten::is_nonzero",
      "aten::allclose",      "aten::repeat_interleave",
  };
  return names.count(name) > 0;
}

void computed_by_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  if (!inside) {
    count(operators, schema.name());
    if (reads(schema.name()))
      read(schema.name());
  }
  const auto& arguments = schema.arguments();
  const auto begin = stack->size() - arguments.size();
  auto device = c10::DeviceIndex(-1);
  bool seeded = op.hasTag(at::Tag::nondeterministic_seeded);
  for (size_t index = 0; index < arguments.size() && device < 0; ++index) {
    const auto& value = (*stack)[begin + index];
    if (value.isTensor() && value.toTensor().defined() && value.toTensor().device().type() == NPU)
      device = value.toTensor().device().index();
  }
  for (size_t index = 0; index < arguments.size(); ++index) {
    auto& value = (*stack)[begin + index];
    const bool takes_generator = arguments[index].type()->str().find("Generator") != std::string::npos;
    seeded = seeded && !takes_generator;
    if (value.isGenerator()) {
      if (value.toGenerator().device().type() == NPU)
        value = inner_of(value.toGenerator());
    } else if (value.isNone() && takes_generator) {
      value = inner_of(default_generator(device));
    }
  }
  const Inside here;
  if (!seeded) {
    at::native::cpu_fallback(op, stack);
    return;
  }
  // Dropout takes no generator: the CPU's own is lent the device's numbers meanwhile.
  static std::mutex lending;
  const std::lock_guard<std::mutex> lock(lending);
  auto host = at::detail::getDefaultCPUGenerator(), ours = inner_of(default_generator(device));
  const auto kept = host.get_state();
  host.set_state(ours.get_state());
  try {
    at::native::cpu_fallback(op, stack);
  } catch (...) {
    host.set_state(kept);
    throw;
  }
  ours.set_state(host.get_state());
  host.set_state(kept);
}

// Convolutions, which torch asks of other devices by names of their own.
at::Tensor to_npu(const at::Tensor& tensor, const at::Tensor& like) {
  if (!tensor.defined())
    return tensor;
  auto result = at::empty(tensor.sizes(), tensor.options().device(like.device()));
  on_host(result, true).copy_(tensor);
  return result;
}

at::Tensor convolution(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                       at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
                       at::IntArrayRef output_padding, int64_t groups) {
  count(operators, "aten::convolution");
  const auto own = bias && bias->defined() ? std::optional<at::Tensor>(on_host(*bias)) : std::nullopt;
  return to_npu(at::convolution(on_host(input), on_host(weight), own, stride, padding, dilation, transposed,
                                output_padding, groups),
                input);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& gradient, const at::Tensor& input, const at::Tensor& weight, at::IntArrayRef stride,
    at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed, at::IntArrayRef output_padding, int64_t groups,
    std::array<bool, 3> mask) {
  count(operators, "aten::convolution_backward");
  const auto [of_input, of_weight, of_bias] =
      at::convolution_backward(on_host(gradient), on_host(input), on_host(weight), c10::IntArrayRef({weight.size(0)}),
                               stride, padding, dilation, transposed, output_padding, groups, mask);
  return {to_npu(of_input, input), to_npu(of_weight, input), to_npu(of_bias, input)};
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("_local_scalar_dense", local_scalar_dense);
  m.impl("convolution_overrideable", convolution);
  m.impl("convolution_backward_overrideable", convolution_backward);
  m.impl("view", at::native::view);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("resize_", at::native::resize_);
  m.impl("set_", set_empty);
  m.impl("set_.source_Storage", set_source);
  m.impl("set_.source_Storage_storage_offset", at::native::set_storage_cpu_);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("is_set_to", at::native::is_set_to);
  m.impl("_to_copy", to_copy);
  m.impl("_has_compatible_shallow_copy_type", compatible);
  m.impl("record_stream", record_stream);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&computed_by_the_cpu>());
}

TORCH_LIBRARY_IMPL(_, AutogradPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
#define LOWER(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define FULL(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define CHOSEN(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define PROMOTE(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)
  AT_FORALL_LOWER_PRECISION_FP(LOWER)
  AT_FORALL_FP32(FULL)
  AT_FORALL_FP32_SET_OPT_DTYPE(CHOSEN)
  AT_FORALL_PROMOTE(PROMOTE)
}

} // namespace

at::Tensor on_host(const at::Tensor& tensor, bool writes) {
  if (tensor.device().type() != NPU)
    return tensor;
  NpuAllocator::get().use(tensor.storage().data_ptr().get(), writes);
  return at::for_blob(tensor.data_ptr(), tensor.sizes())
      .strides(tensor.strides())
      .deleter([tensor](void*) {})
      .options(tensor.options().device(at::kCPU))
      .make_tensor();
}

} // namespace npu_sim

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace npu_sim;
  m.def("device_count", [] { return int(device_count()); });
  m.def("current_device", [] { return int(current); });
  m.def("set_device", [](int device) { current = checked(static_cast<c10::DeviceIndex>(device)); });
  m.def("default_generator", [](int device) { return default_generator(static_cast<c10::DeviceIndex>(device)); });
  m.def("operators", [] { const std::lock_guard<std::mutex> lock(counting); return operators; });
  m.def("transfers", [] { const std::lock_guard<std::mutex> lock(counting); return transfers; });
  m.def("hazards", [] { const std::lock_guard<std::mutex> lock(Order::get().mutex); return Order::get().hazards; });
  m.def("found_at_first", [] { return found_at_first; });
  m.def("forget", [] {
    const std::lock_guard<std::mutex> lock(counting), other(Order::get().mutex);
    operators.clear();
    transfers.clear();
    Order::get().hazards.clear();
  });
  m.def("on_read", [](std::optional<py::function> call) {
    if (!call) {
      on_read = nullptr;
      return;
    }
    // Never released: it may outlive the interpreter.
    auto* kept = new py::function(std::move(*call));
    on_read = [kept](const std::string& name) {
      const py::gil_scoped_acquire gil;
      (*kept)(name);
    };
  });
  // As one operator of the device: what is computed until `leave` is neither counted nor the program's.
  m.def("enter", [](const std::string& name) {
    if (!inside)
      count(operators, name);
    ++inside;
  });
  m.def("leave", [] { --inside; });
  m.def("set_memory_limit", [](size_t bytes) { NpuAllocator::get().limit = bytes; });
  bind_hccl(m);
}
