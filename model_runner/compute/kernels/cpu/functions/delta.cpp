// The LoRA delta on a CPU: adds scale * (x A^T) B to each adapted row of y, with the pages of the row's lane. One call
// computes all lanes of a step.
//
//   shrink   a task computes h for eight units of a page: their dot products with every token of the lane
//   expand   a task computes some columns for a lane: the tokens' h times these columns of the lane's pages, summed in
//            float32 and added to y with one rounding
//
// Each weight is read once, in place, by one thread; unused units of a page are skipped. h is rounded to the dtype of
// the weights, as PEFT rounds it. Compiled for bfloat16 if BFLOAT16 is defined, else for float32.
//
// Legend: P pages of the pool, S slices, R = 16 units of a page, I in features, O out features, L lanes, q uses of
// pages by lanes, n adapted tokens.

#include <vector>

#include "vectors.h"

namespace {

constexpr long R = 16;
constexpr int UNITS = 8;             // units of a page computed together, for two tokens
constexpr int WIDE = 8, NARROW = 2;  // vectors of columns computed together, for two tokens
constexpr long TASK_COLUMNS = WIDE * WIDTH;
constexpr long PARALLEL_MIN = 1 << 17;  // multiplications from which several threads are used

struct Site {  // a linear with S slices of columns; the last slice ends at O
    long I, O, S;
    const int64_t* stops;
    long start(long slice) const { return slice ? stops[slice - 1] : 0; }
};

struct Lane {
    const int64_t *rows, *pages;  // the rows of the lane's tokens in x and y, the lane's pages
    const float* scales;
    long tokens, uses;
    Scalar* h;  // for each slice, `slice_stride` apart: [uses * R / STEP, tokens, STEP]
    Scalar* units(long slice, long slice_stride, long unit) const { return h + slice * slice_stride + unit * tokens; }
};

struct Pool {
    const Scalar *a, *b;   // [P, S, R, I], [P, R, O]
    const int32_t* units;  // [P, S]
};

// Computes h of eight units of one page for T tokens of a lane. `h` points to the first unit of the lane's token 0.
template <int T> void shrink_tokens(const Lane& lane, long first, const Scalar* x, const Scalar* a, long I, float scale,
                                    Scalar* h) {
    const Scalar* tokens[T];
    for (int t = 0; t < T; t++) tokens[t] = x + lane.rows[first + t] * I;
    Vector acc[T][UNITS] = {};
    for (long i = 0; i < I; i += WIDTH * STEP) {
        Vector token[T];
        for (int t = 0; t < T; t++) token[t] = load_steps(tokens[t] + i, I - i);
        for (int u = 0; u < UNITS; u++) {
            const Vector unit = load_steps(a + u * I + i, I - i);
            for (int t = 0; t < T; t++) acc[t][u] = multiply_add(acc[t][u], token[t], unit);
        }
    }
    Vector ordered[WIDTH] = {};
#pragma GCC unroll 2
    for (int t = 0; t < T; t++)
#pragma GCC unroll 8
        for (int u = 0; u < UNITS; u++) ordered[u / STEP * T * STEP + t * STEP + u % STEP] = acc[t][u];
    const Vector totals = sum_each(ordered);
    Scalar rounded[WIDTH];
    store(rounded, totals * scale);
    for (int step = 0; step < UNITS / STEP; step++)
        std::memcpy(h + (step * lane.tokens + first) * STEP, rounded + step * T * STEP, T * STEP * sizeof(Scalar));
}

// Computes h of eight units of one page for all tokens of a lane.
void shrink(const Lane& lane, const Scalar* x, const Scalar* a, long I, float scale, Scalar* h) {
    long first = 0;
    for (; first + 2 <= lane.tokens; first += 2) shrink_tokens<2>(lane, first, x, a, I, scale, h);
    for (; first < lane.tokens; first++) shrink_tokens<1>(lane, first, x, a, I, scale, h);
}

// Some columns of B for all units that a lane has in a slice, STEP units at a time.
struct Tile {
    std::vector<Vector> columns;  // V vectors for each step of STEP units
    std::vector<long> units;      // the first unit of each step, counted over the lane's pages

    void select_units(const Lane& lane, const Pool& pool, const Site& site, long slice) {
        units.clear();
        for (long use = 0; use < lane.uses; use++)
            for (long r = 0; r < pool.units[lane.pages[use] * site.S + slice]; r += STEP) units.push_back(use * R + r);
        columns.resize(units.size() * WIDE);
    }

    template <int V> void load_columns(const Lane& lane, const Pool& pool, long O, long column) {
        for (size_t k = 0; k < units.size(); k++) {
            const Scalar* b = pool.b + (lane.pages[units[k] / R] * R + units[k] % R) * O + column;
            for (int v = 0; v < V; v++)
                columns[k * V + v] = load_rows(b + v * WIDTH, b + v * WIDTH + (STEP - 1) * O);
        }
    }
};

// Adds V vectors of columns to y for T tokens. `h` points to the lane's first unit in this slice.
template <int V, int T>
void expand_tokens(const Tile& tile, const Lane& lane, const Scalar* h, long first, Scalar* y, long O) {
    Vector acc[T][V] = {};
    for (size_t k = 0; k < tile.units.size(); k++) {
        const Vector* columns = tile.columns.data() + k * V;
        const Scalar* tokens = h + tile.units[k] * lane.tokens + first * STEP;
        for (int t = 0; t < T; t++) {
            const Vector token = broadcast(tokens + t * STEP);
            for (int v = 0; v < V; v++) acc[t][v] = multiply_add(acc[t][v], token, columns[v]);
        }
    }
#pragma GCC unroll 2
    for (int t = 0; t < T; t++) {
        Scalar* to = y + lane.rows[first + t] * O;
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) store(to + v * WIDTH, load(to + v * WIDTH) + acc[t][v]);
    }
}

template <int V> void expand_block(Tile& tile, const Lane& lane, const Scalar* h, const Pool& pool, Scalar* y, long O,
                                   long column) {
    tile.load_columns<V>(lane, pool, O, column);
    long first = 0;
    for (; first + 2 <= lane.tokens; first += 2) expand_tokens<V, 2>(tile, lane, h, first, y + column, O);
    if (first < lane.tokens) expand_tokens<V, 1>(tile, lane, h, first, y + column, O);
}

// Adds the columns after the last full block to y, one by one.
void expand_remainder(const Tile& tile, const Lane& lane, const Scalar* h, const Pool& pool, Scalar* y, long O,
                      long columns) {
    for (long token = 0; token < lane.tokens; token++)
        for (long column = 0; column < columns; column++) {
            float total = 0;
            for (long first : tile.units)
                for (long r = first; r < first + STEP; r++) {
                    const long row = lane.pages[r / R] * R + r % R;
                    const long unit = r / STEP * lane.tokens * STEP + token * STEP + r % STEP;
                    total += widen(h[unit]) * widen(pool.b[row * O + column]);
                }
            Scalar* to = y + lane.rows[token] * O + column;
            Scalar rounded[WIDTH];
            store(rounded, widen(*to) + total - Vector{});
            *to = rounded[0];
        }
}

void expand(Tile& tile, const Lane& lane, const Scalar* h, const Pool& pool, Scalar* y, long O, long begin, long end) {
    long column = begin;
    for (; column + WIDE * WIDTH <= end; column += WIDE * WIDTH)
        expand_block<WIDE>(tile, lane, h, pool, y, O, column);
    for (; column + NARROW * WIDTH <= end; column += NARROW * WIDTH)
        expand_block<NARROW>(tile, lane, h, pool, y, O, column);
    const Pool remainder{pool.a, pool.b + column, pool.units};
    if (column < end) expand_remainder(tile, lane, h, remainder, y + column, O, end - column);
}

// Reads the lanes of a plan and allocates their h, one after another, in `h_buffer`. Returns the stride of its slices.
long read_plan(const int64_t* plan, const float* scales, long S, std::vector<Lane>& lanes,
               std::vector<Scalar>& h_buffer) {
    lanes.assign(plan[0], Lane{});
    const int64_t* counts = plan + 1;
    long n = 0, slice_stride = 0;
    for (Lane& lane : lanes) {
        lane.tokens = *counts++, lane.uses = *counts++;
        n += lane.tokens, slice_stride += lane.tokens * lane.uses * R;
    }
    h_buffer.resize(S * slice_stride);
    const int64_t *rows = counts, *pages = counts + n;
    Scalar* h = h_buffer.data();
    for (Lane& lane : lanes) {
        lane.rows = rows, lane.pages = pages, lane.scales = scales, lane.h = h;
        rows += lane.tokens, pages += lane.uses, scales += lane.uses, h += lane.tokens * lane.uses * R;
    }
    return slice_stride;
}

// All threads call shrink_lane and expand_lane with the same arguments; each does its share of the tasks.
void shrink_lane(const Lane& lane, const Site& site, const Pool& pool, const Scalar* x, long slice_stride) {
    const long blocks = R / UNITS, tasks = lane.uses * site.S * blocks;
#pragma omp for schedule(static, 1) nowait
    for (long task = 0; task < tasks; task++) {
        const long use = task / (site.S * blocks), slice = task / blocks % site.S, unit = task % blocks * UNITS;
        const long page_slice = lane.pages[use] * site.S + slice;
        if (unit < pool.units[page_slice])
            shrink(lane, x, pool.a + (page_slice * R + unit) * site.I, site.I, lane.scales[use],
                   lane.units(slice, slice_stride, use * R + unit));
    }
}

void expand_lane(Tile& tile, const Lane& lane, const Site& site, const Pool& pool, Scalar* y, long slice_stride) {
    for (long slice = 0; slice < site.S; slice++) {
        tile.select_units(lane, pool, site, slice);
        if (tile.units.empty()) continue;
        const long begin = site.start(slice), end = site.stops[slice];
        const long tasks = (end - begin + TASK_COLUMNS - 1) / TASK_COLUMNS;
#pragma omp for schedule(static) nowait
        for (long task = 0; task < tasks; task++) {
            const long from = begin + task * TASK_COLUMNS;
            const long to = from + TASK_COLUMNS < end ? from + TASK_COLUMNS : end;
            expand(tile, lane, lane.units(slice, slice_stride, 0), pool, y, site.O, from, to);
        }
    }
}

}  // namespace

// y [T, O], x [T, I]; a, b, units: the pool; site [I, O, S, the end of each slice]; plan [L, then for each lane its
// numbers of tokens and uses, then the n rows, then the q pages, lane after lane]; scales [q].
extern "C" void run(Scalar* y, const Scalar* x, const Scalar* a, const Scalar* b, const int32_t* units,
                    const int64_t* site_at, const int64_t* plan, const float* scales) {
    const Site site{site_at[0], site_at[1], site_at[2], site_at + 3};
    const Pool pool{a, b, units};
    static thread_local std::vector<Lane> own_lanes;
    static thread_local std::vector<Scalar> h_buffer;
    const std::vector<Lane>& lanes = own_lanes;  // made by the calling thread, read by all threads
    const long slice_stride = read_plan(plan, scales, site.S, own_lanes, h_buffer);
#pragma omp parallel if (slice_stride * (site.S * site.I + site.O) >= PARALLEL_MIN)
    {
        static thread_local Tile own;
        Tile& tile = own;
        for (const Lane& lane : lanes) shrink_lane(lane, site, pool, x, slice_stride);
#pragma omp barrier
        for (const Lane& lane : lanes) expand_lane(tile, lane, site, pool, y, slice_stride);
    }
}
