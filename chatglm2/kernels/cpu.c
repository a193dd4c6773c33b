// Products with INT8 and INT4 weights, for CPUs.
//
//   y[r, o] = sum over c of x[r, c] * W[o, c],   W[o, c] = level(o, c) * scale[o, c / group_size]
//
// The weights are in the order of packing.c. Each group of GROUP columns of x is converted to
// 16-bit integers that share a scale, largest |x| / LARGEST. Products and sums of integers are
// exact, at most GROUP * LARGEST * 255 < 2^31.
//
//   y[r, o] = sum over groups of scale[o, group] * x_scale[r, group] *
//             (sum over c of integer[r, c] * (level(o, c) + offset) - offset * sum of integer[r, c])
//
// The error of a result is less than that of float16 arithmetic, also with columns that are 1000
// times as large as the others.
//
// Each four columns of a row of x are two words of 32 bits:
//
//   DIGITS  word 1 has the high digits, word 0 the low ones, integer = 256 * high + low; one
//           instruction multiplies four bytes of a lane. The sum for word 1 is multiplied by 256.
//   else    word 0 has the integers of columns 0 and 2, word 1 those of columns 1 and 3; levels are
//           widened to 16 bits.
//
// In memory, x is [panel][tile of rows][group][word][column / 4][row of the tile], or for AMX
// [panel][tile of rows][group][word][row of the tile][column / 4]. Unpacked levels are
// [group][word, unless DIGITS][column / 4][vector][lane].
//
// The result of a row depends neither on the other rows nor on their number: integer sums are exact
// in any order, and all tiles below add groups of columns in the same order.
#include "cpu.h"

#if defined(AVX512) || defined(AVX2)
#include <cpuid.h>
#elif defined(NEON) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(NEON) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#ifdef AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define BLOCK_STEP (4 * BLOCK)  // bytes: 32 bits of each output
#define UNIT (4 * PARTS)        // vectors that a thread takes at a time
#ifdef AMX
#define MAX_UNIT (4 * UNIT)     // for many rows, so that a panel of x is read less often
#else
#define MAX_UNIT UNIT
#endif
#define GROUP 128               // columns of x that share a scale
#define PANEL 512               // columns whose unpacked levels are kept in the first cache
#define PANEL_ROWS 256          // rows whose words and totals are kept in the second cache
#define LARGEST 32639           // 127 * 256 + 127: both digits are signed bytes
#define TINY 1e-30f             // a group of smaller numbers becomes zeros
#if LANES == 16
#define PREFETCH(place) __builtin_prefetch((place) + 1024, 0, 2)  // into the second cache
#else
#define PREFETCH(place) __builtin_prefetch((place) + 2048)
#endif

#define VECTORS 2   // of a tile
#define MAX_SUMS 8  // of the tile of a product with few rows

// Each four columns of a row of x are two words of 32 bits; see above.
#if defined(AVX512) || defined(NEON)
#define DIGITS        // a word has one digit of each column
#define WORD_LEVELS 1  // vectors of unpacked levels for the two words
#else
#define WORD_LEVELS 2
#endif

// Adds to each lane its levels times the numbers of x[word]: four bytes each, or two of 16 bits.
// The assembly, also the empty one, fixes the order of the instructions. With its own order gcc 12
// has too few registers for the sums.
INLINE Ints add_products(Ints sum, Bits levels, const int32_t *x, const int word) {
#ifdef AVX512
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(levels), "v"(spread_int(x[word])));
    return sum;
#elif defined(NEON)
    // Reads four words at once, also if some are not used, because an operand can be one of four.
    const int8x16_t words = vld1q_s8((const int8_t *)(x + word / 4 * 4)), w = (int8x16_t)levels;
    switch (word % 4) {
        case 0: return (Ints)vdotq_laneq_s32((int32x4_t)sum, w, words, 0);
        case 1: return (Ints)vdotq_laneq_s32((int32x4_t)sum, w, words, 1);
        case 2: return (Ints)vdotq_laneq_s32((int32x4_t)sum, w, words, 2);
        default: return (Ints)vdotq_laneq_s32((int32x4_t)sum, w, words, 3);
    }
#elif defined(AVXVNNI)
    return (Ints)_mm256_dpwssd_avx_epi32((__m256i)sum, (__m256i)levels,
                                         _mm256_set1_epi32(x[word]));
#elif defined(AVX2)
    sum += (Ints)_mm256_madd_epi16((__m256i)levels, _mm256_set1_epi32(x[word]));
    __asm__("" : "+x"(sum));
    return sum;
#elif defined(__SSE2__) && LANES == 4
    return sum + (Ints)_mm_madd_epi16((__m128i)levels, _mm_set1_epi32(x[word]));
#else
    return sum + (Ints)(levels & 0xffff) * (int16_t)x[word] +
           (Ints)(levels >> 16) * (x[word] >> 16);
#endif
}

typedef struct {
    const Linear *linear;
    const float *x;
    float *y;
    int64_t num_rows;
    // The caller leaves the rest empty.
    int64_t filled_rows;  // `num_rows`, rounded up to whole tiles
    int64_t columns;      // `in`, rounded up to whole lanes
    int64_t groups, x_groups;
    int64_t tile_rows;  // of the largest tile
    int64_t unit;       // vectors that a thread takes at a time
    int uses_amx;
    int32_t *x_words;
    float *x_scale;    // [group][row]
    int32_t *x_start;  // [group][row]: -offset * sum of integers
} Product;

// Returns what `unpack` gives for level 0.
static int find_offset(int bits) {
#ifdef NEON
    if (bits == 8) return 0;  // bytes are signed
#endif
    return bits == 4 ? 8 : 128;
}

// Returns the rows of the tile that begins with a row.
static int64_t count_rows(const Product *t, int64_t row) {
    return t->uses_amx ? t->tile_rows : count_tile_rows(t->num_rows - row);
}

static int64_t count_vectors(int64_t out) { return divide_up(out, BLOCK) * PARTS; }

// Vector v of the outputs is part v % PARTS of block v / PARTS. The last tile may have more vectors
// than are left: they are computed from the last vector and not written.
INLINE int64_t clamp_vector(const Product *t, int64_t v) {
    return smaller(v, count_vectors(t->linear->out) - 1);
}

INLINE const uint8_t *find_weight(const Product *t, int64_t v, int64_t column, int bits) {
    v = clamp_vector(t, v);
    return t->linear->weight + (v / PARTS * t->columns + column) * BLOCK * bits / 8 +
           v % PARTS * 4 * LANES;
}

INLINE Floats find_scale(const Product *t, int64_t v, int64_t group) {
    v = clamp_vector(t, v);
    return load(t->linear->scale + (v / PARTS * t->groups + group) * BLOCK + v % PARTS * LANES);
}

// Returns the scale of a group of columns, or 1 if each row of W has a single scale, which
// `write_total` applies.
INLINE Floats find_group_scale(const Product *t, int64_t v, int64_t group) {
    return t->groups == 1 ? spread(1) : find_scale(t, v, group);
}

// Reads vector v of the outputs; the last one may have fewer than LANES.
INLINE Floats read_outputs(const float *from, int64_t v, int64_t out) {
    const int64_t left = out - v * LANES;
    if (left >= LANES) return load(from + v * LANES);
    float lanes[LANES] = {0};
    if (left > 0) memcpy(lanes, from + v * LANES, 4 * left);
    return load(lanes);
}

INLINE void write_outputs(float *to, int64_t v, int64_t out, Floats value) {
    const int64_t left = out - v * LANES;
    if (left >= LANES) store(to + v * LANES, value);
    else if (left > 0) memcpy(to + v * LANES, &value, 4 * left);
}

// Writes a result, whose sum is given, to y.
INLINE void write_total(const Product *t, int64_t row, int64_t v, Floats total) {
    const Linear *linear = t->linear;
    if (row >= t->num_rows) return;
    if (t->groups == 1) total *= find_scale(t, v, 0);
    if (linear->bias) total += read_outputs(linear->bias, v, linear->out);
    write_outputs(t->y + row * linear->out, v, linear->out, total);
}

// Returns NaN for a group with infinities or NaNs, so that its results are NaN, and 0 for a group
// of tiny numbers, which have fewer bits. The integers of both groups are zeros.
static float choose_scale(const float *x) {
    Ints largest = {0};  // float32 numbers without sign can be compared as integers
    for (int c = 0; c < GROUP; c += LANES) {
        const Ints size = (Ints)(load_bits(x + c) & 0x7fffffffu);
        largest = choose(size > largest, size, largest);
    }
    int32_t bits = 0;
    for (int i = 0; i < LANES; i++) bits = largest[i] > bits ? largest[i] : bits;
    float max;
    memcpy(&max, &bits, 4);
    if (!(max <= FLT_MAX)) return NAN;
    return max < TINY ? 0 : max / LARGEST;
}

// Stores the low byte of each lane.
INLINE void store_bytes(void *to, Ints v) {
#ifdef AVX512
    _mm_storeu_si128(to, _mm512_cvtepi32_epi8((__m512i)v));
#else
    typedef int8_t Bytes __attribute__((vector_size(LANES)));
    const Bytes bytes = __builtin_convertvector(v, Bytes);
    memcpy(to, &bytes, sizeof bytes);
#endif
}

// Writes the words of LANES columns of a row, `step` words apart; word 1 is `size` words behind
// word 0. No more than `count` columns are written.
INLINE void write_words(Ints integer, int64_t count, int64_t step, int64_t size, int32_t *to) {
    int32_t words[2][LANES / 4];
#ifdef DIGITS
    store_bytes(words[0], integer);
    store_bytes(words[1], (integer + 128) >> 8);
#else
    for (int i = 0; i < LANES / 4; i++)
        for (int word = 0; word < 2; word++)
            words[word][i] = (uint16_t)integer[4 * i + word] |
                             (uint32_t)integer[4 * i + word + 2] << 16;
#endif
    if (step == 1 && count >= LANES) {
        memcpy(to, words[0], LANES);
        memcpy(to + size, words[1], LANES);
        return;
    }
    for (int i = 0; i < smaller(LANES, count) / 4; i++, to += step)
        to[0] = words[0][i], to[size] = words[1][i];
}

// Converts a group of a row of x to words, and returns the sum of its integers.
static int32_t quantize_group(const float *x, float scale, int64_t width, int64_t step,
                              int64_t size, int32_t *words) {
    const float inverse = scale > 0 ? 1 / scale : 0;
    Ints sums = {0};
    for (int64_t c = 0; c < width; c += LANES, words += LANES / 4 * step) {
        const Ints integer = inverse > 0 ? round_to_ints(load(x + c) * inverse) : spread_int(0);
        write_words(integer, width - c, step, size, words);
        sums += integer;
    }
    int32_t sum = 0;
    for (int i = 0; i < LANES; i++) sum += sums[i];
    return sum;
}

// Returns the words of the tile that begins with a row, from a column on that begins a group.
INLINE int32_t *find_words(const Product *t, int64_t row, int64_t column) {
    const int64_t panel = column / PANEL * PANEL, width = smaller(PANEL, t->columns - panel);
    return t->x_words +
           (panel * t->filled_rows + row * width + (column - panel) * count_rows(t, row)) / 2;
}

// Converts a group of the rows of a tile.
static void quantize_tile(const void *task, int64_t unit) {
    const Product *t = task;
    const int64_t first_row = unit / t->x_groups * t->tile_rows, group = unit % t->x_groups;
    const int64_t rows = count_rows(t, first_row), first = group * GROUP;
    const int64_t width = smaller(GROUP, t->columns - first);
    int32_t *words = find_words(t, first_row, first);
    for (int64_t r = 0; r < rows; r++) {
        const float *x = t->x + (first_row + r) * t->linear->in + first;
        float filled[GROUP] = {0};
        if (first_row + r >= t->num_rows) x = filled;
        else if (t->linear->in - first < GROUP)
            x = memcpy(filled, x, 4 * (t->linear->in - first));
        const int64_t place = group * t->filled_rows + first_row + r;
        t->x_scale[place] = choose_scale(x);
        t->x_start[place] = -find_offset(t->linear->bits) *
            quantize_group(x, t->x_scale[place], width, t->uses_amx ? 1 : rows, rows * width / 4,
                           words + (t->uses_amx ? r * width / 4 : r));
    }
}

// Returns the levels of LANES outputs that belong to a word of x.
INLINE Bits unpack(Bits packed, int half, int word, int bits) {
    uint32_t mask = bits == 4 ? 0x0f0f0f0fu : 0xffffffffu;
#ifdef NEON
    if (bits == 8) packed ^= 0x80808080u;
#endif
#ifndef DIGITS
    mask &= 0x00ff00ffu;
    packed >>= 8 * word;
#endif
    return packed >> 4 * half & mask;
}

#ifdef I8MM
// One instruction multiplies 8 columns of two rows by 8 columns of two outputs. For this the vector
// of four columns a0 a1 a2 a3 (32 bits for each of four outputs) and that of the next four columns,
// b0 b1 b2 b3, become a0 b0 a1 b1 and a2 b2 a3 b3. So do the words of four rows. A group whose
// columns are not a multiple of 8 is multiplied as without I8MM.

INLINE int has_pairs(int64_t width) { return width % 8 == 0; }

static void pair_levels(uint8_t *levels, int64_t width) {
    int32_t *a = (int32_t *)levels;
    for (int64_t c = 0; c < width; c += 8, a += VECTORS * LANES)
        UNROLL for (int v = 0; v < VECTORS; v++, a += LANES) {
            int32_t *b = a + VECTORS * LANES;
            const int32x4_t first = vld1q_s32(a), second = vld1q_s32(b);
            vst1q_s32(a, vzip1q_s32(first, second));
            vst1q_s32(b, vzip2q_s32(first, second));
        }
}

// Returns 8 columns of rows 2 * pair and 2 * pair + 1; if `rows` is 1, the second row is arbitrary.
INLINE int8x16_t pair_words(const int32_t *words, const int rows, const int pair) {
    const int32_t *a = words + pair / 2 * 4;
    const int32x4_t first = vld1q_s32(a), second = vld1q_s32(a + rows);
    return (int8x16_t)(pair % 2 ? vzip2q_s32(first, second) : vzip1q_s32(first, second));
}

// Does what `multiply_unpacked` does, with the result of `pair_levels`.
INLINE void multiply_pairs(const uint8_t *levels, const int32_t *x, int64_t width, const int rows,
                           Ints *total) {
    const int pairs = (rows + 1) / 2, vectors = 2 * VECTORS;  // a vector has two outputs
    int32x4_t sum[ROWS * VECTORS] = {{0}};
    for (int word = 1; word >= 0; word--) {
        const int8_t *from = (const int8_t *)levels, *end = from + width * VECTORS * LANES;
        UNROLL for (int i = 0; i < pairs * vectors; i++) sum[i] = vshlq_n_s32(sum[i], 8);
        for (const int32_t *words = x + word * width / 4 * rows; from < end; words += 2 * rows) {
            int8x16_t lanes[2 * VECTORS];
            UNROLL for (int v = 0; v < vectors; v++, from += 16) lanes[v] = vld1q_s8(from);
            UNROLL for (int p = 0; p < pairs; p++)
                UNROLL for (int v = 0; v < vectors; v++)
                    sum[p * vectors + v] = vmmlaq_s32(sum[p * vectors + v],
                                                      pair_words(words, rows, p), lanes[v]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < VECTORS; v++) {
            const int64x2_t first = (int64x2_t)sum[r / 2 * vectors + v];
            const int64x2_t second = (int64x2_t)sum[r / 2 * vectors + VECTORS + v];
            total[r * VECTORS + v] =
                (Ints)(r % 2 ? vzip2q_s64(first, second) : vzip1q_s64(first, second));
        }
}
#endif

// Unpacks the levels of a group of columns.
INLINE void unpack_group(const Product *t, int64_t first, int64_t column, int64_t width, int bits,
                         uint8_t *levels) {
    UNROLL for (int v = 0; v < VECTORS; v++) {
        const uint8_t *w = find_weight(t, first + v, column, bits);
        for (int64_t c = 0; c < width; c += 32 / bits, w += BLOCK_STEP) {
            const Bits packed = load_bits(w);
            PREFETCH(w);
            UNROLL for (int half = 0; half < 8 / bits; half++)
                UNROLL for (int word = 0; word < WORD_LEVELS; word++) {
                    const Bits unpacked = unpack(packed, half, word, bits);
                    memcpy(levels + (((word * width + c) / 4 + half) * VECTORS + v) * 4 * LANES,
                           &unpacked, sizeof unpacked);
                }
        }
    }
#ifdef I8MM
    if (has_pairs(width)) pair_levels(levels, width);
#endif
}

// Sums of a tile over a group of columns. `vectors` and `rows` are constants after inlining, so
// that the sums are in registers.

// Multiplies the levels that `unpack_group` has stored.
INLINE void multiply_unpacked(const uint8_t *levels, const int32_t *x, int64_t width,
                              const int rows, Ints *total) {
#ifdef I8MM
    if (has_pairs(width)) {
        multiply_pairs(levels, x, width, rows, total);
        return;
    }
#endif
    const int64_t size = width * VECTORS * LANES;  // bytes of the levels for a word
    Ints sum[ROWS * VECTORS] = {{0}};
    for (int word = 1; word >= 0; word--) {
        const uint8_t *from = levels;
        const int32_t *words = x + word * width / 4 * rows;
#ifdef DIGITS
        UNROLL for (int i = 0; i < VECTORS * rows; i++) sum[i] <<= 8;
#else
        from += word * size;
#endif
        for (const uint8_t *end = from + size; from < end; words += rows) {
            Bits lanes[VECTORS];
            UNROLL for (int v = 0; v < VECTORS; v++, from += 4 * LANES) lanes[v] = load_bits(from);
            UNROLL for (int r = 0; r < rows; r++)
                UNROLL for (int v = 0; v < VECTORS; v++) {
                    Ints *to = &sum[r * VECTORS + v];
                    *to = add_products(*to, lanes[v], words, r);
                }
        }
    }
    UNROLL for (int i = 0; i < VECTORS * rows; i++) total[i] = sum[i];
}

// Multiplies weights as they are in memory, and moves `w` to the next group.
INLINE void multiply_packed(const uint8_t **w, const int32_t *x, int64_t width, int bits,
                            const int vectors, const int rows, Ints *total) {
    Ints sum[2][MAX_SUMS] = {{{0}}};  // of words 0 and 1; without DIGITS sum[0] is of both
    const int64_t size = width / 4 * rows;  // of word 0, and of word 1
    for (const int32_t *end = x + size; x < end; x += 8 / bits * rows) {
        Bits packed[4];
        UNROLL for (int v = 0; v < vectors; v++, w[v - 1] += BLOCK_STEP) {
            packed[v] = load_bits(w[v]);
            PREFETCH(w[v]);
        }
        UNROLL for (int half = 0; half < 8 / bits; half++)
            UNROLL for (int word = 0; word < 2; word++)
                UNROLL for (int v = 0; v < vectors; v++) {
                    const Bits levels = unpack(packed[v], half, word, bits);
                    UNROLL for (int r = 0; r < rows; r++) {
                        Ints *to = &sum[word / WORD_LEVELS][r * vectors + v];
                        *to = add_products(*to, levels, x + word * size + half * rows, r);
                    }
                }
    }
    UNROLL for (int i = 0; i < vectors * rows; i++) total[i] = sum[0][i] + (sum[1][i] << 8);
}

// Adds the sums of a group to the totals of a tile.
INLINE void add_group(const Product *t, int64_t first, int64_t row, int64_t group,
                      const int vectors, const int rows, const Ints *sum, Floats *total) {
    const int64_t place = group * t->filled_rows + row;
    UNROLL for (int v = 0; v < vectors; v++) {
        const Floats scale = find_group_scale(t, first + v, group);
        UNROLL for (int r = 0; r < rows; r++) {
            const int i = r * vectors + v;
            const Floats s = to_floats(sum[i] + spread_int(t->x_start[place + r]));
            total[i] = multiply_add(s, scale * t->x_scale[place + r], total[i]);
        }
    }
}

// Multiplies a tile of rows by a panel of columns, whose unpacked levels are given, and adds the
// results to `totals`, [row][vector].
INLINE void multiply_panel(const Product *t, int64_t first, int64_t row, int64_t column,
                           int64_t end, const uint8_t *levels, const int rows, Floats *totals) {
    Floats total[ROWS * VECTORS];  // in registers, unlike `totals`
    const int32_t *words = find_words(t, row, column);
    UNROLL for (int i = 0; i < rows * VECTORS; i++) total[i] = totals[i];
    for (; column < end; column += GROUP) {
        const int64_t width = smaller(GROUP, end - column);
        Ints sum[ROWS * VECTORS];
        multiply_unpacked(levels, words, width, rows, sum);
        levels += width * VECTORS * LANES * WORD_LEVELS;
        words += width * rows / 2;
        add_group(t, first, row, column / GROUP, VECTORS, rows, sum, total);
    }
    UNROLL for (int i = 0; i < rows * VECTORS; i++) totals[i] = total[i];
}

#ifdef AMX
// A register of AMX has up to 16 rows of 64 bytes. One instruction multiplies 64 columns of 16 rows
// of x by 64 columns of 16 outputs, and adds the results to the sums of these rows and outputs.

#define AMX_ROWS 16
#define AMX_COLUMNS 64

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} Registers;  // 0 to 3: sums [digit][vector]; 4 and 5: digits of x; 6 and 7: levels of a vector

#define ROW_BYTES {64, 64, 64, 64, 64, 64, 64, 64}
static const Registers EIGHT_ROWS = {1, 0, {0}, ROW_BYTES, {8, 8, 8, 8, 8, 8, 16, 16}};
static const Registers SIXTEEN_ROWS = {1, 0, {0}, ROW_BYTES, {16, 16, 16, 16, 16, 16, 16, 16}};

static int may_use_amx;  // set by `chatglm_runs_here`

// Sums of a group of columns, in registers.
INLINE void multiply_by_amx(const uint8_t *levels, const int32_t *x, int64_t width,
                            int64_t rows) {
    const int64_t stride = 4 * VECTORS * LANES;
    __asm__ volatile("" ::: "memory");  // gcc does not know that _tile_loadd reads memory
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t c = 0; c < width; c += AMX_COLUMNS, levels += AMX_COLUMNS / 4 * stride) {
        _tile_loadd(4, x + c / 4, width);
        _tile_loadd(5, x + (rows * width + c) / 4, width);
        _tile_loadd(6, levels, stride);
        _tile_loadd(7, levels + 4 * LANES, stride);
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 4, 7);
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
    }
}

typedef Ints AMXSums[2][AMX_ROWS][VECTORS];  // [digit][row][vector]

INLINE void store_amx_sums(AMXSums sum) {
    const int64_t stride = 4 * VECTORS * LANES;
    _tile_stored(0, sum[0], stride);
    _tile_stored(1, &sum[0][0][1], stride);
    _tile_stored(2, sum[1], stride);
    _tile_stored(3, &sum[1][0][1], stride);
}

// Does what `add_group` does. `next` are the words of x that AMX will read next.
INLINE void add_amx_sums(const Product *t, int64_t first, int64_t row, int64_t group, AMXSums sum,
                         const int32_t *next, Floats *totals) {
    const int64_t place = group * t->filled_rows + row;
    Floats scale[VECTORS];
    for (int v = 0; v < VECTORS; v++) scale[v] = find_group_scale(t, first + v, group);
    for (int64_t r = 0; r < t->tile_rows; r++, next += GROUP / 2) {
        UNROLL for (int i = 0; i < 2 * GROUP; i += 64) __builtin_prefetch((const char *)next + i);
        UNROLL for (int v = 0; v < VECTORS; v++, totals++) {
            const Ints all = sum[0][r][v] + (sum[1][r][v] << 8);
            const Floats s = to_floats(all + spread_int(t->x_start[place + r]));
            *totals = multiply_add(s, scale[v] * t->x_scale[place + r], *totals);
        }
    }
}

// Does what `multiply_panel` does. While AMX multiplies a group, the stored sums of the previous
// group are added to the totals.
static void multiply_panel_by_amx(const Product *t, int64_t first, int64_t row, int64_t column,
                                  int64_t end, const uint8_t *levels, Floats *totals) {
    const int32_t *words = find_words(t, row, column);
    AMXSums sum;
    for (int64_t c = column; c < end; c += GROUP) {
        const int64_t width = smaller(GROUP, end - c);
        multiply_by_amx(levels, words, width, t->tile_rows);
        levels += width * VECTORS * LANES;
        words += width * t->tile_rows / 2;
        if (c > column) add_amx_sums(t, first, row, c / GROUP - 1, sum, words, totals);
        store_amx_sums(sum);
    }
    add_amx_sums(t, first, row, (end - 1) / GROUP, sum, words, totals);
}
#endif

// Multiplies a single tile of rows. The weights are read once, from the first column to the last.
INLINE void multiply_few(const Product *t, int64_t begin, int64_t last, int bits,
                         const int vectors, const int rows) {
    for (int64_t first = begin; first < last; first += vectors) {
        const uint8_t *w[4];
        UNROLL for (int v = 0; v < vectors; v++) w[v] = find_weight(t, first + v, 0, bits);
        Floats total[MAX_SUMS] = {{0}};
        for (int64_t group = 0; group < t->x_groups; group++) {
            Ints sum[MAX_SUMS];
            const int64_t width = smaller(GROUP, t->columns - group * GROUP);
            multiply_packed(w, find_words(t, 0, group * GROUP), width, bits, vectors, rows, sum);
            add_group(t, first, 0, group, vectors, rows, sum, total);
        }
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int v = 0; v < vectors; v++)
                write_total(t, r, first + v, total[r * vectors + v]);
    }
}

INLINE void multiply_tile(const Product *t, int64_t first, int64_t row, int64_t column,
                          int64_t end, const uint8_t *levels, Floats *totals) {
#ifdef AMX
    if (t->uses_amx) {
        multiply_panel_by_amx(t, first, row, column, end, levels, totals);
        return;
    }
#endif
    switch (count_rows(t, row)) {
        case 1: multiply_panel(t, first, row, column, end, levels, 1, totals); break;
        case 2: multiply_panel(t, first, row, column, end, levels, 2, totals); break;
        case 4: multiply_panel(t, first, row, column, end, levels, 4, totals); break;
#if ROWS == 8
        case 8: multiply_panel(t, first, row, column, end, levels, 8, totals); break;
#endif
    }
}

// Multiplies up to PANEL_ROWS rows, which use the levels of a panel of columns, unpacked once.
INLINE void multiply_many(const Product *t, int64_t begin, int64_t last, int64_t first_row,
                          int bits) {
    uint8_t levels[PANEL * VECTORS * LANES * WORD_LEVELS] __attribute__((aligned(ALIGNMENT)));
    Floats totals[MAX_UNIT / VECTORS][PANEL_ROWS][VECTORS];
    const int64_t end_row = smaller(first_row + PANEL_ROWS, t->filled_rows);
    for (int64_t pair = 0; pair < t->unit / VECTORS; pair++)
        memset(totals[pair], 0, (end_row - first_row) * sizeof totals[pair][0]);
    for (int64_t column = 0; column < t->columns; column += PANEL) {
        const int64_t end = smaller(column + PANEL, t->columns);
        for (int64_t first = begin; first < last; first += VECTORS) {
            for (int64_t c = column; c < end; c += GROUP)
                unpack_group(t, first, c, smaller(GROUP, end - c), bits,
                             levels + (c - column) * VECTORS * LANES * WORD_LEVELS);
            for (int64_t row = first_row; row < end_row; row += t->tile_rows)
                multiply_tile(t, first, row, column, end, levels,
                              totals[(first - begin) / VECTORS][row - first_row]);
        }
    }
    for (int64_t row = first_row; row < end_row; row++)
        for (int64_t v = begin; v < last; v++)
            write_total(t, row, v, totals[(v - begin) / VECTORS][row - first_row][v % VECTORS]);
}

INLINE void multiply_all(const Product *t, int64_t begin, int64_t last, int bits) {
    for (int64_t row = 0; row < t->num_rows; row += PANEL_ROWS)
        multiply_many(t, begin, last, row, bits);
}

INLINE void multiply_outputs(const Product *t, int64_t unit, int bits) {
    const int64_t first = unit * t->unit;
    const int64_t last = smaller(first + t->unit, count_vectors(t->linear->out));
#ifdef AMX
    if (t->uses_amx) {
        _tile_loadconfig(t->tile_rows == 8 ? &EIGHT_ROWS : &SIXTEEN_ROWS);
        multiply_all(t, first, last, bits);
        _tile_release();
        return;
    }
#endif
    switch (t->filled_rows) {
        case 1: multiply_few(t, first, last, bits, 4, 1); break;
        case 2: multiply_few(t, first, last, bits, 4, 2); break;
        case 4: multiply_few(t, first, last, bits, 2, 4); break;
#if ROWS == 8
        case 8: multiply_few(t, first, last, bits, 1, 8); break;
#endif
        default: multiply_all(t, first, last, bits);
    }
}

static void multiply_unit(const void *task, int64_t unit) {
    const Product *t = task;
    if (t->linear->bits == 4) multiply_outputs(t, unit, 4);
    else multiply_outputs(t, unit, 8);
}

// Functions for Python. Those that compute return 0, or -1 if there is no memory.

const char *chatglm_isa(void) {
#ifdef AMX
    if (may_use_amx) return "amx";
#endif
    return ISA;
}

// Whether the CPU has the instructions of this library, and the system saves their registers.
// __builtin_cpu_supports is not used, because it is always 0 with zig's clang.
int chatglm_runs_here(void) {
#if defined(AVX512) || defined(AVX2)
    unsigned eax, ebx, ecx, edx, saved;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return 0;
    const unsigned wanted = bit_OSXSAVE | bit_FMA | bit_F16C;
    if ((ecx & wanted) != wanted || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return 0;
    __asm__("xgetbv" : "=a"(saved), "=d"(edx) : "c"(0));
#ifdef AVX512
    const unsigned registers = 0xe6, in_ebx = bit_AVX512F | bit_AVX512BW, in_ecx = bit_AVX512VNNI;
#else
    const unsigned registers = 0x06, in_ebx = bit_AVX2, in_ecx = 0;
#endif
    if ((saved & registers) != registers || (ebx & in_ebx) != in_ebx || (ecx & in_ecx) != in_ecx)
        return 0;
#ifdef AMX  // docs.kernel.org/arch/x86/xstate.html
    const int request_permission = 0x1023, tile_data = 18;
    may_use_amx = !syscall(SYS_arch_prctl, request_permission, tile_data);
#endif
#ifdef AVXVNNI
    if (!__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) || !(eax & bit_AVXVNNI)) return 0;
#endif
#elif defined(NEON) && defined(__linux__)
    if (!(getauxval(AT_HWCAP) & HWCAP_ASIMDDP)) return 0;
#ifdef I8MM
    if (!(getauxval(AT_HWCAP2) & HWCAP2_I8MM)) return 0;
#endif
#elif defined(I8MM) && defined(__APPLE__)  // all have the other instructions
    int has_i8mm = 0;
    size_t size = sizeof has_i8mm;
    sysctlbyname("hw.optional.arm.FEAT_I8MM", &has_i8mm, &size, NULL, 0);
    if (!has_i8mm) return 0;
#endif
    return 1;
}

int chatglm_multiply(const Linear *linear, const float *x, float *y, int64_t num_rows,
                     int num_threads) {
    Product task = {linear, x, y, num_rows};
    task.columns = divide_up(linear->in, 32 / linear->bits) * (32 / linear->bits);
    task.groups = linear->in / linear->group_size;
    task.x_groups = divide_up(linear->in, GROUP);
    task.tile_rows = ROWS;
    task.unit = UNIT;
#ifdef AMX
    task.uses_amx = may_use_amx && num_rows > 4 && task.columns % AMX_COLUMNS == 0;
    if (task.uses_amx && num_rows > 8) {
        task.tile_rows = AMX_ROWS;
        while (task.unit < MAX_UNIT && count_vectors(linear->out) / task.unit > 8 * num_threads)
            task.unit *= 2;
    }
#endif
    const int64_t num_tiles = divide_up(num_rows, task.tile_rows);
    const int64_t last = (num_tiles - 1) * task.tile_rows;
    const int64_t filled = task.filled_rows = last + count_rows(&task, last);
    // The last 16 bytes are for NEON, which reads four words at a time.
    task.x_words = allocate(filled * (2 * task.columns + 8 * task.x_groups) + 16);
    if (!task.x_words) return -1;
    task.x_start = task.x_words + filled * task.columns / 2;
    task.x_scale = (float *)(task.x_start + filled * task.x_groups);
    run(quantize_tile, &task, num_tiles * task.x_groups, num_threads);
    run(multiply_unit, &task, divide_up(count_vectors(linear->out), task.unit), num_threads);
    release(task.x_words);
    return 0;
}
