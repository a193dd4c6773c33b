// Products with INT8 and INT4 weights, for CPUs.
//
//   y[r, o] = sum over c of x[r, c] * W[o, c],   W[o, c] = level(o, c) * scale[o, c / group_size]
//
// The weights are in the order of packing.c. Each group of GROUP columns of x is converted to
// 16-bit integers that share a scale, largest |x| / LARGEST (activations.c). Products and sums of
// integers are exact, at most GROUP * LARGEST * 255 < 2^31.
//
//   y[r, o] = sum over groups of scale[o, group] * x_scale[r, group] *
//            (sum over c of integer[r, c] * (level(o, c) + offset) - offset * sum of integer[r, c])
//
// The error of a result is less than that of float16 arithmetic, also with columns that are 1000
// times as large as the others.
//
// The result of a row depends neither on the other rows nor on their number: integer sums are exact
// in any order, and all tiles add groups of columns in the same order.
#include "product.h"

#define BLOCK_STEP (4 * BLOCK)  // bytes: 32 bits of each output
#define PANEL_ROWS 256          // rows whose words and totals are kept in the second cache
#define MAX_SUMS 8              // of the tile of a product with few rows
#define UNIT (4 * PARTS)        // vectors that a thread takes at a time
#ifdef AMX
#define MAX_UNIT (4 * UNIT)     // for many rows, so that a panel of x is read less often
#else
#define MAX_UNIT UNIT
#endif
#if LANES == 16
#define PREFETCH(place) __builtin_prefetch((place) + 1024, 0, 2)  // into the second cache
#else
#define PREFETCH(place) __builtin_prefetch((place) + 2048)
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

INLINE const uint8_t *find_weight(const Product *t, int64_t v, int64_t column, int bits) {
    v = clamp_vector(t, v);
    return t->linear->weight + (v / PARTS * t->columns + column) * BLOCK * bits / 8 +
           v % PARTS * 4 * LANES;
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

// Returns the levels of LANES outputs that belong to a word of x. With `in_place` those of INT4's
// half 1 are 16 times as large, which saves a shift.
INLINE Bits unpack(Bits packed, int half, int word, int bits, const int in_place) {
    uint32_t mask = bits == 4 ? 0x0f0f0f0fu : 0xffffffffu;
#ifdef NEON
    if (bits == 8) packed ^= 0x80808080u;
#endif
#ifndef DIGITS
    mask &= 0x00ff00ffu;
    packed >>= 8 * word;
#endif
    if (in_place) return packed & mask << 4 * half;
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

// Unpacks the levels of a group of columns for VECTORS vectors of outputs.
INLINE void unpack_group(const Product *t, int64_t first, int64_t column, int64_t width, int bits,
                         uint8_t *levels) {
    UNROLL for (int v = 0; v < VECTORS; v++) {
        const uint8_t *w = find_weight(t, first + v, column, bits);
        for (int64_t c = 0; c < width; c += 32 / bits, w += BLOCK_STEP) {
            const Bits packed = load_bits(w);
            PREFETCH(w);
            UNROLL for (int half = 0; half < 8 / bits; half++)
                UNROLL for (int word = 0; word < WORD_LEVELS; word++) {
                    const Bits unpacked = unpack(packed, half, word, bits, 0);
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
#ifdef DIGITS
    const int in_place = 0;
#else
    const int in_place = rows == 1;  // with more rows, there are no registers for more sums
#endif
    Ints sum[2][MAX_SUMS] = {{{0}}};  // with DIGITS of words 0 and 1, with `in_place` of the halves
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
                    const Bits levels = unpack(packed[v], half, word, bits, in_place);
                    UNROLL for (int r = 0; r < rows; r++) {
                        Ints *to = &sum[in_place ? half : word / WORD_LEVELS][r * vectors + v];
                        *to = add_products(*to, levels, x + word * size + half * rows, r);
                    }
                }
    }
    UNROLL for (int i = 0; i < vectors * rows; i++)
        total[i] = sum[0][i] + (in_place ? sum[1][i] >> 4 : sum[1][i] << 8);
}

// Adds the sums of a group to the totals of a tile.
INLINE void add_group(const Product *t, int64_t first, int64_t row, int64_t group,
                      const int vectors, const int rows, const Ints *sum, Floats *total) {
    const int64_t place = group * t->filled_rows + row;
    UNROLL for (int v = 0; v < vectors; v++) {
        const Floats scale = find_group_scale(t, first + v, group);
        UNROLL for (int r = 0; r < rows; r++) {
            const int i = r * vectors + v;
            total[i] = add_sum(t, place + r, scale, sum[i], total[i]);
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

// Multiplies a single tile of rows. The weights are read once, from the first column to the last.
INLINE void multiply_few(const Product *t, int64_t begin, int64_t last, int bits,
                         const int vectors, const int rows) {
    for (int64_t first = begin; first < last; first += vectors) {
        const uint8_t *w[4];
        UNROLL for (int v = 0; v < vectors; v++) w[v] = find_weight(t, first + v, 0, bits);
        const int32_t *words = t->x_words;
        Floats total[MAX_SUMS] = {{0}};
        for (int64_t group = 0; group < t->x_groups; group++) {
            Ints sum[MAX_SUMS];
            const int64_t width = smaller(GROUP, t->columns - group * GROUP);
            multiply_packed(w, words, width, bits, vectors, rows, sum);
            words += width * rows / 2;
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
        chatglm_multiply_by_amx(t, first, row, column, end, levels, totals);
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

// Unpacks the levels of a panel of columns.
static void unpack_panel(const Product *t, int64_t first, int64_t column, int64_t end,
                         uint8_t *levels) {
    for (; column < end; column += GROUP) {
        const int64_t width = smaller(GROUP, end - column);
        if (t->linear->bits == 4) unpack_group(t, first, column, width, 4, levels);
        else unpack_group(t, first, column, width, 8, levels);
        levels += width * VECTORS * LANES * WORD_LEVELS;
    }
}

// Multiplies up to PANEL_ROWS rows. The levels of a panel of columns are unpacked once for all of
// them. This function is not inlined, because products of few rows do not need its large stack.
static __attribute__((noinline)) void multiply_many(const Product *t, int64_t begin, int64_t last,
                                                    int64_t first_row) {
    uint8_t levels[PANEL * VECTORS * LANES * WORD_LEVELS] __attribute__((aligned(ALIGNMENT)));
    Floats totals[MAX_UNIT / VECTORS][PANEL_ROWS][VECTORS];
    const int64_t end_row = smaller(first_row + PANEL_ROWS, t->filled_rows);
    for (int64_t pair = 0; pair < t->unit / VECTORS; pair++)
        memset(totals[pair], 0, (end_row - first_row) * sizeof totals[pair][0]);
    for (int64_t column = 0; column < t->columns; column += PANEL) {
        const int64_t end = smaller(column + PANEL, t->columns);
        for (int64_t first = begin; first < last; first += VECTORS) {
            unpack_panel(t, first, column, end, levels);
            for (int64_t row = first_row; row < end_row; row += t->tile_rows)
                multiply_tile(t, first, row, column, end, levels,
                              totals[(first - begin) / VECTORS][row - first_row]);
        }
    }
    for (int64_t row = first_row; row < end_row; row++)
        for (int64_t v = begin; v < last; v++)
            write_total(t, row, v, totals[(v - begin) / VECTORS][row - first_row][v % VECTORS]);
}

static void multiply_all(const Product *t, int64_t begin, int64_t last) {
    for (int64_t row = 0; row < t->num_rows; row += PANEL_ROWS) multiply_many(t, begin, last, row);
}

INLINE void multiply_outputs(const Product *t, int64_t unit, int bits) {
    const int64_t first = unit * t->unit;
    const int64_t last = smaller(first + t->unit, count_vectors(t->linear->out));
#ifdef AMX
    if (t->uses_amx) {
        chatglm_begin_amx(t->tile_rows);
        multiply_all(t, first, last);
        chatglm_end_amx();
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
        default: multiply_all(t, first, last);
    }
}

static void multiply_unit(const void *task, int64_t unit) {
    const Product *t = task;
    if (t->linear->bits == 4) multiply_outputs(t, unit, 4);
    else multiply_outputs(t, unit, 8);
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
    task.uses_amx = chatglm_may_use_amx() && num_rows > 4 && task.columns % AMX_COLUMNS == 0;
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
    chatglm_convert_rows(&task, num_threads);
    run(multiply_unit, &task, divide_up(count_vectors(linear->out), task.unit), num_threads);
    release(task.x_words);
    return 0;
}
