// A product with INT8 or INT4 weights, which activations.c, amx.c and cpu.c share.
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
#pragma once

#include "cpu.h"

#define GROUP 128  // columns of x that share a scale
#define PANEL 512  // columns whose unpacked levels are kept in the first cache
#define VECTORS 2  // of outputs in a tile
#if defined(AVX512) || defined(NEON)
#define DIGITS        // a word has one digit of each column
#define WORD_LEVELS 1  // vectors of unpacked levels for the two words
#else
#define WORD_LEVELS 2
#endif

typedef struct {
    const Linear *linear;
    const float *x;
    float *y;
    int64_t num_rows;
    // `chatglm_multiply` sets the rest from these.
    int64_t filled_rows;       // `num_rows`, rounded up to whole tiles
    int64_t columns;           // `in`, rounded up to whole lanes
    int64_t groups, x_groups;  // of columns that share a scale in W, and in x
    int64_t tile_rows;         // of the largest tile
    int64_t unit;              // vectors that a thread takes at a time
    int uses_amx;
    int32_t *x_words;
    float *x_scale;    // [group][row]
    int32_t *x_start;  // [group][row]: -offset * sum of integers
} Product;

// Returns what `unpack` (cpu.c) gives for level 0.
INLINE int find_offset(int bits) {
#ifdef NEON
    if (bits == 8) return 0;  // bytes are signed
#endif
    return bits == 4 ? 8 : 128;
}

// Returns the rows of the tile that begins with a row.
INLINE int64_t count_rows(const Product *t, int64_t row) {
    return t->uses_amx ? t->tile_rows : count_tile_rows(t->num_rows - row);
}

INLINE int64_t count_vectors(int64_t out) { return divide_up(out, BLOCK) * PARTS; }

// Vector v of the outputs is part v % PARTS of block v / PARTS. The last tile may have more vectors
// than are left; the others are computed from the last vector and not written.
INLINE int64_t clamp_vector(const Product *t, int64_t v) {
    return smaller(v, count_vectors(t->linear->out) - 1);
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

// Adds the integer sum of a group of columns to the total of a row and LANES outputs. `place` is
// the index of group and row in x_scale and x_start. All tiles call it, so that they round alike.
INLINE Floats add_sum(const Product *t, int64_t place, Floats scale, Ints sum, Floats total) {
    const Floats s = to_floats(sum + spread_int(t->x_start[place]));
    return multiply_add(s, scale * t->x_scale[place], total);
}

// Returns the words of the tile that begins with a row, from a column on that begins a group.
INLINE int32_t *find_words(const Product *t, int64_t row, int64_t column) {
    const int64_t panel = column / PANEL * PANEL, width = smaller(PANEL, t->columns - panel);
    return t->x_words +
           (panel * t->filled_rows + row * width + (column - panel) * count_rows(t, row)) / 2;
}

// Fills x_words, x_scale and x_start (activations.c).
void chatglm_convert_rows(const Product *product, int num_threads);

#ifdef AMX
#define AMX_ROWS 16     // of a tile; 8 if there are no more rows
#define AMX_COLUMNS 64  // that are multiplied at a time

// Requests AMX's registers from the system, once. Returns whether it allows them. The permission is
// for all threads of the process, also those that run already, and for processes that it forks.
int chatglm_may_use_amx(void);

// Configures the thread's registers for tiles of 8 or 16 rows, and releases them.
void chatglm_begin_amx(int64_t tile_rows);
void chatglm_end_amx(void);

// Multiplies a tile of rows by the columns of a panel for two vectors of outputs, whose unpacked
// levels are given, and adds the results to `totals`, [row][vector].
void chatglm_multiply_by_amx(const Product *product, int64_t first, int64_t row, int64_t column,
                             int64_t end, const uint8_t *levels, Floats *totals);
#endif
