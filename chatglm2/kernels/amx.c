// Products of many rows with AMX, the matrix registers of Intel's servers.
//
// A register of AMX has up to 16 rows of 64 bytes. One instruction multiplies 64 columns of 16 rows
// of x by 64 columns of 16 outputs, and adds the results to the sums of these rows and outputs.
// The integer sums are exact, so the results are, bit for bit, those of cpu.c without AMX.
#include "product.h"

#ifdef AMX
#include <sys/syscall.h>
#include <unistd.h>

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} Registers;  // 0 to 3: sums [digit][vector]; 4 and 5: digits of x; 6 and 7: levels of a vector

#define ROW_BYTES {64, 64, 64, 64, 64, 64, 64, 64}
static const Registers EIGHT_ROWS = {1, 0, {0}, ROW_BYTES, {8, 8, 8, 8, 8, 8, 16, 16}};
static const Registers SIXTEEN_ROWS = {1, 0, {0}, ROW_BYTES, {16, 16, 16, 16, 16, 16, 16, 16}};

// Computes the sums of a group of columns in registers 0 to 3.
INLINE void multiply_group(const uint8_t *levels, const int32_t *x, int64_t width, int64_t rows) {
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

typedef Ints Sums[2][AMX_ROWS][VECTORS];  // [digit][row][vector]

INLINE void store_sums(Sums sum) {
    const int64_t stride = 4 * VECTORS * LANES;
    _tile_stored(0, sum[0], stride);
    _tile_stored(1, &sum[0][0][1], stride);
    _tile_stored(2, sum[1], stride);
    _tile_stored(3, &sum[1][0][1], stride);
}

// Adds the sums of a group to the totals, as `add_group` of cpu.c does. `next` are the words of x
// that AMX will read next; they are prefetched.
INLINE void add_sums(const Product *t, int64_t first, int64_t row, int64_t group, Sums sum,
                     const int32_t *next, Floats *totals) {
    const int64_t place = group * t->filled_rows + row;
    Floats scale[VECTORS];
    for (int v = 0; v < VECTORS; v++) scale[v] = find_group_scale(t, first + v, group);
    for (int64_t r = 0; r < t->tile_rows; r++, next += GROUP / 2) {
        UNROLL for (int i = 0; i < 2 * GROUP; i += 64) __builtin_prefetch((const char *)next + i);
        UNROLL for (int v = 0; v < VECTORS; v++, totals++) {
            const Ints all = sum[0][r][v] + (sum[1][r][v] << 8);
            *totals = add_sum(t, place + r, scale[v], all, *totals);
        }
    }
}

// While AMX multiplies a group, the stored sums of the previous group are added to the totals.
void chatglm_multiply_by_amx(const Product *t, int64_t first, int64_t row, int64_t column,
                             int64_t end, const uint8_t *levels, Floats *totals) {
    const int32_t *words = find_words(t, row, column);
    Sums sum;
    for (int64_t c = column; c < end; c += GROUP) {
        const int64_t width = smaller(GROUP, end - c);
        multiply_group(levels, words, width, t->tile_rows);
        levels += width * VECTORS * LANES;
        words += width * t->tile_rows / 2;
        if (c > column) add_sums(t, first, row, c / GROUP - 1, sum, words, totals);
        store_sums(sum);
    }
    add_sums(t, first, row, (end - 1) / GROUP, sum, words, totals);
}

int chatglm_may_use_amx(void) {
    static int answer = -1;
    const long request_permission = 0x1023, tile_data = 18;  // docs.kernel.org/arch/x86/xstate.html
    if (answer < 0) answer = !syscall(SYS_arch_prctl, request_permission, tile_data);
    return answer;
}

void chatglm_begin_amx(int64_t tile_rows) {
    _tile_loadconfig(tile_rows == 8 ? &EIGHT_ROWS : &SIXTEEN_ROWS);
}

void chatglm_end_amx(void) { _tile_release(); }
#endif
