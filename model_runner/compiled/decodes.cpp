// Attention of decodes on a CPU: each row's one token over the slots that the row sees, where they lie in the cache.
//
//   a task is a row and a key/value head, for the G query heads that share it:
//     scores     16 keys at a time, turned, so that a vector is of 16 slots    [G, L]
//     softmax    in float32; the shares are rounded to the cache's dtype
//     values     two slots at a time (pairs), or one, summed in float32        [G, D]
//
// No row's slots are gathered, padded or looked at by another row. Compiled with BFLOAT16 or without, for float32.
//
// Legend: C rows, L slots that a row sees, N query heads, K key/value heads, G = N / K, D head size, a multiple of
// WIDTH * STEP.

#include <algorithm>
#include <vector>

#include "vectors.h"

namespace {

constexpr int QUERIES = 8;       // heads whose scores are computed together
constexpr int HEADS = 4;         // heads that go through the values together
constexpr long AHEAD = 16;       // slots
constexpr long BLOCK = 64;       // slots whose values are read together
constexpr long LEAST = 1 << 19;  // multiplications that a second thread is worth

using Ints = int32_t __attribute__((vector_size(4 * WIDTH)));

// e to the power of x <= 0: 2^n e^r with |r| <= ln 2 / 2, e^r by its series to the sixth power, off by 1e-7 of itself.
inline Wide power(Wide given) {
    const Wide x = given < -87.0f ? -87.0f - Wide{} : given;
    const float magic = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to a whole number
    const Wide shifted = x * 1.44269504f + magic, n = shifted - magic;
    const Wide r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Wide series = r * (1.0f / 720) + 1.0f / 120;
    for (float term : {1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) series = series * r + term;
    return given == given ? (Wide)((Ints)series + ((Ints)shifted << 23)) : given;
}

inline float largest(Wide value) {
    float found = value[0];
    for (long i = 1; i < WIDTH; i++) found = std::max(found, value[i]);
    return found;
}

struct Cache {
    const Scalar *k, *v;  // [M, K, D]
    long K, D;
    const Scalar* key(long slot, long head) const { return k + (slot * K + head) * D; }
    const Scalar* value(long slot, long head) const { return v + (slot * K + head) * D; }
};

struct Row {
    const int64_t* slots;
    long seen;
};

// One thread's room.
struct Desk {
    std::vector<float> scores;   // [G, L rounded up]
    std::vector<Scalar> shares;  // the same, normed
    std::vector<Wide> keys;      // [D / STEP] of 16 slots each
    std::vector<Wide> values;    // of BLOCK slots
    std::vector<Wide> sums;      // [G, D / WIDTH]
};

inline void fetch(const Scalar* from, long values) {
    for (long at = 0; at < values; at += 64 / long(sizeof(Scalar))) __builtin_prefetch(from + at);
}

// 16 slots' keys from `first` on, step by step; those beyond the row's last are the last one's.
void turn(const Cache& cache, const Row& row, long first, long head, Wide* keys) {
    const Scalar* from[WIDTH];
    for (long j = 0; j < WIDTH; j++) from[j] = cache.key(row.slots[std::min(first + j, row.seen - 1)], head);
    for (long j = first; j < std::min(first + WIDTH, row.seen); j++) {  // what is wanted soon is on its way
        fetch(cache.key(row.slots[std::min(j + AHEAD, row.seen - 1)], head), cache.D);
        fetch(cache.value(row.slots[j], head), cache.D);
    }
    for (long d = 0; d < cache.D; d += WIDTH * STEP) {
        Wide rows[WIDTH];
#pragma GCC unroll 16
        for (long j = 0; j < WIDTH; j++) rows[j] = load_steps(from[j] + d);
#pragma GCC unroll 4
        for (int step = 1; step < WIDTH; step *= 2)
#pragma GCC unroll 16
            for (int j = 0; j < WIDTH; j++)
                if (!(j & step)) part(rows[j], rows[j + step], step);
#pragma GCC unroll 16
        for (long j = 0; j < WIDTH; j++) keys[d / STEP + j] = rows[j];
    }
}

// 16 scores of each of H heads.
template <int H> void score(const Wide* keys, long D, const Scalar* q, float scale, float* scores, long room) {
    Wide acc[H] = {};
    for (long d = 0; d < D; d += STEP)
        for (int g = 0; g < H; g++) acc[g] = add_products(acc[g], keys[d / STEP], spread(q + g * D + d));
#pragma GCC unroll 8
    for (int g = 0; g < H; g++) store(scores + g * room, acc[g] * scale);
}

constexpr decltype(&score<1>) SCORE[] = {score<1>, score<2>, score<3>, score<4>,
                                         score<5>, score<6>, score<7>, score<8>};

// Scores to shares of one query head: `room` of both, of which `seen` are real. What is behind them becomes nothing.
void soften(float* scores, Scalar* shares, long seen, long room) {
    for (long at = seen; at < room; at++) scores[at] = -3e38f;
    Wide high = load(scores), total = {};
    for (long at = WIDTH; at < room; at += WIDTH) {
        const Wide some = load(scores + at);
        high = some > high ? some : high;
    }
    const float top = largest(high);
    for (long at = 0; at < room; at += WIDTH) {
        const Wide some = power(load(scores + at) - top);
        store(scores + at, some);
        total += some;
    }
    float whole = 0;
    for (long i = 0; i < WIDTH; i++) whole += total[i];
    for (long at = 0; at < room; at += WIDTH) store(shares + at, load(scores + at) * (1 / whole));
}

// Adds up to BLOCK slots' values, times their shares, to H heads' sums; V vectors of a head at a time.
template <int H, int V>
void add_values(const Wide* values, long width, long steps, const Scalar* shares, long room, Wide* sums) {
    for (long d = 0; d < width; d += V) {
        Wide acc[H][V];
        for (int g = 0; g < H; g++)
            for (int i = 0; i < V; i++) acc[g][i] = sums[g * width + d + i];
        for (long step = 0; step < steps; step++)
            for (int g = 0; g < H; g++) {
                const Wide share = spread(shares + g * room + step * STEP);
                for (int i = 0; i < V; i++) acc[g][i] = add_products(acc[g][i], share, values[step * width + d + i]);
            }
#pragma GCC unroll 4
        for (int g = 0; g < H; g++)
#pragma GCC unroll 4
            for (int i = 0; i < V; i++) sums[g * width + d + i] = acc[g][i];
    }
}

template <int V> constexpr decltype(&add_values<1, V>) ADD[] = {add_values<1, V>, add_values<2, V>, add_values<3, V>,
                                                                add_values<4, V>};

void weigh(Desk& desk, const Cache& cache, const Row& row, long head, long G, long room, Scalar* out) {
    const long width = cache.D / WIDTH;
    desk.values.resize(BLOCK / STEP * width);
    desk.sums.assign(G * width, Wide{});
    for (long first = 0; first < row.seen; first += BLOCK) {
        const long steps = (std::min(BLOCK, row.seen - first) + STEP - 1) / STEP;
        for (long step = 0; step < steps; step++) {
            const long one = first + step * STEP, below = std::min(one + STEP - 1, row.seen - 1);
            const Scalar *upper = cache.value(row.slots[one], head), *lower = cache.value(row.slots[below], head);
            for (long d = 0; d < width; d++)
                desk.values[step * width + d] = load_column(upper + d * WIDTH, lower + d * WIDTH);
        }
        const Scalar* shares = desk.shares.data() + first;
        for (long g = 0; g < G; g += HEADS) {
            const long more = std::min<long>(HEADS, G - g) - 1;
            (width % 4 ? ADD<1> : ADD<4>)[more](desk.values.data(), width, steps, shares + g * room, room,
                                                desk.sums.data() + g * width);
        }
    }
    for (long i = 0; i < G * width; i++) store(out + i * WIDTH, desk.sums[i]);
}

}  // namespace

// q, out [T, N, D], k, v [M, K, D], sizes [N, K, D], scale [1], plan [C, the rows' tokens, where each row's slots end,
// then the slots, row after row].
extern "C" void run(const Scalar* q, const Scalar* k, const Scalar* v, Scalar* out, const int64_t* sizes,
                    const float* scale, const int64_t* plan) {
    const long N = sizes[0], K = sizes[1], D = sizes[2], C = plan[0], G = N / K;
    const Cache cache{k, v, K, D};
    const int64_t *tokens = plan + 1, *stops = tokens + C, *slots = stops + C;
#pragma omp parallel if (C && stops[C - 1] * N * D >= LEAST)
    {
        static thread_local Desk own;
        Desk& desk = own;
#pragma omp for schedule(static, 1)
        for (long task = 0; task < C * K; task++) {
            const long at = task / K, head = task % K, begin = at ? stops[at - 1] : 0;
            const Row row{slots + begin, stops[at] - begin};
            const long room = (row.seen + WIDTH - 1) / WIDTH * WIDTH, from = (tokens[at] * N + head * G) * D;
            desk.scores.resize(G * room), desk.shares.resize(G * room), desk.keys.resize(D / STEP);
            for (long first = 0; first < row.seen; first += WIDTH) {
                turn(cache, row, first, head, desk.keys.data());
                for (long g = 0; g < G; g += QUERIES)
                    SCORE[std::min<long>(QUERIES, G - g) - 1](desk.keys.data(), D, q + from + g * D, *scale,
                                                              desk.scores.data() + g * room + first, room);
            }
            for (long g = 0; g < G; g++)
                soften(desk.scores.data() + g * room, desk.shares.data() + g * room, row.seen, room);
            weigh(desk, cache, row, head, G, room, out + from);
        }
    }
}
