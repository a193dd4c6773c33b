// Conversion of activations to the words of product.h.
#include "product.h"

#define LARGEST 32639  // 127 * 256 + 127: both digits are signed bytes
#define TINY 1e-30f    // a group of smaller numbers becomes zeros

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
    for (int i = 0; i < smaller(LANES, count) / 4; i++, to += step)
        to[0] = words[0][i], to[size] = words[1][i];
}

// Converts a group of a row of x to words, and returns the sum of its integers.
static int32_t convert_group(const float *x, float scale, int64_t width, int64_t step,
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

// Converts a group of the rows of a tile.
static void convert_tile(const void *task, int64_t unit) {
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
            convert_group(x, t->x_scale[place], width, t->uses_amx ? 1 : rows, rows * width / 4,
                          words + (t->uses_amx ? r * width / 4 : r));
    }
}

void chatglm_convert_rows(const Product *t, int num_threads) {
    run(convert_tile, t, divide_up(t->num_rows, t->tile_rows) * t->x_groups, num_threads);
}
