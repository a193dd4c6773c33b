// Products with float16 and bfloat16 weights, which are read as they are stored, [out, in].
//
//   y[r, o] = sum over c of x[r, c] * W[o, c]
//
// The lanes of a vector are columns, and x is copied so that zeros fill up its rows to whole
// vectors. The result of a row depends neither on the other rows nor on their number.
#include "cpu.h"

#define UNIT 32     // outputs that a thread takes at a time
#define PANEL 4096  // numbers of x that stay in the first cache

typedef struct {
    const uint16_t *weight;
    const float *x;
    float *y;
    int64_t num_rows, in, out, columns;
    int is_bfloat16;
} Product;

// Adds the products of LANES columns from c on; the last ones are filled up with zeros.
INLINE void add_columns(const Product *t, const uint16_t *const *w, const float *x,
                        const int is_bfloat16, const int outputs, const int rows, int64_t c,
                        const int is_last, Floats *sum) {
    Floats columns[ROWS];
    UNROLL for (int r = 0; r < rows; r++) columns[r] = load(x + r * t->columns + c);
    UNROLL for (int o = 0; o < outputs; o++) {
        const uint16_t *from = w[o] + c;
        uint16_t last[LANES] = {0};
        if (is_last) from = memcpy(last, from, 2 * (t->in - c));
        const Floats weight = load_stored(from, is_bfloat16);
        UNROLL for (int r = 0; r < rows; r++)
            sum[o * rows + r] = multiply_add(weight, columns[r], sum[o * rows + r]);
    }
}

// Multiplies the columns from `column` to `end`. `sum` has a vector for each output and row.
INLINE void multiply_stored_tile(const Product *t, int64_t output, int64_t row,
                                 int64_t column, int64_t end, const int is_bfloat16,
                                 const int outputs, const int rows, Floats *sum) {
    const float *x = t->x + row * t->columns;
    const uint16_t *w[8];  // the most outputs that `multiply_stored_unit` gives a tile
    Floats part[16];       // and its most sums; these are in registers, unlike `sum`
    UNROLL for (int o = 0; o < outputs; o++) w[o] = t->weight + (output + o) * t->in;
    UNROLL for (int i = 0; i < outputs * rows; i++) part[i] = sum[i];
    int64_t c = column;
    for (; c + LANES <= end; c += LANES)
        add_columns(t, w, x, is_bfloat16, outputs, rows, c, 0, part);
    if (c < end) add_columns(t, w, x, is_bfloat16, outputs, rows, c, 1, part);
    UNROLL for (int i = 0; i < outputs * rows; i++) sum[i] = part[i];
}

// Multiplies in panels of columns, whose x stays in the first cache.
INLINE void multiply_stored_rows(const Product *t, int64_t first, int64_t last, int64_t row,
                                 const int is_bfloat16, const int outputs, const int rows) {
    Floats sum[UNIT * ROWS] = {{0}};
    const int64_t panel = PANEL / rows;
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

INLINE void multiply_stored_unit(const Product *t, int64_t unit, const int is_bfloat16) {
    const int64_t first = unit * UNIT, last = smaller(first + UNIT, t->out);
    for (int64_t row = 0; row < t->num_rows; row += ROWS)
        switch (count_tile_rows(t->num_rows - row)) {
            case 1: multiply_stored_rows(t, first, last, row, is_bfloat16, 8, 1); break;
            case 2: multiply_stored_rows(t, first, last, row, is_bfloat16, 4, 2); break;
            case 4: multiply_stored_rows(t, first, last, row, is_bfloat16, 4 / PARTS, 4); break;
#if ROWS == 8
            case 8: multiply_stored_rows(t, first, last, row, is_bfloat16, 2, 8); break;
#endif
        }
}

static void multiply_stored(const void *task, int64_t unit) {
    const Product *t = task;
    if (t->is_bfloat16) multiply_stored_unit(t, unit, 1);
    else multiply_stored_unit(t, unit, 0);
}

int chatglm_multiply_stored(const uint16_t *weight, const float *x, float *y, int64_t num_rows,
                            int64_t in, int64_t out, int is_bfloat16, int num_threads) {
    const int64_t columns = divide_up(in, LANES) * LANES;
    const int64_t size = 4 * columns * divide_up(num_rows, ROWS) * ROWS;
    float *rows = allocate(size);
    if (!rows) return -1;
    memset(rows, 0, size);
    for (int64_t row = 0; row < num_rows; row++) memcpy(rows + row * columns, x + row * in, 4 * in);
    const Product task = {weight, rows, y, num_rows, in, out, columns, is_bfloat16};
    run(multiply_stored, &task, divide_up(out, UNIT), num_threads);
    release(rows);
    return 0;
}
