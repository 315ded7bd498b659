// A simulated HCCL: collectives on the simulated NPU's tensors, carried by gloo.
//
// Device memory is host memory, so gloo is given the same memory as tensors of the CPU. A collective is done when its
// call returns. Reductions and data types that torch-npu's HCCL has not are refused; means are sums that are divided.

#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>

#include "counters.h"

namespace npu_sim {
namespace {

using Tensors = std::vector<at::Tensor>;
using Lists = std::vector<Tensors>;
template <typename T>
using Ptr = c10::intrusive_ptr<T>;
using c10d::Backend;
using c10d::ReduceOp;

Tensors on_host(Tensors& tensors) {
  Tensors result;
  for (const auto& each : tensors)
    result.push_back(npu_sim::on_host(each));
  return result;
}

// As HCCL takes them: numbers one after another, whatever the shape.
at::Tensor flat_on_host(const at::Tensor& tensor) {
  TORCH_CHECK(tensor.is_contiguous(), "HCCL takes contiguous tensors");
  return npu_sim::on_host(tensor).view(-1);
}

Lists on_host(Lists& lists) {
  Lists result;
  for (auto& each : lists)
    result.push_back(on_host(each));
  return result;
}

// HCCL's reductions, of these types. What gloo has not is made of what it has.
ReduceOp checked(const ReduceOp& op, const at::Tensor& tensor) {
  TORCH_CHECK(op != ReduceOp::BAND && op != ReduceOp::BOR && op != ReduceOp::BXOR, "HCCL has no reduction by bits");
  const auto type = tensor.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kHalf || type == at::kBFloat16 || type == at::kChar ||
                  type == at::kShort || type == at::kInt || type == at::kLong || type == at::kByte || type == at::kBool,
              "HCCL does not reduce ", type);
  return op == ReduceOp::AVG ? ReduceOp(ReduceOp::SUM) : op;
}

struct DoneWork final : c10d::Work {
  Tensors outputs;
  Ptr<c10::ivalue::Future> future;

  DoneWork(int rank, c10d::OpType kind, Tensors given) : Work(rank, kind), outputs(std::move(given)) {
    std::vector<c10::Device> devices;
    if (!outputs.empty() && !outputs[0].is_cpu())
      devices.push_back(outputs[0].device());
    future = c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()), devices);
    future->markCompleted(at::IValue(outputs));
    finish();
  }
  bool wait(std::chrono::milliseconds) override {
    return true;
  }
  Tensors result() override {
    return outputs;
  }
  Ptr<c10::ivalue::Future> getFuture() override {
    return future;
  }
};

// Of a message between two processes, which the other may send later.
struct PendingWork final : c10d::Work {
  Ptr<Work> inner;

  PendingWork(int rank, c10d::OpType kind, Ptr<Work> inner) : Work(rank, kind), inner(std::move(inner)) {}
  bool isCompleted() override {
    return inner->isCompleted();
  }
  bool wait(std::chrono::milliseconds timeout) override {
    return inner->wait(timeout);
  }
  int sourceRank() const override {
    return inner->sourceRank();
  }
};

struct Hccl final : Backend {
  Ptr<Backend> gloo;
  using Kind = c10d::OpType;

  explicit Hccl(const Ptr<Backend>& gloo) : Backend(gloo->getRank(), gloo->getSize()), gloo(gloo) {}

  const std::string getBackendName() const override {
    return "hccl";
  }
  Ptr<c10d::Work> done(const Ptr<c10d::Work>& work, Kind kind, Tensors outputs) {
    const Inside here;
    work->wait();
    return c10::make_intrusive<DoneWork>(getRank(), kind, std::move(outputs));
  }
  Ptr<c10d::Work> reduced(const Ptr<c10d::Work>& work, Kind kind, const ReduceOp& op, Tensors outputs) {
    auto result = done(work, kind, outputs);
    if (op == ReduceOp::AVG)
      for (auto& each : outputs)
        npu_sim::on_host(each).div_(getSize());
    return result;
  }
  static Tensors flat(const Lists& lists) {
    Tensors all;
    for (const auto& each : lists)
      all.insert(all.end(), each.begin(), each.end());
    return all;
  }

  Ptr<c10d::Work> broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override {
    auto host = on_host(tensors);
    return done(gloo->broadcast(host, options), Kind::BROADCAST, tensors);
  }
  Ptr<c10d::Work> allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override {
    auto host = on_host(tensors);
    auto told = options;
    told.reduceOp = checked(options.reduceOp, tensors[0]);
    return reduced(gloo->allreduce(host, told), Kind::ALLREDUCE, options.reduceOp, tensors);
  }
  Ptr<c10d::Work> allreduce_coalesced(Tensors& tensors, const c10d::AllreduceCoalescedOptions& options) override {
    for (auto& each : tensors) {
      Tensors one{each};
      allreduce(one, options);
    }
    return c10::make_intrusive<DoneWork>(getRank(), Kind::ALLREDUCE_COALESCED, tensors);
  }
  Ptr<c10d::Work> reduce(Tensors& tensors, const c10d::ReduceOptions& options) override {
    auto host = on_host(tensors);
    auto told = options;
    told.reduceOp = checked(options.reduceOp, tensors[0]);
    return reduced(gloo->reduce(host, told), Kind::REDUCE, options.reduceOp, tensors);
  }
  Ptr<c10d::Work> allgather(Lists& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override {
    auto to = on_host(outputs);
    auto from = on_host(inputs);
    return done(gloo->allgather(to, from, options), Kind::ALLGATHER, flat(outputs));
  }
  Ptr<c10d::Work> _allgather_base(at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& options) override {
    auto to = flat_on_host(output);
    auto from = flat_on_host(input);
    return done(gloo->_allgather_base(to, from, options), Kind::_ALLGATHER_BASE, {output});
  }
  Ptr<c10d::Work> allgather_into_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                                  const c10d::AllgatherOptions& options) override {
    for (size_t index = 0; index < outputs.size(); ++index)
      _allgather_base(outputs[index], inputs[index], options);
    return c10::make_intrusive<DoneWork>(getRank(), Kind::COALESCED, outputs);
  }
  Ptr<c10d::Work> gather(Lists& outputs, Tensors& inputs, const c10d::GatherOptions& options) override {
    auto to = on_host(outputs);
    auto from = on_host(inputs);
    return done(gloo->gather(to, from, options), Kind::GATHER, flat(outputs));
  }
  Ptr<c10d::Work> scatter(Tensors& outputs, Lists& inputs, const c10d::ScatterOptions& options) override {
    auto to = on_host(outputs);
    auto from = on_host(inputs);
    return done(gloo->scatter(to, from, options), Kind::SCATTER, outputs);
  }
  Ptr<c10d::Work> reduce_scatter(Tensors& outputs, Lists& inputs, const c10d::ReduceScatterOptions& options) override {
    auto to = on_host(outputs);
    auto from = on_host(inputs);
    auto told = options;
    told.reduceOp = checked(options.reduceOp, outputs[0]);
    return reduced(gloo->reduce_scatter(to, from, told), Kind::REDUCE_SCATTER, options.reduceOp, outputs);
  }
  Ptr<c10d::Work> _reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                                       const c10d::ReduceScatterOptions& options) override {
    auto to = flat_on_host(output);
    auto from = flat_on_host(input);
    auto told = options;
    told.reduceOp = checked(options.reduceOp, output);
    return reduced(gloo->_reduce_scatter_base(to, from, told), Kind::_REDUCE_SCATTER_BASE, options.reduceOp, {output});
  }
  Ptr<c10d::Work> reduce_scatter_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                                  const c10d::ReduceScatterOptions& options) override {
    for (size_t index = 0; index < outputs.size(); ++index)
      _reduce_scatter_base(outputs[index], inputs[index], options);
    return c10::make_intrusive<DoneWork>(getRank(), Kind::COALESCED, outputs);
  }
  Ptr<c10d::Work> alltoall_base(at::Tensor& output, at::Tensor& input, std::vector<int64_t>& to_sizes,
                                std::vector<int64_t>& from_sizes, const c10d::AllToAllOptions& options) override {
    auto to = npu_sim::on_host(output);
    auto from = npu_sim::on_host(input);
    return done(gloo->alltoall_base(to, from, to_sizes, from_sizes, options), Kind::ALLTOALL_BASE, {output});
  }
  Ptr<c10d::Work> send(Tensors& tensors, int to, int tag) override {
    auto host = on_host(tensors);
    return c10::make_intrusive<PendingWork>(getRank(), Kind::SEND, gloo->send(host, to, tag));
  }
  Ptr<c10d::Work> recv(Tensors& tensors, int from, int tag) override {
    auto host = on_host(tensors);
    return c10::make_intrusive<PendingWork>(getRank(), Kind::RECV, gloo->recv(host, from, tag));
  }
  Ptr<c10d::Work> barrier(const c10d::BarrierOptions& options) override {
    return done(gloo->barrier(options), Kind::BARRIER, {});
  }
  void setSequenceNumberForGroup() override {
    gloo->setSequenceNumberForGroup();
  }
  uint64_t getSequenceNumberForGroup() override {
    return gloo->getSequenceNumberForGroup();
  }
  void setTimeout(std::chrono::milliseconds timeout) override {
    gloo->setTimeout(timeout);
  }
};

} // namespace

void bind_hccl(py::module_& m) {
  m.def("hccl", [](const Ptr<Backend>& gloo) -> Ptr<Backend> { return c10::make_intrusive<Hccl>(gloo); });
}

} // namespace npu_sim
