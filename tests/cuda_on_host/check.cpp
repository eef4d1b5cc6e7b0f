// The CUDA kernels on the host against float64, on shapes that meet every path: for the sanitizers,
// which want a program of their own. Prints one line a case; exits with 1 where a result is wrong.
//
//   check [cases] [seed]
#include <cmath>
#include <cstdio>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cuda/device.h"
#include "ordinary.h"

using namespace dpo;

namespace {

constexpr double INFINITE = std::numeric_limits<double>::infinity();
constexpr int64_t IGNORE = -100;
int failures = 0;

struct Case {
  std::string name;
  int64_t R, T, V;
  int64_t shift;  // of the first element against 16 bytes, in elements
  int64_t gap;    // unused elements after each row
  DType dtype;
  Transform transform;
  bool stats;
};

void expect(bool right, const Case& c, const char* what, double got, double wanted) {
  if (right) return;
  ++failures;
  std::printf("WRONG %s: %s is %.9g, expected %.9g\n", c.name.c_str(), what, got, wanted);
}

bool close(double a, double b, double tolerance) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  if (std::isinf(a) || std::isinf(b)) return a == b;
  return std::fabs(a - b) <= tolerance;
}

// Logits of a dtype in memory with strides, exactly `bytes` of it: a read past the end is seen.
struct Logits {
  const Case& c;
  std::vector<unsigned char> memory;
  size_t size;
  int64_t stride_t, stride_r;

  explicit Logits(const Case& c) : c(c), size(c.dtype == DType::f32 ? 4 : 2) {
    stride_t = c.V + c.gap;
    stride_r = c.T * stride_t + c.gap;
    const int64_t last = (c.R - 1) * stride_r + (c.T - 1) * stride_t + c.V;
    memory.resize((last + c.shift) * size);
  }
  void* data() { return memory.data() + c.shift * size; }
  unsigned char* at(int64_t row, int64_t v) {
    const int64_t i = (row / c.T) * stride_r + (row % c.T) * stride_t + v;
    return (unsigned char*)data() + i * size;
  }
  void set(int64_t row, int64_t v, float x) {
    const uint16_t half = c.dtype == DType::bf16 ? cuda::float_to_bf16(x) : cuda::float_to_half(x);
    std::memcpy(at(row, v), size == 4 ? (const void*)&x : &half, size);
  }
  double get(int64_t row, int64_t v) {
    float x;
    uint16_t half;
    std::memcpy(size == 4 ? (void*)&x : &half, at(row, v), size);
    if (size == 4) return x;
    return c.dtype == DType::bf16 ? cuda::as_float((uint32_t)half << 16)
                                  : cuda::half_to_float(half);
  }
};

double z_of(const Transform& t, double x) {
  const double s = t.scale * x;
  return (t.softcap ? t.softcap * std::tanh(s / t.softcap) : s) * t.inv_temperature;
}

double slope_of(const Transform& t, double x) {
  const double th = t.softcap ? std::tanh(t.scale * x / t.softcap) : 0;
  return t.scale * t.inv_temperature * (1 - th * th);
}

struct Truth {
  double logp, lse, entropy, mean, top1, squares;
};

Truth truth_of(Logits& x, const Case& c, int64_t row, int64_t y) {
  double m = -INFINITE, l = 0, entropy = 0, mean = 0, squares = 0;
  for (int64_t v = 0; v < c.V; ++v) m = std::fmax(m, z_of(c.transform, x.get(row, v)));
  for (int64_t v = 0; v < c.V; ++v) l += std::exp(z_of(c.transform, x.get(row, v)) - m);
  const double lse = m + std::log(l), zy = z_of(c.transform, x.get(row, y));
  bool top = true;
  for (int64_t v = 0; v < c.V; ++v) {
    const double z = z_of(c.transform, x.get(row, v)), p = std::exp(z - lse);
    if (p != 0) entropy -= p * (z - lse);
    mean += z / c.V;
    squares += p * p;
    if (z > zy || (z == zy && v < y)) top = false;
  }
  return {zy - lse, lse, entropy, mean, (double)top, std::log(squares)};
}

void check_rows(const Case& c, std::mt19937& random) {
  std::normal_distribution<float> normal(0, 4);
  std::vector<uint32_t> counters(4 + c.R * c.T + c.R);
  Logits x(c), kept(c);
  const int64_t rows = c.R * c.T;
  std::vector<int64_t> targets(rows);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t v = 0; v < c.V; ++v) x.set(row, v, normal(random));
    targets[row] = row % 3 == 1 ? IGNORE : (int64_t)(random() % c.V);
    if (row % 7 == 3) targets[row] = row % 2 ? c.V : -1;  // out of range
    if (row % 5 == 4 && c.transform.scale != 0)
      for (int64_t v = 0; v < c.V / 2; ++v)
        if (v != targets[row]) x.set(row, v, -INFINITY);
    if (row % 11 == 6 && c.transform.scale != 0) x.set(row, c.V / 3, NAN);
    if (row % 2 == 0 && targets[row] >= 0 && targets[row] < c.V)  // the largest, and another is too
      for (const int64_t v : {targets[row], (int64_t)(random() % c.V)})
        x.set(row, v, c.transform.scale < 0 ? -40 : 40);
    if (targets[row] == IGNORE) x.set(row, 0, NAN);  // never read
  }
  std::vector<float> logps(rows, 7), entropy(rows, 7), mean(rows, 7), top1(rows, 7), squares(rows, 7);
  std::vector<double> lse(rows, 7);
  TokenLogps p{x.data(), x.stride_r, x.stride_t, targets.data(), c.R, c.T, c.V, IGNORE, c.dtype,
               c.transform, logps.data(), lse.data(), nullptr, nullptr, nullptr, nullptr};
  if (c.stats) {
    p.entropy = entropy.data();
    p.mean_logits = mean.data();
    p.is_top1 = top1.data();
    p.log_sum_sq_probs = squares.data();
  }
  const int splits = cuda::token_logps_splits(rows, c.V, c.dtype, 0);
  std::vector<double> scratch(cuda::token_logps_scratch(rows, splits) / 8 + 1);
  const cuda::Stream stream{0, nullptr};
  for (int repeat = 0; repeat < 2; ++repeat) {  // the counters are as they were, the bits too
    std::vector<float> first = logps;
    const char* error = cuda::token_logps(p, splits, counters.data(), scratch.data(), stream);
    expect(!error, c, error ? error : "", 0, 0);
    for (uint32_t n : counters) expect(n == 0, c, "a counter", n, 0);
    if (repeat)
      expect(!std::memcmp(first.data(), logps.data(), 4 * rows), c, "the second run's bits", 1, 0);
  }
  std::vector<Truth> truths(rows);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t y = targets[row];
    Truth t{0, 0, 0, 0, 0, 0};
    if (y != IGNORE) t = {NAN, NAN, NAN, NAN, NAN, NAN};
    if (y >= 0 && y < c.V) t = truth_of(x, c, row, y);
    truths[row] = t;
    expect(close(logps[row], t.logp, 3e-6 + 2e-7 * std::fabs(t.logp)), c, "logp", logps[row], t.logp);
    expect(close(lse[row], t.lse, 3e-6 + 2e-7 * std::fabs(t.lse)), c, "lse", lse[row], t.lse);
    if (!c.stats) continue;
    if (std::isnan(t.logp)) t = {NAN, NAN, NAN, NAN, NAN, NAN};
    expect(close(entropy[row], t.entropy, 2e-5), c, "entropy", entropy[row], t.entropy);
    expect(close(mean[row], t.mean, 2e-5 + 1e-6 * std::fabs(t.mean)), c, "mean", mean[row], t.mean);
    expect(close(top1[row], t.top1, 0), c, "is_top1", top1[row], t.top1);
    expect(close(squares[row], t.squares, 2e-5), c, "squares", squares[row], t.squares);
  }

  // Backward, out of place (another alignment too), in place, and of fp32 logits into a narrower
  // gradient.
  std::vector<float> grad(rows);
  for (float& g : grad) g = normal(random);
  grad[0] = 0;
  kept.memory = x.memory;
  for (int place = 0; place < (c.dtype == DType::f32 ? 5 : 3); ++place) {
    Case other = c;
    other.shift = place == 1 ? c.shift + 1 : 0;
    other.gap = place == 1 ? c.gap + 3 : c.gap;
    if (place >= 3) other.dtype = place == 3 ? DType::bf16 : DType::f16;
    Logits fresh(other);
    Logits& in = place < 3 ? x : kept;
    Logits& out = place == 2 ? x : fresh;
    TokenLogpsBackward b{grad.data(), in.data(), in.stride_r, in.stride_t, targets.data(),
                         lse.data(), c.R, c.T, c.V, IGNORE, c.dtype, c.transform, out.data(),
                         out.stride_r, out.stride_t, other.dtype};
    const char* error = cuda::token_logps_backward(b, stream);
    expect(!error, c, error ? error : "", 0, 0);
    const double unit =
        other.dtype == DType::bf16 ? 1.0 / 256 : other.dtype == DType::f16 ? 1.0 / 2048 : 0;
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t v = 0; v < c.V; ++v) {
        const int64_t y = targets[row];
        const double g = grad[row], xv = kept.get(row, v);
        double wanted = 0;
        if (y != IGNORE && g != 0) {
          const double q = std::exp(z_of(c.transform, xv) - truths[row].lse);
          wanted = y < 0 || y >= c.V ? NAN : g * ((v == y) - q) * slope_of(c.transform, xv);
        }
        const double allowed = 1.01 * unit * std::fabs(wanted) + 1e-5 * std::fabs(wanted) + 2e-6;
        expect(close(out.get(row, v), wanted, allowed), c, "gradient", out.get(row, v), wanted);
      }
  }
}

void check_sums(const Case& c, std::mt19937& random) {
  const int64_t S = 2 * c.R;
  std::vector<int64_t> starts(1, 0), targets;
  for (int64_t s = 0; s < S; ++s) starts.push_back(starts.back() + (int64_t)(random() % 700));  // up to three rounds of a block
  const int64_t rows = starts.back();
  std::vector<float> values(rows), d_values(rows, 7);
  for (int64_t i = 0; i < rows; ++i) {
    values[i] = (float)(random() % 1000) / 100 - 5;
    targets.push_back(random() % 3 ? 1 : IGNORE);
  }
  for (double tail : {1.0, 0.3}) {
    std::vector<double> sums(S), grad(S);
    std::vector<int64_t> counts(S);
    for (double& g : grad) g = (double)(random() % 100) / 10 - 5;
    std::vector<double> scales(S / 2, 1);  // of all sequences, or of each pair
    cuda::Scale scale{tail == 1 ? 1.0 : -0.5, tail == 1 ? nullptr : scales.data(), c.T % 2};
    if (scale.scale)
      for (double& k : scales) k = (double)(random() % 5) - 2;
    auto scale_of = [&](int64_t s) {
      return scale.factor * (scale.scale ? scales[scale.each ? s % (S / 2) : 0] : 1);
    };
    if (scale_of(0) == 0) grad[0] = INFINITY;  // a scale of 0 gives 0 whatever the gradient
    std::vector<int64_t> given = starts;  // boundaries that point outside are cut
    given.front() -= 2;
    given.back() += 3;
    SequenceSum p{targets.data(), given.data(), S, IGNORE, tail, values.data(), sums.data(),
                  counts.data(), grad.data(), d_values.data()};
    const cuda::Stream stream{0, nullptr};
    const char* error = cuda::sequence_sum(p, rows, stream);
    if (!error) error = cuda::sequence_sum_backward(p, rows, scale, stream);
    expect(!error, c, error ? error : "", 0, 0);
    std::vector<int64_t> n(S);
    for (int64_t s = 0; s < S; ++s)
      for (int64_t i = starts[s]; i < starts[s + 1]; ++i) n[s] += targets[i] != IGNORE;
    for (int64_t s = 0; s < S; ++s) {
      const int64_t head = tail == 1 ? n[s] : std::min(n[s], n[(s + S / 2) % S]);
      double sum = 0;
      int64_t rank = 0;
      for (int64_t i = starts[s]; i < starts[s + 1]; ++i) {
        const double w = targets[i] == IGNORE ? 0 : rank++ < head ? 1 : tail;
        sum += w * values[i];
        const double d = scale_of(s) == 0 ? 0 : scale_of(s) * grad[s] * w;
        expect(close(d_values[i], d, 1e-6), c, "d_value", d_values[i], d);
      }
      expect(close(sums[s], sum, 1e-9 * (1 + std::fabs(sum))), c, "sum", sums[s], sum);
      expect(counts[s] == n[s], c, "count", (double)counts[s], (double)n[s]);
    }
  }
}

void check_pairs(const Case& c, std::mt19937& random) {
  const int64_t B = 256;  // whole blocks: none to spare
  std::vector<double> u(B), v(B), beta(B), loss(B), slopes(4 * B);
  const int32_t phis[1] = {0};
  const double terms[10] = {1, -1, 1, 0, 0, 0, 0, 0, 1, 0};
  for (int64_t i = 0; i < B; ++i) {
    u[i] = (double)(random() % 2000) / 10 - 100;
    v[i] = (double)(random() % 2000) / 10 - 100;
    beta[i] = 0.05 + (double)(random() % 100) / 100;
  }
  PairLoss p{u.data(), v.data(), beta.data(), nullptr, phis, terms, B, 1, loss.data(), slopes.data()};
  const char* error = cuda::pair_loss(p, {0, nullptr});
  expect(!error, c, error ? error : "", 0, 0);
  for (int64_t i = 0; i < B; ++i) {
    const double d = beta[i] * (u[i] - v[i]);
    const double wanted = std::fmax(-d, 0) + std::log1p(std::exp(-std::fabs(d)));
    expect(close(loss[i], wanted, 1e-12 * (1 + wanted)), c, "pair loss", loss[i], wanted);
    expect(close(slopes[i], -beta[i] / (1 + std::exp(d)), 1e-12), c, "du", slopes[i], 0);
  }
}

// An ordinary loss of sums: the sigmoid of log-ratios, per token where c.stats.
void check_ordinary(const Case& c, std::mt19937& random) {
  const int64_t B = 1 + (int64_t)(random() % 300);
  std::vector<double> sums(2 * B), counts(2 * B), reference(2 * B), found(FOUND * B, 7);
  const int32_t phis[1] = {0};
  const double terms[10] = {1, -1, 1, 0, 0, 0, 0, 0, 1, 0};
  for (int64_t s = 0; s < 2 * B; ++s) {
    sums[s] = -(double)(random() % 2000) / 10;
    reference[s] = -(double)(random() % 2000) / 10;
    counts[s] = (double)(random() % 40);
  }
  const double* ref = c.T % 2 ? reference.data() : nullptr;
  Ordinary p{ref, nullptr, 0.3, nullptr, phis, terms, B, 1, c.stats, false, found.data()};
  std::vector<float> fields(6 * B, 7);
  float loss = 7;
  const cuda::Stream stream{0, nullptr};
  const char* error = cuda::ordinary(p, sums.data(), counts.data(), stream);
  if (!error)
    error = cuda::ordinary_fields(found.data(), B, (double)B, false, &loss, fields.data(), stream);
  expect(!error, c, error ? error : "", 0, 0);
  double total = 0;
  for (int64_t i = 0; i < B; ++i) {
    double ratio[2], n[2];
    for (int side = 0; side < 2; ++side) {
      const int64_t s = i + side * B;
      ratio[side] = sums[s] - (ref ? reference[s] : 0);
      n[side] = c.stats ? std::fmax(counts[s], 1) : 1;
    }
    const double d = 0.3 * (ratio[0] / n[0] - ratio[1] / n[1]);
    const double wanted = std::fmax(-d, 0) + std::log1p(std::exp(-std::fabs(d)));
    const double slope = -0.3 / (1 + std::exp(d));
    const double row[FOUND] = {wanted,
                               sums[i],
                               sums[B + i],
                               0.3 * ratio[0],
                               0.3 * ratio[1],
                               0.3 * (ratio[0] - ratio[1]),
                               0.3 * ratio[0] > 0.3 * ratio[1] ? 1.0 : 0.0,
                               slope / n[0],
                               -slope / n[1]};
    for (int64_t k = 0; k < FOUND; ++k) {
      expect(close(found[k * B + i], row[k], 1e-10), c, "found", found[k * B + i], row[k]);
      if (k >= FIELDS && k < SLOPES) {
        const float field = fields[(k - FIELDS) * B + i];
        expect(close(field, row[k], 1e-4), c, "a field", field, row[k]);
      }
    }
    total += wanted;
  }
  expect(close(loss, total / (double)B, 1e-5 * (1 + total / (double)B)), c, "loss", loss, total);
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 30;
  std::mt19937 random(argc > 2 ? std::atoi(argv[2]) : 0);
  // V: one; less than a vector; odd; one stage and a bit; several stages, so that rows are split.
  const int64_t sizes[] = {1, 5, 61, 517, 2103, 9001};
  const Transform transforms[] = {{1, 0, 1},        {1, 0, 1 / 0.7}, {-1.3, 0, 1}, {0, 0, 1},
                                  {1, 20, 1 / 1.2}, {1, 5, 1},       {-1.3, 15, 1}};
  for (int i = 0; i < cases; ++i) {
    Case c;
    c.R = 1 + random() % 3;
    c.T = 1 + random() % 5;
    c.V = sizes[random() % 6];
    if (i % 3 == 1) {  // few rows on a wider device: their parts go to several blocks
      c.R = 1;
      c.T = 1 + i % 2;
      c.V = 9001;
    }
    host::sms = i % 3 == 1 ? 5 : 2;
    c.shift = random() % 9;
    c.gap = random() % 4;
    c.dtype = DType(i % 3);
    c.transform = transforms[random() % 7];
    c.stats = random() % 2;
    c.name = "R=" + std::to_string(c.R) + " T=" + std::to_string(c.T) + " V=" + std::to_string(c.V) +
             " shift=" + std::to_string(c.shift) + " gap=" + std::to_string(c.gap) + " dtype=" +
             std::to_string((int)c.dtype) + " softcap=" + std::to_string(c.transform.softcap) +
             " scale=" + std::to_string(c.transform.scale) + (c.stats ? " stats" : "");
    std::printf("%s\n", c.name.c_str());
    std::fflush(stdout);
    check_rows(c, random);
    check_sums(c, random);
    check_pairs(c, random);
    check_ordinary(c, random);
  }
  std::printf("%d cases, %d wrong\n", cases, failures);
  return failures != 0;
}
