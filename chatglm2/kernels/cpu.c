// Products with INT8, INT4, float16 and bfloat16 weights, for CPUs.
//
//   y[r, o] = sum over c of x[r, c] * W[o, c],   W[o, c] = level(o, c) * scale[o, c / group_size]
//
// Order of the weights in memory: a *block* is 16 outputs, which are lanes side by side. A lane has
// 32 bits: 8 columns of INT4, or 4 of INT8. With o = 16 * block + lane,
//
//   INT4: byte ((block * ceil(in / 8) + c / 8) * 16 + lane) * 4 + c % 4
//         holds level + 8, in its low four bits if c % 8 < 4, else in the high ones
//   INT8: byte ((block * ceil(in / 4) + c / 4) * 16 + lane) * 4 + c % 4   holds level + 128
//   scale: float ((block * in / group_size) + c / group_size) * 16 + lane
//
// Example, INT4, in = 16, level(17, 13) = -3: block 1, lane 1, c / 8 = 1, c % 8 = 5, so the high
// bits of byte ((1 * 2 + 1) * 16 + 1) * 4 + 1 = 197 are -3 + 8 = 5. The last block and the last
// lane are filled up with level 0.
//
// The result of a row depends neither on the other rows nor on their number: integer sums are exact
// in any order, and all tiles below add groups of columns in the same order.
#include "cpu.h"

#if defined(AVX512) || defined(AVX2)
#include <cpuid.h>
#endif

#define BLOCK 16                // outputs
#define BLOCK_STEP (4 * BLOCK)  // bytes: 32 bits of each output
#define PARTS (BLOCK / LANES)   // vectors of a block
#define UNIT (4 * PARTS)        // vectors that a thread takes at a time
#define GROUP 128               // columns of x that share a scale
#define TINY 1e-30f             // a group of smaller numbers becomes zeros
#define STORED_UNIT 32          // outputs that a thread takes at a time
#define PREFETCH 2048           // bytes ahead

// Rows and vectors of outputs of a tile, whose sums fill most of the registers.
#if LANES == 16
#define EXACT_ROWS 8
#define EXACT_VECTORS(rows) ((rows) <= 2 ? 4 : 8 / (rows))
#define INT8_ROWS 8
#else
#define EXACT_ROWS 4
#define EXACT_VECTORS(rows) ((rows) <= 2 ? 2 : 1)
#define INT8_ROWS 4
#endif
#define INT8_VECTORS 2
#define PANEL 1024  // columns whose levels are unpacked into the first cache

typedef int8_t Bytes __attribute__((vector_size(LANES)));
typedef int16_t Shorts __attribute__((vector_size(4 * LANES)));

// Adds to each lane its four unsigned bytes times the four signed bytes of x. Nothing saturates.
INLINE Ints add_dot4(Ints sum, Bits v, int32_t x, int bits) {
    (void)bits;
#ifdef AVX512
    // Assembly keeps the instructions in order: as gcc 12 orders them, they run at half the speed.
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(v), "v"(spread_int(x)));
    return sum;
#elif defined(AVX2)
    const __m256i all = _mm256_set1_epi32(x), bytes = (__m256i)v;
    if (bits == 4)  // sums of two products fit 16 bits
        return sum + (Ints)_mm256_madd_epi16(_mm256_maddubs_epi16(bytes, all),
                                             _mm256_set1_epi16(1));
    const __m256i x_even = _mm256_srai_epi16(_mm256_slli_epi16(all, 8), 8);
    const __m256i x_odd = _mm256_srai_epi16(all, 8);
    const __m256i even = _mm256_and_si256(bytes, _mm256_set1_epi16(255));
    const __m256i odd = _mm256_srli_epi16(bytes, 8);
    return sum + (Ints)_mm256_madd_epi16(even, x_even) + (Ints)_mm256_madd_epi16(odd, x_odd);
#else  // each half of a lane holds a product
    const Shorts all = (Shorts)spread_int(x);
    const Shorts even = (Shorts)(v & 0x00ff00ffu) * (all << 8 >> 8);
    const Shorts odd = (Shorts)(v >> 8 & 0x00ff00ffu) * (all >> 8);
    const Shorts both = even + odd;  // 16 bits hold it if the levels have 4 bits
    if (bits == 4) return sum + ((Ints)both << 16 >> 16) + ((Ints)both >> 16);
    return sum + ((Ints)even << 16 >> 16) + ((Ints)even >> 16) + ((Ints)odd << 16 >> 16) +
           ((Ints)odd >> 16);
#endif
}

// The official order and back

typedef struct {
    const uint8_t *official;     // INT4: column 2 * i is in the high bits of byte i
    uint8_t *packed, *restored;  // one of them is written
    int64_t out, row_bytes;
    int bits;
} Packing;

static int64_t count_steps(const Packing *t) { return divide_up(t->row_bytes, 4); }

// Reorders the INT4 columns of a lane: 1 0 3 2 5 4 7 6, from low to high bits, become
// 0 4 1 5 2 6 3 7. Inverting the sign bit adds 8 to an INT4 level, or 128 to an INT8 level.
static uint32_t pack_lane(uint32_t v, int bits) {
    if (bits == 8) return v ^ 0x80808080u;
    const uint32_t even = v >> 4 & 0x0f0f0f0fu, odd = v & 0x0f0f0f0fu;  // columns 0 2 4 6, 1 3 5 7
    // columns 0 1 2 3 and 4 5 6 7
    const uint32_t low = (even & 0xff) | (odd & 0xff) << 8 | (even & 0xff00) << 8 |
                         (odd & 0xff00) << 16;
    const uint32_t high = (even >> 16 & 0xff) | (odd >> 8 & 0xff00) | (even >> 8 & 0xff0000) |
                          (odd & 0xff000000u);
    return (low | high << 4) ^ 0x88888888u;
}

static uint32_t restore_lane(uint32_t v, int bits) {
    if (bits == 8) return v ^ 0x80808080u;
    const uint32_t signed_levels = v ^ 0x88888888u;
    const uint32_t low = signed_levels & 0x0f0f0f0fu, high = signed_levels >> 4 & 0x0f0f0f0fu;
    const uint32_t even = (low & 0xff) | (low >> 8 & 0xff00) | (high & 0xff) << 16 |
                          (high & 0xff0000) << 8;
    const uint32_t odd = (low >> 8 & 0xff) | (low >> 16 & 0xff00) | (high & 0xff00) << 8 |
                         (high & 0xff000000u);
    return even << 4 | odd;
}

static void pack_block(const void *task, int64_t block) {
    const Packing *t = task;
    const int64_t steps = count_steps(t), whole = t->row_bytes / 4;
    uint32_t *packed = (uint32_t *)t->packed + block * steps * BLOCK;
    for (int lane = 0; lane < BLOCK; lane++) {
        const int64_t row = block * BLOCK + lane;
        const uint8_t *from = t->official + row * t->row_bytes;
        for (int64_t step = 0; step < steps; step++) {
            uint32_t v = 0;
            if (row < t->out) memcpy(&v, from + 4 * step, step < whole ? 4 : t->row_bytes % 4);
            packed[step * BLOCK + lane] = pack_lane(v, t->bits);
        }
    }
}

static void restore_block(const void *task, int64_t block) {
    const Packing *t = task;
    const int64_t steps = count_steps(t), whole = t->row_bytes / 4;
    const uint32_t *packed = (const uint32_t *)t->packed + block * steps * BLOCK;
    for (int lane = 0; lane < smaller(BLOCK, t->out - block * BLOCK); lane++) {
        uint8_t *to = t->restored + (block * BLOCK + lane) * t->row_bytes;
        for (int64_t step = 0; step < steps; step++) {
            const uint32_t v = restore_lane(packed[step * BLOCK + lane], t->bits);
            memcpy(to + 4 * step, &v, step < whole ? 4 : t->row_bytes % 4);
        }
    }
}

// Products with INT8 and INT4 weights. Each group of GROUP columns of x is converted to integers
// that share a scale, of one signed byte or of three (digits of base 256):
//
//   1 digit   scale = largest |x| / 127
//   3 digits  scale = the power of 2 for which the largest integer is 2^22 to 2^23. These integers
//             have as many bits as float32, and their products and sums are exact, hence "exact" in
//             the names below. The error of the result is 0.64 to 0.76 times that of float32
//             arithmetic. If some columns are 20 to 1000 times larger than the others, which then
//             lose their last bits, it is 1.0 to 2.3 times that, at most 6e-7 of the result (norms
//             of the vectors of outputs).
//
// The digits are stored in tiles of rows: [column / 4][digit, lowest first][row of the tile]
// [column % 4], so that one instruction multiplies four columns of a lane by four bytes of a row.

typedef struct {
    const Linear *linear;
    const float *x;
    float *y;
    int64_t num_rows, tile_rows;
    int digits;
    // The caller leaves the rest empty.
    int64_t columns;  // `in`, rounded up to whole lanes
    int64_t groups, x_groups;
    int32_t *tiles;
    float *x_scale;  // [tile][group][row]
    int32_t *x_start;  // [tile][group][digit][row]: makes up for the 8 or 128 added to each level
} Product;

// Returns the rows of a tile, 1, 2, 4 or 8. Zeros fill up the last tile.
static int64_t fill_tile(int64_t rows_left) {
    int64_t rows = 1;
    while (rows < rows_left && rows < EXACT_ROWS) rows *= 2;
    return rows;
}

static int64_t count_vectors(int64_t out) { return divide_up(out, BLOCK) * PARTS; }

// The last tile of `multiply_int8` may have more vectors than are left. They are computed from the
// last vector and not written.
INLINE int64_t clamp_vector(const Product *t, int64_t v) {
    return smaller(v, count_vectors(t->linear->out) - 1);
}

// Vector v of the outputs is part v % PARTS of block v / PARTS.
INLINE const uint8_t *find_weight(const Product *t, int64_t v) {
    v = clamp_vector(t, v);
    return t->linear->weight + v / PARTS * BLOCK * t->columns * t->linear->bits / 8 +
           v % PARTS * 4 * LANES;
}

INLINE Floats find_scale(const Product *t, int64_t v, int64_t group) {
    v = clamp_vector(t, v);
    return load(t->linear->scale + (v / PARTS * t->groups + group) * BLOCK + v % PARTS * LANES);
}

static int64_t count_tile_rows(const Product *t, int64_t first) {
    return t->digits == 1 ? INT8_ROWS : fill_tile(t->num_rows - first);
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

// Returns the scale of a group of columns, or 1 if each row of W has a single scale, which
// `write_total` applies.
INLINE Floats find_group_scale(const Product *t, int64_t v, int64_t group) {
    return t->groups == 1 ? spread(1) : find_scale(t, v, group);
}

// Returns the sum over the columns before `column`, which the previous panel has left in y.
INLINE Floats read_total(const Product *t, int64_t row, int64_t v, int64_t column) {
    if (column == 0 || row >= t->num_rows) return spread(0);
    return read_outputs(t->y + row * t->linear->out, v, t->linear->out);
}

// Stores the sum over the columns before `column`, which is the result after the last column.
INLINE void write_total(const Product *t, int64_t row, int64_t v, int64_t column, Floats total) {
    const Linear *linear = t->linear;
    if (row >= t->num_rows) return;
    if (column == t->columns) {
        if (t->groups == 1) total *= find_scale(t, v, 0);
        if (linear->bias) total += read_outputs(linear->bias, v, linear->out);
    }
    write_outputs(t->y + row * linear->out, v, linear->out, total);
}

// Returns NaN for a group with infinities or NaNs, so that its results are NaN, and 0 for a group
// of tiny numbers, which have fewer bits. The digits of both groups are zeros.
static float choose_scale(const float *x, int digits) {
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
    if (max < TINY) return 0;
    if (digits == 1) return max / 127;
    const int32_t power = ((bits + 0x10200) & 0x7f800000) - (22 << 23);
    memcpy(&max, &power, 4);
    return max;
}

// Converts a group of a row of x to digits, which become row `row` of a tile.
INLINE void quantize_group(const Product *t, int64_t tile, int64_t group, int64_t row, int64_t rows,
                           const int digits) {
    const int64_t first = group * GROUP, width = smaller(GROUP, t->linear->in - first);
    const int64_t place = tile * t->tile_rows * t->x_groups + group * rows;
    const int64_t x_row = tile * t->tile_rows + row;
    float x[GROUP] = {0};
    int8_t bytes[3][GROUP];
    Ints sum[3] = {{0}};
    if (x_row < t->num_rows) memcpy(x, t->x + x_row * t->linear->in + first, 4 * width);
    const float scale = choose_scale(x, digits), inverse = scale > 0 ? 1 / scale : 0;
    if (inverse == 0) memset(x, 0, sizeof x);
    for (int c = 0; c < GROUP; c += LANES) {
        Ints value = round_to_ints(load(x + c) * inverse);
        UNROLL for (int d = 0; d < digits; d++) {
            const Ints digit = d + 1 < digits ? (Ints)((Bits)value << 24) >> 24 : value;
            const Bytes stored = __builtin_convertvector(digit, Bytes);
            memcpy(bytes[d] + c, &stored, LANES);
            sum[d] += digit;
            value = (value - digit) >> 8;
        }
    }
    t->x_scale[place + row] = scale;
    int32_t *to = t->tiles + (tile * t->tile_rows * t->columns + first * rows) / 4 * digits + row;
    for (int d = 0; d < digits; d++) {
        int32_t all = 0;
        for (int i = 0; i < LANES; i++) all += sum[d][i];
        t->x_start[place * digits + d * rows + row] = -all * (t->linear->bits == 4 ? 8 : 128);
        for (int64_t c = 0; c < smaller(GROUP, t->columns - first); c += 4)
            memcpy(to + (c / 4 * digits + d) * rows, bytes[d] + c, 4);
    }
}

// A unit is a group of columns of a tile.
static void quantize_x(const void *task, int64_t unit) {
    const Product *t = task;
    const int64_t tile = unit / t->x_groups, group = unit % t->x_groups;
    const int64_t rows = count_tile_rows(t, tile * t->tile_rows);
    for (int64_t row = 0; row < rows; row++)
        if (t->digits == 1) quantize_group(t, tile, group, row, rows, 1);
        else quantize_group(t, tile, group, row, rows, 3);
}

// Multiplies the columns from `column` to `end`. `vectors` and `rows` are constants after inlining,
// so that the sums are in registers.
INLINE void multiply_exact_tile(const Product *t, int64_t first, int64_t row, int64_t column,
                                int64_t end, int bits, const int vectors, const int rows) {
    const int32_t *x = t->tiles + (row * t->columns + column * rows) / 4 * 3;
    const uint8_t *w[8];
    Floats total[8];
    UNROLL for (int v = 0; v < vectors; v++) {
        w[v] = find_weight(t, first + v) + column * BLOCK * bits / 8;
        UNROLL for (int r = 0; r < rows; r++)
            total[v * rows + r] = read_total(t, row + r, first + v, column);
    }
    for (int64_t group = column / GROUP; group * GROUP < end; group++) {
        const int64_t place = row * t->x_groups + group * rows;
        const int64_t width = smaller(GROUP, end - group * GROUP);
        Ints sum[24];
        UNROLL for (int v = 0; v < vectors; v++)
            UNROLL for (int i = 0; i < 3 * rows; i++)
                sum[v * 3 * rows + i] = spread_int(t->x_start[place * 3 + i]);
        for (const int32_t *x_end = x + width / 4 * 3 * rows; x < x_end;) {
            Bits lanes[8], levels[8];
            UNROLL for (int v = 0; v < vectors; v++) {
                lanes[v] = load_bits(w[v]);
                __builtin_prefetch(w[v] + PREFETCH);
                w[v] += BLOCK_STEP;
            }
            UNROLL for (int half = 0; half < 8 / bits; half++, x += 3 * rows) {
                UNROLL for (int v = 0; v < vectors; v++)
                    levels[v] = bits == 8 ? lanes[v] : lanes[v] >> 4 * half & 0x0f0f0f0fu;
                UNROLL for (int i = 0; i < 3 * rows; i++)
                    UNROLL for (int v = 0; v < vectors; v++) {
                        Ints *s = &sum[v * 3 * rows + i];
                        *s = add_dot4(*s, levels[v], x[i], bits);
                    }
            }
        }
        UNROLL for (int v = 0; v < vectors; v++) {
            const Floats scale = find_group_scale(t, first + v, group);
            UNROLL for (int r = 0; r < rows; r++) {
                const Ints *s = &sum[v * 3 * rows + r];
                const Floats high = to_floats(s[rows] + (s[2 * rows] << 8));
                const Floats all = multiply_add(high, spread(256), to_floats(s[0]));
                Floats *to = &total[v * rows + r];
                *to = multiply_add(all, scale * t->x_scale[place + r], *to);
            }
        }
    }
    UNROLL for (int v = 0; v < vectors; v++)
        UNROLL for (int r = 0; r < rows; r++)
            write_total(t, row + r, first + v, end, total[v * rows + r]);
}

// Multiplies in panels of columns, whose x stays in the first cache.
INLINE void multiply_exact_rows(const Product *t, int64_t first, int64_t last, int64_t row,
                                int bits, const int rows) {
    const int64_t panel = 8 * PANEL / rows;
    for (int64_t column = 0; column < t->columns; column += panel) {
        const int64_t end = smaller(column + panel, t->columns);
        int64_t v = first;
        for (; v + EXACT_VECTORS(rows) <= last; v += EXACT_VECTORS(rows))
            multiply_exact_tile(t, v, row, column, end, bits, EXACT_VECTORS(rows), rows);
        for (; v < last; v++) multiply_exact_tile(t, v, row, column, end, bits, 1, rows);
    }
}

INLINE void multiply_exact_unit(const Product *t, int64_t unit, int bits) {
    const int64_t first = unit * UNIT, last = smaller(first + UNIT, count_vectors(t->linear->out));
    for (int64_t row = 0; row < t->num_rows; row += EXACT_ROWS)
        switch (count_tile_rows(t, row)) {
            case 1: multiply_exact_rows(t, first, last, row, bits, 1); break;
            case 2: multiply_exact_rows(t, first, last, row, bits, 2); break;
            case 4: multiply_exact_rows(t, first, last, row, bits, 4); break;
#if EXACT_ROWS == 8
            case 8: multiply_exact_rows(t, first, last, row, bits, 8); break;
#endif
        }
}

static void multiply_exact(const void *task, int64_t unit) {
    const Product *t = task;
    if (t->linear->bits == 4) multiply_exact_unit(t, unit, 4);
    else multiply_exact_unit(t, unit, 8);
}

// Unpacks the levels of a panel of columns: [column / 4][vector][lane][column % 4]. Meanwhile the
// weights of the next panel, which begins at `next_first` and `next_column`, are prefetched.
INLINE void unpack_panel(const Product *t, int64_t first, int64_t column, int64_t width,
                         int64_t next_first, int64_t next_column, int bits, uint8_t *levels) {
    UNROLL for (int v = 0; v < INT8_VECTORS; v++) {
        const uint8_t *w = find_weight(t, first + v) + column * BLOCK * bits / 8;
        const uint8_t *next = find_weight(t, next_first + v) + next_column * BLOCK * bits / 8;
        for (int64_t c = 0; c < width; c += 32 / bits, w += BLOCK_STEP, next += BLOCK_STEP) {
            const Bits lanes = load_bits(w);
            __builtin_prefetch(next, 0, 2);
            UNROLL for (int half = 0; half < 8 / bits; half++) {
                const Bits unpacked = bits == 8 ? lanes : lanes >> 4 * half & 0x0f0f0f0fu;
                memcpy(levels + ((c / 4 + half) * INT8_VECTORS + v) * 4 * LANES, &unpacked,
                       4 * LANES);
            }
        }
    }
}

// Multiplies the columns from `column` to `end`, whose unpacked levels are given.
INLINE void multiply_int8_tile(const Product *t, int64_t first, int64_t row, int64_t column,
                               int64_t end, int bits, const uint8_t *levels) {
    const int rows = INT8_ROWS, vectors = INT8_VECTORS;
    const int32_t *x = t->tiles + (row * t->columns + column * rows) / 4;
    Floats total[INT8_ROWS][INT8_VECTORS];
    for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++)
            total[r][v] = read_total(t, row + r, first + v, column);
    for (int64_t group = column / GROUP; group * GROUP < end; group++) {
        const int64_t place = row * t->x_groups + group * rows;
        const int64_t width = smaller(GROUP, end - group * GROUP);
        Ints sum[INT8_ROWS][INT8_VECTORS];
        UNROLL for (int r = 0; r < rows; r++)
            UNROLL for (int v = 0; v < vectors; v++)
                sum[r][v] = spread_int(t->x_start[place + r]);
        for (const int32_t *x_end = x + width / 4 * rows; x < x_end; x += rows) {
            Bits lanes[INT8_VECTORS];
            UNROLL for (int v = 0; v < vectors; v++, levels += 4 * LANES)
                lanes[v] = load_bits(levels);
            UNROLL for (int r = 0; r < rows; r++)
                UNROLL for (int v = 0; v < vectors; v++)
                    sum[r][v] = add_dot4(sum[r][v], lanes[v], x[r], bits);
        }
        UNROLL for (int v = 0; v < vectors; v++) {
            const Floats scale = find_group_scale(t, first + v, group);
            UNROLL for (int r = 0; r < rows; r++)
                total[r][v] = multiply_add(to_floats(sum[r][v]), scale * t->x_scale[place + r],
                                           total[r][v]);
        }
    }
    for (int r = 0; r < rows; r++)
        UNROLL for (int v = 0; v < vectors; v++)
            write_total(t, row + r, first + v, end, total[r][v]);
}

INLINE void multiply_int8_unit(const Product *t, int64_t unit, int bits) {
    const int64_t begin = unit * UNIT, last = smaller(begin + UNIT, count_vectors(t->linear->out));
    uint8_t levels[PANEL * INT8_VECTORS * LANES] __attribute__((aligned(ALIGNMENT)));
    for (int64_t column = 0; column < t->columns; column += PANEL) {
        const int64_t end = smaller(column + PANEL, t->columns);
        for (int64_t first = begin; first < last; first += INT8_VECTORS) {
            const int is_last = first + INT8_VECTORS >= last;
            unpack_panel(t, first, column, end - column, is_last ? begin : first + INT8_VECTORS,
                         is_last ? end : column, bits, levels);
            for (int64_t row = 0; row < t->num_rows; row += INT8_ROWS)
                multiply_int8_tile(t, first, row, column, end, bits, levels);
        }
    }
}

static void multiply_int8(const void *task, int64_t unit) {
    const Product *t = task;
    if (t->linear->bits == 4) multiply_int8_unit(t, unit, 4);
    else multiply_int8_unit(t, unit, 8);
}

// Products with weights of 16 bits, which are read as they are stored, [out, in]. The lanes of a
// vector are columns here, and x is copied so that zeros fill up its rows to whole vectors.

typedef struct {
    const uint16_t *weight;
    const float *x;
    float *y;
    int64_t num_rows, in, out, columns;
    int is_bfloat16;
} StoredProduct;

// Adds the products of LANES columns from c on; the last ones are filled up with zeros.
INLINE void add_columns(const StoredProduct *t, const uint16_t *const *w, const float *x,
                        const int is_bfloat16, const int outputs, const int rows, int64_t c,
                        const int is_last, Floats *sum) {
    Floats columns[EXACT_ROWS];
    UNROLL for (int r = 0; r < rows; r++) columns[r] = load(x + r * t->columns + c);
    UNROLL for (int o = 0; o < outputs; o++) {
        const uint16_t *from = w[o] + c;
        uint16_t last[LANES] = {0};
        if (is_last) from = memcpy(last, from, 2 * (t->in - c));
        else __builtin_prefetch(from + PREFETCH / 2);
        const Floats weight = load_stored(from, is_bfloat16);
        UNROLL for (int r = 0; r < rows; r++)
            sum[o * rows + r] = multiply_add(weight, columns[r], sum[o * rows + r]);
    }
}

// Multiplies the columns from `column` to `end`. `sum` has a vector for each output and row.
INLINE void multiply_stored_tile(const StoredProduct *t, int64_t output, int64_t row,
                                 int64_t column, int64_t end, const int is_bfloat16,
                                 const int outputs, const int rows, Floats *sum) {
    const float *x = t->x + row * t->columns;
    const uint16_t *w[8];
    Floats part[16];
    UNROLL for (int o = 0; o < outputs; o++) w[o] = t->weight + (output + o) * t->in;
    UNROLL for (int i = 0; i < outputs * rows; i++) part[i] = sum[i];
    int64_t c = column;
    for (; c + LANES <= end; c += LANES)
        add_columns(t, w, x, is_bfloat16, outputs, rows, c, 0, part);
    if (c < end) add_columns(t, w, x, is_bfloat16, outputs, rows, c, 1, part);
    UNROLL for (int i = 0; i < outputs * rows; i++) sum[i] = part[i];
}

// Multiplies in panels of columns, whose x stays in the first cache.
INLINE void multiply_stored_rows(const StoredProduct *t, int64_t first, int64_t last, int64_t row,
                                 const int is_bfloat16, const int outputs, const int rows) {
    Floats sum[STORED_UNIT * EXACT_ROWS] = {{0}};
    const int64_t panel = 4 * PANEL / rows;
    for (int64_t column = 0; column < t->in; column += panel) {
        const int64_t end = smaller(column + panel, t->in);
        int64_t o = first;
        for (; o + outputs <= last; o += outputs)
            multiply_stored_tile(t, o, row, column, end, is_bfloat16, outputs, rows,
                                 sum + (o - first) * rows);
        for (; o < last; o++)
            multiply_stored_tile(t, o, row, column, end, is_bfloat16, 1, rows,
                                 sum + (o - first) * rows);
    }
    for (int64_t o = first; o < last; o++)
        for (int64_t r = 0; r < smaller(rows, t->num_rows - row); r++)
            t->y[(row + r) * t->out + o] = add_lanes(sum[(o - first) * rows + r]);
}

INLINE void multiply_stored_unit(const StoredProduct *t, int64_t unit, const int is_bfloat16) {
    const int64_t first = unit * STORED_UNIT, last = smaller(first + STORED_UNIT, t->out);
    for (int64_t row = 0; row < t->num_rows; row += EXACT_ROWS)
        switch (fill_tile(t->num_rows - row)) {
            case 1: multiply_stored_rows(t, first, last, row, is_bfloat16, 4, 1); break;
            case 2: multiply_stored_rows(t, first, last, row, is_bfloat16, 4, 2); break;
            case 4: multiply_stored_rows(t, first, last, row, is_bfloat16, 4 / PARTS, 4); break;
#if EXACT_ROWS == 8
            case 8: multiply_stored_rows(t, first, last, row, is_bfloat16, 2, 8); break;
#endif
        }
}

static void multiply_stored(const void *task, int64_t unit) {
    const StoredProduct *t = task;
    if (t->is_bfloat16) multiply_stored_unit(t, unit, 1);
    else multiply_stored_unit(t, unit, 0);
}

// Functions for Python. Those that compute return 0, or -1 if there is no memory.

const char *chatglm_isa(void) { return ISA; }

// Whether the CPU has the instructions that this file uses, and the system saves their registers.
// Not by __builtin_cpu_supports, which is always 0 with zig's clang.
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
    return (saved & registers) == registers && (ebx & in_ebx) == in_ebx && (ecx & in_ecx) == in_ecx;
#else
    return 1;
#endif
}

void chatglm_pack(const uint8_t *official, uint8_t *packed, int64_t out, int64_t row_bytes,
                  int bits, int num_threads) {
    const Packing task = {official, packed, NULL, out, row_bytes, bits};
    run(pack_block, &task, divide_up(out, BLOCK), num_threads);
}

void chatglm_restore(const uint8_t *packed, uint8_t *restored, int64_t out, int64_t row_bytes,
                     int bits, int num_threads) {
    const Packing task = {NULL, (uint8_t *)packed, restored, out, row_bytes, bits};
    run(restore_block, &task, divide_up(out, BLOCK), num_threads);
}

int chatglm_multiply(const Linear *linear, const float *x, float *y, int64_t num_rows, int is_exact,
                     int num_threads) {
    Product task = {linear, x, y, num_rows};
    task.digits = is_exact ? 3 : 1;
    task.tile_rows = is_exact ? EXACT_ROWS : INT8_ROWS;
    task.columns = divide_up(linear->in, 32 / linear->bits) * (32 / linear->bits);
    task.groups = linear->in / linear->group_size;
    task.x_groups = divide_up(linear->in, GROUP);
    const int64_t num_tiles = divide_up(num_rows, task.tile_rows);
    const int64_t filled = num_tiles * task.tile_rows;  // rows
    task.tiles = allocate(filled * (task.digits * (task.columns + 4 * task.x_groups) +
                                    4 * task.x_groups));
    if (!task.tiles) return -1;
    task.x_start = task.tiles + filled * task.columns / 4 * task.digits;
    task.x_scale = (float *)(task.x_start + filled * task.x_groups * task.digits);
    run(quantize_x, &task, num_tiles * task.x_groups, num_threads);
    run(is_exact ? multiply_exact : multiply_int8, &task,
        divide_up(count_vectors(linear->out), UNIT), num_threads);
    release(task.tiles);
    return 0;
}

int chatglm_multiply_stored(const uint16_t *weight, const float *x, float *y, int64_t num_rows,
                            int64_t in, int64_t out, int is_bfloat16, int num_threads) {
    const int64_t columns = divide_up(in, LANES) * LANES;
    const int64_t size = 4 * columns * divide_up(num_rows, EXACT_ROWS) * EXACT_ROWS;
    float *rows = allocate(size);
    if (!rows) return -1;
    memset(rows, 0, size);
    for (int64_t row = 0; row < num_rows; row++) memcpy(rows + row * columns, x + row * in, 4 * in);
    const StoredProduct task = {weight, rows, y, num_rows, in, out, columns, is_bfloat16};
    run(multiply_stored, &task, divide_up(out, STORED_UNIT), num_threads);
    release(rows);
    return 0;
}
