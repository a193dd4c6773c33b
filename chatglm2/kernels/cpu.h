// Vectors of the CPU's length, threads, memory and products, which the C kernels share.
//
// The compiler neither fuses nor reorders arithmetic (-ffp-contract=off, no -ffast-math), and only
// `multiply_add` decides between one rounding and two. So a result depends neither on the number of
// threads nor on what is computed beside it.
//
// The language is GNU C (gcc, clang), for little-endian machines. The code that depends on the CPU
// is in this file, amx.c, isa.c, attention.c (TILE), product.h (DIGITS, `find_offset`),
// activations.c (`store_bytes`, `write_words`) and cpu.c (PREFETCH, `add_products`, `unpack`, AMX,
// I8MM).
#pragma once

#include <float.h>
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(PORTABLE)
// no special instructions, by request
#elif defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#define ISA "avx512"
#define AVX512
#if (defined(__AMX_INT8__) || defined(__AMXINT8__)) && defined(__linux__)  // gcc, older clang
#define AMX  // for many rows, if the system allows it
#endif
#define LANES 16  // numbers of 32 bits in a vector
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#ifdef __AVXVNNI__
#define ISA "avxvnni"
#define AVXVNNI
#else
#define ISA "avx2"
#endif
#define AVX2
#define LANES 8
#elif defined(__ARM_FEATURE_DOTPROD)
#ifdef __ARM_FEATURE_MATMUL_INT8
#define ISA "i8mm"
#define I8MM
#else
#define ISA "neon"
#endif
#define NEON
#endif
#ifndef ISA
#define ISA "portable"
#endif
#ifndef LANES  // the tests compile longer vectors for any CPU
#define LANES 4
#endif
#if defined(__aarch64__) && LANES == 4
#define ARM  // what each 64-bit ARM CPU has; also in "portable", so that it rounds as NEON does
#endif
#ifdef __SSE2__
#include <immintrin.h>
#elif defined(ARM)
#include <arm_neon.h>
#endif

#define ALIGNMENT 64
#define INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif

// Vectors

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));

INLINE Floats spread(float value) { return value - (Floats){0}; }
INLINE Ints spread_int(int32_t value) { return value - (Ints){0}; }

INLINE Floats load(const float *from) {
    Floats v;
    memcpy(&v, from, sizeof v);
    return v;
}

INLINE Bits load_bits(const void *from) {
    Bits v;
    memcpy(&v, from, sizeof v);
    return v;
}

INLINE void store(float *to, Floats v) { memcpy(to, &v, sizeof v); }

INLINE Floats to_floats(Ints v) { return __builtin_convertvector(v, Floats); }

INLINE Floats multiply_add(Floats a, Floats b, Floats sum) {
#ifdef AVX512
    return _mm512_fmadd_ps(a, b, sum);
#elif defined(AVX2)
    return _mm256_fmadd_ps(a, b, sum);
#elif defined(ARM)
    return (Floats)vfmaq_f32((float32x4_t)sum, (float32x4_t)a, (float32x4_t)b);
#else
    return sum + a * b;
#endif
}

// Each lane is a where `where` is -1, and b where it is 0.
INLINE Ints choose(Ints where, Ints a, Ints b) { return (where & a) | (~where & b); }

// Each lane is a if it is greater, else b; so b if one of them is NaN.
INLINE Floats max_of(Floats a, Floats b) {
#ifdef AVX512
    return _mm512_max_ps(a, b);
#elif defined(AVX2)
    return _mm256_max_ps(a, b);
#else
    return (Floats)choose((Ints)(a > b), (Ints)a, (Ints)b);
#endif
}

// Rounds to the nearest integer, halves away from 0.
INLINE Ints round_to_ints(Floats v) {
    const Bits half = ((Bits)v & 0x80000000u) | 0x3f000000u;
    return __builtin_convertvector(v + (Floats)half, Ints);
}

INLINE float add_lanes(Floats v) {
    float lane[LANES];
    memcpy(lane, &v, sizeof v);
    for (int n = LANES / 2; n; n /= 2)
        for (int i = 0; i < n; i++) lane[i] += lane[i + n];
    return lane[0];
}

// Returns LANES numbers of 16 bits, float16 or bfloat16, as float32.
INLINE Floats load_stored(const uint16_t *from, int is_bfloat16) {
#ifdef AVX512
    const __m256i stored = _mm256_loadu_si256((const void *)from);
    if (!is_bfloat16) return _mm512_cvtph_ps(stored);
    const Bits h = (Bits)_mm512_cvtepu16_epi32(stored);
#elif defined(AVX2)
    const __m128i stored = _mm_loadu_si128((const void *)from);
    if (!is_bfloat16) return _mm256_cvtph_ps(stored);
    const Bits h = (Bits)_mm256_cvtepu16_epi32(stored);
#elif defined(ARM)
    const uint16x4_t stored = vld1_u16(from);
    if (!is_bfloat16) return (Floats)vcvt_f32_f16(vreinterpret_f16_u16(stored));
    const Bits h = (Bits)vmovl_u16(stored);
#else
    Bits h = {0};
    UNROLL for (int i = 0; i < LANES; i++) h[i] = from[i];
    if (!is_bfloat16) {  // shifts exponent and mantissa to float32's place, and corrects the bias
        const Floats number = (Floats)((h & 0x7fff) << 13) * 0x1p112f;
        const Bits is_special = (Bits)((h & 0x7c00) == 0x7c00);  // infinity, NaN
        return (Floats)((Bits)number | (is_special & 0x7f800000) | (h & 0x8000) << 16);
    }
#endif
    return (Floats)(h << 16);
}

// Threads

typedef void (*Work)(const void *task, int64_t unit);

#define MAX_THREADS 64  // that the kernels start themselves

// Starts a parallel region in the OpenMP library that torch has loaded, if it has this function of
// "The libgomp ABI" (manual of libgomp). So torch and the kernels use the same threads, one after
// the other; the waiting threads of a second library would keep the CPUs busy.
#ifdef __linux__
extern void GOMP_parallel(void (*function)(void *), void *data, unsigned num_threads,
                          unsigned flags) __attribute__((weak));
#else
static void (*const GOMP_parallel)(void (*)(void *), void *, unsigned, unsigned) = NULL;
#endif

typedef struct {
    Work work;
    const void *task;
    int64_t num_units, next;
} Queue;

static void take_units(void *queue) {
    Queue *q = queue;
    int64_t unit;
    while ((unit = __atomic_fetch_add(&q->next, 1, __ATOMIC_RELAXED)) < q->num_units)
        q->work(q->task, unit);
}

static void *take_units_in_thread(void *queue) {
    take_units(queue);
    return NULL;
}

// Calls `work` once for each unit.
static inline void run(Work work, const void *task, int64_t num_units, int num_threads) {
    Queue queue = {work, task, num_units, 0};
    if (GOMP_parallel && num_units > 1) {
        GOMP_parallel(take_units, &queue, num_threads, 0);
        return;
    }
    pthread_t threads[MAX_THREADS];
    int started = 0;
    while (started < MAX_THREADS && started + 1 < num_threads && started + 1 < num_units &&
           !pthread_create(&threads[started], NULL, take_units_in_thread, &queue))
        started++;
    take_units(&queue);
    while (started) pthread_join(threads[--started], NULL);
}

static inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Memory

static inline void *allocate(int64_t size) {
    const int64_t whole = divide_up(size, ALIGNMENT) * ALIGNMENT;
#ifdef _WIN32
    return _aligned_malloc(whole, ALIGNMENT);
#else
    return aligned_alloc(ALIGNMENT, whole);
#endif
}

static inline void release(void *memory) {
#ifdef _WIN32
    _aligned_free(memory);
#else
    free(memory);
#endif
}

// Products (cpu.c, stored.c)

#define BLOCK 16               // outputs; see packing.c
#define PARTS (BLOCK / LANES)  // vectors of a block

// A tile is some rows of x times some vectors of outputs. Its sums are in registers.
#if defined(AVX512) || defined(NEON)  // 32 registers
#define ROWS 8
#else
#define ROWS 4
#endif

// Returns the rows of a tile, 1, 2, 4 or 8. Zeros fill up the last tile.
static inline int64_t count_tile_rows(int64_t rows_left) {
    int64_t rows = 1;
    while (rows < rows_left && rows < ROWS) rows *= 2;
    return rows;
}

typedef struct {
    const uint8_t *weight;  // in the order of packing.c
    const float *scale;     // in the order of packing.c
    const float *bias;      // or NULL
    int64_t in, out, group_size;
    int64_t bits;
} Linear;

// y[r, o] = sum over c of x[r, c] * W[o, c] + bias[o]. Returns 0, or -1 if there is no memory.
int chatglm_multiply(const Linear *linear, const float *x, float *y, int64_t num_rows,
                     int num_threads);
