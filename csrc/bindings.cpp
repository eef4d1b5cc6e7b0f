// The only pybind11 file: pointers (as integers), sizes and strides in; nothing out. Python owns
// every check and every lifetime (dpo_kernels/ops, dpo_kernels/backends).
//
// A parameter struct is a class whose constructor takes its fields in order; `token_logps(struct)`
// runs on the CPU, `cuda_token_logps(struct, ..., device, stream)` enqueues on a GPU and raises
// RuntimeError with CUDA's own words where a launch fails.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <vector>

#ifndef CUDA_ON_HOST  // the CUDA kernels alone, on the host, for the tests
#include <omp.h>

#include "cpu/functions.h"
#include "cpu/products.h"
#endif

#include "ordinary.h"
#include "params.h"

namespace py = pybind11;
using namespace dpo;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using Numbers = std::array<double, 3>;  // scale, softcap, inv_temperature
using release = py::call_guard<py::gil_scoped_release>;

// A loss of pairs as Python has it; what points into it lives as long.
struct OrdinaryLoss {
  std::vector<int> phis;
  std::vector<double> terms;
  bool per_token, mean_reward;

  Ordinary of(uintptr_t reference, uintptr_t betas, double beta, uintptr_t offset, int64_t B,
              uintptr_t found) const {
    return {at<const double>(reference),
            at<const double>(betas),
            beta,
            at<const double>(offset),
            phis.data(),
            terms.data(),
            B,
            (int64_t)phis.size(),
            per_token,
            mean_reward,
            at<double>(found)};
  }
};

void bind_parameters(py::module_& m) {
  // module_local: the tests load a second module with the same classes.
  py::class_<TokenLogps>(m, "TokenLogps", py::module_local())
      .def(py::init([](uintptr_t logits, int64_t stride_r, int64_t stride_t, uintptr_t targets,
                       int64_t R, int64_t T, int64_t V, int64_t ignore_index, int dtype, Numbers t,
                       uintptr_t logps, uintptr_t lse, uintptr_t entropy, uintptr_t mean_logits,
                       uintptr_t is_top1, uintptr_t log_sum_sq_probs) {
        return TokenLogps{at<const void>(logits),
                          stride_r,
                          stride_t,
                          at<const int64_t>(targets),
                          R,
                          T,
                          V,
                          ignore_index,
                          DType(dtype),
                          {t[0], t[1], t[2]},
                          at<float>(logps),
                          at<double>(lse),
                          at<float>(entropy),
                          at<float>(mean_logits),
                          at<float>(is_top1),
                          at<float>(log_sum_sq_probs)};
      }));
  py::class_<TokenLogpsBackward>(m, "TokenLogpsBackward", py::module_local())
      .def(py::init([](uintptr_t grad, uintptr_t logits, int64_t stride_r, int64_t stride_t,
                       uintptr_t targets, uintptr_t lse, int64_t R, int64_t T, int64_t V,
                       int64_t ignore_index, int dtype, Numbers t, uintptr_t out,
                       int64_t out_stride_r, int64_t out_stride_t, int out_dtype) {
        return TokenLogpsBackward{at<const float>(grad),
                                  at<const void>(logits),
                                  stride_r,
                                  stride_t,
                                  at<const int64_t>(targets),
                                  at<const double>(lse),
                                  R,
                                  T,
                                  V,
                                  ignore_index,
                                  DType(dtype),
                                  {t[0], t[1], t[2]},
                                  at<void>(out),
                                  out_stride_r,
                                  out_stride_t,
                                  DType(out_dtype)};
      }));
  py::class_<SequenceSum>(m, "SequenceSum", py::module_local())
      .def(py::init([](uintptr_t targets, uintptr_t starts, int64_t S, int64_t ignore_index,
                       double tail_weight, uintptr_t values, uintptr_t sums, uintptr_t counts,
                       uintptr_t grad, uintptr_t d_values) {
        return SequenceSum{at<const int64_t>(targets),
                           at<const int64_t>(starts),
                           S,
                           ignore_index,
                           tail_weight,
                           at<const float>(values),
                           at<double>(sums),
                           at<int64_t>(counts),
                           at<const double>(grad),
                           at<float>(d_values)};
      }));
  py::class_<OrdinaryLoss>(m, "OrdinaryLoss", py::module_local())
      .def(py::init<std::vector<int>, std::vector<double>, bool, bool>());
}

PairLoss pair_of(uintptr_t u, uintptr_t v, uintptr_t beta, uintptr_t offset,
                 const std::vector<int>& phis, const std::vector<double>& terms, int64_t B,
                 uintptr_t loss, uintptr_t slopes) {
  return {at<const double>(u),
          at<const double>(v),
          at<const double>(beta),
          at<const double>(offset),
          phis.data(),
          terms.data(),
          B,
          (int64_t)phis.size(),
          at<double>(loss),
          at<double>(slopes)};
}

#ifndef CUDA_ON_HOST
SequenceSum place_of(const int64_t* targets, uintptr_t starts, int64_t S, int64_t ignore_index,
                     double tail_weight) {
  return {targets,     at<const int64_t>(starts),
          S,           ignore_index,
          tail_weight, nullptr,
          nullptr,     nullptr,
          nullptr,     nullptr};
}

void bind_ordinary(py::module_& m) {
  m.def(
      "ordinary",
      [](const OrdinaryLoss& loss, uintptr_t sums, uintptr_t counts, uintptr_t reference,
         uintptr_t betas, double beta, uintptr_t offset, int64_t B, uintptr_t found) {
        ordinary(loss.of(reference, betas, beta, offset, B, found), at<const double>(sums),
                 at<const double>(counts));
      },
      release());
  m.def(
      "ordinary_rows",
      [](const OrdinaryLoss& loss, const TokenLogps& rows, uintptr_t starts, double tail_weight,
         uintptr_t reference, uintptr_t betas, double beta, uintptr_t offset, int64_t B,
         uintptr_t found) {
        ordinary_rows(loss.of(reference, betas, beta, offset, B, found), rows,
                      place_of(rows.targets, starts, 2 * B, rows.ignore_index, tail_weight));
      },
      release());
  m.def(
      "ordinary_rows_backward",
      [](uintptr_t found, double scale, const TokenLogpsBackward& rows, uintptr_t starts,
         double tail_weight, int64_t B) {
        ordinary_rows_backward(
            at<const double>(found) + SLOPES * B, scale, rows,
            place_of(rows.targets, starts, 2 * B, rows.ignore_index, tail_weight));
      },
      release());
  m.def(
      "ordinary_streamed",
      [](const OrdinaryLoss& loss, uintptr_t logits, int64_t stride, int64_t N, int64_t V,
         uintptr_t boundaries, int64_t ignore_index, double tail_weight, Numbers t,
         uintptr_t reference, uintptr_t betas, double beta, uintptr_t offset, int64_t B,
         double divisor, bool wide, uintptr_t out, uintptr_t fields) {
        const int64_t* targets = at<const int64_t>(boundaries) + 2 * B + 1;
        TokenLogps rows{};
        rows.logits = at<const void>(logits);
        rows.stride_t = stride;
        rows.targets = targets;
        rows.R = 1;
        rows.T = N;
        rows.V = V;
        rows.ignore_index = ignore_index;
        rows.dtype = DType::f32;
        rows.transform = {t[0], t[1], t[2]};
        ordinary_streamed(loss.of(reference, betas, beta, offset, B, 0), rows,
                          place_of(targets, boundaries, 2 * B, ignore_index, tail_weight), divisor,
                          wide, at<void>(out), at<void>(fields));
      },
      release());
  m.def(
      "ordinary_fields",
      [](uintptr_t found, int64_t B, double divisor, bool wide, uintptr_t loss, uintptr_t fields) {
        ordinary_fields(at<const double>(found), B, divisor, wide, at<void>(loss),
                        at<void>(fields));
      },
      release());
}

void bind_places(py::module_& m) {
  m.def("targets_of",
        [](uintptr_t labels, int64_t S, int64_t T, int64_t V, int64_t ignore_index, bool shift,
           uintptr_t targets) -> py::object {
          std::vector<int64_t> lengths(S);
          if (!targets_of(at<const int64_t>(labels), S, T, V, ignore_index, shift,
                          at<int64_t>(targets), lengths.data()))
            return py::none();
          py::tuple found(S);
          for (int64_t s = 0; s < S; ++s) found[s] = lengths[s];
          return found;
        });
  m.def(
      "packed",
      [](uintptr_t targets, uintptr_t starts, int64_t S, int64_t ignore_index, int64_t N,
         int64_t whole, uintptr_t places, uintptr_t hidden, int64_t size, uintptr_t rows) {
        packed(place_of(at<const int64_t>(targets), starts, S, ignore_index, 1), N, whole,
               at<int64_t>(places));
        if (rows)
          rows_at(at<const int64_t>(places), whole, at<const char>(hidden), size, at<char>(rows));
      },
      release());
  m.def(
      "rows_back",
      [](uintptr_t places, int64_t n, uintptr_t rows, int64_t size, int64_t all, uintptr_t out) {
        rows_back(at<const int64_t>(places), n, at<const char>(rows), size, all, at<char>(out));
      },
      release());
}

void bind_cpu(py::module_& m) {
  py::class_<TokenKl>(m, "TokenKl", py::module_local())
      .def(py::init([](uintptr_t logits, int64_t stride_r, int64_t stride_t, uintptr_t ref_logits,
                       int64_t ref_stride_r, int64_t ref_stride_t, uintptr_t targets, int64_t R,
                       int64_t T, int64_t V, int64_t ignore_index, int dtype, int ref_dtype,
                       Numbers t, uintptr_t logps, uintptr_t lse, uintptr_t ref_logps,
                       uintptr_t ref_lse, uintptr_t kl) {
        return TokenKl{at<const void>(logits),
                       stride_r,
                       stride_t,
                       at<const void>(ref_logits),
                       ref_stride_r,
                       ref_stride_t,
                       at<const int64_t>(targets),
                       R,
                       T,
                       V,
                       ignore_index,
                       DType(dtype),
                       DType(ref_dtype),
                       {t[0], t[1], t[2]},
                       at<float>(logps),
                       at<double>(lse),
                       at<float>(ref_logps),
                       at<double>(ref_lse),
                       at<float>(kl)};
      }));
  py::class_<TokenKlBackward>(m, "TokenKlBackward", py::module_local())
      .def(py::init([](uintptr_t grad_logps, uintptr_t grad_kl, uintptr_t logits, int64_t stride_r,
                       int64_t stride_t, uintptr_t ref_logits, int64_t ref_stride_r,
                       int64_t ref_stride_t, uintptr_t targets, uintptr_t lse, uintptr_t ref_lse,
                       int64_t R, int64_t T, int64_t V, int64_t ignore_index, int dtype,
                       int ref_dtype, Numbers t, uintptr_t out, int64_t out_stride_r,
                       int64_t out_stride_t) {
        return TokenKlBackward{at<const float>(grad_logps),
                               at<const float>(grad_kl),
                               at<const void>(logits),
                               stride_r,
                               stride_t,
                               at<const void>(ref_logits),
                               ref_stride_r,
                               ref_stride_t,
                               at<const int64_t>(targets),
                               at<const double>(lse),
                               at<const double>(ref_lse),
                               R,
                               T,
                               V,
                               ignore_index,
                               DType(dtype),
                               DType(ref_dtype),
                               {t[0], t[1], t[2]},
                               at<void>(out),
                               out_stride_r,
                               out_stride_t};
      }));
  m.def("token_kl", [](const TokenKl& p) { token_kl(p); }, release());
  m.def("token_kl_backward", [](const TokenKlBackward& p) { token_kl_backward(p); }, release());
  m.def("token_logps", [](const TokenLogps& p) { token_logps(p); }, release());
  m.def(
      "token_logps_backward", [](const TokenLogpsBackward& p) { token_logps_backward(p); },
      release());
  m.def("sequence_sum", [](const SequenceSum& p) { sequence_sum(p); }, release());
  m.def("sequence_sum_backward", [](const SequenceSum& p) { sequence_sum_backward(p); }, release());
  m.def(
      "pair_loss",
      [](uintptr_t u, uintptr_t v, uintptr_t beta, uintptr_t offset, const std::vector<int>& phis,
         const std::vector<double>& terms, int64_t B, uintptr_t loss, uintptr_t slopes) {
        pair_loss(pair_of(u, v, beta, offset, phis, terms, B, loss, slopes));
      },
      release());
  bind_places(m);
  bind_ordinary(m);
  m.def(
      "instruction_sets", [] { return std::string(instruction_sets()); },
      "Instruction sets that run here, best (the default) first, comma-separated.");
  m.def("use_instruction_set",
        [](const std::string& name) { return use_instruction_set(name.c_str()); });
  m.def("has_bf16_products", &has_bf16_products);
  m.def(
      "bf16_product",
      [](uintptr_t a, int64_t a_row, int64_t a_column, uintptr_t b, int64_t b_row, int64_t b_column,
         uintptr_t out, int64_t stride, int64_t M, int64_t N, int64_t K, bool add) {
        bf16_product({at<const uint16_t>(a), a_row, a_column},
                     {at<const uint16_t>(b), b_row, b_column}, at<float>(out), stride, M, N, K,
                     add);
      },
      release());
  m.def("num_threads", [] { return omp_get_max_threads(); });
}
#endif

#ifdef DPO_CUDA
void check(const char* error) {
  if (error) throw std::runtime_error(std::string("CUDA kernel: ") + error);
}

void bind_cuda(py::module_& m) {
  using namespace dpo::cuda;
  m.def("cuda_splits", [](int64_t rows, int64_t V, int dtype, int device) {
    return token_logps_splits(rows, V, DType(dtype), device);
  });
  m.def("cuda_counters", &token_logps_counters);
  m.def("cuda_scratch", &token_logps_scratch);
  m.def(
      "cuda_token_logps",
      [](const TokenLogps& p, int splits, uintptr_t counters, uintptr_t scratch, int device,
         uintptr_t stream) {
        check(token_logps(p, splits, at<void>(counters), at<void>(scratch),
                          {device, at<void>(stream)}));
      },
      release());
  m.def(
      "cuda_token_logps_backward",
      [](const TokenLogpsBackward& p, int device, uintptr_t stream) {
        check(token_logps_backward(p, {device, at<void>(stream)}));
      },
      release());
  m.def(
      "cuda_sequence_sum",
      [](const SequenceSum& p, int64_t rows, int device, uintptr_t stream) {
        check(sequence_sum(p, rows, {device, at<void>(stream)}));
      },
      release());
  m.def(
      "cuda_sequence_sum_backward",
      [](const SequenceSum& p, int64_t rows, double factor, uintptr_t scale, int64_t each,
         int device, uintptr_t stream) {
        const Scale by{factor, at<const double>(scale), each};
        check(sequence_sum_backward(p, rows, by, {device, at<void>(stream)}));
      },
      release());
  m.def(
      "cuda_pair_loss",
      [](uintptr_t u, uintptr_t v, uintptr_t beta, uintptr_t offset, const std::vector<int>& phis,
         const std::vector<double>& terms, int64_t B, uintptr_t loss, uintptr_t slopes, int device,
         uintptr_t stream) {
        check(pair_loss(pair_of(u, v, beta, offset, phis, terms, B, loss, slopes),
                        {device, at<void>(stream)}));
      },
      release());
  m.def(
      "cuda_ordinary",
      [](const OrdinaryLoss& loss, uintptr_t sums, uintptr_t counts, uintptr_t reference,
         uintptr_t betas, double beta, uintptr_t offset, int64_t B, uintptr_t found, int device,
         uintptr_t stream) {
        check(ordinary(loss.of(reference, betas, beta, offset, B, found), at<const double>(sums),
                       at<const double>(counts), {device, at<void>(stream)}));
      },
      release());
  m.def(
      "cuda_ordinary_fields",
      [](uintptr_t found, int64_t B, double divisor, bool wide, uintptr_t loss, uintptr_t fields,
         int device, uintptr_t stream) {
        check(ordinary_fields(at<const double>(found), B, divisor, wide, at<void>(loss),
                              at<void>(fields), {device, at<void>(stream)}));
      },
      release());
}
#endif

}  // namespace

#ifdef CUDA_ON_HOST
PYBIND11_MODULE(_cuda_on_host, m) {
  m.doc() = "The CUDA kernels of dpo_kernels as C++ on the host, for the tests.";
  bind_parameters(m);
  bind_cuda(m);
  m.def("set_multiprocessors", [](int n) { host::sms = n; });
}
#else
PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of dpo_kernels on raw pointers.";
  bind_parameters(m);
  bind_cpu(m);
#ifdef DPO_CUDA
  bind_cuda(m);
  m.attr("cuda_architectures") = DPO_CUDA_ARCHITECTURES;
  m.attr("cuda_source_hashes") = DPO_CUDA_SOURCE_HASHES;
#else
  m.attr("cuda_architectures") = "";
  m.attr("cuda_source_hashes") = "";
#endif
}
#endif
