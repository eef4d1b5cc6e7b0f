// Chooses, at run time, the best instruction set that was built and that this processor runs.
#include <cstdlib>
#include <cstring>
#include <string>

#include "../params.h"
#include "products.h"

namespace dpo {

#define DPO_DECLARE(isa)                                \
  namespace isa {                                       \
  void token_logps(const TokenLogps&);                  \
  void token_logps_backward(const TokenLogpsBackward&); \
  void token_kl(const TokenKl&);                        \
  void token_kl_backward(const TokenKlBackward&);       \
  }

#ifdef DPO_AVX512_BF16
namespace products {
void bf16(Matrix, Matrix, float*, int64_t, int64_t, int64_t, int64_t, bool);
}
#endif

DPO_DECLARE(portable)
#ifdef DPO_X86
DPO_DECLARE(avx2)
DPO_DECLARE(avx512)
#endif

namespace {

struct Rows {
  const char* name;
  bool runs;
  void (*forward)(const TokenLogps&);
  void (*backward)(const TokenLogpsBackward&);
  void (*kl)(const TokenKl&);
  void (*kl_backward)(const TokenKlBackward&);
};

const Rows* table() {
#ifdef DPO_X86
  static const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                         __builtin_cpu_supports("f16c");
  static const bool v4 = v3 && __builtin_cpu_supports("avx512f") &&
                         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                         __builtin_cpu_supports("avx512vl");
#endif
#define DPO_ROWS(isa, runs) \
  {#isa, runs, isa::token_logps, isa::token_logps_backward, isa::token_kl, isa::token_kl_backward}
  static const Rows rows[] = {
#ifdef DPO_X86
      DPO_ROWS(avx512, v4),
      DPO_ROWS(avx2, v3),
#endif
      DPO_ROWS(portable, true),
      {nullptr, false, nullptr, nullptr, nullptr, nullptr},
  };
  return rows;
}

const Rows* best() {
  const Rows* r = table();
  while (!r->runs) ++r;
  return r;
}

const Rows*& chosen() {
  static const Rows* rows = best();
  return rows;
}

}  // namespace

const char* instruction_sets() {
  static const std::string names = [] {
    std::string s;
    for (const Rows* r = table(); r->name; ++r)
      if (r->runs) s += (s.empty() ? "" : ",") + std::string(r->name);
    return s;
  }();
  return names.c_str();
}

bool use_instruction_set(const char* name) {
  if (!*name) {
    chosen() = best();
    return true;
  }
  for (const Rows* r = table(); r->name; ++r)
    if (r->runs && !std::strcmp(r->name, name)) {
      chosen() = r;
      return true;
    }
  return false;
}

bool has_bf16_products() {
#ifdef DPO_AVX512_BF16
  static const bool runs = table()->runs && __builtin_cpu_supports("avx512bf16");
  return runs;
#else
  return false;
#endif
}

void bf16_product(Matrix a, Matrix b, float* out, int64_t stride, int64_t M, int64_t N, int64_t K,
                  bool add) {
#ifdef DPO_AVX512_BF16
  products::bf16(a, b, out, stride, M, N, K, add);
#else
  (void)a, (void)b, (void)out, (void)stride, (void)M, (void)N, (void)K, (void)add;
  std::abort();  // has_bf16_products() was not asked
#endif
}

void token_logps(const TokenLogps& p) { chosen()->forward(p); }
void token_logps_backward(const TokenLogpsBackward& p) { chosen()->backward(p); }
void token_kl(const TokenKl& p) { chosen()->kl(p); }
void token_kl_backward(const TokenKlBackward& p) { chosen()->kl_backward(p); }

}  // namespace dpo
