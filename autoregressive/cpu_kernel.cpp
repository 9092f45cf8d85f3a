// Decoding on a CPU: attention over the KV cache and products of few rows, each reading memory once.
// Compiled on first use by cpu_kernel.py. No sum depends on other rows, on how many there are, or on threads.
//
// Letters: R rows of a step, S slots, G streams of a slot (R = S G), h heads, e head width, Q places of the cache,
// N outputs and K inputs of a linear layer.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AMX_BF16__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define HAS_TILES 1
#endif

namespace {

constexpr int LANES = 16;
constexpr int AHEAD = 16;  // keys that are fetched in advance
typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

struct BFloat16 {
  uint16_t bits;
};

inline Vector load(const float* from) {
  Vector x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

inline Vector load(const BFloat16* from) {
  Halves half;
  std::memcpy(&half, from, sizeof half);
  return (Vector)(__builtin_convertvector(half, Words) << 16);  // the upper half of a float
}

inline void store(float* to, Vector x) { std::memcpy(to, &x, sizeof x); }

inline void store(BFloat16* to, Vector x) {
  Words bits = (Words)x;
  Halves half = __builtin_convertvector((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, Halves);  // to nearest even
  std::memcpy(to, &half, sizeof half);
}

inline float sum(Vector x) {
  x += __builtin_shuffle(x, (Ints){8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7});
  x += __builtin_shuffle(x, (Ints){4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11});
  x += __builtin_shuffle(x, (Ints){2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13});
  x += __builtin_shuffle(x, (Ints){1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14});
  return x[0];
}

// exp(x) for x <= 0, to 2 units in the last place: 2^n times a polynomial in the rest.
inline Vector exp_of(Vector x) {
  x = x < -87.0f ? (Vector){} - 87.0f : x;
  Vector scaled = x * 1.44269504f - 0.5f;
  Ints n = __builtin_convertvector(scaled, Ints);  // rounds towards 0, and scaled is negative
  Vector whole = __builtin_convertvector(n, Vector);
  Vector r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return (Vector)((Ints)p + (n << 23));
}

template <typename T, int WIDTH>  // WIDTH: vectors in a head
void attend_one(const T* q, const T* k, const T* v, int64_t num, float scale, T* mixed, float* weight) {
  Vector query[WIDTH];
  for (int i = 0; i < WIDTH; ++i) query[i] = load(q + i * LANES) * scale;
  float top = -INFINITY;
  for (int64_t j = 0; j < num; ++j) {
    const T* key = k + j * WIDTH * LANES;
    for (int i = 0; i < WIDTH * LANES; i += 64 / sizeof(T)) __builtin_prefetch(key + AHEAD * WIDTH * LANES + i);
    Vector part = query[0] * load(key);
    for (int i = 1; i < WIDTH; ++i) part += query[i] * load(key + i * LANES);
    weight[j] = sum(part);
    top = weight[j] > top ? weight[j] : top;
  }
  for (int64_t j = num; j % LANES; ++j) weight[j] = -INFINITY;  // up to a whole vector; their exp is counted as below
  Vector total = {};
  for (int64_t j = 0; j < num; j += LANES) {
    Vector score = load(weight + j);
    Vector share = score == -INFINITY ? (Vector){} : exp_of(score - top);
    store(weight + j, share);
    total += share;
  }
  Vector out[WIDTH] = {};
  for (int64_t j = 0; j < num; ++j) {
    for (int i = 0; i < WIDTH * LANES; i += 64 / sizeof(T)) __builtin_prefetch(v + (j + AHEAD) * WIDTH * LANES + i);
    for (int i = 0; i < WIDTH; ++i) out[i] += load(v + (j * WIDTH + i) * LANES) * weight[j];
  }
  float norm = 1.0f / sum(total);
  for (int i = 0; i < WIDTH; ++i) store(mixed + i * LANES, out[i] * norm);
}

template <typename T>
void attend(const T* q, const T* k, const T* v, T* cached_k, T* cached_v, const int64_t* num_S, int64_t slots,
            int64_t streams, int64_t heads, int64_t width, int64_t places, int64_t q_stride, int64_t k_stride,
            int64_t v_stride, T* mixed) {
  const float scale = 1.0f / std::sqrt(float(width));
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t program = 0; program < slots * streams * heads; ++program) {
    const int64_t row = program / heads, head = program % heads, num = num_S[row / streams];
    T* out = mixed + program * width;
    if (num == 0) {  // an idle slot
      std::memset(out, 0, width * sizeof(T));
      continue;
    }
    static thread_local std::vector<float> weight;
    weight.resize(places + LANES);
    T* own_k = cached_k + program * places * width;
    T* own_v = cached_v + program * places * width;
    std::memcpy(own_k + (num - 1) * width, k + row * k_stride + head * width, width * sizeof(T));
    std::memcpy(own_v + (num - 1) * width, v + row * v_stride + head * width, width * sizeof(T));
    const T* query = q + row * q_stride + head * width;
    switch (width / LANES) {
      case 1: attend_one<T, 1>(query, own_k, own_v, num, scale, out, weight.data()); break;
      case 2: attend_one<T, 2>(query, own_k, own_v, num, scale, out, weight.data()); break;
      case 4: attend_one<T, 4>(query, own_k, own_v, num, scale, out, weight.data()); break;
      case 8: attend_one<T, 8>(query, own_k, own_v, num, scale, out, weight.data()); break;
    }
  }
}

constexpr int ROWS = 8, OUTPUTS = 3;  // 24 sums, 3 weights and an input: they fit into 32 registers
constexpr int TILE = 8 * OUTPUTS;

template <int R, int N>
void product(const float* x, const float* w, int64_t inputs, float* y, int64_t outputs) {
  Vector total[R][N] = {};
  for (int64_t k = 0; k < inputs; k += LANES) {
    Vector weight[N];
    for (int n = 0; n < N; ++n) {
      weight[n] = load(w + n * inputs + k);
      __builtin_prefetch(w + (n + N) * inputs + k, 0, 2);  // the next outputs: hardware stops at the end of a page
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Vector value = load(x + r * inputs + k);
#pragma GCC unroll 3
      for (int n = 0; n < N; ++n) total[r][n] += value * weight[n];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < N; ++n) y[r * outputs + n] = sum(total[r][n]);
}

template <int N>
void products(const float* x, const float* w, int64_t rows, int64_t inputs, float* y, int64_t outputs) {
  switch (rows) {
    case 1: return product<1, N>(x, w, inputs, y, outputs);
    case 2: return product<2, N>(x, w, inputs, y, outputs);
    case 3: return product<3, N>(x, w, inputs, y, outputs);
    case 4: return product<4, N>(x, w, inputs, y, outputs);
    case 5: return product<5, N>(x, w, inputs, y, outputs);
    case 6: return product<6, N>(x, w, inputs, y, outputs);
    case 7: return product<7, N>(x, w, inputs, y, outputs);
    case 8: return product<8, N>(x, w, inputs, y, outputs);
  }
}

#ifdef HAS_TILES
constexpr int SIDE = 16, DEPTH = 32;  // of a tile: 16 rows of 32 bf16

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles belong to a thread; the system grants them to a process that asks.
bool start_tiles() {
  static const bool granted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // ARCH_REQ_XCOMP_PERM, tile data
  if (!granted) return false;
  TileConfig config;
  for (int tile = 0; tile < 3; ++tile) config.bytes[tile] = 64, config.rows[tile] = SIDE;
  asm volatile("" : : "r"(&config) : "memory");  // gcc 12 would drop the stores above: its intrinsic reads 8 bytes
  _tile_loadconfig(&config);
  return true;
}
#endif

}  // namespace

extern "C" {

void attend_float32(const float* q, const float* k, const float* v, float* cached_k, float* cached_v,
                    const int64_t* num_S, int64_t slots, int64_t streams, int64_t heads, int64_t width, int64_t places,
                    int64_t q_stride, int64_t k_stride, int64_t v_stride, float* mixed) {
  attend(q, k, v, cached_k, cached_v, num_S, slots, streams, heads, width, places, q_stride, k_stride, v_stride, mixed);
}

void attend_bfloat16(const BFloat16* q, const BFloat16* k, const BFloat16* v, BFloat16* cached_k, BFloat16* cached_v,
                     const int64_t* num_S, int64_t slots, int64_t streams, int64_t heads, int64_t width, int64_t places,
                     int64_t q_stride, int64_t k_stride, int64_t v_stride, BFloat16* mixed) {
  attend(q, k, v, cached_k, cached_v, num_S, slots, streams, heads, width, places, q_stride, k_stride, v_stride, mixed);
}

// 1 if this processor multiplies tiles of bf16, which `linear_bfloat16` needs.
int has_tiles() {
#ifdef HAS_TILES
  if (start_tiles()) {
    _tile_release();
    return 1;
  }
#endif
  return 0;
}

// y[R, N] = x[R, K] w[N, K]^T for at most 16 rows, 16 or more outputs and K a multiple of 32; sums in float32.
// The weights are the left factor, so their rows are read as they lie; x is put into pairs (k, k + 1) once.
void linear_bfloat16(const BFloat16* x, const BFloat16* w, int64_t rows, int64_t inputs, int64_t outputs, BFloat16* y) {
#ifdef HAS_TILES
  std::vector<BFloat16> pairs(inputs * SIDE, BFloat16{0});  // [K / 2, 16 rows, 2]
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < inputs; ++k) pairs[(k / 2 * SIDE + r) * 2 + k % 2] = x[r * inputs + k];
  const int64_t tiles = (outputs + SIDE - 1) / SIDE;
#pragma omp parallel
  {
    start_tiles();
    float sums[SIDE][SIDE];  // [outputs, rows]
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t n = tile * SIDE + SIDE <= outputs ? tile * SIDE : outputs - SIDE;  // the last may overlap
      const BFloat16* own = w + n * inputs;
      _tile_zero(0);
      for (int64_t k = 0; k < inputs; k += DEPTH) {
        for (int64_t i = 0; i < SIDE; ++i) __builtin_prefetch(own + (SIDE + i) * inputs + k, 0, 2);
        _tile_loadd(1, own + k, inputs * sizeof(BFloat16));
        _tile_loadd(2, pairs.data() + k * SIDE, 64);
        _tile_dpbf16ps(0, 1, 2);
      }
      _tile_stored(0, sums, 64);
      for (int64_t r = 0; r < rows; ++r) {
        Vector column;
        for (int i = 0; i < SIDE; ++i) column[i] = sums[i][r];
        store(y + r * outputs + n, column);
      }
    }
    _tile_release();
  }
#endif
}

// y[R, N] = x[R, K] w[N, K]^T; K is a multiple of 16.
void linear_float32(const float* x, const float* w, int64_t rows, int64_t inputs, int64_t outputs, float* y) {
  const int64_t tiles = (outputs + TILE - 1) / TILE;
#pragma omp parallel for schedule(static)
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t end = outputs < (tile + 1) * TILE ? outputs : (tile + 1) * TILE;
    for (int64_t row = 0; row < rows; row += ROWS) {  // their inputs stay in the first cache, the weights in the second
      const int64_t num = rows - row < ROWS ? rows - row : ROWS;
      int64_t n = tile * TILE;
      for (; n + OUTPUTS <= end; n += OUTPUTS)
        products<OUTPUTS>(x + row * inputs, w + n * inputs, num, inputs, y + row * outputs + n, outputs);
      for (; n < end; ++n) products<1>(x + row * inputs, w + n * inputs, num, inputs, y + row * outputs + n, outputs);
    }
  }
}
}
