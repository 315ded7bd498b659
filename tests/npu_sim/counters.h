#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

namespace npu_sim {

// While one lives, this thread computes for the device: copies to the host are not the program's.
extern thread_local int inside;

struct Inside {
  Inside() {
    ++inside;
  }
  ~Inside() {
    --inside;
  }
};

// The same memory as a tensor of the CPU, which the current stream reads, or writes.
at::Tensor on_host(const at::Tensor& tensor, bool writes = false);

void bind_hccl(py::module_& m);

} // namespace npu_sim
