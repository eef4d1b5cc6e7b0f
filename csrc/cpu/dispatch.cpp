// Chooses, at run time, the best instruction set that was built and that this processor runs.
#include <cstring>
#include <string>

#include "../params.h"

namespace dpo {

#define DPO_DECLARE(isa)                                \
  namespace isa {                                       \
  void token_logps(const TokenLogps&);                  \
  void token_logps_backward(const TokenLogpsBackward&); \
  void token_kl(const TokenKl&);                        \
  void token_kl_backward(const TokenKlBackward&);       \
  }

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

void token_logps(const TokenLogps& p) { chosen()->forward(p); }
void token_logps_backward(const TokenLogpsBackward& p) { chosen()->backward(p); }
void token_kl(const TokenKl& p) { chosen()->kl(p); }
void token_kl_backward(const TokenKlBackward& p) { chosen()->kl_backward(p); }

}  // namespace dpo
