// The only pybind11 file: pointers (as integers), sizes and strides in; nothing out. Python owns
// every check and every lifetime (dpo_kernels/ops, dpo_kernels/backends).
#include <omp.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "params.h"

namespace py = pybind11;
using dpo::DType;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using Numbers = std::array<double, 3>;  // scale, softcap, inv_temperature

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of dpo_kernels on raw pointers.";
  using release = py::call_guard<py::gil_scoped_release>;

  m.def(
      "token_logps",
      [](uintptr_t logits, int64_t stride_r, int64_t stride_t, uintptr_t targets, int64_t R,
         int64_t T, int64_t V, int64_t ignore_index, int dtype, Numbers t, uintptr_t logps,
         uintptr_t lse, uintptr_t entropy, uintptr_t mean_logits, uintptr_t is_top1,
         uintptr_t log_sum_sq_probs) {
        dpo::token_logps({at<const void>(logits), stride_r, stride_t, at<const int64_t>(targets), R,
                          T, V, ignore_index, DType(dtype), {t[0], t[1], t[2]}, at<float>(logps),
                          at<double>(lse), at<float>(entropy), at<float>(mean_logits),
                          at<float>(is_top1), at<float>(log_sum_sq_probs)});
      },
      release());
  m.def(
      "token_logps_backward",
      [](uintptr_t grad, uintptr_t logits, int64_t stride_r, int64_t stride_t, uintptr_t targets,
         uintptr_t lse, int64_t R, int64_t T, int64_t V, int64_t ignore_index, int dtype, Numbers t,
         uintptr_t out, int64_t out_stride_r, int64_t out_stride_t) {
        dpo::token_logps_backward({at<const float>(grad), at<const void>(logits), stride_r,
                                   stride_t, at<const int64_t>(targets), at<const double>(lse), R,
                                   T, V, ignore_index, DType(dtype), {t[0], t[1], t[2]},
                                   at<void>(out), out_stride_r, out_stride_t});
      },
      release());
  m.def(
      "sequence_sum",
      [](uintptr_t targets, uintptr_t starts, int64_t S, int64_t ignore_index, double tail_weight,
         uintptr_t values, uintptr_t sums, uintptr_t counts) {
        dpo::sequence_sum({at<const int64_t>(targets), at<const int64_t>(starts), S, ignore_index,
                           tail_weight, at<const float>(values), at<double>(sums),
                           at<int64_t>(counts), nullptr, nullptr});
      },
      release());
  m.def(
      "sequence_sum_backward",
      [](uintptr_t targets, uintptr_t starts, int64_t S, int64_t ignore_index, double tail_weight,
         uintptr_t grad, uintptr_t d_values) {
        dpo::sequence_sum_backward({at<const int64_t>(targets), at<const int64_t>(starts), S,
                                    ignore_index, tail_weight, nullptr, nullptr, nullptr,
                                    at<const double>(grad), at<float>(d_values)});
      },
      release());
  m.def(
      "pair_loss",
      [](uintptr_t u, uintptr_t v, uintptr_t beta, uintptr_t offset, const std::vector<int>& phis,
         const std::vector<double>& terms, int64_t B, uintptr_t loss, uintptr_t slopes) {
        dpo::pair_loss({at<const double>(u), at<const double>(v), at<const double>(beta),
                        at<const double>(offset), phis.data(), terms.data(), B,
                        (int64_t)phis.size(), at<double>(loss), at<double>(slopes)});
      },
      release());
  m.def("instruction_sets", [] { return std::string(dpo::instruction_sets()); },
        "Instruction sets that run here, best (the default) first, comma-separated.");
  m.def("use_instruction_set", [](const std::string& name) {
    return dpo::use_instruction_set(name.c_str());
  });
  m.def("num_threads", [] { return omp_get_max_threads(); });
}
