// LoRA on a CPU: adds scale * (x A^T) B of its own pages to each adapted row of y, for all lanes of a step at once.
//
//   shrink   a task is eight units of a page: their dot products with every token of the lane, which are its h
//   expand   a task is some columns of a lane: its tokens' h times these columns of its pages, summed in float32 and
//            added to y with one rounding
//
// A weight comes from memory once, where it lies, to one thread; units that a page does not have are skipped. h is
// rounded to the dtype of the weights, as PEFT rounds it. Compiled with BFLOAT16, or without it for float32.
//
// Legend: P pages of the pool, S slices, R = 16 units of a page, I in features, O out features, L lanes, q uses of
// pages by lanes, n adapted tokens.

#include <vector>

#include "vectors.h"

namespace {

constexpr long R = 16;
constexpr int UNITS = 8;               // of a page, computed together, for two tokens
constexpr int BROAD = 8, NARROW = 2;   // vectors of columns computed together, for two tokens
constexpr long CHUNK = BROAD * WIDTH;  // columns of a task
constexpr long LEAST = 1 << 17;        // multiplications that a second thread is worth

struct Site {  // a linear: S slices of columns, the last ending at O
    long I, O, S;
    const int64_t* stops;
    long start(long slice) const { return slice ? stops[slice - 1] : 0; }
};

struct Lane {
    const int64_t *rows, *pages;  // its tokens' rows of x and y, its pages
    const float* scales;
    long tokens, uses;
    Scalar* h;  // S of these, `apart` each: [uses * R / STEP, tokens, STEP]
    Scalar* units(long slice, long apart, long unit) const { return h + slice * apart + unit * tokens; }
};

struct Pool {
    const Scalar *a, *b;   // [P, S, R, I], [P, R, O]
    const int32_t* units;  // [P, S]
};

// Eight units of one page for T tokens of a lane; h is where the first unit of the lane's first token goes.
template <int T> void shrink_tokens(const Lane& lane, long first, const Scalar* x, const Scalar* a, long I, float scale,
                                    Scalar* h) {
    const Scalar* tokens[T];
    for (int t = 0; t < T; t++) tokens[t] = x + lane.rows[first + t] * I;
    Wide acc[T][UNITS] = {};
    for (long i = 0; i < I; i += WIDTH * STEP) {
        Wide token[T];
        for (int t = 0; t < T; t++) token[t] = load_steps(tokens[t] + i, I - i);
        for (int u = 0; u < UNITS; u++) {
            const Wide unit = load_steps(a + u * I + i, I - i);
            for (int t = 0; t < T; t++) acc[t][u] = add_products(acc[t][u], token[t], unit);
        }
    }
    Wide ordered[WIDTH] = {};
#pragma GCC unroll 2
    for (int t = 0; t < T; t++)
#pragma GCC unroll 8
        for (int u = 0; u < UNITS; u++) ordered[u / STEP * T * STEP + t * STEP + u % STEP] = acc[t][u];
    const Wide totals = sums(ordered);
    Scalar all[WIDTH];
    store(all, totals * scale);
    for (int step = 0; step < UNITS / STEP; step++)
        std::memcpy(h + (step * lane.tokens + first) * STEP, all + step * T * STEP, T * STEP * sizeof(Scalar));
}

// The same for all tokens of the lane.
void shrink(const Lane& lane, const Scalar* x, const Scalar* a, long I, float scale, Scalar* h) {
    long first = 0;
    for (; first + 2 <= lane.tokens; first += 2) shrink_tokens<2>(lane, first, x, a, I, scale, h);
    for (; first < lane.tokens; first++) shrink_tokens<1>(lane, first, x, a, I, scale, h);
}

// Columns of some units, in the order in which they are multiplied: two units at a time where pairs are, else one.
struct Tile {
    std::vector<Wide> columns;  // of V vectors for each of these
    std::vector<long> where;    // the first of these units among the lane's

    void pick(const Lane& lane, const Pool& pool, const Site& site, long slice) {
        where.clear();
        for (long use = 0; use < lane.uses; use++)
            for (long r = 0; r < pool.units[lane.pages[use] * site.S + slice]; r += STEP) where.push_back(use * R + r);
        columns.resize(where.size() * BROAD);
    }

    template <int V> void fill(const Lane& lane, const Pool& pool, long O, long column) {
        for (size_t k = 0; k < where.size(); k++) {
            const Scalar* b = pool.b + (lane.pages[where[k] / R] * R + where[k] % R) * O + column;
            for (int v = 0; v < V; v++)
                columns[k * V + v] = load_column(b + v * WIDTH, b + v * WIDTH + (STEP - 1) * O);
        }
    }
};

// V vectors of columns of T tokens; h is where the lane's units of this slice begin.
template <int V, int T>
void expand_tokens(const Tile& tile, const Lane& lane, const Scalar* h, long first, Scalar* y, long O) {
    Wide acc[T][V] = {};
    for (size_t k = 0; k < tile.where.size(); k++) {
        const Wide* columns = tile.columns.data() + k * V;
        const Scalar* tokens = h + tile.where[k] * lane.tokens + first * STEP;
        for (int t = 0; t < T; t++) {
            const Wide token = spread(tokens + t * STEP);
            for (int v = 0; v < V; v++) acc[t][v] = add_products(acc[t][v], token, columns[v]);
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
    tile.fill<V>(lane, pool, O, column);
    long first = 0;
    for (; first + 2 <= lane.tokens; first += 2) expand_tokens<V, 2>(tile, lane, h, first, y + column, O);
    if (first < lane.tokens) expand_tokens<V, 1>(tile, lane, h, first, y + column, O);
}

// The columns behind the last whole block.
void expand_rest(const Tile& tile, const Lane& lane, const Scalar* h, const Pool& pool, Scalar* y, long O,
                 long columns) {
    for (long token = 0; token < lane.tokens; token++)
        for (long column = 0; column < columns; column++) {
            float total = 0;
            for (long at : tile.where)
                for (long r = at; r < at + STEP; r++) {
                    const long row = lane.pages[r / R] * R + r % R;
                    const long unit = r / STEP * lane.tokens * STEP + token * STEP + r % STEP;
                    total += widen(h[unit]) * widen(pool.b[row * O + column]);
                }
            Scalar* to = y + lane.rows[token] * O + column;
            Scalar all[WIDTH];
            store(all, widen(*to) + total - Wide{});
            *to = all[0];
        }
}

void expand(Tile& tile, const Lane& lane, const Scalar* h, const Pool& pool, Scalar* y, long O, long begin, long end) {
    long column = begin;
    for (; column + BROAD * WIDTH <= end; column += BROAD * WIDTH)
        expand_block<BROAD>(tile, lane, h, pool, y, O, column);
    for (; column + NARROW * WIDTH <= end; column += NARROW * WIDTH)
        expand_block<NARROW>(tile, lane, h, pool, y, O, column);
    const Pool rest{pool.a, pool.b + column, pool.units};
    if (column < end) expand_rest(tile, lane, h, rest, y + column, O, end - column);
}

// The lanes of a plan, their h side by side in `room`. Gives the size of one slice of it.
long read_plan(const int64_t* plan, const float* scales, long S, std::vector<Lane>& lanes,
               std::vector<Scalar>& room) {
    lanes.assign(plan[0], Lane{});
    const int64_t* counts = plan + 1;
    long n = 0, apart = 0;
    for (Lane& lane : lanes) {
        lane.tokens = *counts++, lane.uses = *counts++;
        n += lane.tokens, apart += lane.tokens * lane.uses * R;
    }
    room.resize(S * apart);
    const int64_t *rows = counts, *pages = counts + n;
    Scalar* h = room.data();
    for (Lane& lane : lanes) {
        lane.rows = rows, lane.pages = pages, lane.scales = scales, lane.h = h;
        rows += lane.tokens, pages += lane.uses, scales += lane.uses, h += lane.tokens * lane.uses * R;
    }
    return apart;
}

// What one of the threads does of both halves for a lane: all threads call it with the same.
void shrink_lane(const Lane& lane, const Site& site, const Pool& pool, const Scalar* x, long apart) {
    const long blocks = R / UNITS, tasks = lane.uses * site.S * blocks;
#pragma omp for schedule(static, 1) nowait
    for (long task = 0; task < tasks; task++) {
        const long use = task / (site.S * blocks), slice = task / blocks % site.S, unit = task % blocks * UNITS;
        const long held = lane.pages[use] * site.S + slice;
        if (unit < pool.units[held])
            shrink(lane, x, pool.a + (held * R + unit) * site.I, site.I, lane.scales[use],
                   lane.units(slice, apart, use * R + unit));
    }
}

void expand_lane(Tile& tile, const Lane& lane, const Site& site, const Pool& pool, Scalar* y, long apart) {
    for (long slice = 0; slice < site.S; slice++) {
        tile.pick(lane, pool, site, slice);
        if (tile.where.empty()) continue;
        const long begin = site.start(slice), end = site.stops[slice], tasks = (end - begin + CHUNK - 1) / CHUNK;
#pragma omp for schedule(static) nowait
        for (long task = 0; task < tasks; task++) {
            const long from = begin + task * CHUNK, to = from + CHUNK < end ? from + CHUNK : end;
            expand(tile, lane, lane.units(slice, apart, 0), pool, y, site.O, from, to);
        }
    }
}

}  // namespace

// y [T, O], x [T, I]; a, b, units: the pool; site [I, O, S, where each slice ends]; plan [L, then for each lane its
// tokens and uses, then the n rows, then the q pages, lane after lane]; scales [q].
extern "C" void run(Scalar* y, const Scalar* x, const Scalar* a, const Scalar* b, const int32_t* units,
                    const int64_t* site_at, const int64_t* plan, const float* scales) {
    const Site site{site_at[0], site_at[1], site_at[2], site_at + 3};
    const Pool pool{a, b, units};
    static thread_local std::vector<Lane> own_lanes;
    static thread_local std::vector<Scalar> room;
    const std::vector<Lane>& lanes = own_lanes;  // the calling thread's, for all
    const long apart = read_plan(plan, scales, site.S, own_lanes, room);
#pragma omp parallel if (apart * (site.S * site.I + site.O) >= LEAST)
    {
        static thread_local Tile own;
        Tile& tile = own;
        for (const Lane& lane : lanes) shrink_lane(lane, site, pool, x, apart);
#pragma omp barrier
        for (const Lane& lane : lanes) expand_lane(tile, lane, site, pool, y, apart);
    }
}
